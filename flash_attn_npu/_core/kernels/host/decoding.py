"""One query of many keys, in float32: the heads that share keys as rows of one product.

Torch's own kernel multiplies one head at a time; its products read the heads of a cache side by
side, as they lie. Tensors are (batch, nheads, seqlen, headdim).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["many_keys", "one_query"]

MANY_KEYS = 1 << 17
"""Numbers in the keys of a sequence from which this is the faster way."""

LOG2_E = math.log2(math.e)


def many_keys(k: Tensor) -> bool:
    """Whether it is worth a few launches more for each sequence."""
    return k.element_size() > 2 and math.prod(k.shape[1:]) >= MANY_KEYS


def one_query(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out, softmax_lse (batch, nheads, 1)); zeros where all scores are -inf, as of the kernel."""
    rows = q.squeeze(2).unflatten(1, (k.shape[1], -1)) * (scale * LOG2_E)
    found, scores = torch.empty_like(rows), rows.new_empty(*rows.shape[1:3], k.shape[2])
    tops, totals = rows.new_empty(2, *rows.shape[:3], 1)
    for of_one, keys, values, out, top, total in zip(rows, k, v, found, tops, totals, strict=True):
        torch.bmm(of_one, keys.transpose(1, 2), out=scores)
        torch.amax(scores, -1, keepdim=True, out=top)
        # not -inf, as -inf - -inf is NaN
        top.clamp_(min=torch.finfo(scores.dtype).min)
        # several times as fast as exp on a CPU
        scores.sub_(top).exp2_()
        torch.sum(scores, -1, keepdim=True, out=total)
        torch.bmm(scores, values, out=out)
    silent = totals == 0
    found.div_(totals.masked_fill_(silent, 1.0))
    lse = totals.log2_().add_(tops).div_(LOG2_E).masked_fill_(silent, 0.0)
    return found.flatten(1, 2).unsqueeze(2), lse.flatten(1, 2)
