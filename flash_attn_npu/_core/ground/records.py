"""Records with other values, in a way that every torch.compile can trace."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

__all__ = ["named", "replaced"]

Record = TypeVar("Record", bound=tuple[Any, ...])


def replaced(record: Record, **changes: Any) -> Record:
    """`record._replace(**changes)` of a NamedTuple; torch 2.6 and 2.8 cannot trace that method."""
    given: Any = record
    if not torch.compiler.is_compiling():
        whole: Record = given._replace(**changes)
        return whole
    kind: Any = type(record)
    made: Record = kind(**{**named(record), **changes})
    return made


def named(record: tuple[Any, ...]) -> dict[str, Any]:
    """`record._asdict()` of a NamedTuple, which they cannot trace either."""
    # the fields of the class: those of the instance cannot be iterated there
    kind: Any = type(record)
    return {field: getattr(record, field) for field in kind._fields}
