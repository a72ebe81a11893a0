"""From a problem to a plan: the first kernel that the table admits, and why the others were not.

A plan is made once for each distinct problem and remembered by what is known of the arguments
without reading a tensor, so that all layers of a model share one.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from types import ModuleType
from typing import Any

from torch import Tensor

from .. import policy, usage
from ..errors import UnsupportedError, explain
from ..memory import Memo
from . import checks
from .describe import dense_problem, varlen_problem
from .lengths import Lengths
from .problem import Facts, Options, Pages, Problem
from .support import BLOCKWISE, FUSION, INFER, refusals

__all__ = [
    "Plan",
    "decided",
    "decision",
    "lookup",
    "permit",
    "recall_plan",
    "remember_plan",
]


@dataclass(frozen=True)
class Plan:
    """What serves a problem.

    name, kernel: the kernel's name, and the module with its `forward` and `backward`.
    direct: takes (q, k, v, alibi_slopes, sink) and returns what the public function returns,
        differentiable by itself; None where autograd goes through our operators.
    reasons: why the kernels before this one were passed over.
    tally: counts the calls, for the report.
    """

    problem: Problem
    name: str
    kernel: ModuleType
    direct: Callable[..., Any] | None
    reasons: tuple[str, ...]
    tally: usage.Tally

    @property
    def nbytes(self) -> int:
        return self.problem.nbytes

    @cached_property
    def backward(self) -> Plan:
        """The same decision for the backward of the call, reported by a name of its own."""
        function = f"{self.problem.function} (backward)"
        return replace(
            self,
            problem=replace(self.problem, function=function),
            tally=usage.tally(function, self.name, self.reasons),
        )


_decisions = threading.local()


@contextmanager
def decided(found: Plan | None, *tensors: Tensor) -> Iterator[None]:
    """Let `decision(*tensors)` answer inside, in this thread: no operator decides again."""
    before = getattr(_decisions, "made", None)
    _decisions.made = None if found is None else (found, tensors)
    try:
        yield
    finally:
        _decisions.made = before


def decision(*tensors: Tensor) -> Plan | None:
    """What was decided about a call on these very tensors; None if nobody has decided yet."""
    found, known = getattr(_decisions, "made", None) or (None, ())
    same = len(known) == len(tensors) and all(map(operator.is_, known, tensors))
    return found if same else None


_plans: Memo[tuple[Any, ...], Plan] = Memo("plans of attention calls", 256, nbytes=1 << 26)
recall_plan = _plans.recall
"""The plan that was remembered for a key, None if there is none."""


def lookup(
    function: str,
    q: Tensor | Facts,
    k: Tensor | Facts,
    v: Tensor | Facts,
    lengths_q: Lengths | None,
    lengths_k: Lengths | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    return_attn_probs: bool,
    uses_lse: bool,
    needs_grad: bool,
    sink: Tensor | None = None,
    mask_from: str | None = None,
    pages: Pages | None = None,
) -> Plan:
    """The plan for a call, validated when it is made. See `Options` for what no caller passes.

    With `pages`, k and v are facts of the packed tensors that the cache stands for.
    """
    key = found = None
    try:
        # fmt: off
        key = (
            function, q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype,
            q.device, k.device, v.device, lengths_q, lengths_k, max_seqlen_q, max_seqlen_k,
            dropout_p, softmax_scale, causal, window_size, softcap,
            None if alibi_slopes is None else Facts.of(alibi_slopes),
            deterministic, return_attn_probs, uses_lse, needs_grad,
            None if sink is None else Facts.of(sink), mask_from, pages,
        )
        # fmt: on
        found = recall_plan(key)
    except (AttributeError, TypeError):
        # not a tensor, or not hashable: the checks below accept it or name it
        key = None
    if found is None:
        options = _options(
            *(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes),
            *(deterministic, return_attn_probs, uses_lse, needs_grad, sink),
        )._replace(mask_from=mask_from, pages=pages)
        if pages is None:
            checks.require_plain(q=q, k=k, v=v)
        tensors = (Facts.of(q), Facts.of(k), Facts.of(v))
        if lengths_q is None or lengths_k is None:
            problem = dense_problem(function, *tensors, options)
        else:
            assert max_seqlen_q is not None
            assert max_seqlen_k is not None
            longest = (max_seqlen_q, max_seqlen_k)
            problem = varlen_problem(function, *tensors, lengths_q, lengths_k, longest, options)
        found = _plan(problem)
        remember_plan(key, found)
    return found


def permit(found: Plan) -> None:
    """Apply the fallback policy to a plan; a problem without work loses nothing by no fusion."""
    problem = found.problem
    if not found.reasons or not problem.has_work:
        return
    detour = None if found.name == BLOCKWISE else f"gathers its keys for {found.name}"
    policy.permit(problem.function, problem.device, found.reasons, detour=detour)


def _plan(problem: Problem) -> Plan:
    from ..kernels import blockwise, fusion, infer

    passed_over: tuple[str, ...] = ()
    order: list[tuple[str, ModuleType]] = [(FUSION, fusion), (BLOCKWISE, blockwise)]
    if problem.pages is not None:
        order.insert(0, (INFER, infer))
    for name, kernel in order:
        reasons = refusals(name, problem)
        if not reasons:
            own_autograd = kernel is fusion and problem.pages is None
            direct = fusion.direct(problem) if own_autograd else None
            tally = usage.tally(problem.function, name, passed_over)
            return Plan(problem, name, kernel, direct, passed_over, tally)
        passed_over += (f"{name}: {', '.join(reasons)}",)
    raise UnsupportedError(
        explain(
            problem.function,
            "a call that no kernel can serve",
            "; ".join(passed_over),
            "change the arguments named here",
        )
    )


def remember_plan(key: tuple[Any, ...] | None, found: Plan) -> None:
    """Let `recall_plan(key)` answer; the key must hold all that the plan depends on."""
    # a number given as a tensor may change under the same key
    if key is None or any(_holds_tensor(part) for part in key):
        return
    _plans.put(key, found)


def _holds_tensor(part: Any) -> bool:
    if type(part) is tuple:
        return any(isinstance(entry, Tensor) for entry in part)
    return isinstance(part, Tensor)


def _options(
    dropout_p: Any,
    softmax_scale: Any,
    causal: Any,
    window_size: Any,
    softcap: Any,
    alibi_slopes: Any,
    deterministic: Any,
    return_attn_probs: Any,
    uses_lse: Any,
    needs_grad: Any,
    sink: Any,
) -> Options:
    for argument, value in (("alibi_slopes", alibi_slopes), ("sink", sink)):
        if value is not None:
            checks.require_plain(**{argument: value})
    plain = checks.plain(
        *(dropout_p, softmax_scale, causal, window_size, softcap),
        *(deterministic, return_attn_probs),
    )
    return Options(
        **plain._asdict(),
        alibi_slopes=None if alibi_slopes is None else Facts.of(alibi_slopes),
        uses_lse=bool(uses_lse),
        needs_grad=bool(needs_grad),
        sink=None if sink is None else Facts.of(sink),
    )
