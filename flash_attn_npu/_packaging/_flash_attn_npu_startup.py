"""What Python runs at its start: the package's `_startup.py`, without the package and its torch.

A wheel has it at its root, where a `.pth` and a `.start` file can name it.
"""

from __future__ import annotations

import sys
from _frozen_importlib import module_from_spec  # importlib.util loads 16 modules, on every start

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PACKAGE = "flash_attn_npu"
NAME = f"{PACKAGE}._startup"


def start() -> None:
    """Follow FLASH_ATTN_NPU_INSTALL, if the package is there."""
    if (startup := _startup()) is not None:
        startup.start()


def start_activated() -> None:
    """Serve flash_attn where `activate` made that permanent, if the package is there."""
    if (startup := _startup()) is not None:
        startup.start_activated()


def _startup() -> Any:
    """The module that the package itself will find in `sys.modules`; None if there is none."""
    if NAME not in sys.modules:
        package = _spec(PACKAGE, None)
        spec = package and _spec(NAME, package.submodule_search_locations or [])
        if spec is None:
            return None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[NAME] = module
    return sys.modules[NAME]


def _spec(name: str, path: Any) -> Any:
    asked = (
        finder.find_spec(name, path) for finder in sys.meta_path if hasattr(finder, "find_spec")
    )
    return next((spec for spec in asked if spec is not None), None)
