"""What is handed out: an archive of the sources that runs its own tests, and a package in a zip."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.helpers.environments import BACKEND, ROOT

MADE = ("__pycache__", "*.pyc", "*.egg-info", "_build", ".*", "build", "dist", "*.so")
TEXT = (".md", ".toml", ".ini", ".py")
HANDED_OUT = ("flash_attn_npu", "tests", "benchmarks", "docs", "examples")

IN_A_ZIP = """
import sys
sys.path.insert(0, sys.argv[1])
sys.modules["torch_npu"] = None
import torch
import flash_attn_npu
assert flash_attn_npu.__file__.startswith(sys.argv[1]), flash_attn_npu.__file__
flash_attn_npu.install()
from flash_attn import flash_attn_func
from flash_attn.bert_padding import unpad_input
q = torch.randn(1, 5, 2, 8)
assert torch.equal(flash_attn_func(q, q, q), flash_attn_npu.flash_attn_func(q, q, q))
from flash_attn_npu._surface import FROZEN, wheels
assert "flash_attn.flash_attn_interface" in FROZEN
print(wheels.table(), end="")
"""


def child(*arguments: str, cwd: Path, **told: str) -> subprocess.CompletedProcess[str]:
    """A Python that finds nothing of this checkout by itself."""
    apart = ("PYTHON", "FLASH_ATTN_NPU_INSTALL")
    keep = {name: value for name, value in os.environ.items() if not name.startswith(apart)}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=keep | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"} | told,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("told", [{}, {"FLASH_ATTN_NPU_INSTALL": "1"}], ids=["", "follows"])
def test_a_zip_is_imported_like_a_folder(told: dict[str, str], tmp_path: Path) -> None:
    """With the data that lies in it: a part of compat_matrix.md comes out as it is committed."""
    archive = tmp_path / "flash.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for path in sorted((ROOT / "flash_attn_npu").rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                packed.write(path, path.relative_to(ROOT))
    done = child("-c", IN_A_ZIP, str(archive), cwd=tmp_path, **told)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 1000
    assert done.stdout in (ROOT / "compat_matrix.md").read_text()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked archive of sources, built from a copy: setuptools leaves things behind."""
    folder = tmp_path_factory.mktemp("sources")
    copy = folder / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*MADE))
    done = child("-c", f"{BACKEND}; backend.build_sdist('.')", cwd=copy)
    assert done.returncode == 0, done.stderr
    (archive,) = copy.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    (unpacked,) = (path for path in folder.iterdir() if path != copy)
    return unpacked


def test_the_sources_are_all_there(sources: Path) -> None:
    copy = sources.parent / "copy"
    wanted = {
        path.relative_to(copy)
        for top in HANDED_OUT
        for path in (copy / top).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    wanted |= {path.relative_to(ROOT) for path in ROOT.glob("*.*") if path.suffix in TEXT}
    assert len(wanted) > 300
    missing = sorted(str(path) for path in wanted if not (sources / path).is_file())
    assert not missing
    assert not list(sources.rglob("*.pyc"))


@pytest.mark.sweep
def test_the_sources_run_their_own_tests(sources: Path) -> None:
    chosen = ("house", "attention/test_wheels.py", "attention/test_sink_algebra.py")
    done = child(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider"),
        *(f"tests/{name}" for name in chosen),
        cwd=sources,
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
