"""pytest and IPython load the package into themselves, and let it go."""

from __future__ import annotations

import os
from types import ModuleType

import pytest

import flash_attn_npu
from flash_attn_npu._activation import hosts

pytest_plugins = ["pytester"]

TESTS = """
import os, subprocess, sys
import flash_attn

def test_it():
    assert flash_attn.flash_attn_func.__module__ == "flash_attn_npu.flash_attn_interface"
    assert os.environ["FLASH_ATTN_NPU_INSTALL"] == "1"
"""


@pytest.fixture(autouse=True)
def nothing_is_left() -> None:
    yield
    assert not flash_attn_npu.installed()
    assert "FLASH_ATTN_NPU_INSTALL" not in os.environ


def few(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", *arguments)


def test_pytest_loads_it_before_any_conftest(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("import flash_attn")
    pytester.makepyfile(TESTS)
    few(pytester, "-p", "flash_attn_npu").assert_outcomes(passed=1)
    assert not flash_attn_npu.installed()


def test_pytest_can_be_told_not_to(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(TESTS)
    without = few(pytester, "-p", "flash_attn_npu", "-p", "no:flash_attn_npu")
    without.assert_outcomes(errors=1)


def test_a_conftest_may_name_it(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("pytest_plugins = ['flash_attn_npu']")
    pytester.makepyfile(TESTS)
    few(pytester).assert_outcomes(passed=1)


def test_pytest_says_what_is_in_the_way(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "flash_attn", None)
    done = pytester.runpytest_inprocess("-p", "flash_attn_npu")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["ERROR: sys.modules*got None*"])


def test_ipython_loads_and_unloads_it() -> None:
    # as IPython's extension manager asks
    assert hasattr(flash_attn_npu, "load_ipython_extension")
    outer = flash_attn_npu.install()
    flash_attn_npu.load_ipython_extension(None)
    flash_attn_npu.load_ipython_extension(None)
    assert os.environ["FLASH_ATTN_NPU_INSTALL"] == "1"
    flash_attn_npu.unload_ipython_extension(None)
    assert "FLASH_ATTN_NPU_INSTALL" not in os.environ
    assert flash_attn_npu.installed()
    outer.uninstall()
    flash_attn_npu.unload_ipython_extension(None)


def test_public_names_are_what_dir_shows() -> None:
    assert dir(flash_attn_npu) == sorted(flash_attn_npu.__all__)
    for name in dir(flash_attn_npu):
        assert isinstance(getattr(flash_attn_npu, name), (type, str, ModuleType)) or callable(
            getattr(flash_attn_npu, name)
        )
    with pytest.raises(AttributeError, match="module 'flash_attn_npu' has no attribute 'nothing'"):
        _ = flash_attn_npu.nothing
    with pytest.raises(AttributeError):
        hosts.attribute("nothing")
    with flash_attn_npu.install():
        import flash_attn

        assert not hasattr(flash_attn, "load_ipython_extension")
        assert not hasattr(flash_attn, "pytest_plugins")
