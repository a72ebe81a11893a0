"""Packed sequences one after the other: what none of them needs for itself is done for several."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import NamedTuple

from torch import Tensor

from ...problems.attention import Problem
from ...problems.results import accumulator
from ..bands import Band
from .copies import Copies
from .flash import attend_step, split_scale, with_silence
from .parts import TOGETHER_BYTES, Triple, dense
from .steps import Step, whole_step

__all__ = ["Run", "attend_chunks", "chunks", "copied_together"]

COPIED_NUMBERS = 1 << 16
"""Of one tensor: so few are copied to compute sequences together that lie apart."""

MANY_APART = 4
"""Short sequences of one pair of lengths for which that is worth more than launches for each."""


class Run(NamedTuple):
    """Equally long sequences side by side, which one launch computes: all of each."""

    sequences: int
    step: Step

    @property
    def rows(self) -> int:
        return self.sequences * self.step.rows[1]

    @property
    def keys(self) -> int:
        return self.sequences * self.step.keys[1]


def chunks(problem: Problem) -> list[list[Run]] | None:
    """Runs one after the other from the first row on, of which few numbers are copied at once.

    None where some sequence is not a launch by itself, or is better computed another way.
    """
    lengths_q, lengths_k = problem.lengths_q, problem.lengths_k
    launches = _launches(problem)
    if lengths_q is None or lengths_k is None or launches is None:
        return None
    room = left = _room(problem)
    laid: list[list[Run]] = [[]]
    for pair, alike in groupby(zip(lengths_q.seqlens, lengths_k.seqlens, strict=True)):
        (step, numbers), count = launches[pair], len(list(alike))
        while count:
            if numbers > left:
                laid.append([])
                left = room
            some = min(count, left // numbers) if numbers else count
            laid[-1].append(Run(some, step))
            count, left = count - some, left - some * numbers
    return [runs for runs in laid if runs]


def _launches(problem: Problem) -> dict[tuple[int, int], tuple[Step, int]] | None:
    """For each pair of lengths the launch of a sequence, and the numbers of its largest copy."""
    if problem.alibi or not problem.nheads:
        return None
    copied, found = problem.dtype != accumulator(problem.dtype), {}
    for pair, sequences in problem.sequences.items():
        numbers = problem.headdim * max(pair[0] * problem.nheads, pair[1] * problem.nheads_k)
        step = whole_step(Band(*pair, problem.left, problem.right))
        apart = len(sequences) - 1 != sequences[-1] - sequences[0]
        together = len(sequences) >= MANY_APART and copied_together(problem, *pair) > 1
        # one query of a half precision may be computed without a copy
        single = copied and pair[0] == 1
        if step is None or single or (apart and together):
            return None
        if copied and numbers > _room(problem):
            return None
        found[pair] = step, numbers if copied else 0
    return found


def _room(problem: Problem) -> int:
    return TOGETHER_BYTES // accumulator(problem.dtype).itemsize


def copied_together(problem: Problem, seqlen_q: int, seqlen_k: int) -> int:
    """How many sequences that lie apart are copied to be computed together."""
    width = problem.nheads * max(problem.headdim, 1)
    return COPIED_NUMBERS // (width * max(seqlen_q, seqlen_k, 1))


def attend_chunks(
    laid: list[list[Run]], inputs: Triple, to: tuple[Tensor, Tensor], problem: Problem
) -> None:
    """Fill out (total_q, nheads, headdim) and softmax_lse (nheads, total_q)."""
    out, lse = to
    first_q = first_k = 0
    copies = Copies(lse.dtype, max((_copied(problem, runs) for runs in laid), default=0))
    for runs in laid:
        rows, keys = [run.rows for run in runs], [run.keys for run in runs]
        part_q = slice(first_q, first_q + sum(rows))
        part_k = slice(first_k, first_k + sum(keys))
        first_q, first_k = part_q.stop, part_k.stop
        pairs = zip((*inputs, out), (part_q, part_k, part_k, part_q), strict=True)
        q, k, v, found = (x[part].transpose(0, 1).unsqueeze(0) for x, part in pairs)
        if problem.dtype != lse.dtype:
            q, k, v = copies.of((q, k, v))
        else:
            q, k, v = dense(q), dense(k), dense(v)
        of_queries = [x.split(rows, 2) for x in (q, found, lse[:, part_q].unsqueeze(0))]
        _launch(problem, runs, zip(*of_queries, k.split(keys, 2), v.split(keys, 2), strict=True))


def _launch(problem: Problem, runs: list[Run], views: Iterable[tuple[Tensor, ...]]) -> None:
    """Of each run: views (1, nheads, rows or keys, headdim) of q, out, softmax_lse, k and v."""
    factor, scale = split_scale(problem.softmax_scale, problem.dtype)
    for (count, step), tensors in zip(runs, views, strict=True):
        if not step.rows[1]:
            continue
        if count > 1:
            tensors = tuple(x.squeeze(0).unflatten(1, (count, -1)).transpose(0, 1) for x in tensors)
        q, out, lse, k, v = tensors
        q = q * factor if factor != 1 else q
        found, total = attend_step((q, k), v, scale, step, None)
        out.copy_(found)
        lse.copy_(with_silence(total, (q, k), step, scale) if problem.uses_lse else total)


def _copied(problem: Problem, runs: list[Run]) -> int:
    """Numbers of q, k and v."""
    heads, heads_k = problem.nheads, 2 * problem.nheads_k
    return sum(run.rows * heads + run.keys * heads_k for run in runs) * problem.headdim
