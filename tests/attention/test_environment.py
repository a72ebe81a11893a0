"""What the environment sets when the package is imported, and what it says of the rest."""

import importlib.util
import re
import threading
from pathlib import Path
from types import ModuleType

import pytest

from flash_attn_npu._core.ground import settings, variables
from flash_attn_npu.errors import ArgumentError

VARIABLE = re.compile(r"FLASH_ATTN_NPU_[A-Z_]*")


def imported_anew(monkeypatch, variable: str, value: str | None) -> ModuleType:
    """A second copy of the settings, which has read this environment."""
    if value is None:
        monkeypatch.delenv(variable, raising=False)
    else:
        monkeypatch.setenv(variable, value)
    spec = importlib.util.spec_from_file_location(
        "flash_attn_npu._core.ground.settings_anew", settings.__file__
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("value", "policy"),
    [(None, "warn"), ("warn", "warn"), ("allow", "allow"), ("error", "error")],
)
def test_the_environment_sets_the_default(monkeypatch, value, policy):
    module = imported_anew(monkeypatch, "FLASH_ATTN_NPU_FALLBACK", value)
    assert module.fallback_policy() == policy
    with module.fallback("allow"):
        assert module.fallback_policy() == "allow"
    assert module.fallback_policy() == policy
    seen = []
    thread = threading.Thread(target=lambda: seen.append(module.fallback_policy()))
    thread.start()
    thread.join()
    assert seen == [policy]


@pytest.mark.parametrize(("value", "allowed"), [(None, False), ("0", False), ("1", True)])
def test_the_environment_sets_the_alibi_offset(monkeypatch, value, allowed):
    module = imported_anew(monkeypatch, "FLASH_ATTN_NPU_ALIBI_OFFSET", value)
    assert module.alibi_offset() is allowed


@pytest.mark.parametrize(
    ("variable", "legal"),
    [
        ("FLASH_ATTN_NPU_FALLBACK", "warn, allow, error, ascend"),
        ("FLASH_ATTN_NPU_ALIBI_OFFSET", "0, 1"),
        ("FLASH_ATTN_NPU_CONSISTENT", "0, 1"),
        ("FLASH_ATTN_NPU_VERIFY", "compose, refuse, warn, always, off"),
    ],
)
@pytest.mark.parametrize("value", ["ignore", "", "2"])
def test_an_illegal_value_in_the_environment_is_an_error(monkeypatch, variable, legal, value):
    message = f"{variable}: got {value!r}; allowed: {legal};"
    with pytest.raises(ArgumentError, match=f"^{re.escape(message)}"):
        imported_anew(monkeypatch, variable, value)


def test_the_error_about_another_ascend_names_the_variable(monkeypatch):
    with pytest.raises(ArgumentError, match="FLASH_ATTN_NPU_FALLBACK: got 'ascend:Asc") as refused:
        imported_anew(monkeypatch, "FLASH_ATTN_NPU_FALLBACK", "ascend:Ascend910B3:9")
    assert refused.value.argument == "FLASH_ATTN_NPU_FALLBACK"


def test_a_variable_that_nothing_reads_is_warned_of_once(monkeypatch, caplog):
    for name in (*variables.KNOWN, *variables.OF_TESTS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FLASH_ATTN_NPU_FALLBACKS", "error")
    imported_anew(monkeypatch, "FLASH_ATTN_NPU_CONSITENT", "1")
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "FLASH_ATTN_NPU_FALLBACKS (meant: FLASH_ATTN_NPU_FALLBACK?)" in record.getMessage()
    assert "FLASH_ATTN_NPU_CONSITENT (meant: FLASH_ATTN_NPU_CONSISTENT?)" in record.getMessage()
    caplog.clear()
    monkeypatch.setenv("FLASH_ATTN_NPU_QQ", "1\n")
    monkeypatch.delenv("FLASH_ATTN_NPU_FALLBACKS")
    imported_anew(monkeypatch, "FLASH_ATTN_NPU_CONSITENT", None)
    assert f"FLASH_ATTN_NPU_QQ (meant: one of {variables.KNOWN[0]}, " in caplog.text


def test_a_variable_that_something_reads_is_not_warned_of(monkeypatch, caplog):
    """Of those that are in the sources, be it of the tests, and in the documents."""
    root = Path(settings.__file__).parents[3]
    read = [*root.glob("flash_attn_npu/**/*.py"), *root.glob("benchmarks/**/*.py")]
    read += [root / "tests" / "conftest.py", *root.glob("tests/helpers/*.py"), root / "tox.ini"]
    named = {name for file in read for name in VARIABLE.findall(file.read_text("utf-8"))}
    assert named - {variables.PREFIX} == {*variables.KNOWN, *variables.OF_TESTS}
    page = (root / "docs" / "settings.md").read_text("utf-8") + settings.__doc__
    assert set(VARIABLE.findall(page)) == set(variables.KNOWN)
    for name in named - {variables.PREFIX}:
        monkeypatch.setenv(name, "1")
    assert variables.unread() == {}
