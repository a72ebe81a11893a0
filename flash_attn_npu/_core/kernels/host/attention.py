"""Torch's own flash attention for a CPU: dense, and over packed sequences without padding."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...ground.functions import is_undisturbed
from ...ground.second_derivatives import once, watch
from ...problems.attention import Problem
from ...problems.results import Forward, Inputs, Saved, accumulator
from ..bands import Band
from ..composed.attention import attend_group
from ..groups import Group, groups, groups_in_place
from ..kernel import Kernel
from ..sinks import counting, take_share
from .chunks import attend_chunks, chunks, copied_together
from .copies import Copies
from .flash import (
    attend,
    attend_backward,
    attend_whole,
    forward_dtype,
    launch,
    shares_heads,
    split_scale,
    with_silence,
)
from .parts import COPIED_BYTES, TOGETHER_BYTES, Rule, dense
from .steps import Step, whole_step

__all__ = ["KERNEL", "shares_heads"]

MANY_NUMBERS = 1 << 17
"""Of a tensor whose copy is worth a block for all three: see `Copies`."""


def direct(problem: Problem) -> Any:
    """A differentiable function (q, k, v, ...) -> what the public function returns, by one launch.

    None where it takes several, or its own backward would be off by more than upstream's bound.
    """
    launched, wide = _launched(problem), accumulator(problem.dtype)
    if launched is None or (problem.needs_grad and problem.dtype != wide):
        return None
    told = problem.ask.options.return_attn_probs
    mark = once(problem.function) if problem.needs_grad else None
    factor, scale = split_scale(problem.softmax_scale, problem.dtype)
    causal = launched.causal
    split = (problem.batch, -1) if problem.varlen else None
    copies = problem.dtype != wide
    many = copies and _numbers(problem) >= MANY_NUMBERS

    def laid(x: Tensor) -> Tensor:
        # rows of a contiguous tensor need not be looked at
        together = x.is_contiguous()
        x = (x.to(wide) if copies else x).transpose(1, 2)
        return x if together else dense(x)

    def run(q: Tensor, k: Tensor, v: Tensor, *_: None) -> Any:
        if split is not None:
            q, k, v = q.unflatten(0, split), k.unflatten(0, split), v.unflatten(0, split)
        if many and is_undisturbed():
            queries, keys, values = Copies(wide).of([x.transpose(1, 2) for x in (q, k, v)])
        else:
            queries, keys, values = laid(q), laid(k), laid(v)
        queries = queries * factor if factor != 1 else queries
        out, lse = launch(queries, keys, values, scale, causal)
        if mark is not None:
            watch(out, mark)
        out = out.transpose(1, 2)
        out = out.to(q.dtype) if copies else out
        out = out.flatten(0, 1) if split is not None else out
        if not told:
            return out.contiguous()
        lse = with_silence(lse.detach(), (queries.detach(), keys.detach()), launched, scale)
        lse = lse.transpose(0, 1).flatten(1, 2) if split is not None else lse
        return out.contiguous(), lse.contiguous(), q.new_empty(0)

    return run


def _launched(problem: Problem) -> Step | None:
    """The one launch that serves a problem; None if there are several, or things around them."""
    ask = problem.ask
    extras = problem.alibi or problem.sink or problem.tail_q or problem.tail_k
    if extras or ask.backward or problem.pages is not None or len(problem.sequences) > 1:
        return None
    ((seqlen_q, seqlen_k),) = problem.sequences
    step = whole_step(Band(seqlen_q, seqlen_k, problem.left, problem.right))
    wide = accumulator(problem.dtype)
    copied = problem.dtype != wide
    # several sequences are better copied few after few, and for one query none may be
    most = COPIED_BYTES if problem.batch == 1 and seqlen_q > 1 else TOGETHER_BYTES
    large = copied and _numbers(problem) >= most // wide.itemsize
    return None if not seqlen_q or large else step


def _numbers(problem: Problem) -> int:
    """Of the larger one of q and k."""
    rows = max(problem.rows_q * problem.nheads, problem.rows_k * problem.nheads_k)
    return problem.headdim * rows


def forward(problem: Problem, inputs: Inputs) -> Forward:
    """Attention without autograd; rows of no sequence give 0 and +inf."""
    at_once = _at_once(problem, inputs)
    if at_once is not None:
        return at_once
    q, k, v, slopes, sink = inputs[:5]
    if inputs.cache is not None and inputs.cache.rows is None:
        k, v = inputs.cache.gather(inputs.spans)
    in_place = bool(inputs.spans) and (inputs.cache is None or inputs.cache.rows is not None)
    runs = None if in_place else chunks(problem)
    # a sink takes its share before the answer is rounded, once
    kept = q.dtype if sink is None else accumulator(q.dtype)
    out = torch.empty(q.shape, dtype=kept, device=q.device)
    shape = (problem.rows_q,) if problem.varlen else (problem.batch, q.shape[1])
    lse = torch.empty(
        (*shape[:-1], problem.nheads, shape[-1]), dtype=accumulator(q.dtype), device=q.device
    )
    if problem.tail_q:
        out[problem.total_q :] = 0
        lse[:, problem.total_q :] = math.inf
    if runs is not None:
        attend_chunks(runs, (q, k, v), (out, lse), problem)
    else:
        in_groups = groups_in_place(problem, inputs.cache, inputs.spans)
        laid = in_groups if in_place else _groups(problem)
        _by_groups(problem, laid, (q, k, v, out, lse), slopes)
    if sink is not None:
        take_share(out, lse, sink)
        out, lse = out.to(q.dtype), counting(lse, sink)
    return Forward(out, lse, q.new_empty(0), torch.zeros(2, dtype=torch.int64, device="cpu"))


def _at_once(problem: Problem, inputs: Inputs) -> Forward | None:
    """The answer of one launch over rows of a cache side by side; None if it takes more."""
    cache, spans = inputs.cache, inputs.spans
    if cache is None or len(problem.sequences) != 1 or not problem.nheads:
        return None
    at = cache.block(spans)
    if at is None or problem.alibi or problem.sink or problem.tail_q:
        return None
    ((seqlen_q, seqlen_k),) = problem.sequences
    band = Band(seqlen_q, seqlen_k, problem.left, problem.right)
    rule = Rule(band, problem.softmax_scale, told=problem.uses_lse)
    q = inputs.q
    laid = q.view(len(spans), seqlen_q, *q.shape[1:])
    three = _heads(laid), _heads(inputs.k[at]), _heads(inputs.v[at])
    answer = attend_whole(three, forward_dtype(three, q.dtype, rule), rule)
    if answer is None:
        return None
    # a view made without gradients may not be written where there are some: it is not to be one
    out, empty = _heads(answer[0]).reshape(q.shape).contiguous().detach(), q.new_empty(0)
    lse = answer[1].transpose(0, 1).flatten(1, 2).detach() if problem.uses_lse else empty
    return Forward(out, lse, empty, torch.zeros(2, dtype=torch.int64, device="cpu"))


def _by_groups(
    problem: Problem, laid: Iterator[Group], tensors: tuple[Tensor, ...], slopes: Tensor | None
) -> None:
    q, k, v, out, lse = tensors
    biased = problem.alibi or problem.windowed or not _square(problem)
    for group in laid:
        part, part_lse = group.q.space(out), group.q.space_of_rows(lse)
        attend(
            (_heads(group.q.taken(q)), _heads(group.k.taken(k)), _heads(group.k.taken(v))),
            _heads(part),
            part_lse,
            _rule(problem, group, slopes),
        )
        unclear = biased and (problem.alibi or whole_step(group.band) is None)
        if unclear and part_lse.isnan().any():
            # a bias does not hide NaN, or inf: tiles do
            attend_group(problem, group, (q, k, v, part, part_lse), slopes)
        group.q.write(out, part)
        group.q.write_rows(lse, part_lse)


def backward(
    problem: Problem, dout: Tensor, saved: Saved, grads: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Write dq, dk, dv into `grads`, where they lie."""
    dq, dk, dv = grads
    if problem.varlen:
        dq[problem.total_q :] = 0
        dk[problem.total_k :] = 0
        dv[problem.total_k :] = 0
    for group in _groups(problem):
        q, k, v, out, lse = saved[:5]
        sides = (group.q, group.k, group.k)
        parts = [side.space(grad) for side, grad in zip(sides, grads, strict=True)]
        douts, outs = (_heads(group.q.taken(x)) for x in (dout, out))
        attend_backward(
            (_heads(group.q.taken(q)), _heads(group.k.taken(k)), _heads(group.k.taken(v))),
            (douts, outs, group.q.taken_rows(lse)),
            (_heads(parts[0]), _heads(parts[1]), _heads(parts[2])),
            _rule(problem, group, saved.alibi_slopes),
        )
        for side, grad, part in zip(sides, grads, parts, strict=True):
            side.write(grad, part)


def _square(problem: Problem) -> bool:
    """Whether all sequences have as many queries as keys, or no bound on the keys."""
    return problem.right is None or all(rows == keys for rows, keys in problem.sequences)


def _groups(problem: Problem) -> Iterator[Group]:
    def together(*_: int) -> int:
        return problem.batch

    return groups(problem, together, partial(copied_together, problem))


def _heads(x: Tensor) -> Tensor:
    """(batch, nheads, seqlen, headdim), as the kernel has it."""
    return x.transpose(1, 2)


def _rule(problem: Problem, group: Group, slopes: Tensor | None) -> Rule:
    slopes = None if slopes is None else group.slopes(slopes.detach())
    return Rule(group.band, problem.softmax_scale, slopes, problem.uses_lse)


KERNEL = Kernel(forward, backward, direct, reads_pages=True)
