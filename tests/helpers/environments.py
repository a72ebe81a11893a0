"""Scratch environments: a wheel of this package unpacked into one, and the Pythons at hand."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGING = "flash_attn_npu/_packaging"
START_FILES = ("_flash_attn_npu_startup.py", "_zz_flash_attn_npu.pth", "_zz_flash_attn_npu.start")
"""What a wheel has at its root, and where it lies in the sources."""
BACKEND = f"import sys; sys.path.insert(0, {PACKAGING!r}); import backend"


def pythons() -> dict[str, str]:
    """Version -> interpreter, of those from 3.10 to 3.14 that this machine has."""
    found = {f"{sys.version_info[0]}.{sys.version_info[1]}": sys.executable}
    for minor in range(10, 15):
        name = f"3.{minor}"
        installed = sorted(Path.home().glob(f".pyenv/versions/{name}.*/bin/python{name}"))
        path = str(installed[-1]) if installed else shutil.which(f"python{name}")
        if path and subprocess.run([path, "-c", ""], check=False).returncode == 0:
            found.setdefault(name, path)
    return dict(sorted(found.items()))


class Environment:
    """A virtual environment without pip, which `run` starts in a folder of its own."""

    def __init__(self, folder: Path, python: str = sys.executable) -> None:
        subprocess.run([python, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
        self.folder = folder
        self.python = folder / "venv" / "bin" / "python"
        (self.site,) = (folder / "venv" / "lib").glob("python*/site-packages")

    def see_packages_of_the_tests(self) -> None:
        """Make torch and the rest importable, whose own start files are not read."""
        paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        (self.site / "aa_tests.pth").write_text("\n".join(dict.fromkeys(paths)) + "\n")

    def unpack(self, wheel: Path) -> None:
        """Install a wheel of Python files, as an installer would lay it."""
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(self.site)

    def run(
        self, *arguments: str, variable: str | None = None, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """Run its Python with FLASH_ATTN_NPU_INSTALL set to `variable`."""
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "FLASH_ATTN"))}
        keep |= {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PYTHONDONTWRITEBYTECODE": "1", **more}
        if variable is not None:
            keep["FLASH_ATTN_NPU_INSTALL"] = variable
        return subprocess.run(
            [str(self.python), *arguments],
            cwd=self.folder,
            env=keep,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def says(self, *arguments: str, variable: str | None = None, **more: str) -> str:
        """What it prints; anything on stderr fails."""
        done = self.run(*arguments, variable=variable, **more)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout


def build_wheel(folder: Path) -> Path:
    """The wheel of the working tree, from a copy: setuptools leaves things where it builds."""
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    package = "flash_attn_npu"
    shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-c", f"{BACKEND}; backend.build_wheel('.')"]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    (wheel,) = source.glob("*.whl")
    return wheel
