"""What lies on disk: versions of packages, CANN, the driver, cards. Imports none of it."""

from __future__ import annotations

import importlib.machinery
import os
import re
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

__all__ = ["Cann", "cann", "cards", "copies", "driver", "release", "version", "where"]

HOMES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
ROOT = Path("/usr/local/Ascend")
SCRIPTS = ("ascend-toolkit/set_env.sh", "cann*/set_env.sh", "latest/set_env.sh")
DEVICES = Path("/dev")
_VERSION = re.compile(r"^\s*version\s*=\s*(\S+)", re.IGNORECASE | re.MULTILINE)


class Cann(NamedTuple):
    """version: empty if it does not say. sourced: its variables are set. script: what sets them."""

    version: str
    sourced: bool
    script: str


def version(distribution: str) -> str | None:
    """The version of a distribution, None if there is none."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def release(number: str) -> tuple[str, ...]:
    """The first three numbers of a version, by which a torch_npu belongs to a torch."""
    return tuple(re.findall(r"\d+", number)[:3])


def where(package: str) -> str | None:
    """The folder of a package, or its file, as the path finder sees it; None if it does not."""
    spec = importlib.machinery.PathFinder.find_spec(package)
    if spec is None:
        return None
    found = list(spec.submodule_search_locations or ()) or [spec.origin or "?"]
    return str(found[0])


def copies(package: str) -> list[str]:
    """Every folder of that name on the path, the one that is imported first."""
    found: dict[str, None] = {}
    for entry in sys.path:
        spec = importlib.machinery.PathFinder.find_spec(package, [entry or os.getcwd()])
        if spec is not None and spec.origin:
            found[os.path.dirname(os.path.realpath(spec.origin))] = None
    return list(found)


def cann() -> Cann | None:
    """The CANN whose variables are set, else one that is installed, else None."""
    for variable in HOMES:
        home = os.environ.get(variable)
        if home and os.path.isdir(home):
            return Cann(_cann_version(Path(home)), True, "")
    scripts = [script for pattern in SCRIPTS for script in sorted(ROOT.glob(pattern))]
    if not scripts:
        return None
    return Cann(_cann_version(scripts[0].parent), False, str(scripts[0]))


def _cann_version(home: Path) -> str:
    files = (*home.glob("*/ascend_*_install.info"), *home.glob("ascend_*_install.info"))
    return _said([*files, home / "version.cfg", home / "version.info"])


def driver() -> str | None:
    """The version of the NPU driver, None if there is none."""
    file = ROOT / "driver" / "version.info"
    return (_said([file]) or "unknown") if file.exists() else None


def cards() -> int:
    """How many NPUs the driver shows in /dev."""
    return sum(1 for file in _devices() if re.fullmatch(r"davinci\d+", file.name))


def _devices() -> Iterator[Path]:
    return DEVICES.glob("davinci*") if DEVICES.is_dir() else iter(())


def _said(files: Iterable[Path]) -> str:
    for file in files:
        try:
            found = _VERSION.search(file.read_text(errors="replace"))
        except OSError:
            continue
        if found:
            return found.group(1)
    return ""
