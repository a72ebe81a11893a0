"""Records with other values, in a way that every torch.compile can trace."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

__all__ = ["replaced"]

Record = TypeVar("Record", bound=tuple[Any, ...])


def replaced(record: Record, **changes: Any) -> Record:
    """`record._replace(**changes)` of a NamedTuple; torch 2.6 and 2.8 cannot trace that method."""
    given: Any = record
    if not torch.compiler.is_compiling():
        whole: Record = given._replace(**changes)
        return whole
    kind: Any = type(record)
    # the fields of the class: those of the instance cannot be iterated there either
    made: Record = kind(*[changes.get(f, getattr(given, f)) for f in kind._fields])
    return made
