"""The operator that serves a rotation, norm, gate or loss: the first that the table admits.

A choice is remembered for each distinct problem. Under torch.compile nothing is remembered, and
counted and logged once for each graph, so that tracing leaves no trace in it.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch

from ..ground import policy, usage
from ..ground.memory import Memo
from ..ground.traced import note
from ..problems.rowwise import Problem
from .rowwise import TORCH, candidates, refusals

__all__ = ["choose", "recall", "remember", "serves"]


class _Choice(NamedTuple):
    operator: str
    reasons: tuple[str, ...]
    tally: usage.Tally


_choices: Memo[Problem, _Choice] = Memo("operators chosen row by row", 1024)
_recalled: Memo[Hashable, _Choice] = Memo("operators chosen for norms, by their arguments", 1024)


def choose(problem: Problem) -> str:
    """The operator to call, `TORCH` if the call is to be composed.

    Raises:
        UnsupportedError: no fused operator serves it, and the fallback policy is `error`.
    """
    if torch.compiler.is_compiling():
        operator, reasons = _first(problem)
        work = not problem.empty
        note(problem.function, problem.device.type, operator, reasons, work)
        return operator
    choice = _choice(problem)
    if choice.operator == TORCH and not problem.empty:
        policy.permit(problem.function, problem.device, choice.reasons)
    choice.tally.calls += 1
    return choice.operator


def serves(problem: Problem) -> bool:
    """Whether a fused operator serves a backward: without a count, which its forward has had."""
    found = _first(problem) if torch.compiler.is_compiling() else _choice(problem)
    return found[0] != TORCH


def recall(key: Hashable) -> str | None:
    """The fused operator that was remembered for a key, None if there is none; counts the call."""
    choice = _recalled.recall(key)
    if choice is None:
        return None
    choice.tally.calls += 1
    return choice.operator


def remember(key: Hashable, problem: Problem) -> None:
    """Let `recall(key)` answer, if a fused operator serves.

    The key must hold all that the problem and the checks before it depend on.
    """
    choice = _choice(problem)
    if choice.operator != TORCH:
        _recalled.put(key, choice)


def _first(problem: Problem) -> tuple[str, tuple[str, ...]]:
    refused: tuple[str, ...] = ()
    last = TORCH
    for operator in candidates(problem):
        refused, last = refusals(operator, problem), operator
        if not refused:
            return operator, ()
    return TORCH, (f"{last}: {', '.join(refused)}",)


def _choice(problem: Problem) -> _Choice:
    choice = _choices.recall(problem)
    if choice is None:
        operator, reasons = _first(problem)
        choice = _Choice(operator, reasons, usage.tally(problem.function, operator, reasons))
        _choices.put(problem, choice)
    return choice
