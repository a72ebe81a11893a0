"""A sample of a problem's tensors, copied to the host: a few rows, not a batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.ascend import dropout, filling
from ..problems.attention import Problem
from ..problems.places import Layout, positions
from ..problems.results import Inputs
from .samples import Spot
from .truth import Band, Piece

__all__ = ["Drawn", "Reader", "dropout_bits"]


class Drawn(NamedTuple):
    """Where the dropout mask of a call comes from: the generator's state, as the kernel gave it."""

    seed: int
    offset: int


class Reader:
    """Reads what a check needs of one call.

    Attributes:
        mask: the bits by which the kernel dropped, on the device; None if it cannot be told.
    """

    def __init__(self, problem: Problem, inputs: Inputs, mask: Tensor | None) -> None:
        self.problem, self.inputs, self.mask = problem, inputs, mask
        self.group = problem.nheads // problem.nheads_k

    def rows(self, x: Tensor, spot: Spot, rows: Tensor, heads: tuple[int, ...]) -> Tensor:
        """(rows, heads, headdim) of a tensor laid out as q."""
        source = x.detach() if self.problem.varlen else x.detach()[spot.sequence]
        return _part(source, rows + spot.start_q, heads)

    def keys(self, x: Tensor, spot: Spot, columns: Tensor, heads: tuple[int, ...]) -> Tensor:
        """(columns, heads, headdim) of a tensor laid out as k, or of a cache, for key heads."""
        cache = self.inputs.cache
        if cache is not None and x.dim() == 4:
            span = self.inputs.spans[spot.sequence]
            page, place = positions(_of_one(cache.layout, spot.sequence), (span,), x.device)
            picked = columns.to(x.device)
            some = torch.tensor(heads, device=x.device)
            where = (page[picked][:, None], place[picked][:, None], some[None])
            return x.detach()[where].cpu()
        source = x.detach() if self.problem.varlen else x.detach()[spot.sequence]
        return _part(source, columns + spot.start_k, heads)

    def band(self, spot: Spot, heads: tuple[int, ...]) -> Band:
        problem, slopes = self.problem, self.inputs.alibi_slopes
        if slopes is not None:
            row = slopes.detach()[spot.sequence] if slopes.dim() == 2 else slopes.detach()
            slopes = row.cpu().double()[list(heads)]
        lengths = (spot.seqlen_q, spot.seqlen_k)
        return Band(*lengths, problem.left, problem.right, problem.softmax_scale, slopes)

    def piece(self, spot: Spot, rows: Tensor, columns: Tensor, heads: tuple[int, ...]) -> Piece:
        """The scores of these rows and columns, in these query heads."""
        key_heads = tuple(sorted({head // self.group for head in heads}))
        own = [key_heads.index(head // self.group) for head in heads]
        k, v = (self.keys(x, spot, columns, key_heads) for x in (self.inputs.k, self.inputs.v))
        sink = self.inputs.sink
        return Piece(
            self.band(spot, heads),
            rows,
            columns,
            self.rows(self.inputs.q, spot, rows, heads),
            k[:, own],
            v[:, own],
            None if sink is None else sink.detach().cpu().double()[list(heads)],
            *self._kept(spot, rows, columns, heads),
        )

    def _kept(
        self, spot: Spot, rows: Tensor, columns: Tensor, heads: tuple[int, ...]
    ) -> tuple[Tensor | None, float]:
        if self.mask is None:
            return None, 1.0
        problem = self.problem
        first = problem.blind(spot.seqlen_q, spot.seqlen_k)
        seeing = spot.seqlen_q - first
        head = torch.tensor(heads, device="cpu")[:, None, None]
        row = (rows - first).clamp(min=0)[None, :, None]
        bit = (head * seeing + row) * spot.seqlen_k + columns[None, None]
        bit += _pairs_before(problem, spot.sequence) * problem.nheads
        octets = self.mask[(bit // 8).to(self.mask.device)].cpu().to(torch.int64)
        return (octets >> (bit % 8)) & 1 == 1, 1.0 - problem.dropout_p


def dropout_bits(problem: Problem, q: Tensor, drawn: Drawn) -> Tensor | None:
    """The mask of a call drawn again; None where that cannot be done."""
    if filling.fills(problem):
        # it is that of other rows
        return None
    count = _pairs_before(problem, problem.batch) * problem.nheads
    return dropout.bits(q, count, problem.dropout_p, drawn.seed, drawn.offset)


def _pairs_before(problem: Problem, sequence: int) -> int:
    """Pairs of a seeing query and a key of one head, in all sequences before this one."""
    if problem.lengths_q is None or problem.lengths_k is None:
        seqlen_q, seqlen_k = problem.max_seqlen_q, problem.max_seqlen_k
        return sequence * (seqlen_q - problem.blind(seqlen_q, seqlen_k)) * seqlen_k
    pairs = zip(problem.lengths_q.seqlens, problem.lengths_k.seqlens, strict=True)
    return sum((q - problem.blind(q, k)) * k for q, k in list(pairs)[:sequence])


def _of_one(layout: Layout, sequence: int) -> Layout:
    width = layout.width
    return layout._replace(ids=layout.ids[sequence * width : (sequence + 1) * width])


def _part(x: Tensor, rows: Tensor, heads: tuple[int, ...]) -> Tensor:
    """(rows, heads, headdim) of (rows, heads, headdim), copied to the host."""
    first, count = (int(rows[0]), len(rows)) if len(rows) else (0, 0)
    some = torch.tensor(heads, device=x.device)
    if count and int(rows[-1]) - first + 1 == count:
        return x[first : first + count].index_select(1, some).cpu()
    return x[rows.to(x.device)[:, None], some[None]].cpu()
