"""Exact attention on any device, composed of torch operations, memory linear in sequence length.

This file lays a problem out as groups of equally long sequences and makes the result
differentiable; the arithmetic is in `tiles`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..attention.problem import Problem
from ..attention.result import Result
from .tiles import Band, Scoring, Streams, accumulator, attend, attend_backward

__all__ = ["NAME", "backward", "forward", "prepare"]

NAME = "blockwise"

STREAMS_AT_ONCE = 64
"""Sequences times heads that share a tile: few enough for tiles to stay large."""


def prepare(problem: Problem) -> tuple[Callable[..., Result], bool]:
    """A function (q, k, v, alibi_slopes, sink) -> Result, and that its output is not bare.

    It is differentiable in everything but the slopes.
    """

    def run(
        q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None = None, sink: Tensor | None = None
    ) -> Result:
        out, lse, rng_state = _Blockwise.apply(q, k, v, slopes, sink, problem)  # type: ignore[no-untyped-call]
        return Result(out, lse, rng_state)

    return run, False


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        slopes, sink, problem = rest
        out, lse, rng_state = forward(problem, q, k, v, slopes, sink)
        ctx.save_for_backward(q, k, v, slopes, sink, out, lse, rng_state)
        ctx.problem = problem
        ctx.mark_non_differentiable(lse, rng_state)
        return out, lse, rng_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        q, k, v, slopes, sink, out, lse, rng_state = ctx.saved_tensors
        grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        dsink = backward(ctx.problem, dout, (q, k, v, out, lse), grads, slopes, sink, rng_state)
        return (*grads, None, dsink, None)


def forward(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None = None,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, softmax_lse, rng_state) in flash-attn's layouts; rows of no sequence: 0 and +inf."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    shape = (problem.rows_q,) if problem.varlen else (problem.batch, q.shape[1])
    lse = torch.empty(
        (*shape[:-1], problem.nheads, shape[-1]), dtype=accumulator(q.dtype), device=q.device
    )
    if problem.tail_q:
        out[-problem.tail_q :] = 0
        lse[:, -problem.tail_q :] = math.inf
    rng_state = _draw_seed(problem)
    with torch.autocast(q.device.type, enabled=False):
        for group in _groups(problem):
            scoring = _scoring(problem, group, slopes, sink, rng_state)
            attend(group.streams(q, k, v, out, lse), group.band, scoring)
    return out, lse, rng_state


def backward(
    problem: Problem,
    dout: Tensor,
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    grads: tuple[Tensor, ...],
    slopes: Tensor | None,
    sink: Tensor | None,
    rng_state: Tensor,
) -> Tensor | None:
    """Write dq, dk, dv into `grads`, where they lie, from saved = (q, k, v, out, softmax_lse).

    Returns the gradient of the sink, None without one.
    """
    dq, dk, dv = grads
    if problem.varlen:
        dq[sum(problem.seqlens_q) :] = 0
        dk[sum(problem.seqlens_k) :] = 0
        dv[sum(problem.seqlens_k) :] = 0
    dsink = None if sink is None else torch.zeros_like(sink, dtype=accumulator(dq.dtype))
    with torch.autocast(dq.device.type, enabled=False):
        for group in _groups(problem):
            scoring = _scoring(problem, group, slopes, sink, rng_state)
            views = (group.queries(dq), group.keys(dk), group.keys(dv))
            part = attend_backward(
                group.streams(*saved), group.band, scoring, group.queries(dout), views
            )
            if dsink is not None and part is not None:
                dsink += part.flatten()
    return None if sink is None or dsink is None else dsink.to(sink.dtype)


@dataclass(frozen=True)
class _Group:
    """Equally long sequences: a range of batch rows of a dense problem, or one packed sequence."""

    band: Band
    nheads_k: int
    sequences: slice
    rows_q: slice
    rows_k: slice
    packed: bool

    def queries(self, x: Tensor) -> Tensor:
        """(batch, nheads_k, group, seqlen, headdim) view of a tensor laid out as q."""
        return self._view(x, self.rows_q)

    def keys(self, x: Tensor) -> Tensor:
        """(batch, nheads_k, 1, seqlen, headdim) view of a tensor laid out as k."""
        return self._view(x, self.rows_k)

    def streams(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Streams:
        rows = lse[None, :, self.rows_q] if self.packed else lse[self.rows_q]
        return Streams(
            self.queries(q),
            self.keys(k),
            self.keys(v),
            self.queries(out),
            rows.unflatten(1, (self.nheads_k, -1)),
            place=self.sequences.start,
        )

    def _view(self, x: Tensor, rows: slice) -> Tensor:
        x = x[None, rows] if self.packed else x[rows]
        heads: Tensor = x.transpose(1, 2).unflatten(1, (self.nheads_k, -1))
        return heads


def _groups(problem: Problem) -> Iterator[_Group]:
    if not problem.nheads:
        return
    if problem.lengths_q is not None and problem.lengths_k is not None:
        spans = zip(
            pairwise(problem.lengths_q.cumulative),
            pairwise(problem.lengths_k.cumulative),
            strict=True,
        )
        for index, (rows_q, rows_k) in enumerate(spans):
            band = Band(rows_q[1] - rows_q[0], rows_k[1] - rows_k[0], problem.left, problem.right)
            sequence = slice(index, index + 1)
            yield _Group(
                band, problem.nheads_k, sequence, slice(*rows_q), slice(*rows_k), packed=True
            )
        return
    step = max(1, STREAMS_AT_ONCE // problem.nheads)
    for first in range(0, problem.batch, step):
        rows = slice(first, min(first + step, problem.batch))
        band = Band(problem.seqlens_q[0], problem.seqlens_k[0], problem.left, problem.right)
        yield _Group(band, problem.nheads_k, rows, rows, rows, packed=False)


def _scoring(
    problem: Problem, group: _Group, slopes: Tensor | None, sink: Tensor | None, rng_state: Tensor
) -> Scoring:
    heads = (problem.nheads_k, problem.nheads // problem.nheads_k)
    if slopes is not None:
        if slopes.dim() == 2:
            slopes = slopes[group.sequences]
        slopes = slopes.reshape(-1, *heads, 1, 1)
    return Scoring(
        problem.softmax_scale,
        problem.softcap,
        slopes,
        None if sink is None else sink.detach().reshape(*heads, 1),
        problem.dropout_p,
        int(rng_state[0]) if problem.dropout_p else 0,
    )


def _draw_seed(problem: Problem) -> Tensor:
    """int64 (seed, offset): drawn from torch's default generator, so manual_seed repeats it."""
    state = torch.zeros(2, dtype=torch.int64)
    if problem.dropout_p:
        state[0] = torch.randint(1 << 62, (), dtype=torch.int64)
    return state
