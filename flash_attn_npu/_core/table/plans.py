"""From what is asked to a plan: the first kernel that the table admits, and why not the others.

A plan is made once for each distinct `Ask` and remembered, so all layers of a model share one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from ...errors import UnsupportedError
from ..ground import policy, usage
from ..ground.memory import Memo
from ..problems.ask import Ask, Facts, Options, Packed
from ..problems.attention import Problem
from ..problems.results import Forward, Inputs, Saved
from ..problems.validation import describe
from .attention import BLOCKWISE, FUSION, INFER, refusals

__all__ = ["Kernel", "Plan", "make_plan", "permit", "recall_plan"]

_plans: Memo[Hashable, Plan] = Memo("plans of attention calls", 256, nbytes=1 << 26)
recall_plan = _plans.recall
"""The plan that was remembered for an `Ask`, None if there is none."""


class Kernel(Protocol):
    """What every kernel's module has.

    READS_PAGES: it takes keys in a cache as they lie; for the others they are gathered.
    """

    READS_PAGES: bool

    def forward(self, problem: Problem, inputs: Inputs) -> Forward: ...

    def backward(
        self, problem: Problem, dout: Tensor, saved: Saved, grads: tuple[Tensor, Tensor, Tensor]
    ) -> None: ...

    def direct(self, problem: Problem) -> Callable[..., Any] | None:
        """A differentiable function (q, k, v, alibi_slopes, sink) -> the public result, or None."""


@dataclass(frozen=True)
class Plan:
    """What serves a call.

    problem: what the kernel is to compute.
    direct: takes (q, k, v, alibi_slopes, sink) and returns what the public function returns,
        differentiable by itself; None where the kernel is one without autograd of its own.
    reasons: why the kernels before this one were passed over.
    tally: counts the calls, for the report.
    """

    ask: Ask
    problem: Problem
    name: str
    kernel: Kernel
    direct: Callable[..., Any] | None
    reasons: tuple[str, ...]
    tally: usage.Tally

    @property
    def nbytes(self) -> int:
        return self.problem.nbytes

    @cached_property
    def backward_tally(self) -> usage.Tally:
        """Counts backwards that this plan serves apart from its forwards."""
        return usage.tally(f"{self.problem.function} (backward)", self.name, self.reasons)


def make_plan(key: tuple[Any, ...]) -> Plan:
    """The plan for an `Ask`, or for a plain tuple of its fields; validated when it is made."""
    found = _recall(key)
    if found is None:
        ask = _ask(key)
        # options that cannot be a key (lists, tensors) were made plain
        key = key if _is_key(key) else ask
        found = recall_plan(key) or _plan(ask)
        _plans.put(key, found)
    return found


def permit(found: Plan) -> None:
    """Apply the fallback policy to a plan; a problem without work loses nothing by no fusion."""
    problem = found.problem
    if not problem.has_work:
        return
    detour = None if found.name == BLOCKWISE else f"gathers its keys for {found.name}"
    policy.permit(problem.function, problem.device, found.reasons, detour=detour)


def _recall(key: tuple[Any, ...]) -> Plan | None:
    try:
        return recall_plan(key)
    except TypeError:
        return None


def _is_key(key: tuple[Any, ...]) -> bool:
    # a number given as a tensor may change under the same key, and an array is none
    options = key[Ask._fields.index("options")]
    parts = [x for part in options for x in (part if isinstance(part, tuple) else (part,))]
    return all(part is None or type(part) in (bool, int, float) for part in parts)


def _ask(key: tuple[Any, ...]) -> Ask:
    ask = Ask(*key)
    return ask._replace(
        q=Facts(*ask.q),
        k=Facts(*ask.k),
        v=Facts(*ask.v),
        packed=None if ask.packed is None else Packed(*ask.packed),
        options=Options.checked(*ask.options),
        needs_grad=bool(ask.needs_grad),
        uses_lse=bool(ask.uses_lse),
    )


def _plan(ask: Ask) -> Plan:
    problem = describe(ask)
    names = (FUSION, BLOCKWISE) if ask.pages is None else (INFER, FUSION, BLOCKWISE)
    passed_over: tuple[str, ...] = ()
    for name in names:
        refused = refusals(name, problem)
        if not refused:
            kernel = _kernel(name)
            own_autograd = ask.pages is None and not ask.backward
            direct = kernel.direct(problem) if own_autograd else None
            tally = usage.tally(problem.function, name, passed_over)
            return Plan(ask, problem, name, kernel, direct, passed_over, tally)
        passed_over += (f"{name}: {', '.join(refused)}",)
    raise UnsupportedError(
        problem.function,
        "a call that no kernel can serve",
        "; ".join(passed_over),
        "change the arguments named here",
    )


def _kernel(name: str) -> Kernel:
    from ..kernels.ascend import fusion_attention, infer_attention
    from ..kernels.composed import attention

    kernels: dict[str, Any] = {
        FUSION: fusion_attention,
        INFER: infer_attention,
        BLOCKWISE: attention,
    }
    kernel: Kernel = kernels[name]
    return kernel
