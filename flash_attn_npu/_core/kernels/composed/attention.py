"""Exact attention on any device, composed of torch operations, memory linear in sequence length.

This file lays a problem out as groups of equally long sequences; the arithmetic is in `forward`,
`gradients` and `tiles`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ...problems.attention import Problem
from ...problems.results import Forward, Inputs, Saved, accumulator, rounded_up
from ..groups import Group, groups
from ..kernel import Kernel
from .forward import attend, probabilities
from .gradients import attend_backward
from .tiles import STREAMS_ON_CPU, Scoring, Streams, parts, tile_elements

__all__ = ["KERNEL", "attend_group", "backward"]

STREAMS_AT_ONCE = 64
"""Sequences times heads that share a tile: few enough for tiles to stay large."""

SHORT_NUMBERS = 1 << 20
"""Of one tensor, or scores, of short sequences that are computed together, at least."""

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
            streams = _streams(group, _shared(problem), (q, k, v, part, part_lse))
            scoring = _scoring(problem, group, slopes, rng_state, sink)
            square = _pairs(group, s_dmask) if s_dmask.numel() else None
            for heads, some, of_some in parts(streams, scoring):
                attend(some, group.band, of_some)
                if square is not None:
                    split = square.unflatten(1, _shared(problem))[:, heads]
                    probabilities(some, group.band, of_some, split)
            if square is not None and not isinstance(group.sequences, slice):
                s_dmask[group.sequences, :, : group.q.seqlen, : group.k.seqlen] = square
            group.q.write(out, part)
            group.q.write_rows(lse, part_lse)
    return Forward(out, lse, s_dmask, rng_state)


def attend_group(
    problem: Problem, group: Group, tensors: tuple[Tensor, ...], slopes: Tensor | None
) -> None:
    """The forward of one group without dropout and sink: fills out and softmax_lse.

    Args:
        tensors: q, k and v whole, and the group's space in out and in softmax_lse.
    """
    streams = _streams(group, _shared(problem), tensors)
    scoring = _scoring(problem, group, slopes, None)
    with torch.autocast(problem.device.type, enabled=False):
        for _, some, of_some in parts(streams, scoring):
            attend(some, group.band, of_some)


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
            _backward_of(problem, group, dout, saved, grads)


def _backward_of(
    problem: Problem, group: Group, dout: Tensor, saved: Saved, grads: tuple[Tensor, Tensor, Tensor]
) -> None:
    scoring, heads = _scoring(problem, group, saved.alibi_slopes, saved.rng_state), _shared(problem)
    q, k, v, out, lse = saved[:5]
    rows = (group.q.taken(out), group.q.taken_rows(lse))
    streams = _streams(group, heads, (q, k, v, *rows))
    sides = (group.q, group.k, group.k)
    spaces = [side.space(grad) for side, grad in zip(sides, grads, strict=True)]
    views = [_split(space, heads) for space in (*spaces, group.q.taken(dout))]
    for part, some, of_some in parts(streams, scoring):
        dq, dk, dv, douts = (view[:, part] for view in views)
        attend_backward(some, group.band, of_some, douts, (dq, dk, dv))
    for side, grad, space in zip(sides, grads, spaces, strict=True):
        side.write(grad, space)


def _streams(group: Group, heads: tuple[int, int], saved: tuple[Tensor, ...]) -> Streams:
    """Of q, k and v, and of a part of out and softmax_lse."""
    q, k, v, out, lse = saved
    return Streams(
        _split(group.q.taken(q), heads),
        _split(group.k.taken(k), heads),
        _split(group.k.taken(v), heads),
        _split(out, heads),
        lse.unflatten(1, heads),
        place=(group.first,),
    )


def _split(part: Tensor, heads: tuple[int, int]) -> Tensor:
    """(count, nheads_k, nheads of one, seqlen, headdim) of what was taken."""
    split: Tensor = part.transpose(1, 2).unflatten(1, (heads[0], -1))
    return split


def _pairs(group: Group, s_dmask: Tensor) -> Tensor:
    """(count, nheads, seqlen_q, seqlen_k) to be written."""
    if isinstance(group.sequences, slice):
        return s_dmask[group.sequences, :, : group.q.seqlen, : group.k.seqlen]
    sides = (group.q.seqlen, group.k.seqlen)
    return s_dmask.new_zeros(group.q.count, s_dmask.shape[1], *sides)


def _groups(problem: Problem) -> Iterator[Group]:
    def at_once(seqlen_q: int, seqlen_k: int) -> int:
        return _at_once(problem, seqlen_q, seqlen_k)

    return groups(problem, at_once, at_once)


def _at_once(problem: Problem, seqlen_q: int, seqlen_k: int) -> int:
    """How many sequences share tiles: as many short ones as fill one, with their rows."""
    pairs = max(seqlen_q, 1) * max(seqlen_k, 1)
    numbers = max(seqlen_q, seqlen_k, 1) * max(problem.headdim, 1)
    room = max(SHORT_NUMBERS, tile_elements(problem.device))
    short = room // (problem.nheads * max(pairs, numbers))
    streams = STREAMS_ON_CPU if problem.device.type == "cpu" else STREAMS_AT_ONCE
    # packed ones that do not lie side by side are copied, so they are few if they are long
    return max(1, short, 1 if problem.varlen else streams // problem.nheads)


def _scoring(
    problem: Problem,
    group: Group,
    slopes: Tensor | None,
    rng_state: Tensor | None,
    sink: Tensor | None = None,
) -> Scoring:
    heads = _shared(problem)
    slopes = group.slopes(slopes)
    if slopes is not None:
        slopes = slopes.unflatten(1, heads)[..., None, None]
    return Scoring(
        problem.softmax_scale,
        problem.softcap,
        slopes,
        None if sink is None else sink.reshape(*heads, 1),
        problem.dropout_p,
        int(rng_state[0]) if problem.dropout_p and rng_state is not None else 0,
    )


def _shared(problem: Problem) -> tuple[int, int]:
    """The heads of k, and how many query heads share one."""
    return problem.nheads_k, problem.nheads // problem.nheads_k


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
