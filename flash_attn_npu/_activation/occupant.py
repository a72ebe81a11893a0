"""Who else holds a module name in this process, and how to move them out of the way.

Facts only, for any name: what is loaded, whether it is a mere placeholder, which modules keep
references that a replacement cannot reach, and which came too early to find it. What follows
from them is decided elsewhere. Nothing here runs code of a module that it looks at.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.abc import MetaPathFinder
from types import FunctionType, ModuleType
from typing import Any

from .._integrations.untouched import namespace
from .finder import Facade

__all__ = [
    "answering_before",
    "evict",
    "holding",
    "is_placeholder",
    "loaded_as",
    "references_to",
    "whereabouts",
]

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
    loader = getattr(_own(module, "__spec__"), "loader", None)
    return loader is None or _own(module, "__path__") is None


def references_to(name: str) -> list[str]:
    """Names of modules outside `name` that hold modules, functions or classes from it."""
    inside = {id(module) for module in loaded_as(name).values() if module is not None}
    # one module may be listed twice: multiprocessing calls __main__ also __mp_main__
    holders: dict[int, str] = {}
    for key, module in list(sys.modules.items()):
        if module is None or key == name or key.startswith(f"{name}."):
            continue
        if any(
            id(value) in inside or _comes_from(value, name)
            for value in list(namespace(module).values())
        ):
            holders.setdefault(id(module), key)
    return sorted(holders.values())


def holding(marks: Mapping[str, Any]) -> list[str]:
    """Names of modules that hold one of these names with this very value."""
    return sorted(
        {
            key
            for key, module in list(sys.modules.items())
            for name, value in marks.items()
            if namespace(module).get(name, marks) is value
        }
    )


def answering_before(finder: MetaPathFinder, name: str) -> list[str]:
    """The finders that stand before `finder` in `sys.meta_path` and know a module `name`."""
    finders = list(sys.meta_path)
    before = finders[: finders.index(finder)] if finder in finders else []
    return [repr(other) for other in before if _answers(other, name)]


def evict(modules: dict[str, ModuleType | None]) -> None:
    """Take `modules` out of `sys.modules`, and off the attributes of parents that stay."""
    for key in modules:
        sys.modules.pop(key, None)
    for key, module in modules.items():
        parent, _, child = key.rpartition(".")
        holder = sys.modules.get(parent)
        if module is None:
            continue
        if isinstance(holder, Facade) and getattr(holder, child, None) is module:
            delattr(holder, child)
        elif namespace(holder).get(child) is module:
            del namespace(holder)[child]


def whereabouts(module: ModuleType) -> str:
    """Where a module says it comes from."""
    file = _own(module, "__file__")
    return str(file) if file else f"no file (a {type(module).__qualname__})"


def _answers(finder: Any, name: str) -> bool:
    try:
        return finder.find_spec(name, None) is not None
    except Exception:  # whatever it is, an import of the name ends with it
        return True


def _own(module: object, name: str) -> Any:
    # who puts something else than a module there has nothing that could be loaded later
    if issubclass(type(module), ModuleType):
        return namespace(module).get(name)
    return getattr(module, name, None)


def _comes_from(value: object, name: str) -> bool:
    # type() and not isinstance(): the latter asks foreign objects for __class__, and some answer
    # with warnings or imports
    if not issubclass(type(value), _KINDS_THAT_NAME_THEIR_MODULE):
        return False
    origin = getattr(value, "__module__", None)
    return isinstance(origin, str) and (origin == name or origin.startswith(f"{name}."))
