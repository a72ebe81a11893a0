"""Import order needs an interpreter per case, so most tests here run small scripts: in a fork of
one that has imported torch, or, where starting itself is asked about, in a Python that starts.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flash_attn_npu._startup import VARIABLE
from tests.helpers.warm import Warm

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True)
def _children_are_told_nothing_by_a_test() -> Iterator[None]:
    """Later tests of this process start children too."""
    before = os.environ.get(VARIABLE)
    yield
    assert os.environ.get(VARIABLE) == before


def _package_root() -> Path:
    spec = importlib.util.find_spec("flash_attn_npu")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parents[1]


def _environment(path: list[str]) -> dict[str, str]:
    own = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), **own}


@pytest.fixture
def python(tmp_path: Path) -> Run:
    """Runs Python with arguments, in an empty folder and with torch not loading torch_npu."""

    def run(
        *args: str, path: tuple[Path, ...] = (), stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *args],
            cwd=tmp_path,
            env=_environment([*map(str, path), str(_package_root())]),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    process = Warm()
    yield process
    process.close()


@pytest.fixture
def script(warm: Warm, tmp_path: Path) -> Callable[..., str]:
    """Runs a script that must succeed with every warning an error; returns what it printed."""

    def run(source: str, *, path: tuple[Path, ...] = (), warnings: str = "error") -> str:
        file = tmp_path / "script.py"
        file.write_text(textwrap.dedent(source))
        places = [*map(str, path), str(_package_root())]
        done = warm.run(file, _environment(places), places, warnings)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


COMMAND = """
import runpy, sys
sys.argv = {arguments!r}
runpy.run_module("flash_attn_npu", run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def command(warm: Warm, tmp_path: Path) -> Run:
    """Runs our command line in a fork: what it does once Python has found it."""

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        file = tmp_path / "command_line.py"
        file.write_text(COMMAND.format(arguments=["flash_attn_npu", *args]))
        places = [str(_package_root())]
        return warm.run(file, _environment(places), places, "default")

    return run


@pytest.fixture
def import_system() -> Iterator[None]:
    """Puts `sys.meta_path` and `sys.modules` back as they were.

    What torch imported meanwhile stays: the compiler registers its parts, and cannot do so twice.
    """
    finders, modules = list(sys.meta_path), dict(sys.modules)
    yield
    sys.meta_path[:] = finders
    for name in set(sys.modules) - set(modules):
        if name.partition(".")[0] != "torch":
            del sys.modules[name]
    sys.modules.update(modules)
