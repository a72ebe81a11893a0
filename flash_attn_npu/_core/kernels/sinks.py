"""A sink, added to what a kernel answered that knows none.

A sink is one more logit of each head in the softmax, with no value behind it. So it only takes its
share: with s = sink and lse without it, the keys keep exp(lse) / (exp(lse) + exp(s)) of the
output, which is sigmoid(lse - s), and the new softmax_lse is logaddexp(lse, s). From that
softmax_lse and that output any backward is right without knowing of the sink.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["with_sink"]


def with_sink(out: Tensor, softmax_lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """(out, softmax_lse) with a sink, from those without; a row without keys stays as it is.

    Args:
        out: (batch, seqlen_q, nheads, headdim) or (total_q, nheads, headdim).
        softmax_lse: (batch, nheads, seqlen_q) or (nheads, total_q), +inf for rows without keys.
        sink: (nheads,), of any floating dtype.
    """
    logit = sink.to(softmax_lse.dtype)[:, None]
    kept = torch.sigmoid(softmax_lse - logit).transpose(-1, -2)[..., None]
    scaled = (out.to(kept.dtype) * kept).to(out.dtype)
    return scaled, torch.logaddexp(softmax_lse, logit)
