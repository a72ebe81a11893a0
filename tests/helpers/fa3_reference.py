"""FlashAttention 3 as its documentation defines it, one sequence at a time, for any dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """out [seqlen_q, nheads, headdim_v] and lse [nheads, seqlen_q] of one sequence.

    A side of the window below 0 has no bound, whatever the lengths.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k)
    headdim = q.shape[-1]
    if qv is not None:
        scores = scores + torch.einsum("ihd,jhd->hij", qv, v)
        headdim += qv.shape[-1]
    scores = scores * (headdim**-0.5 if softmax_scale is None else softmax_scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    ahead = torch.arange(k.shape[0]) - torch.arange(q.shape[0])[:, None] - (len(k) - len(q))
    left, right = window_size[0], 0 if causal else window_size[1]
    seen = (ahead >= -left) | torch.tensor(left < 0)
    seen &= (ahead <= right) | torch.tensor(right < 0)
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    out = torch.einsum("hij,jhd->ihd", weights, v)
    return out, lse


def dense(
    q: Tensor, k: Tensor, v: Tensor, qv: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Of every row of a padded batch."""
    extra = [None] * len(q) if qv is None else qv
    found = [attention(*x, **options) for x in zip(q, k, v, extra, strict=True)]
    return torch.stack([out for out, _ in found]), torch.stack([lse for _, lse in found])


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    qv: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Of packed sequences; rows that are not used are zero, and -inf in the lse."""
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf)
    for i in range(len(cu_seqlens_q) - 1):
        (a, b), (c, d) = cu_seqlens_q[i : i + 2].tolist(), cu_seqlens_k[i : i + 2].tolist()
        b = b if seqused_q is None else a + int(seqused_q[i])
        d = d if seqused_k is None else c + int(seqused_k[i])
        mine = None if qv is None else qv[a:b]
        out[a:b], lse[:, a:b] = attention(q[a:b], k[c:d], v[c:d], mine, **options)
    return out, lse
