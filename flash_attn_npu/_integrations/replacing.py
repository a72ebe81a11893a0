"""Functions of other people's modules, replaced by ours where they are held, and put back."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from types import ModuleType
from typing import Any

from .changes import Changes
from .untouched import loaded, namespace

__all__ = [
    "changes",
    "defines",
    "everywhere",
    "is_function_of",
    "is_ours",
    "lacks",
    "method",
    "stand_in",
    "swap",
]

_log = logging.getLogger("flash_attn_npu")
changes = Changes()

_REGISTRIES = (
    ("transformers.modeling_utils", "AttentionInterface"),
    ("transformers.masking_utils", "AttentionMaskInterface"),
)
_MATRIX = ("transformers.modeling_flash_attention_utils", "FLASH_ATTENTION_COMPATIBILITY_MATRIX")

MadeFrom = Callable[[Callable[..., Any]], Callable[..., Any]]


def defines(module: ModuleType, function: object) -> bool:
    """Whether `function` comes from the file of `module`, and not from whoever replaced it."""
    return getattr(function, "__globals__", None) is vars(module)


def is_ours(function: object) -> bool:
    """Whether `function` is a stand-in from this folder."""
    name = getattr(function, "__globals__", {}).get("__name__", "")
    return str(name).startswith(f"{__package__}.")


def is_function_of(module: ModuleType, name: str, *parameters: str) -> bool:
    """Whether `module` has a function of that name which takes `parameters`."""
    function = vars(module).get(name)
    return callable(function) and set(parameters) <= set(inspect.signature(function).parameters)


def stand_in(module: ModuleType, name: str, made_from: MadeFrom) -> None:
    """Replace a function of `module`, unless somebody has done so before us."""
    if _is_their_own(module, name):
        changes.set(vars(module), name, made_from(vars(module)[name]))


def everywhere(module: ModuleType, name: str, made_from: MadeFrom) -> None:
    """The same, wherever the function is held: imported by name, or registered."""
    if _is_their_own(module, name):
        original = vars(module)[name]
        swap(name, original, made_from(original))


def swap(name: str, old: object, new: object) -> None:
    """Whoever holds `old` holds `new`, until it is undone."""
    changes.before(functools.partial(_swap, name, new, old))
    _swap(name, old, new)


def method(owner: type, name: str, made_from: MadeFrom) -> None:
    """Replace a method that `owner` itself defines."""
    original = vars(owner)[name]
    ours = made_from(original)

    def restore() -> None:
        # somebody who replaced it after us keeps their replacement
        if vars(owner).get(name) is ours:
            setattr(owner, name, original)

    changes.before(restore)
    setattr(owner, name, ours)


def lacks(module: ModuleType, name: str, consequence: str) -> None:
    """Say that this version has no such name, and what therefore cannot be done."""
    _log.warning(
        "transformers %s has no %s.%s that flash_attn_npu knows: %s; "
        "transformers 4.57.6 and 5.20 to 5.24 are tested",
        _version(),
        module.__name__,
        name,
        consequence,
    )


def _version() -> str:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version("transformers")
    return "(unknown)"


def _is_their_own(module: ModuleType, name: str) -> bool:
    own = defines(module, vars(module)[name])
    if not own:
        _log.info("%s.%s is not transformers' own: it is left as it is", module.__name__, name)
    return own


def _swap(name: str, old: object, new: object) -> None:
    for module in list(sys.modules.values()):
        held = namespace(module)
        if held.get(name) is old:
            held[name] = new
    for table in _tables():
        for key, value in list(table.items()):
            if value is old:
                table[key] = new


def _tables() -> Iterator[dict[Any, Any]]:
    for module, name in _REGISTRIES:
        table = getattr(loaded(module).get(name), "_global_mapping", None)
        if isinstance(table, dict):
            yield table
    module, name = _MATRIX
    yield from loaded(module).get(name, {}).values()
