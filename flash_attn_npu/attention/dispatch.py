"""From a problem to a plan: the first kernel that the table admits, and why the others were not.

A plan is made once for each distinct problem and remembered by `call`; what happens per call
stays in the kernel's own function.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import report
from ..errors import UnsupportedError, explain
from .problem import Problem
from .support import BLOCKWISE, FUSION, refusals

__all__ = ["Plan", "plan"]

logger = logging.getLogger("flash_attn_npu")

_warned: set[tuple[str, tuple[str, ...]]] = set()


@dataclass(frozen=True)
class Plan:
    """What serves a problem.

    run: takes (q, k, v, alibi_slopes), gives the bare output if `bare`, else a Result.
    reasons: why the kernels before this one were passed over.
    tally: counts the calls, for the report.
    """

    problem: Problem
    kernel: str
    run: Callable[..., Any]
    bare: bool
    reasons: tuple[str, ...]
    tally: report.Tally


def plan(problem: Problem) -> Plan:
    """Choose a kernel for `problem`, or raise UnsupportedError with every kernel's reason."""
    passed_over: list[str] = []
    for kernel, prepare in _kernels():
        reasons = refusals(kernel, problem)
        if not reasons:
            _announce(problem, kernel, tuple(passed_over))
            tally = report.tally(problem.function, kernel, tuple(passed_over))
            run, bare = prepare(problem)
            return Plan(problem, kernel, run, bare, tuple(passed_over), tally)
        passed_over += [f"{kernel}: {reason}" for reason in reasons]
    raise UnsupportedError(
        explain(
            problem.function,
            "a call that no kernel can serve",
            "; ".join(passed_over),
            "change the arguments named here",
        )
    )


def _kernels() -> tuple[tuple[str, Callable[[Problem], tuple[Callable[..., Any], bool]]], ...]:
    from ..kernels import blockwise, fusion

    return (FUSION, fusion.prepare), (BLOCKWISE, blockwise.prepare)


def _announce(problem: Problem, kernel: str, reasons: tuple[str, ...]) -> None:
    """Say once for each function and set of reasons that a call is composed, not fused.

    Off an NPU nothing else is to be expected, and a problem without work loses nothing.
    """
    key = (problem.function, reasons)
    if not reasons or key in _warned:
        return
    _warned.add(key)
    expected = problem.device.type != "npu" or not problem.has_work
    logger.log(
        logging.INFO if expected else logging.WARNING,
        "`%s` runs on %s, exact but composed of torch operations: %s",
        problem.function,
        kernel,
        "; ".join(reasons),
    )
