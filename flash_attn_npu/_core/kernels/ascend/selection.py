"""Which rows of a problem the fused kernel is given, and how its answer is put back.

The kernel refuses packed queries that see no key, keys of length 0 under a mask, and rows past
the last sequence. They are left out before the call and answered with zeros and +inf after it.
A dense problem loses the first rows of every sequence; a packed one loses the blind rows of
each sequence, the sequences that are empty then, and the tail.

Hundreds of sequences of one token, as clients describe padding, crash the packed kernel (ByteDance
VeOmni, pull request 918). A problem with more than a few of them loses those too: their token sees
one key, so `singles` answers them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...ground.functions import listed
from ...ground.memory import Memo
from ...problems.attention import Problem

__all__ = ["Rows"]

Places = slice | Tensor
"""Rows of a packed tensor: those of a range, or by their positions, on the device."""


class _Index(NamedTuple):
    """Where in packed tensors that lies which the kernel is given, and where the single tokens.

    Tensors are made on the host and copied once. sequences: those that are given.
    """

    q: Places
    k: Places
    single_q: Places
    single_k: Places
    sequences: Tensor | None

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self if isinstance(x, Tensor))


_indices: Memo[Problem, _Index] = Memo(
    "positions of rows that a kernel is given", 64, nbytes=1 << 26
)


class Rows:
    """The selection for one problem.

    Attributes:
        untouched: nothing is left out.
        ends_q, ends_k: cumulative lengths of what is left, None for dense problems.
        total_q, total_k: rows that are left of q and of k.
        pairs: query-key pairs of what is left, over all sequences, for one head.
        singles: how many sequences of one token are answered beside the kernel.
    """

    def __init__(self, problem: Problem) -> None:
        self.varlen = problem.varlen
        self.blind = 0 if problem.varlen else problem.most_blind
        self.rows_q, self.rows_k = problem.rows_q, problem.rows_k
        self.singles = len(problem.sequences[1, 1]) if problem.many_singles else 0
        self.total_q = problem.seeing_rows - self.singles
        self.total_k = problem.total_k - self.singles
        self.pairs = sum(
            (seqlen_q - problem.blind(seqlen_q, seqlen_k)) * seqlen_k * len(them)
            for (seqlen_q, seqlen_k), them in problem.sequences.items()
        )
        self._problem = problem
        self._scattered = problem.varlen and (problem.most_blind > 0 or self.singles > 0)
        self.ends_q: list[int] | None = None
        self.ends_k: list[int] | None = None
        if not problem.varlen:
            self.untouched = self.blind == 0
            return
        self.ends_q, self.ends_k = _ends(problem)
        self.untouched = self.total_q == problem.rows_q and self.total_k == problem.rows_k

    @property
    def nbytes(self) -> int:
        return self._problem.nbytes

    @property
    def nothing(self) -> bool:
        """Whether the kernel would be given no query, and is not called."""
        return self.singles > 0 and self.total_q == 0

    @property
    def _index(self) -> _Index | None:
        """Where what is given lies; None where it is the first rows."""
        if not self._scattered:
            return None
        index = _indices.recall(self._problem)
        if index is None:
            index = _seeing_index(self._problem)
            _indices.put(self._problem, index)
        return index

    def take_q(self, x: Tensor) -> Tensor:
        """The rows of a tensor laid out as q."""
        if not self.varlen:
            return x[:, self.blind :]
        index = self._index
        return x[: self.total_q] if index is None else _taken(x, index.q, 0)

    def take_k(self, x: Tensor) -> Tensor:
        """The rows of a tensor laid out as k."""
        if not self.varlen:
            return x
        index = self._index if self.singles else None
        return x[: self.total_k] if index is None else _taken(x, index.k, 0)

    def take_lse(self, lse: Tensor) -> Tensor:
        """The rows of (batch, nheads, seqlen_q) or (nheads, total_q)."""
        if not self.varlen:
            return lse[..., self.blind :]
        index = self._index
        return lse[:, : self.total_q] if index is None else _taken(lse, index.q, 1)

    def take_slopes(self, slopes: Tensor) -> Tensor:
        """Those of the sequences that are left."""
        index = self._index if self.singles and slopes.dim() == 2 else None
        if index is None or index.sequences is None:
            return slopes
        return slopes.index_select(0, index.sequences)

    def take_singles(self, q: Tensor, *keys: Tensor) -> tuple[Tensor, ...]:
        """The single tokens, of a tensor laid out as q and of others laid out as k."""
        index = self._index
        assert index is not None
        return _taken(q, index.single_q, 0), *(_taken(x, index.single_k, 0) for x in keys)

    def shifts(self, sequence: int) -> tuple[int, int] | None:
        """How far from its place in q and in k a sequence lies in what is given; None: nowhere."""
        problem = self._problem
        if problem.lengths_q is None or problem.lengths_k is None:
            return -self.blind, 0
        pairs = list(zip(problem.lengths_q.seqlens, problem.lengths_k.seqlens, strict=True))
        if self.singles and pairs[sequence] == (1, 1):
            return None
        singles = pairs[:sequence].count((1, 1)) if self.singles else 0
        blind = sum(problem.blind(*pair) for pair in pairs[: sequence + 1])
        return -blind - singles, -singles

    def restore(self, out: Tensor, singles: Tensor | None = None) -> Tensor:
        """All rows of q again, zeros where nothing was computed; differentiable."""
        if not self.varlen:
            return pad(out, (0, 0, 0, 0, self.blind, 0)) if self.blind else out
        index = self._index
        if index is not None:
            return _spread(out.new_zeros(self.rows_q, *out.shape[1:]), 0, index, out, singles)
        tail = self.rows_q - self.total_q
        return pad(out, (0, 0, 0, 0, 0, tail)) if tail else out

    def restore_lse(self, lse: Tensor, singles: Tensor | None = None) -> Tensor:
        """All rows of softmax_lse again, +inf where nothing was computed."""
        if not self.varlen:
            return pad(lse, (self.blind, 0), value=math.inf) if self.blind else lse
        index = self._index
        if index is not None:
            whole = lse.new_full((lse.shape[0], self.rows_q), math.inf)
            return _spread(whole, 1, index, lse, singles)
        tail = self.rows_q - self.total_q
        return pad(lse, (0, tail), value=math.inf) if tail else lse

    def write_q(self, target: Tensor, part: Tensor, singles: Tensor | None = None) -> None:
        """Write rows into a tensor laid out as q, where it lies, and zeros beside them."""
        index = self._index
        if index is not None:
            _write(target, index.q, part, index.single_q, singles)
        elif self.varlen:
            target[: self.total_q] = part
            target[self.total_q :] = 0
        else:
            target[:, : self.blind] = 0
            target[:, self.blind :] = part

    def write_k(self, target: Tensor, part: Tensor, singles: Tensor | None = None) -> None:
        """Write rows into a tensor laid out as k, where it lies, and zeros beside them."""
        index = self._index if self.singles else None
        if index is not None:
            _write(target, index.k, part, index.single_k, singles)
        elif self.varlen:
            target[: self.total_k] = part
            target[self.total_k :] = 0
        else:
            target.copy_(part)


def _taken(x: Tensor, places: Places, dim: int) -> Tensor:
    if isinstance(places, slice):
        return x.narrow(dim, places.start, places.stop - places.start)
    return x.index_select(dim, places)


def _spread(
    whole: Tensor, dim: int, index: _Index, given: Tensor, singles: Tensor | None
) -> Tensor:
    """`whole` with the rows of the kernel and the single ones at their places."""
    if singles is not None and isinstance(index.q, slice) and isinstance(index.single_q, slice):
        # the single ones are the last, as padding is
        rest = whole.narrow(dim, index.single_q.stop, whole.shape[dim] - index.single_q.stop)
        return torch.cat((given, singles, rest), dim)
    for places, rows in ((index.q, given), (index.single_q, singles)):
        if rows is not None:
            whole = whole.index_copy(dim, _positions(places, whole.device), rows)
    return whole


def _write(
    target: Tensor, places: Places, part: Tensor, single: Places, singles: Tensor | None
) -> None:
    target.zero_()
    for where, rows in ((places, part), (single, singles)):
        if rows is None:
            continue
        if isinstance(where, slice):
            target[where] = rows
        else:
            target.index_copy_(0, where, rows)


def _positions(places: Places, device: torch.device) -> Tensor:
    if isinstance(places, slice):
        return torch.arange(places.start, places.stop, device=device)
    return places


def _ends(problem: Problem) -> tuple[list[int], list[int]]:
    """Cumulative lengths of the rows that are left, without sequences empty on both sides.

    Sequences without queries that follow each other are one: nobody looks at their keys.
    """
    seqlens_q, seqlens_k, blind = _seqlens(problem)
    seeing = seqlens_q - blind
    kept = (seeing > 0) | (seqlens_k > 0)
    if problem.many_singles:
        kept &= ~_single(seqlens_q, seqlens_k)
    ends_q, ends_k = seeing[kept].cumsum(0), seqlens_k[kept].cumsum(0)
    idle = seeing[kept] == 0
    last = torch.cat((~(idle[:-1] & idle[1:]), idle.new_ones(min(1, len(idle)))))
    return listed(ends_q[last]), listed(ends_k[last])


def _seeing_index(problem: Problem) -> _Index:
    # it outlives this call, and a backward cannot save a tensor made in inference mode
    with torch.inference_mode(False):
        seqlens_q, seqlens_k, blind = _seqlens(problem)
        sequence = torch.repeat_interleave(seqlens_q)
        position = torch.arange(problem.total_q, device="cpu")
        first = seqlens_q.cumsum(0) - seqlens_q + blind
        seeing = position >= first[sequence]
        nothing = slice(0, 0)
        if not problem.many_singles:
            return _Index(_on(problem, seeing), nothing, nothing, nothing, None)
        single = _single(seqlens_q, seqlens_k)
        single_q, single_k = (single.repeat_interleave(x) for x in (seqlens_q, seqlens_k))
        return _Index(
            _on(problem, seeing & ~single_q),
            _on(problem, ~single_k),
            _on(problem, single_q),
            _on(problem, single_k),
            (~single).nonzero().flatten().to(problem.device),
        )


def _on(problem: Problem, mask: Tensor) -> Places:
    """Where a mask is true: a range if it is one, so that nothing is copied."""
    places = mask.nonzero().flatten()
    count = places.numel()
    if problem.many_singles and count and int(places[-1]) - int(places[0]) + 1 == count:
        return slice(int(places[0]), int(places[-1]) + 1)
    return places.to(problem.device) if count else slice(0, 0)


def _single(seqlens_q: Tensor, seqlens_k: Tensor) -> Tensor:
    return (seqlens_q == 1) & (seqlens_k == 1)


def _seqlens(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Of each sequence seqlen_q, seqlen_k, and how many queries see no key; on the host."""
    assert problem.lengths_q is not None
    assert problem.lengths_k is not None
    seqlens_q, seqlens_k = (
        torch.tensor(lengths.seqlens, dtype=torch.int64, device="cpu")
        for lengths in (problem.lengths_q, problem.lengths_k)
    )
    # `Problem.blind`, of all at once
    right = problem.max_seqlen_q if problem.right is None else problem.right
    blind = (seqlens_q - seqlens_k - right).clamp(min=0)
    return seqlens_q, seqlens_k, torch.where(seqlens_k == 0, seqlens_q, blind)
