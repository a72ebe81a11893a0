"""Children of a process that installed: each way to start one, from a wheel in an environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import flash_attn_npu
from flash_attn_npu import _activation
from flash_attn_npu._activation import children
from tests.helpers.environments import Environment, build_wheel

VARIABLE = "FLASH_ATTN_NPU_INSTALL"

STARTED = """
import os, subprocess, sys
import torch, torch.multiprocessing as mp
from torch.utils.data import DataLoader
import flash_attn_npu

def whose(*_):
    import flash_attn
    return flash_attn.flash_attn_func.__module__

def rank(number):
    print("torch.multiprocessing", whose(), flush=True)

def collate(items):
    return whose()

if __name__ == "__main__":
    torch.set_num_threads(1)
    with flash_attn_npu.install(children=True):
        for context in ("spawn", "fork"):
            loader = DataLoader([0], collate_fn=collate, num_workers=1,
                                multiprocessing_context=context)
            print("DataLoader", context, *loader, flush=True)
        mp.spawn(rank, nprocs=1)
    print(os.environ.get("FLASH_ATTN_NPU_INSTALL"))
    code = "import importlib.util; print(importlib.util.find_spec('flash_attn'))"
    print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
"""

PROBE = """
import os
import pytest
flash_attn = pytest.importorskip("flash_attn")

def test_it():
    assert "PYTEST_XDIST_WORKER" in os.environ
    assert flash_attn.flash_attn_func.__module__ == "flash_attn_npu.flash_attn_interface"
"""

ORDERS = {
    "client first": "import client; import torch, flash_attn",
    "client last": "import torch, flash_attn, client",
    "package first": "import flash_attn_npu, client, flash_attn",
    "metadata first": "import importlib.metadata as m; m.version('flash-attn'); import client",
    "FlashAttention 3 first": (
        "import flash_attn_interface, client, flash_attn_3.flash_attn_interface as whole;"
        "assert flash_attn_interface.flash_attn_combine is whole.flash_attn_combine"
    ),
    "FlashAttention 3's metadata first": (
        "import importlib.metadata as m; assert m.version('flash-attn-3') == '3.0.0';"
        "import flash_attn_npu, flash_attn_interface; assert flash_attn_npu.installed();"
        "assert m.packages_distributions()['flash_attn_interface'] == ['flash_attn_3']"
    ),
    "torch_npu missing": "import sys; sys.modules['torch_npu'] = None; import client",
    "dummy later": (
        "import flash_attn, types, sys, flash_attn_npu;"
        "sys.modules['flash_attn.x'] = types.ModuleType('flash_attn.x');"
        "flash_attn_npu.install(); import client; assert 'flash_attn.x' not in sys.modules"
    ),
    "dummy first": (
        "import sys, types; sys.modules['flash_attn'] = types.ModuleType('flash_attn');"
        "import flash_attn_npu, client"
    ),
    "MindSpeed, which makes a dummy of what it cannot import": (
        "import importlib, sys, types\n"
        "for name in ('flash_attn', 'flash_attn.flash_attn_interface', 'flash_attn.nothing'):\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except ModuleNotFoundError:\n"
        "        sys.modules[name] = types.ModuleType(name)\n"
        "import flash_attn_npu, client\n"
        "served = sys.modules['flash_attn.flash_attn_interface'].__name__\n"
        "assert served.startswith('flash_attn_npu')"
    ),
    "transformers first": (
        "from transformers.utils import is_flash_attn_2_available; import flash_attn_npu, client;"
        "assert flash_attn_npu.installed() and is_flash_attn_2_available()"
    ),
    "blocked, which is said in one line": (
        "import io, os, sys; sys.modules['flash_attn'] = None; sys.stderr = io.StringIO();"
        "import flash_attn_npu; said = sys.stderr.getvalue(); sys.stderr = sys.__stderr__;"
        "assert said.count(chr(10)) == 1 and 'is not served: sys.modules[' in said, said;"
        "os._exit(0)"
    ),
}
"""How a child may come to import; all but the last end with the very same module."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    folder = tmp_path_factory.mktemp("children")
    environment = Environment(folder)
    environment.see_packages_of_the_tests()
    environment.unpack(build_wheel(folder))
    return environment


def test_workers_of_torch_follow(environment: Environment) -> None:
    (environment.folder / "started.py").write_text(STARTED)
    ours = "flash_attn_npu.flash_attn_interface"
    assert environment.says("started.py").splitlines() == [
        f"DataLoader spawn {ours}",
        f"DataLoader fork {ours}",
        f"torch.multiprocessing {ours}",
        "None",
        "None",
        "",
    ]


def test_workers_of_pytest_follow_the_launcher(environment: Environment) -> None:
    pytest.importorskip("xdist")
    (environment.folder / "test_probe.py").write_text(PROBE)
    launcher = ("-m", "flash_attn_npu", "-q", "-m", "pytest", "-p", "no:cacheprovider")
    few = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = environment.run(*launcher, "-p", "xdist", "-n", "1", "-q", "test_probe.py", **few)
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_every_order_of_imports_in_a_child(environment: Environment) -> None:
    """One fork for each, so that torch is imported once: the hook does not mind."""
    (environment.folder / "client.py").write_text(
        "import importlib.util, torch\n"
        "assert importlib.util.find_spec('flash_attn')\n"
        "from flash_attn.bert_padding import unpad_input\n"
    )
    code = f"""
import os, sys, torch
for name, order in {ORDERS!r}.items():
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        try:
            exec(order, {{}})
            import client, flash_attn_npu
            assert client.unpad_input is flash_attn_npu.bert_padding.unpad_input, name
            assert flash_attn_npu.installed()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(name, os.waitpid(child, 0)[1])
"""
    said = environment.says("-c", code, variable="1,fa3").splitlines()
    assert said == [f"{name} 0" for name in ORDERS]


@pytest.mark.parametrize("before", [None, "0", "fa3"])
def test_the_variable_is_taken_back(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    # what is deleted without having been there is not taken back
    monkeypatch.setenv(VARIABLE, before or "")
    if before is None:
        monkeypatch.delenv(VARIABLE)
    told = "1,fa3" if before == "fa3" else "1"
    with flash_attn_npu.install():
        assert os.environ.get(VARIABLE) == before
        with flash_attn_npu.install(children=True), flash_attn_npu.install(children=True):
            assert os.environ[VARIABLE] == told
        assert os.environ.get(VARIABLE) == before
        flash_attn_npu.install(children=True)
        assert os.environ[VARIABLE] == told
    assert os.environ[VARIABLE] == told
    flash_attn_npu.uninstall()
    assert os.environ.get(VARIABLE) == before
    with flash_attn_npu.install(children=True):
        os.environ[VARIABLE] = "force"
    assert os.environ[VARIABLE] == "force"


def test_children_shadow_what_their_parent_shadows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    with flash_attn_npu.install(children=True):
        assert os.environ[VARIABLE] == "1,force"
    assert VARIABLE not in os.environ


def test_it_is_said_where_children_cannot_follow(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As a warning to who asked for children by name; the launcher and plugins always ask."""

    def said() -> list[str]:
        found = [x.levelname for x in caplog.records if "no start-up file" in x.getMessage()]
        caplog.clear()
        return found

    caplog.set_level("INFO", "flash_attn_npu")
    monkeypatch.setattr(children, "START_FILE", "no such file")
    with flash_attn_npu.install(children=True):
        assert said() == ["WARNING"]
        with flash_attn_npu.install(), _activation.claim(children=True):
            assert said() == ["INFO"]
    assert said() == []
    (tmp_path / "here.pth").touch()
    monkeypatch.setattr(children, "START_FILE", "here.pth")
    monkeypatch.syspath_prepend(str(tmp_path))
    with flash_attn_npu.install(children=True):
        assert said() == []
