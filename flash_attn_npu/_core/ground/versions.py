"""Which torch_npu is installed, and whether it is supported."""

from __future__ import annotations

import sys
from importlib import metadata

import torch

from ..._version import OLDEST_TORCH_NPU
from .absent import Absent
from .memory import Memo

__all__ = ["too_old", "torch_npu_version"]

_installed: Memo[str, str] = Memo("version of torch_npu", 1)


def torch_npu_version() -> str | None:
    """The version of torch_npu, None if there is none; does not import it."""
    known = _installed.recall("torch_npu")
    if known is None:
        known = _loaded() or _on_disk()
        if known is not None:
            _installed.put("torch_npu", known)
    return known


def too_old(device: torch.device | Absent) -> bool:
    """Whether tensors on an NPU are served by a torch_npu older than the oldest supported."""
    if device.type != "npu":
        return False
    version = device.torch_npu if isinstance(device, Absent) else torch_npu_version()
    return version is not None and _older(version, OLDEST_TORCH_NPU)


# as for `chip.soc_name`
too_old._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _loaded() -> str | None:
    version: str | None = getattr(sys.modules.get("torch_npu"), "__version__", None)
    return version


def _on_disk() -> str | None:
    try:
        return metadata.version("torch_npu")
    except metadata.PackageNotFoundError:
        return None


def _older(version: str, oldest: str) -> bool:
    """Whether it is; False of a version that cannot be read."""
    # the module costs more than many of ours, and nothing is asked of it on a CPU
    from packaging.version import InvalidVersion, Version

    try:
        return Version(version) < Version(oldest)
    except InvalidVersion:
        return False
