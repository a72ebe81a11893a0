"""Which torch_npu is installed, whether it is supported, and whether it belongs to this torch."""

from __future__ import annotations

import sys
from importlib import metadata

import torch
from packaging.version import InvalidVersion, Version

from .memory import Memo

__all__ = ["OLDEST", "mismatch", "too_old", "torch_npu_version"]

OLDEST = "2.6.0"
"""The oldest torch_npu that is supported: the first whose torch is."""

_installed: Memo[str, str] = Memo("version of torch_npu", 1)


def torch_npu_version() -> str | None:
    """The version of torch_npu, None if there is none; does not import it."""
    known = _installed.recall("torch_npu")
    if known is None:
        known = _loaded() or _on_disk()
        if known is not None:
            _installed.put("torch_npu", known)
    return known


def too_old(device: torch.device) -> bool:
    """Whether tensors on an NPU are served by a torch_npu older than the oldest supported."""
    version = torch_npu_version() if device.type == "npu" else None
    parsed = None if version is None else _parsed(version)
    return parsed is not None and parsed < Version(OLDEST)


# as for `chip.soc_name`
too_old._dynamo_marked_constant = True  # type: ignore[attr-defined]


def mismatch() -> str | None:
    """What is wrong with the pair of torch and torch_npu, None if they belong together.

    A torch_npu is built for one release of torch and bears its number; what follows the first
    three numbers (`.post2`, `+cpu`, `.dev20250101`) is its own.
    """
    torch_npu = torch_npu_version()
    parsed = None if torch_npu is None else _parsed(torch_npu)
    if parsed is None:
        return None
    if parsed < Version(OLDEST):
        return f"torch_npu {torch_npu} is older than {OLDEST}, the oldest that is supported"
    ours = _parsed(torch.__version__)
    if ours is not None and ours.release[:3] != parsed.release[:3]:
        belongs = ".".join(map(str, parsed.release[:3]))
        return f"torch_npu {torch_npu} belongs to torch {belongs}, and torch is {torch.__version__}"
    return None


def _loaded() -> str | None:
    version: str | None = getattr(sys.modules.get("torch_npu"), "__version__", None)
    return version


def _on_disk() -> str | None:
    try:
        return metadata.version("torch_npu")
    except metadata.PackageNotFoundError:
        return None


def _parsed(version: str) -> Version | None:
    try:
        return Version(version)
    except InvalidVersion:
        return None
