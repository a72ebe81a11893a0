"""Building and loading the stub CANN: the compiler, the cache of built libraries, the preload.

Nothing here may import torch, which may load torch_npu: that asks for CANN, so stubs come first.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata, resources
from pathlib import Path

SONAMES = (
    "libascendcl.so",
    "libhccl.so",
    "libacl_op_compiler.so",
    "libge_runner.so",
    "libgraph.so",
    "libacl_tdt_channel.so",
    "libatb.so",
    "libopapi.so",
)
_CORE = "libvirtual_cann.so"
_FILES = resources.files(__package__)
"""This folder, which may lie in an archive."""
_OPERATOR = re.compile(rb"\0(aclnn[A-Z]\w+)(?=\0)")


def obstacle() -> str | None:
    """Why the stubs cannot be used in this process, None if they can."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        here = f"{sys.platform} {platform.machine()}"
        return f"the simulated card needs Linux on x86-64 or aarch64, not {here}"
    missing = _missing_wheels()
    if missing is not None:
        return missing
    if shutil.which("gcc") is None:
        return "gcc is not installed, which builds the stub libraries"
    if "torch_npu" in sys.modules:
        return "torch_npu was imported before the simulated card was started"
    return None


def _missing_wheels() -> str | None:
    try:
        torch = metadata.version("torch").partition("+")[0]
    except metadata.PackageNotFoundError:
        return "torch is not installed"
    if wheel_directory() is None:
        return f"torch_npu is not installed: install torch_npu=={torch}, the one for this torch"
    npu = metadata.version("torch_npu")
    if not npu.startswith(torch):
        return f"torch_npu {npu} does not belong to torch {torch}: install torch_npu=={torch}"
    return None


def wheel_directory() -> Path | None:
    """Where torch_npu is installed, found without importing it."""
    spec = importlib.util.find_spec("torch_npu")
    return Path(spec.origin).parent if spec and spec.origin else None


def preload() -> None:
    """Make this process believe that CANN is loaded."""
    directory = build()
    ctypes.CDLL(str(directory / _CORE), mode=ctypes.RTLD_GLOBAL)
    for soname in SONAMES:
        ctypes.CDLL(str(directory / soname), mode=ctypes.RTLD_GLOBAL)


def build() -> Path:
    """The folder with the stub libraries, built on first use and shared by all processes."""
    wheel = wheel_directory()
    if wheel is None:
        raise RuntimeError("torch_npu is not installed")
    library = wheel / "lib" / "libtorch_npu.so"
    target = _cache_root() / _key(library)
    if not target.is_dir():
        _build_into(target, library)
    return target


def _cache_root() -> Path:
    root = Path(tempfile.gettempdir()) / f"virtual_ascend_{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    if root.stat().st_uid != os.getuid():
        raise PermissionError(f"{root} belongs to another user")
    return root


def _key(library: Path) -> str:
    status = library.stat()
    parts = tuple(_FILES.joinpath(name).read_bytes() for name in ("stubs.c", "stubs.py"))
    identity = f"{library}|{status.st_size}|{status.st_mtime_ns}".encode()
    return hashlib.sha256(b"\0".join((*parts, identity))).hexdigest()[:24]


def _build_into(target: Path, library: Path) -> None:
    work = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        _compile(work, library)
        try:
            work.rename(target)
        except OSError:
            # Another process was quicker; its build is as good as ours
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _compile(work: Path, library: Path) -> None:
    names = {match.decode() for match in _OPERATOR.findall(library.read_bytes())}
    operators = {name.removesuffix("GetWorkspaceSize") for name in names}
    lines = "".join(f"OPERATOR({name})\n" for name in sorted(operators))
    (work / "operators.inc").write_text(lines)
    (work / "empty.c").write_text("")
    (work / "stubs.c").write_bytes(_FILES.joinpath("stubs.c").read_bytes())
    _gcc(work, "-O1", "-fPIC", "-I.", f"-Wl,-soname,{_CORE}", "stubs.c", "-o", _CORE)
    for soname in SONAMES:
        # Linked to the core, so that dlsym on any of them finds every symbol
        link = ("-Wl,--no-as-needed", "-Wl,-rpath,$ORIGIN", f"./{_CORE}")
        _gcc(work, f"-Wl,-soname,{soname}", "empty.c", *link, "-o", soname)


def _gcc(work: Path, *arguments: str) -> None:
    command = ["gcc", "-shared", "-w", *arguments]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"gcc could not build the stubs:\n{done.stderr}")
