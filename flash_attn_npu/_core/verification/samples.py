"""Which part of an attention problem a check looks at: a few sequences, heads and rows.

A sample must hold a witness of everything that makes a problem the kind it is (see `kinds`): the
sequences whose lengths differ, the edges of the window, the last tile, the second of everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ..problems.attention import Problem

__all__ = ["Spot", "edges", "spots"]

MOST_SEQUENCES = 10
MOST_ROWS = 32
MOST_SCORES = 1 << 22
"""Scores of one sequence that are computed on the host: of very long ones, fewer rows."""

TILES = (16, 64, 128, 512, 2048)
"""What kernels cut sequences into, at whose edges they err."""


class Spot(NamedTuple):
    """What is looked at in one sequence.

    start_q, start_k: its first rows in packed tensors; 0 of dense ones.
    rows: positions of queries in the sequence, in rising order.
    heads: query heads.
    """

    sequence: int
    seqlen_q: int
    seqlen_k: int
    start_q: int
    start_k: int
    rows: tuple[int, ...]
    heads: tuple[int, ...]


def spots(problem: Problem) -> list[Spot]:
    """The sample of a problem; empty if it has no queries."""
    heads = _heads(problem)
    return [_spot(problem, sequence, heads) for sequence in _sequences(problem)]


def _heads(problem: Problem) -> tuple[int, ...]:
    group = problem.nheads // problem.nheads_k
    # the second head, and the first of the second group, are told apart by how heads are grouped
    wanted = {0, 1, group, problem.nheads - 1}
    return tuple(sorted(head for head in wanted if head < problem.nheads))


def _sequences(problem: Problem) -> list[int]:
    """The longest, the second, the last, the first, one of each relation of the lengths, and the
    one in the middle.
    """
    pairs = {lengths: them for lengths, them in problem.sequences.items() if lengths[0]}
    if not pairs:
        return []
    found = [
        pairs[max(pairs, key=lambda pair: (pair[1], pair[0]))][0],
        pairs[max(pairs)][0],
    ]
    every = [sequence for them in pairs.values() for sequence in (them[0], them[-1])]
    second = [them[1] if them[0] == 0 and len(them) > 1 else them[0] for them in pairs.values()]
    found += [min((s for s in second if s > 0), default=0), max(every), min(every)]
    for relation in (
        [them for (q, k), them in pairs.items() if 0 < k < q],
        [them for (q, k), them in pairs.items() if k > q],
        [them for (q, k), them in pairs.items() if k == q],
        [them for (q, k), them in pairs.items() if k == 0],
    ):
        found += [them[0] for them in relation[:1]]
    middle = problem.batch // 2
    if problem.lengths_q is None or problem.lengths_q.seqlens[middle]:
        found.append(middle)
    return list(dict.fromkeys(found))[:MOST_SEQUENCES]


def _spot(problem: Problem, sequence: int, heads: tuple[int, ...]) -> Spot:
    seqlen_q, seqlen_k, start_q, start_k = problem.max_seqlen_q, problem.max_seqlen_k, 0, 0
    if problem.lengths_q is not None and problem.lengths_k is not None:
        seqlen_q = problem.lengths_q.seqlens[sequence]
        seqlen_k = problem.lengths_k.seqlens[sequence]
        start_q = problem.lengths_q.cumulative[sequence]
        start_k = problem.lengths_k.cumulative[sequence]
    most = max(4, min(MOST_ROWS, MOST_SCORES // max(1, seqlen_k * len(heads))))
    rows = _rows(problem, seqlen_q, seqlen_k, most)
    return Spot(sequence, seqlen_q, seqlen_k, start_q, start_k, rows, heads)


def _rows(problem: Problem, seqlen_q: int, seqlen_k: int, most: int) -> tuple[int, ...]:
    offset, first = seqlen_k - seqlen_q, problem.blind(seqlen_q, seqlen_k)
    # by importance: where rows or keys begin and end, then where the window does
    wanted = [seqlen_q - 1, first, 0, first - 1, 1, first + 1]
    if problem.left is not None:
        wanted += [problem.left - offset, problem.left - offset + 1]
    if problem.right is not None:
        wanted += [seqlen_q - 1 - problem.right, seqlen_q - 2 - problem.right]
    wanted += [seqlen_q // 2, *_largest_power(seqlen_q), *edges(seqlen_q)]
    inside = dict.fromkeys(row for row in wanted if 0 <= row < seqlen_q)
    return tuple(sorted(list(inside)[:most]))


def _largest_power(length: int) -> tuple[int, int]:
    """The last row of some tile, and the first of another, for tiles of every power of two."""
    power = 1 << (length.bit_length() - 1)
    return power - 1, power


def edges(length: int) -> Iterable[int]:
    """Positions on both sides of the edges of tiles: of the last ones, and of the first ones."""

    def both() -> Iterator[int]:
        for tile in reversed(TILES):
            last = (length - 1) // tile * tile
            yield from (last, last - 1, tile, tile - 1)

    return dict.fromkeys(both())
