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
    found, sums = torch.empty_like(rows), []
    for of_one, keys, values, out in zip(rows, k, v, found, strict=True):
        scores = torch.bmm(of_one, keys.transpose(1, 2))
        # not -inf, as -inf - -inf is NaN
        top = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
        # several times as fast as exp on a CPU
        weights = scores.sub_(top).exp2_()
        total = weights.sum(-1, keepdim=True)
        silent = total == 0
        total.masked_fill_(silent, 1.0)
        torch.bmm(weights, values, out=out).div_(total)
        sums.append(total.log2_().add_(top).div_(LOG2_E).masked_fill_(silent, 0.0))
    return found.flatten(1, 2).unsqueeze(2), torch.stack(sums).flatten(1, 2)
