"""ALiBi for fewer queries than keys: the fused kernel is documented for as many.

Rows of zeros are put in front of the queries of each sequence until it has as many as keys. Both
count positions from the end then, so the others see the keys and the distances that flash-attn
defines, and what the kernel answers for the rows of zeros is left out. In a backward these have a
gradient of 0 and probabilities of 0, so they add nothing to dk and dv.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...ground.memory import Memo
from ...problems.attention import Problem
from ...problems.results import Forward, Inputs, Saved
from . import fusion_attention

__all__ = ["KERNEL", "fills", "pairs"]

BELOW_ALL = torch.finfo(torch.float32).max / 2
"""softmax_lse of a row of zeros, from which a backward makes probabilities of 0."""


class _Filled(NamedTuple):
    """A problem with as many queries as keys, and where the queries lie before and in it.

    Of packed sequences these are positions on the device. Dense ones have `missing` rows of zeros
    each, and no positions.
    """

    problem: Problem
    missing: int
    source: Tensor
    places: Tensor

    @property
    def nbytes(self) -> int:
        return self.problem.nbytes + self.source.nbytes + self.places.nbytes

    def fill(self, x: Tensor, value: float = 0.0) -> Tensor:
        """A tensor laid out as q, filled up."""
        if not self.problem.varlen:
            return pad(x, (0, 0, 0, 0, self.missing, 0), value=value)
        whole = x.new_full((self.problem.rows_q, *x.shape[1:]), value)
        return whole.index_copy(0, self.places, x.index_select(0, self.source))

    def fill_lse(self, lse: Tensor) -> Tensor:
        if not self.problem.varlen:
            return pad(lse, (self.missing, 0), value=BELOW_ALL)
        return self.fill(lse.t(), BELOW_ALL).t().contiguous()

    def cut(self, filled: Tensor, like: Tensor, value: float = 0.0) -> Tensor:
        """The rows of `like` of a tensor that was filled up; `value` where there is none."""
        if not self.problem.varlen:
            return filled[:, self.missing :].contiguous()
        whole = filled.new_full((like.shape[0], *filled.shape[1:]), value)
        return whole.index_copy(0, self.source, filled.index_select(0, self.places))

    def cut_lse(self, lse: Tensor, like: Tensor) -> Tensor:
        if not self.problem.varlen:
            return lse[..., self.missing :].contiguous()
        return self.cut(lse.t(), like, torch.inf).t().contiguous()


_filled_up: Memo[Problem, _Filled] = Memo("queries filled up to their keys", 64, nbytes=1 << 26)


def fills(problem: Problem) -> bool:
    """Whether the kernel is given rows of zeros, and not an offset."""
    return problem.alibi and problem.most_missing > 0 and not fusion_attention.offset_of(problem)


def pairs(problem: Problem) -> int:
    """Query-key pairs of all heads when as many queries as keys are computed."""
    squares = sum(seqlen_k**2 * len(them) for (_, seqlen_k), them in problem.sequences.items())
    return problem.nheads * squares


def direct(problem: Problem) -> Callable[..., Any]:
    """As the kernel's; rows of zeros pass through torch_npu's autograd."""
    if not fills(problem):
        return fusion_attention.direct(problem)
    filled = _filled(problem)
    kernel = fusion_attention.direct(filled.problem)

    def run(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, sink: Tensor | None) -> Any:
        answer = kernel(filled.fill(q), k, v, slopes, sink)
        if not problem.uses_lse:
            return filled.cut(answer, q)
        out, lse, s_dmask = answer
        return filled.cut(out, q), filled.cut_lse(lse, q), s_dmask

    return run


def observed(problem: Problem) -> Callable[..., tuple[Any, fusion_attention.Seen]]:
    """As the kernel's, which answers for more rows than the call has."""
    if not fills(problem):
        return fusion_attention.observed(problem)
    filled = _filled(problem)
    kernel = fusion_attention.observed(filled.problem)

    def observe(
        q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, sink: Tensor | None
    ) -> tuple[Any, fusion_attention.Seen]:
        answer, seen = kernel(filled.fill(q), k, v, slopes, sink)
        there = seen._replace(
            shifts=lambda sequence: _shifts(problem, sequence, seen.shifts(sequence)),
            given_q=lambda x: seen.given_q(filled.fill(x)),
            asked=lambda x: filled.cut(seen.asked(x), q),
        )
        if not problem.uses_lse:
            return filled.cut(answer, q), there
        out, lse, s_dmask = answer
        return (filled.cut(out, q), filled.cut_lse(lse, q), s_dmask), there

    return observe


def _shifts(
    problem: Problem, sequence: int, inner: tuple[int, int] | None
) -> tuple[int, int] | None:
    """How far from its place in the call a sequence lies in what the kernel was given."""
    if inner is None:
        return None
    if problem.lengths_q is None or problem.lengths_k is None:
        return inner[0] + problem.most_missing, inner[1]
    ends = (problem.lengths_q.ends[sequence], problem.lengths_k.ends[sequence])
    return inner[0] + ends[1] - ends[0], inner[1]


def forward(problem: Problem, inputs: Inputs) -> Forward:
    """As the kernel's."""
    if not fills(problem):
        return fusion_attention.forward(problem, inputs)
    filled, q = _filled(problem), inputs.q
    answer = fusion_attention.forward(filled.problem, inputs._replace(q=filled.fill(q)))
    lse = answer.softmax_lse
    return answer._replace(
        out=filled.cut(answer.out, q), softmax_lse=filled.cut_lse(lse, q) if lse.numel() else lse
    )


def backward(
    problem: Problem, dout: Tensor, saved: Saved, grads: tuple[Tensor, Tensor, Tensor]
) -> None:
    """As the kernel's."""
    if not fills(problem):
        fusion_attention.backward(problem, dout, saved, grads)
        return
    filled = _filled(problem)
    q = filled.fill(saved.q)
    whole = saved._replace(
        q=q, out=filled.fill(saved.out), softmax_lse=filled.fill_lse(saved.softmax_lse)
    )
    dq = torch.empty_like(q)
    fusion_attention.backward(filled.problem, filled.fill(dout), whole, (dq, *grads[1:]))
    grads[0].copy_(filled.cut(dq, saved.q))


def _filled(problem: Problem) -> _Filled:
    known = _filled_up.recall(problem)
    if known is None:
        # it outlives this call, and a backward cannot save a tensor made in inference mode
        with torch.inference_mode(False):
            known = _fill(problem)
        _filled_up.put(problem, known)
    return known


def _fill(problem: Problem) -> _Filled:
    queries = replace(
        problem,
        rows_q=problem.total_k,
        lengths_q=problem.lengths_k,
        max_seqlen_q=problem.max_seqlen_k,
    )
    if problem.lengths_q is None or problem.lengths_k is None:
        nothing = torch.empty(0, dtype=torch.int64, device="cpu")
        return _Filled(queries, problem.most_missing, nothing, nothing)
    # sequences with more queries than keys lose those that see none
    lengths = zip(problem.lengths_q.seqlens, problem.lengths_k.seqlens, strict=True)
    kept = _ints(q - problem.blind(q, k) for q, k in lengths)
    first = (kept.cumsum(0) - kept).repeat_interleave(kept)
    steps = torch.arange(int(kept.sum()), device="cpu") - first
    # the last rows of each sequence, before and after
    source, places = (
        (_ints(side.ends) - kept).repeat_interleave(kept) + steps
        for side in (problem.lengths_q, problem.lengths_k)
    )
    return _Filled(queries, 0, source.to(problem.device), places.to(problem.device))


def _ints(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64, device="cpu")


KERNEL = fusion_attention.KERNEL._replace(
    forward=forward, backward=backward, direct=direct, observed=observed
)
