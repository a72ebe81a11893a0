"""The doctor says the useful thing on machines that lack something, and on those that are whole."""

from __future__ import annotations

import importlib
import json
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flash_attn_npu._commands import doctor
from flash_attn_npu._core.table.installed import NEEDS
from flash_attn_npu._diagnosis import clashes, installed, probe, settings
from flash_attn_npu._diagnosis.page import Page
from flash_attn_npu._diagnosis.probe import Probed
from tests.helpers.old_torch import TORCH

HEALTHY = {
    "torch": {"version": "2.13.0"},
    "torch_npu": {"version": "2.13.0"},
    "card": {"count": 8, "soc": "Ascend910B3", "cann": "8.5.0", "torch_npu": "2.13.0"},
    "operators": [],
    "attention": {"device": "npu", "kernel": "npu_fusion_attention", "reasons": [], "finite": True},
}


def distribution(folder: Path, name: str, version: str, **fields: str) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = [f"Name: {name}", f"Version: {version}", *(f"{k}: {v}" for k, v in fields.items())]
    (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *lines, ""]))


def of_one_version(folder: Path) -> None:
    """A torch and a torch_npu that belong together, whatever is installed."""
    distribution(folder, "torch", "2.13.0")
    distribution(folder, "torch_npu", "2.13.0")


def package(folder: Path, name: str, text: str = "") -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "__init__.py").write_text(text)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty machine: no CANN, no driver; what is put into the folder is found first."""
    monkeypatch.setattr(installed, "ROOT", tmp_path / "Ascend")
    monkeypatch.setattr(installed, "DEVICES", tmp_path / "dev")
    for variable in (*installed.HOMES, *settings.OF_OTHERS):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def cann(machine: Path, version: str, *, sourced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    home = machine / "Ascend" / "ascend-toolkit"
    (home / "x86_64-linux").mkdir(parents=True)
    (home / "set_env.sh").touch()
    (home / "x86_64-linux" / "ascend_toolkit_install.info").write_text(f"version={version}\n")
    if sourced:
        monkeypatch.setenv("ASCEND_HOME_PATH", str(home))


def found(facts: dict[str, Any] | None = None, *failed: str) -> list[clashes.Clash]:
    return clashes.clashes(Probed(HEALTHY if facts is None else facts, *failed))


def whats(found: list[clashes.Clash]) -> str:
    return "\n".join(f"{clash.what} => {clash.mend}" for clash in found)


def test_a_whole_machine_has_no_clash(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cann(machine, "8.5.0", sourced=True, monkeypatch=monkeypatch)
    assert found() == []
    assert installed.cann() == installed.Cann("8.5.0", True, "")


def test_cann_that_is_not_sourced(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cann(machine, "8.5.0", sourced=False, monkeypatch=monkeypatch)
    of_one_version(machine)
    (clash,) = found()
    assert clash.fatal
    assert "CANN 8.5.0 is installed, but not sourced" in clash.what
    assert clash.mend == f"source {machine}/Ascend/ascend-toolkit/set_env.sh"


def test_no_cann(machine: Path) -> None:
    of_one_version(machine)
    (clash,) = found()
    assert (clash.fatal, clash.what) == (True, "torch_npu is installed, but no CANN is found")


def test_a_torch_npu_of_another_torch(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cann(machine, "8.5.0", sourced=True, monkeypatch=monkeypatch)
    distribution(machine, "torch", "2.8.0+cpu")
    distribution(machine, "torch_npu", "2.7.1.post2")
    (clash,) = found()
    assert clash.fatal
    assert clash.what == "torch_npu 2.7.1.post2 does not belong to torch 2.8.0+cpu"
    assert clash.mend == "pip install torch==2.7.1, or torch_npu==2.8.0"


def test_a_torch_npu_that_is_not_supported(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cann(machine, "8.0.0", sourced=True, monkeypatch=monkeypatch)
    distribution(machine, "torch", "2.5.1")
    distribution(machine, "torch_npu", "2.5.1.post1")
    (clash,) = found()
    assert clash.fatal
    assert clash.what.startswith("torch_npu 2.5.1.post1 is older than 2.6.0")


def test_a_driver_and_no_torch_npu(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "dev").mkdir()
    for name in ("davinci0", "davinci1", "davinci_manager"):
        (machine / "dev" / name).touch()
    assert installed.cards() == 2
    versions = {"torch": "2.13.0"}
    monkeypatch.setattr(installed, "version", versions.get)
    (clash,) = found({"torch": {}})
    assert clash.mend == "pip install torch_npu==2.13.0"


def test_no_card(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cann(machine, "8.5.0", sourced=True, monkeypatch=monkeypatch)
    (clash,) = found({**HEALTHY, "card": {"count": 0}})
    assert clash.fatal
    assert clash.what == "torch_npu sees no card"
    assert "npu-smi" in clash.mend


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("build", "what", "mend"),
    [
        (
            lambda at: (package(at, "flash_attn"), distribution(at, "flash_attn", "2.7.4")),
            "a flash_attn 2.7.4 lies at",
            "pip uninstall flash-attn",
        ),
        (lambda at: package(at, "flash_attn"), "without metadata", "remove the folder"),
        (
            lambda at: distribution(at, "flash_attn_npu", "0.4.2"),
            "flash-attn-npu 0.4.2 (MinghuasLab's)",
            "pip uninstall flash-attn-npu, then",
        ),
        (lambda at: package(at, "flash_attn_npu"), "is on the path 2 times", "uninstall one"),
        (lambda at: package(at, "mindspeed"), "MindSpeed puts dummies", "after `import mindspeed"),
    ],
)
def test_packages_in_each_others_way(
    machine: Path, monkeypatch: pytest.MonkeyPatch, build: Any, what: str, mend: str
) -> None:
    cann(machine, "8.5.0", sourced=True, monkeypatch=monkeypatch)
    build(machine)
    (clash,) = found()
    assert not clash.fatal
    assert what in clash.what
    assert mend in clash.mend


def test_an_activated_environment_is_no_clash(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cann(machine, "8.5.0", sourced=True, monkeypatch=monkeypatch)
    package(machine, "flash_attn")
    distribution(machine, "flash_attn", "2.8.3", Summary="served by flash-attn-npu-shim")
    assert found() == []


@pytest.mark.parametrize(
    ("module", "what"),
    [
        (None, "sys.modules['flash_attn'] is None"),
        (ModuleType("flash_attn"), "a placeholder is loaded as flash_attn"),
    ],
)
def test_who_holds_the_name_in_this_process(
    machine: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType | None, what: str
) -> None:
    cann(machine, "8.5.0", sourced=True, monkeypatch=monkeypatch)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    assert what in whats(found())


DYING = {
    "raises": ("raise ImportError('libhccl.so: cannot open')", "ImportError: libhccl.so: cannot"),
    "dies": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
    "exits": ("import os; os._exit(3)", "ended with status 3"),
}


@pytest.mark.parametrize("way", DYING)
def test_a_torch_npu_that_does_not_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    text, told = DYING[way]
    package(tmp_path, "torch_npu", text)
    # a torch that costs nothing: what matters is that it came before
    package(tmp_path, "torch", "__version__ = '2.13.0'")
    monkeypatch.syspath_prepend(tmp_path)
    probed = probe.probe()
    assert probed.failed == "torch_npu"
    assert told in probed.why
    assert probed.facts["torch"]["version"] == "2.13.0"
    assert any(clash.fatal and told in clash.what for clash in clashes.clashes(probed))


def test_a_package_in_a_zip_is_probed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a package that looks like ours: what lies in a zip is no file that Python could run."""
    with zipfile.ZipFile(tmp_path / "package.zip", "w") as packed:
        packed.writestr("boxed/__init__.py", "")
        packed.write(probe.__file__, "boxed/probe.py")
    package(tmp_path, "torch_npu", "raise ImportError('from torch_npu')")
    package(tmp_path, "torch", "__version__ = '2.13.0'")
    for place in (tmp_path, tmp_path / "package.zip"):
        monkeypatch.syspath_prepend(place)
    monkeypatch.delitem(sys.modules, "boxed", raising=False)
    boxed = importlib.import_module("boxed.probe")
    for name in ("boxed", "boxed.probe"):
        monkeypatch.delitem(sys.modules, name)
    found = boxed.probe()
    assert (found.failed, found.why) == ("torch_npu", "ImportError: from torch_npu")
    assert found.facts["torch"]["version"] == "2.13.0"


@pytest.mark.parametrize("python", ["/no/such/python", "/bin/false"])
def test_a_child_that_does_not_start_is_not_torch_s_fault(
    machine: Path, monkeypatch: pytest.MonkeyPatch, python: str
) -> None:
    monkeypatch.setattr(sys, "executable", python)
    probed = probe.probe()
    assert (probed.failed, probed.facts) == (probe.START, {})
    told = whats(clashes.clashes(probed))
    assert "the child process that was to do it failed" in told
    assert "force-reinstall torch" not in told


def page(**changed: Any) -> Page:
    given: dict[str, Any] = {"versions": {}, "probed": Probed(HEALTHY), "simulated": False}
    lists: dict[str, Any] = {"clashes": [], "clients": [], "settings": [], "combination": None}
    return Page(**{**given, **lists, **changed})


@pytest.mark.parametrize(
    ("attention", "status"),
    [
        ({}, 0),
        ({"kernel": "blockwise", "reasons": ["npu_fusion_attention: why"]}, 1),
        ({"finite": False}, 1),
        (None, 1),
    ],
)
def test_the_exit_status_says_whether_attention_would_be_fused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    attention: dict[str, Any] | None,
    status: int,
) -> None:
    facts = {**HEALTHY, "attention": attention and {**HEALTHY["attention"], **attention}}
    if attention == {}:
        facts = HEALTHY
    made = page(probed=Probed(facts))
    monkeypatch.setattr("flash_attn_npu._diagnosis.page.doctor", lambda simulate: made)
    options = type("Options", (), {"json": False, "simulate": False})
    assert doctor.run(options) == status  # type: ignore[arg-type]
    assert ("NOT fused" in capsys.readouterr().out) == (status == 1)
    options.json = True  # type: ignore[attr-defined]
    assert doctor.run(options) == status  # type: ignore[arg-type]
    assert json.loads(capsys.readouterr().out)["fused"] == (status == 0)


def test_settings_say_where_they_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTN_NPU_FALLBACK", "error")
    monkeypatch.setenv("FLASH_ATTN_NPU_NOBODY_KNOWS", "1")
    found = {setting.name: setting for setting in settings.in_force()}
    assert found["fallback"] == ("fallback", "error", "FLASH_ATTN_NPU_FALLBACK")
    assert found["alibi_offset"] == ("alibi_offset", "0", "default")
    assert found["FLASH_ATTN_NPU_NOBODY_KNOWS"].value == "1"


def test_what_nothing_reads_clashes(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cann(machine, "8.5.0", sourced=True, monkeypatch=monkeypatch)
    monkeypatch.setenv("FLASH_ATTN_NPU_FALBACK", "error")
    (clash,) = found()
    assert not clash.fatal
    assert clash.what.startswith("FLASH_ATTN_NPU_FALBACK is set")
    assert clash.mend == "write FLASH_ATTN_NPU_FALLBACK, or unset it"


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("FALLBACK", "ascend:Ascend910B3:9", "a setting is not legal: FLASH_ATTN_NPU_FALLBACK=asc"),
        ("ALIBI_OFFSET", "1:x", "a setting is not legal: FLASH_ATTN_NPU_ALIBI_OFFSET=1:x"),
        ("INSTALL", "yes", "FLASH_ATTN_NPU_INSTALL is 'yes': new interpreters do not serve"),
        ("INSTALL", "fa3,force", ""),
        ("FALLBACK", "ascend:Ascend950PR", ""),
    ],
)
def test_values_that_are_not_legal_clash(
    machine: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, told: str
) -> None:
    cann(machine, "8.5.0", sourced=True, monkeypatch=monkeypatch)
    monkeypatch.setenv(f"FLASH_ATTN_NPU_{name}", value)
    assert [clash.what for clash in found() if not clash.what.startswith(told or "?")] == []
    assert len(found()) == bool(told)


def test_the_page_names_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    home = os.path.expanduser("~")
    clash = clashes.Clash(f"a flash_attn lies at {home}/x", "remove it")
    assert f"{home}/" not in str(page(clashes=[clash]))


@pytest.mark.usefixtures("npu")
def test_the_simulated_card_is_examined_and_named_so(python: Callable[..., Any]) -> None:
    done = python("-m", "flash_attn_npu", "doctor", "--simulate", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert (told["fused"], told["simulated"]) == (True, True)
    assert told["probed"]["facts"]["attention"]["kernel"] == "npu_fusion_attention"
    operators = told["probed"]["facts"]["operators"]
    assert [need["for"] for need in operators] == [need.feature for need in NEEDS]
    if TORCH >= (2, 9):  # older ones lack some
        assert all(not need["missing"] for need in operators)
    assert told["combination"]["soc"].startswith("Ascend910B")
    assert told["confirmed"] == "a simulated card, which confirms nothing"


def test_its_page_in_the_documents_is_what_it_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.startswith(settings.PREFIX)]:
        monkeypatch.delenv(variable)
    for variable in settings.OF_OTHERS:
        monkeypatch.delenv(variable, raising=False)
    shown = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text()
    for need in NEEDS:
        operators = ", ".join(call[0] for call in need.calls)
        assert f"\n  [ok] {need.feature}: {operators}\n" in shown
    lines = [f"  {name:<18} {value} ({source})" for name, value, source in settings.in_force()]
    assert shown.count("\n".join(["settings", *lines])) == shown.count("\nsettings\n") == 5
