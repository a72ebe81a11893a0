"""What both tables are made of: rules, data from which everything is read, and candidates.

Plans, the warnings, compat_matrix.md and the tests that reach every cell are made from rules. A
kernel serves a problem if none of the rules that are present names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..ground.confirmed import EVERY_CALL
from ..kernels.kernel import Kernel
from ..verification.kinds import Check

__all__ = ["Candidate", "Rule", "Table", "disproved", "reasons"]


@dataclass(frozen=True)
class Rule:
    """Something that a problem may have, and the kernels that then refuse it.

    refused: why, for each of them; to every other kernel the property is native.
    """

    name: str
    present: Callable[[Any], bool]
    refused: Mapping[str, str] = field(default_factory=dict)


class Candidate(NamedTuple):
    """One kernel in the list of those that are asked for a problem.

    name: what rules, warnings and reports call it.
    autograd: what rules call its autograd, `kernel.direct`, if that refuses more than the kernel
        itself does; refused, the kernel serves by its forward and backward.
    shortcut: a candidate behind it does the same with more launches, so that it was passed over is
        no loss, and not told.
    check: what compares its first calls with exact arithmetic; None where it is exact itself.
    detour: what a call does that comes here because another was passed over, and is fused all the
        same; None if it is composed.
    """

    name: str
    kernel: Kernel
    autograd: str | None = None
    shortcut: bool = False
    detour: str | None = None
    check: Check | None = None


class Table(NamedTuple):
    """The rules for some kinds of problems, and the candidates for one, first choice first."""

    rules: tuple[Rule, ...]
    candidates: Callable[[Any], tuple[Candidate, ...]]


def reasons(rules: Iterable[Rule], kernel: str, problem: Any) -> tuple[str, ...]:
    """Why a kernel may not serve a problem, by the rules that are present; empty if it may."""
    return tuple(
        rule.refused[kernel] for rule in rules if kernel in rule.refused and rule.present(problem)
    )


def disproved(
    rules: Iterable[Rule], kernel: str, problem: Any, found_wrong: str
) -> tuple[str, ...]:
    """Why reports say that a kernel may not serve a problem, as `chip.known_wrong` has them."""
    wrong = {
        row: report
        for line in found_wrong.splitlines()
        for row, its_kernel, report in [line.split("\t")]
        if its_kernel == kernel
    }
    names = [rule.name for rule in rules if rule.name in wrong and rule.present(problem)]
    return tuple(
        f"report {wrong[name]} found it wrong here, with this CANN and torch_npu: {name}"
        for name in (*names, *({EVERY_CALL} & set(wrong)))
    )
