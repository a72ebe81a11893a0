"""The one kind of rule that both tables hold: data, from which everything is read.

Plans and choices, the warnings, compat_matrix.md and the tests that reach every cell are made from
rules. A kernel serves a problem if none of the rules that are present names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Rule", "reasons"]


@dataclass(frozen=True)
class Rule:
    """Something that a problem may have, and the kernels that then refuse it.

    refused: why, for each of them; to every other kernel the property is native.
    """

    name: str
    present: Callable[[Any], bool]
    refused: Mapping[str, str] = field(default_factory=dict)


def reasons(table: Iterable[Rule], kernel: str, problem: Any) -> tuple[str, ...]:
    """Why a kernel may not serve a problem, by the rules that are present; empty if it may."""
    return tuple(
        rule.refused[kernel] for rule in table if kernel in rule.refused and rule.present(problem)
    )
