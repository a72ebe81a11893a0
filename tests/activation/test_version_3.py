"""install(fa3=True): FlashAttention 3's names, for those who ask, and for nobody else."""

from __future__ import annotations

import importlib
import importlib.metadata as metadata
import importlib.util
import os
import sys
from types import ModuleType

import pytest

import flash_attn_npu
from flash_attn_npu._activation import version_3
from flash_attn_npu._flash_attn_3 import flash_attn_interface as ours
from flash_attn_npu.errors import ActivationError

NAMES = ("flash_attn_3", "flash_attn_interface", "flash_attn_3.flash_attn_interface")


def found() -> list[bool]:
    return [importlib.util.find_spec(name) is not None for name in NAMES[:2]]


def test_nobody_finds_it_who_did_not_ask() -> None:
    with flash_attn_npu.install():
        assert found() == [False, False]
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("flash_attn._flash_attn_3")
        with pytest.raises(metadata.PackageNotFoundError):
            metadata.version("flash_attn_3")


def test_names_and_distribution_while_somebody_asks() -> None:
    before = list(sys.meta_path)
    with flash_attn_npu.install() as outer:
        plain = list(sys.meta_path)
        with flash_attn_npu.install(fa3=True), flash_attn_npu.install(fa3=True):
            assert found() == [True, True]
            whole, top, inner = (importlib.import_module(name) for name in NAMES)
            assert inner is ours
            assert whole.flash_attn_interface is ours
            for name in ours.__all__:
                assert getattr(top, name) is getattr(ours, name)
            public = {name for name in dir(top) if not name.startswith("__")}
            assert public == set(ours.__all__) == set(version_3.NAMES)
            assert metadata.version("flash-attn-3") == "3.0.0"
            providers = metadata.packages_distributions()
            assert (
                providers["flash_attn_interface"] == providers["flash_attn_3"] == ["flash_attn_3"]
            )
            assert importlib.util.find_spec("flash_attn_3.flash_attn_config") is None
        assert found() == [False, False]
        assert not set(NAMES) & set(sys.modules)
        assert sys.meta_path == plain
        outer.uninstall()
    assert sys.meta_path == before


def test_children_hear_of_it_where_both_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLASH_ATTN_NPU_INSTALL", raising=False)
    with flash_attn_npu.install(children=True):
        assert os.environ["FLASH_ATTN_NPU_INSTALL"] == "1"
        with flash_attn_npu.install(fa3=True):
            assert os.environ["FLASH_ATTN_NPU_INSTALL"] == "1"
        with flash_attn_npu.install(fa3=True, children=True):
            assert os.environ["FLASH_ATTN_NPU_INSTALL"] == "1,fa3"
        assert os.environ["FLASH_ATTN_NPU_INSTALL"] == "1"


@pytest.mark.parametrize("module", [None, ModuleType("flash_attn_interface")])
def test_somebody_elses_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType | None
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    with pytest.raises(ActivationError, match="flash_attn_interface"):
        flash_attn_npu.install(fa3=True, force=True)
    assert not flash_attn_npu.installed()
    with flash_attn_npu.install():
        assert sys.modules["flash_attn_interface"] is module
    assert sys.modules["flash_attn_interface"] is module
