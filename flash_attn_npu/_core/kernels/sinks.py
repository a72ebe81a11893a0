"""A sink, added to what a kernel answered that knows none.

A sink is one more logit of each head in the softmax, with no value behind it. So it only takes its
share: with s = sink and lse without it, the keys keep exp(lse) / (exp(lse) + exp(s)) of the
output, which is sigmoid(lse - s), and the new softmax_lse is logaddexp(lse, s). From that
softmax_lse and that output any backward is right without knowing of the sink.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["counting", "take_share", "with_sink"]


def with_sink(out: Tensor, softmax_lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """(out, softmax_lse) with a sink, from those without; a row without keys stays as it is.

    Args:
        out: (batch, seqlen_q, nheads, headdim) or (total_q, nheads, headdim).
        softmax_lse: (batch, nheads, seqlen_q) or (nheads, total_q), +inf for rows without keys.
        sink: (nheads,), of any floating dtype.
    """
    scaled = (out * _kept(softmax_lse, sink)).to(out.dtype)
    return scaled, counting(softmax_lse, sink)


def take_share(out: Tensor, softmax_lse: Tensor, sink: Tensor) -> None:
    """The same where out lies, in three launches; the product is rounded once, to its dtype.

    Args:
        softmax_lse: without the sink.
    """
    out.mul_(_kept(softmax_lse, sink))


def counting(softmax_lse: Tensor, sink: Tensor) -> Tensor:
    """softmax_lse that counts the sink."""
    return torch.logaddexp(softmax_lse, _logit(softmax_lse, sink))


def _kept(softmax_lse: Tensor, sink: Tensor) -> Tensor:
    """What the keys keep of each row of out."""
    kept = torch.sigmoid(softmax_lse - _logit(softmax_lse, sink))
    return kept.transpose(-1, -2)[..., None]


def _logit(softmax_lse: Tensor, sink: Tensor) -> Tensor:
    # a narrower one is widened by what reads it, exactly, and by no launch of its own
    wider = torch.promote_types(sink.dtype, softmax_lse.dtype) != softmax_lse.dtype
    return (sink.to(softmax_lse.dtype) if wider else sink)[:, None]
