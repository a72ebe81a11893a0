"""Attention in exact arithmetic on the host, or in a lower precision, for the error rule.

Written from the mathematics: one sequence and one head at a time, rows in blocks, gradients by
formula. The rule is upstream's: an error at most twice that of the same arithmetic in the inputs'
own dtype, plus a floor.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Given", "Solved", "judged", "solve"]

BLOCK = 512
FLOOR = 512 * torch.finfo(torch.float32).eps


class Given(NamedTuple):
    """What one sequence of attention is computed from; window sides None for unlimited.

    slopes, sink: of each head. bias and mask are bottom-right aligned, bounds inclusive.
    """

    scale: float
    left: int | None = None
    right: int | None = None
    softcap: float = 0.0
    slopes: Tensor | None = None
    sink: Tensor | None = None


class Solved(NamedTuple):
    """out, softmax_lse (nheads, seqlen_q), and the gradients if dout was given."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def solve(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, given: Given) -> Solved:
    """One sequence (seqlen, nheads, headdim), in the dtype of the tensors."""
    heads, group = q.shape[1], q.shape[1] // max(k.shape[1], 1)
    out, dq = torch.zeros_like(dout), torch.zeros_like(q)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    lse = q.new_full((heads, q.shape[0]), math.inf)
    for head in range(heads):
        of = head // group
        for first in range(0, q.shape[0], BLOCK):
            rows = slice(first, first + BLOCK)
            keys, values = k[:, of], v[:, of]
            scores, slope, seen = _scores(q[rows, head], keys, first, q.shape[0], head, given)
            p, total = _softmax(scores, seen, None if given.sink is None else given.sink[head])
            out[rows, head], lse[head, rows] = p @ values, total
            dp = dout[rows, head] @ values.T
            ds = p * (dp - (dout[rows, head] * out[rows, head]).sum(-1, keepdim=True)) * slope
            dq[rows, head] = ds @ keys * given.scale
            dk[:, of] += ds.T @ q[rows, head] * given.scale
            dv[:, of] += p.T @ dout[rows, head]
    return Solved(out, lse, dq, dk, dv)


def _scores(
    q: Tensor, k: Tensor, first: int, seqlen_q: int, head: int, given: Given
) -> tuple[Tensor, Tensor | float, Tensor]:
    """(scores, their derivative by the scaled product, which keys each row sees)."""
    rows = torch.arange(first, first + q.shape[0])[:, None] + k.shape[0] - seqlen_q
    distance = torch.arange(k.shape[0])[None, :] - rows
    scores, slope = q @ k.T * given.scale, 1.0
    derivative: Tensor | float = slope
    if given.softcap:
        capped = torch.tanh(scores / given.softcap)
        scores, derivative = given.softcap * capped, 1 - capped.square()
    if given.slopes is not None:
        scores = scores - given.slopes[head].to(scores.dtype) * distance.abs().to(scores.dtype)
    seen = torch.ones_like(distance, dtype=torch.bool)
    if given.left is not None:
        seen &= distance >= -given.left
    if given.right is not None:
        seen &= distance <= given.right
    return scores, derivative, seen


def _softmax(scores: Tensor, seen: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """(probabilities, lse): zeros and +inf in a row that sees nothing."""
    if scores.shape[1] == 0:
        return scores, scores.new_full((scores.shape[0],), math.inf)
    scores = scores.masked_fill(~seen, -math.inf)
    if sink is not None:
        column = sink.to(scores.dtype).expand(scores.shape[0], 1)
        scores = torch.cat((scores, column), dim=1)
    blind = ~seen.any(1)
    lse = torch.logsumexp(scores.masked_fill(blind[:, None], 0), dim=1)
    p = torch.exp(scores - lse[:, None])[:, : seen.shape[1]]
    return p.masked_fill(blind[:, None], 0), lse.masked_fill(blind, math.inf)


def judged(actual: Tensor, exact: Tensor, plain: Tensor | None) -> dict[str, float]:
    """The largest error, and what the rule allows; infinite where NaN or inf stand wrongly.

    Args:
        plain: the same in the inputs' own precision; None for what is held in float32.
    """
    actual, exact = actual.detach().cpu().double(), exact.double()
    if actual.shape != exact.shape:
        return {"error": math.inf, "allowed": 0.0}
    if exact.numel() == 0:
        return {"error": 0.0, "allowed": 0.0}
    finite = exact.isfinite()
    same = (actual == exact) | (finite & actual.isfinite())
    largest = exact[finite].abs().max().item() if finite.any() else 0.0
    if plain is None:
        allowed = 64 * torch.finfo(torch.float32).eps * max(1.0, largest)
    else:
        there = finite & plain.isfinite()
        lost = (plain.double() - exact)[there].abs().max().item() if there.any() else 0.0
        allowed = 2 * lost + torch.finfo(plain.dtype).eps * largest + FLOOR
    error = (actual - exact)[finite & actual.isfinite()].abs()
    worst = error.max().item() if error.numel() else 0.0
    return {"error": worst if bool(same.all()) else math.inf, "allowed": allowed}
