"""Other people's modules, looked at without running any of their code.

A module may be a promise only: `importlib.util.LazyLoader` loads it when any attribute is asked
for, and others make up attributes in `__getattr__`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

__all__ = ["is_promise", "loaded", "namespace"]

_NAMESPACE: Any = vars(ModuleType)["__dict__"]


def namespace(module: object) -> dict[str, Any]:
    """What `module` itself holds, to read and to write; nothing if it is no module."""
    if not issubclass(type(module), ModuleType):
        return {}
    held: dict[str, Any] | None = _NAMESPACE.__get__(module)
    return {} if held is None else held


def is_promise(module: object) -> bool:
    """Whether to ask `module` for any attribute would run code, as before a lazy one is loaded."""
    kind = type(module)
    return issubclass(kind, ModuleType) and (
        kind.__getattribute__ is not ModuleType.__getattribute__
    )


def loaded(name: str) -> dict[str, Any]:
    """What the module of that name holds; nothing if it is not loaded."""
    return namespace(sys.modules.get(name))
