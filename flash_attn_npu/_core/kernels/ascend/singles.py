"""Sequences of one token that looks at itself, beside the packed kernel: it sees one key.

So out is the value, softmax_lse the score (an ALiBi bias is 0 at distance 0, and every window
holds it), and a sink takes its share as it does of any answer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...problems.attention import Problem
from ...problems.results import Saved
from ..sinks import with_sink
from .selection import Rows

__all__ = ["Answer", "answer", "gradients"]


class Answer(NamedTuple):
    """out (tokens, nheads, headdim) and softmax_lse (nheads, tokens); differentiable."""

    out: Tensor
    softmax_lse: Tensor


def answer(
    problem: Problem, rows: Rows, qkv: tuple[Tensor, Tensor, Tensor], sink: Tensor | None
) -> Answer | None:
    """What the single tokens get, None if there are none that matter."""
    if not rows.singles:
        return None
    q, k, v = rows.take_singles(*qkv)
    group = problem.nheads // problem.nheads_k
    out = v.repeat_interleave(group, dim=1)
    if sink is None and not problem.uses_lse:
        # nobody asks, and nothing depends on it
        return Answer(out, out.new_empty(0))
    scores = (q.float() * k.repeat_interleave(group, dim=1).float()).sum(-1)
    lse = (scores * problem.softmax_scale).t()
    return Answer(out, lse) if sink is None else Answer(*with_sink(out, lse, sink))


def gradients(
    problem: Problem, rows: Rows, dout: Tensor, saved: Saved
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dq, dk and dv of the single tokens, from out and a softmax_lse that may count other keys."""
    if not rows.singles:
        return None, None, None
    q, k, v = (x.float() for x in rows.take_singles(saved.q, saved.k, saved.v))
    dout, out = (rows.take_singles(x)[0].float() for x in (dout, saved.out))
    lse = rows.take_singles(saved.softmax_lse.t())[0]
    group = problem.nheads // problem.nheads_k
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    chance = torch.exp((q * k).sum(-1) * problem.softmax_scale - lse)[..., None]
    slope = chance * ((dout * v).sum(-1) - (dout * out).sum(-1))[..., None] * problem.softmax_scale
    dk, dv = ((x.unflatten(1, (-1, group)).sum(2)) for x in (slope * q, chance * dout))
    dtype = saved.q.dtype
    return (slope * k).to(dtype), dk.to(dtype), dv.to(dtype)
