"""A problem laid out as groups of equally long sequences, which one pass computes together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from ..ground.lengths import Lengths
from ..problems.attention import Problem
from ..problems.cache import Cache
from ..problems.places import Span
from .bands import Band

__all__ = ["Group", "Side", "groups", "groups_in_place"]


@dataclass(frozen=True, eq=False)
class Side:
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


@dataclass(frozen=True, eq=False)
class _Rows(Side):
    """Keys in rows of a cache, all at the same positions."""

    positions: slice

    def taken(self, x: Tensor) -> Tensor:
        return x[self.at, self.positions]


class Group(NamedTuple):
    """Equally long sequences, which are computed together.

    first, sequences: the first one, and where they lie in what has a row for each sequence.
    """

    band: Band
    first: int
    sequences: slice | Tensor
    q: Side
    k: Side

    def slopes(self, slopes: Tensor | None) -> Tensor | None:
        """Those of these sequences, (count or 1, nheads)."""
        if slopes is None:
            return None
        return slopes[self.sequences] if slopes.dim() == 2 else slopes[None]


def groups(
    problem: Problem, together: Callable[[int, int], int], copied: Callable[[int, int], int]
) -> Iterator[Group]:
    """The groups of a problem.

    Args:
        together: how many sequences of (seqlen_q, seqlen_k) share a group at most.
        copied: the same for packed ones that do not lie side by side.
    """
    if not problem.nheads:
        return
    for (seqlen_q, seqlen_k), sequences in problem.sequences.items():
        band = Band(seqlen_q, seqlen_k, problem.left, problem.right)
        sizes = (together(seqlen_q, seqlen_k), copied(seqlen_q, seqlen_k))
        for these in _cut(sequences, *sizes):
            rows = slice(these[0], these[-1] + 1)
            where = rows if rows.stop - rows.start == len(these) else _on(problem, these)
            if problem.lengths_q is None or problem.lengths_k is None:
                side_q = Side(len(these), seqlen_q, rows, packed=False)
                side_k = Side(len(these), seqlen_k, rows, packed=False)
            else:
                side_q = _packed(problem, these, problem.lengths_q, seqlen_q)
                side_k = _packed(problem, these, problem.lengths_k, seqlen_k)
            yield Group(band, these[0], where, side_q, side_k)


def groups_in_place(
    problem: Problem, cache: Cache | None, spans: Sequence[Span]
) -> Iterator[Group]:
    """The groups of a forward over keys where they lie: nothing is copied.

    Args:
        cache: with a row for each sequence; None where k and v are packed, with gaps.
        spans: where the keys of each sequence lie, in its row or in the packed tensors.
    """
    lengths_q = problem.lengths_q
    if lengths_q is None or not problem.nheads:
        return

    def alike(sequence: int) -> tuple[int, ...]:
        place = sequence if cache is None or cache.rows is None else cache.rows[sequence] - sequence
        return lengths_q.seqlens[sequence], *spans[sequence], place

    for key, run in groupby(range(len(spans)), alike):
        seqlen_q, start, end, _ = key
        these = list(run)
        first, last = these[0], these[-1] + 1
        if cache is None or cache.rows is None:
            side_k = Side(1, end - start, slice(start, end), packed=True)
        else:
            rows = slice(cache.rows[first], cache.rows[first] + len(these))
            side_k = _Rows(len(these), end - start, rows, False, slice(start, end))
        band = Band(seqlen_q, end - start, problem.left, problem.right)
        side_q = _packed(problem, these, lengths_q, seqlen_q)
        yield Group(band, first, slice(first, last), side_q, side_k)


def _cut(sequences: Sequence[int], together: int, copied: int) -> Iterator[Sequence[int]]:
    apart = len(sequences) - 1 != sequences[-1] - sequences[0]
    if apart and copied > 1:
        yield from (sequences[i : i + copied] for i in range(0, len(sequences), copied))
        return
    runs: list[Sequence[int]] = [sequences]
    if apart:
        numbered = groupby(enumerate(sequences), lambda pair: pair[1] - pair[0])
        runs = [[sequence for _, sequence in run] for _, run in numbered]
    for run in runs:
        yield from (run[i : i + together] for i in range(0, len(run), together))


def _packed(problem: Problem, sequences: Sequence[int], lengths: Lengths, seqlen: int) -> Side:
    starts = [lengths.cumulative[sequence] for sequence in sequences]
    count, rows = len(starts), len(starts) * seqlen
    at: slice | Tensor = slice(starts[0], starts[0] + rows)
    if seqlen and starts[-1] - starts[0] != (count - 1) * seqlen:
        first = torch.tensor(starts, dtype=torch.int64, device="cpu")[:, None]
        at = (first + torch.arange(seqlen, device="cpu")).flatten().to(problem.device)
    return Side(count, seqlen, at, packed=True)


def _on(problem: Problem, sequences: Sequence[int]) -> Tensor:
    return torch.tensor(sequences, dtype=torch.int64, device="cpu").to(problem.device)
