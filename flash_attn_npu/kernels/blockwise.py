"""Exact attention on any device, composed of torch operations, memory linear in sequence length.

This file lays a problem out as groups of equally long sequences; the arithmetic is in `tiles`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..attention.problem import Problem
from ..attention.result import Forward, Saved, accumulator, rounded_up
from .tiles import Band, Scoring, Streams, attend, attend_backward, probabilities

__all__ = ["backward", "forward"]

STREAMS_AT_ONCE = 64
"""Sequences times heads that share a tile: few enough for tiles to stay large."""

MASK_OF_BLOCKWISE = -1
"""The offset in rng_state of a dropout mask drawn here; a fused kernel's is never negative."""


def forward(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None = None,
    sink: Tensor | None = None,
) -> Forward:
    """Attention without autograd; rows of no sequence give 0 and +inf."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    shape = (problem.rows_q,) if problem.varlen else (problem.batch, q.shape[1])
    lse = torch.empty(
        (*shape[:-1], problem.nheads, shape[-1]), dtype=accumulator(q.dtype), device=q.device
    )
    if problem.tail_q:
        out[-problem.tail_q :] = 0
        lse[:, -problem.tail_q :] = math.inf
    rng_state = _draw_seed(problem)
    s_dmask = _empty_s_dmask(problem, q)
    with torch.autocast(q.device.type, enabled=False):
        for group in _groups(problem):
            scoring = _scoring(problem, group, slopes, rng_state, sink)
            streams = group.streams(q, k, v, out, lse)
            attend(streams, group.band, scoring)
            if s_dmask.numel():
                probabilities(streams, group.band, scoring, group.square(s_dmask))
    return Forward(out, lse, s_dmask, rng_state)


def backward(
    problem: Problem,
    dout: Tensor,
    saved: Saved,
    grads: tuple[Tensor, Tensor, Tensor],
    slopes: Tensor | None,
    rng_state: Tensor | None,
) -> None:
    """Write dq, dk, dv into `grads`, where they lie."""
    dq, dk, dv = grads
    if not problem.nheads:
        dk.zero_()
        dv.zero_()
    if problem.varlen:
        dq[sum(problem.seqlens_q) :] = 0
        dk[sum(problem.seqlens_k) :] = 0
        dv[sum(problem.seqlens_k) :] = 0
    with torch.autocast(dq.device.type, enabled=False):
        for group in _groups(problem):
            scoring = _scoring(problem, group, slopes, rng_state)
            views = (group.queries(dq), group.keys(dk), group.keys(dv))
            streams = group.streams(*saved)
            attend_backward(streams, group.band, scoring, group.queries(dout), views)


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

    def square(self, s_dmask: Tensor) -> Tensor:
        """(batch, nheads_k, group, seqlen_q, seqlen_k) view of (batch, nheads, ...)."""
        part = s_dmask[self.sequences, :, : self.band.seqlen_q, : self.band.seqlen_k]
        square: Tensor = part.unflatten(1, (self.nheads_k, -1))
        return square

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
    problem: Problem,
    group: _Group,
    slopes: Tensor | None,
    rng_state: Tensor | None,
    sink: Tensor | None = None,
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
        None if sink is None else sink.reshape(*heads, 1),
        problem.dropout_p,
        int(rng_state[0]) if problem.dropout_p and rng_state is not None else 0,
    )


def _draw_seed(problem: Problem) -> Tensor:
    """int64 (seed, -1), drawn from torch's default generator so that manual_seed repeats it."""
    seed = 0
    if problem.dropout_p:
        seed = int(torch.randint(1 << 62, (), device="cpu"))
    offset = MASK_OF_BLOCKWISE if problem.dropout_p else 0
    return torch.tensor([seed, offset], dtype=torch.int64, device="cpu")


def _empty_s_dmask(problem: Problem, q: Tensor) -> Tensor:
    if not problem.s_dmask:
        return q.new_empty(0)
    sides = (
        rounded_up(problem.max_seqlen_q),
        rounded_up(problem.max_seqlen_k),
    )
    return q.new_zeros(problem.batch, problem.nheads, *sides)
