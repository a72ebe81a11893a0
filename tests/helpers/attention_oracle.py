"""What the attention modules compute, from the mathematics, in the dtype of its arguments.

Everything is differentiable by autograd; tests pass float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MASKED = -10000.0


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    slopes: list[float] | None = None,
) -> Tensor:
    """Flash attention of q (batch, sq, h, d) and k, v (batch, sk, hk, d); no row without keys."""
    sq, sk, heads = q.shape[1], k.shape[1], q.shape[2]
    k, v = (
        torch.stack([x[:, :, h * x.shape[2] // heads] for h in range(heads)], 2) for x in (k, v)
    )
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    ahead = torch.arange(sk)[None] - torch.arange(sq)[:, None] - (sk - sq)
    if slopes is not None:
        bias = -torch.tensor(slopes, dtype=torch.float32).to(q.dtype)[:, None, None] * ahead.abs()
        scores = scores + bias
    right = 0 if causal else window[1]
    hidden = torch.zeros(sq, sk, dtype=torch.bool)
    hidden |= (ahead > right) if right >= 0 else hidden
    hidden |= (ahead < -window[0]) if window[0] >= 0 else hidden
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def plain_self(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, keep: Tensor | None, scale: float
) -> Tensor:
    """What `SelfAttention` promises: -10000 is added for each reason to mask."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            for j in range(k.shape[1]):
                reasons = int(causal and j > i) + int(keep is not None and not keep[b, j])
                scores[b, :, i, j] = scores[b, :, i, j] + MASKED * reasons
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def plain_cross(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, keep: Tensor | None, scale: float
) -> Tensor:
    """What `CrossAttention` promises: padding adds -10000, and what is later becomes -10000."""
    group = q.shape[2] // k.shape[2]
    k, v = (torch.cat([x[:, :, [h // group]] for h in range(q.shape[2])], 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    for b in range(q.shape[0]):
        seen = k.shape[1] if keep is None else int(keep[b].sum())
        for i in range(q.shape[1]):
            for j in range(k.shape[1]):
                if keep is not None and not keep[b, j]:
                    scores[b, :, i, j] = scores[b, :, i, j] + MASKED
                if causal and j > i + seen - q.shape[1]:
                    scores[b, :, i, j] = MASKED
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def rotate(x: Tensor, dim: int, interleaved: bool = False, base: float = 10000.0) -> Tensor:
    """Pairs of x (batch, seqlen, heads, headdim) turned by position * base ** (-2 i / dim)."""
    first = torch.arange(dim // 2) * (2 if interleaved else 1)
    second = first + (1 if interleaved else dim // 2)
    rate = base ** (-2 * torch.arange(dim // 2, dtype=torch.float64) / dim)
    turn = torch.polar(torch.ones(()).double(), torch.arange(x.shape[1]).double()[:, None] * rate)
    turned = torch.complex(x[..., first].double(), x[..., second].double()) * turn[None, :, None]
    out = x.clone()
    out[..., first], out[..., second] = turned.real.to(x.dtype), turned.imag.to(x.dtype)
    return out


def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Each channel of x (batch, seqlen, channels) from its last three positions."""
    out = torch.zeros_like(x) + bias
    for shift in range(3):
        part = x[:, : x.shape[1] - shift] * weight[:, 0, 2 - shift]
        out = torch.cat((out[:, :shift], out[:, shift:] + part), 1)
    return out


def linear(x: Tensor, parameters: dict[str, Tensor], name: str) -> Tensor:
    out = x @ parameters[f"{name}.weight"].T
    bias = parameters.get(f"{name}.bias")
    return out if bias is None else out + bias


def slopes_of(nheads: int) -> list[float]:
    """ALiBi's slopes for a power of two."""
    return [2.0 ** (-8 * (i + 1) / nheads) for i in range(nheads)]
