"""Exact attention on any device, composed of torch operations, memory linear in sequence length.

This file lays a problem out as groups of equally long sequences; the arithmetic is in `tiles`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ground.lengths import Lengths
from ...problems.attention import Problem
from ...problems.results import Forward, Inputs, Saved, accumulator, rounded_up
from ..kernel import Kernel
from .tiles import (
    TILE_ELEMENTS_ON_CPU,
    Band,
    Scoring,
    Streams,
    attend,
    attend_backward,
    probabilities,
)

__all__ = ["KERNEL"]

STREAMS_AT_ONCE = 64
"""Sequences times heads that share a tile: few enough for tiles to stay large."""

MASK_OF_BLOCKWISE = -1
"""The offset in rng_state of a dropout mask drawn here; a fused kernel's is never negative."""


def forward(problem: Problem, inputs: Inputs) -> Forward:
    """Attention without autograd; rows of no sequence give 0 and +inf."""
    q, k, v, slopes, sink = inputs[:5]
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
            if not group.q.seqlen:
                continue
            part, part_lse = group.q.space(out), group.q.space_of_rows(lse)
            streams = group.streams(q, k, v, part, part_lse)
            scoring = _scoring(problem, group, slopes, rng_state, sink)
            attend(streams, group.band, scoring)
            if s_dmask.numel():
                square = group.space_of_pairs(s_dmask)
                probabilities(streams, group.band, scoring, square.unflatten(1, group.heads))
                group.write_pairs(s_dmask, square)
            group.q.write(out, part)
            group.q.write_rows(lse, part_lse)
    return Forward(out, lse, s_dmask, rng_state)


def backward(
    problem: Problem, dout: Tensor, saved: Saved, grads: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Write dq, dk, dv into `grads`, where they lie."""
    dq, dk, dv = grads
    if not problem.nheads:
        dk.zero_()
        dv.zero_()
    if problem.varlen:
        dq[problem.total_q :] = 0
        dk[problem.total_k :] = 0
        dv[problem.total_k :] = 0
    with torch.autocast(dq.device.type, enabled=False):
        for group in _groups(problem):
            scoring = _scoring(problem, group, saved.alibi_slopes, saved.rng_state)
            q, k, v, out, lse = saved[:5]
            streams = group.streams(q, k, v, group.q.taken(out), group.q.taken_rows(lse))
            sides = (group.q, group.k, group.k)
            parts = [side.space(grad) for side, grad in zip(sides, grads, strict=True)]
            views = tuple(group.split(part) for part in parts)
            douts = group.split(group.q.taken(dout))
            attend_backward(streams, group.band, scoring, douts, views)
            for side, grad, part in zip(sides, grads, parts, strict=True):
                side.write(grad, part)


@dataclass(frozen=True)
class _Side:
    """The rows of a group in q, or in k: batch rows, or rows of packed tensors.

    at: a range of them, which is seen as it lies, or their indices, which are copied. Of a tensor
        laid out as q, what is taken is (count, seqlen, nheads, headdim).
    """

    count: int
    seqlen: int
    at: slice | Tensor
    packed: bool

    def taken(self, x: Tensor) -> Tensor:
        """The rows of a tensor laid out as q, or as k."""
        rows = x[self.at] if isinstance(self.at, slice) else x.index_select(0, self.at)
        return rows.unflatten(0, (self.count, self.seqlen)) if self.packed else rows

    def space(self, x: Tensor) -> Tensor:
        """A place to write what `write` then puts into x: x itself if it can be."""
        if isinstance(self.at, slice):
            return self.taken(x)
        return x.new_empty(self.count, self.seqlen, *x.shape[1:])

    def write(self, x: Tensor, part: Tensor) -> None:
        if not isinstance(self.at, slice):
            x.index_copy_(0, self.at, part.flatten(0, 1))

    def taken_rows(self, lse: Tensor) -> Tensor:
        """(count, nheads, seqlen) of a tensor laid out as softmax_lse."""
        return self.taken(lse.t()).transpose(1, 2) if self.packed else self.taken(lse)

    def space_of_rows(self, lse: Tensor) -> Tensor:
        return self.space(lse.t()).transpose(1, 2) if self.packed else self.space(lse)

    def write_rows(self, lse: Tensor, part: Tensor) -> None:
        if not isinstance(self.at, slice):
            lse.index_copy_(1, self.at, part.transpose(0, 1).flatten(1, 2))


@dataclass(frozen=True)
class _Group:
    """Equally long sequences, whose tiles are computed together.

    first, sequences: the first one, and where they lie in what has a row for each sequence.
    """

    band: Band
    heads: tuple[int, int]
    first: int
    sequences: slice | Tensor
    q: _Side
    k: _Side

    def streams(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Streams:
        """Of q, k and v, and of a part of out and softmax_lse."""
        return Streams(
            self.split(self.q.taken(q)),
            self.split(self.k.taken(k)),
            self.split(self.k.taken(v)),
            self.split(out),
            lse.unflatten(1, self.heads),
            place=self.first,
        )

    def split(self, part: Tensor) -> Tensor:
        """(count, nheads_k, nheads of one, seqlen, headdim) of what was taken."""
        heads: Tensor = part.transpose(1, 2).unflatten(1, (self.heads[0], -1))
        return heads

    def space_of_pairs(self, s_dmask: Tensor) -> Tensor:
        """(count, nheads, seqlen_q, seqlen_k) to be written."""
        if isinstance(self.sequences, slice):
            return s_dmask[self.sequences, :, : self.q.seqlen, : self.k.seqlen]
        sides = (self.q.seqlen, self.k.seqlen)
        return s_dmask.new_zeros(self.q.count, s_dmask.shape[1], *sides)

    def write_pairs(self, s_dmask: Tensor, part: Tensor) -> None:
        if not isinstance(self.sequences, slice):
            s_dmask[self.sequences, :, : self.q.seqlen, : self.k.seqlen] = part


def _groups(problem: Problem) -> Iterator[_Group]:
    if not problem.nheads:
        return
    heads = (problem.nheads_k, problem.nheads // problem.nheads_k)
    for (seqlen_q, seqlen_k), sequences in problem.sequences.items():
        band = Band(seqlen_q, seqlen_k, problem.left, problem.right)
        step = _at_once(problem, seqlen_q, seqlen_k)
        for start in range(0, len(sequences), step):
            these = sequences[start : start + step]
            rows = slice(these[0], these[-1] + 1)
            where = rows if rows.stop - rows.start == len(these) else _on(problem, these)
            if problem.lengths_q is None or problem.lengths_k is None:
                side_q = _Side(len(these), seqlen_q, rows, packed=False)
                side_k = _Side(len(these), seqlen_k, rows, packed=False)
            else:
                side_q = _packed(problem, these, problem.lengths_q, seqlen_q)
                side_k = _packed(problem, these, problem.lengths_k, seqlen_k)
            yield _Group(band, heads, these[0], where, side_q, side_k)


def _at_once(problem: Problem, seqlen_q: int, seqlen_k: int) -> int:
    """How many sequences share tiles: as many short ones as fill one, with their rows."""
    pairs = max(seqlen_q, 1) * max(seqlen_k, 1)
    numbers = max(seqlen_q, seqlen_k, 1) * max(problem.headdim, 1)
    short = TILE_ELEMENTS_ON_CPU // (problem.nheads * max(pairs, numbers))
    # packed ones that do not lie side by side are copied, so they are few if they are long
    return max(1, short, 1 if problem.varlen else STREAMS_AT_ONCE // problem.nheads)


def _packed(problem: Problem, sequences: Sequence[int], lengths: Lengths, seqlen: int) -> _Side:
    starts = [lengths.cumulative[sequence] for sequence in sequences]
    count, rows = len(starts), len(starts) * seqlen
    at: slice | Tensor = slice(starts[0], starts[0] + rows)
    if seqlen and starts[-1] - starts[0] != (count - 1) * seqlen:
        first = torch.tensor(starts, dtype=torch.int64, device="cpu")[:, None]
        at = (first + torch.arange(seqlen, device="cpu")).flatten().to(problem.device)
    return _Side(count, seqlen, at, packed=True)


def _on(problem: Problem, sequences: Sequence[int]) -> Tensor:
    return torch.tensor(sequences, dtype=torch.int64, device="cpu").to(problem.device)


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


KERNEL = Kernel(forward, backward, draws=lambda offset: offset < 0)
