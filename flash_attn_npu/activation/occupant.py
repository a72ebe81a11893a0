"""Who else holds a module name in this process, and how to move them out of the way.

Facts only, for any name: what is loaded, whether it is a mere placeholder, and which modules
keep references that a replacement cannot reach. What follows from them is decided elsewhere.
"""

from __future__ import annotations

import sys
from types import FunctionType, ModuleType

__all__ = ["evict", "is_placeholder", "loaded_as", "references_to", "whereabouts"]

_KINDS_THAT_NAME_THEIR_MODULE = (FunctionType, type)


def loaded_as(name: str) -> dict[str, ModuleType | None]:
    """The entries of `sys.modules` for `name` and everything below it.

    None, which Python allows there to block an import, is a value like any other.
    """
    return {
        key: module
        for key, module in list(sys.modules.items())
        if key == name or key.startswith(f"{name}.")
    }


def is_placeholder(module: ModuleType) -> bool:
    """Whether `module` only keeps a name taken: no package, or nothing ever loaded it."""
    spec = getattr(module, "__spec__", None)
    return getattr(module, "__path__", None) is None or getattr(spec, "loader", None) is None


def references_to(name: str) -> list[str]:
    """Names of modules outside `name` that hold modules, functions or classes from it."""
    inside = {id(module) for module in loaded_as(name).values() if module is not None}
    # one module may be listed twice: multiprocessing calls __main__ also __mp_main__
    holders: dict[int, str] = {}
    for key, module in list(sys.modules.items()):
        if module is None or key == name or key.startswith(f"{name}."):
            continue
        namespace = getattr(module, "__dict__", None)
        if isinstance(namespace, dict) and any(
            id(value) in inside or _comes_from(value, name) for value in list(namespace.values())
        ):
            holders.setdefault(id(module), key)
    return sorted(holders.values())


def evict(modules: dict[str, ModuleType | None]) -> None:
    """Take `modules` out of `sys.modules`, and off the attributes of parents that stay."""
    for key in modules:
        sys.modules.pop(key, None)
    for key, module in modules.items():
        parent, _, child = key.rpartition(".")
        holder = sys.modules.get(parent)
        if module is not None and holder is not None and vars(holder).get(child) is module:
            delattr(holder, child)


def whereabouts(module: ModuleType) -> str:
    """Where a module says it comes from."""
    file = getattr(module, "__file__", None)
    return str(file) if file else f"no file ({module!r})"


def _comes_from(value: object, name: str) -> bool:
    # type() and not isinstance(): the latter asks foreign objects for __class__, and some answer
    # with warnings or imports
    if not issubclass(type(value), _KINDS_THAT_NAME_THEIR_MODULE):
        return False
    origin = getattr(value, "__module__", None)
    return isinstance(origin, str) and (origin == name or origin.startswith(f"{name}."))
