"""Rotary embedding one pair and one token at a time, in float64, and what an answer may be off."""

from collections.abc import Iterable

import torch
from torch import Tensor

FLOAT32_NOISE = 4 * torch.finfo(torch.float32).eps


def pairs(rotary_dim: int, interleaved: bool) -> list[tuple[int, int]]:
    half = rotary_dim // 2
    if interleaved:
        return [(2 * i, 2 * i + 1) for i in range(half)]
    return [(i, i + half) for i in range(half)]


def rotated(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Iterable[int],
    interleaved: bool,
    conjugate: bool = False,
) -> Tensor:
    """x is (tokens, ..., headdim), `positions` holds one row of the tables for each token."""
    x, cos, sin = (tensor.detach().cpu().double() for tensor in (x, cos, sin))
    out = x.clone()
    sign = -1.0 if conjugate else 1.0
    for token, position in enumerate(positions):
        for i, (a, b) in enumerate(pairs(2 * cos.shape[1], interleaved)):
            c, s = cos[position, i], sign * sin[position, i]
            out[token, ..., a] = x[token, ..., a] * c - x[token, ..., b] * s
            out[token, ..., b] = x[token, ..., a] * s + x[token, ..., b] * c
    return out


def batch_positions(batch: int, seqlen: int, offsets: int | list[int]) -> list[int]:
    """The positions of a padded batch, flattened."""
    starts = [offsets] * batch if isinstance(offsets, int) else offsets
    return [start + i for start in starts for i in range(seqlen)]


def assert_rounded_once(got: Tensor, exact: Tensor, largest: float) -> None:
    """`got` is `exact` but for float32 arithmetic on values up to `largest` and one rounding."""
    if got.dtype == torch.float64:
        torch.testing.assert_close(got.detach().cpu(), exact)
        return
    ulp = torch.finfo(got.dtype).eps * exact.abs()
    error = (got.detach().cpu().double() - exact).abs()
    worst = (error - 0.51 * ulp - FLOAT32_NOISE * max(largest, 1.0)).max() if error.numel() else 0
    assert worst <= 0, f"off by {worst} more than one rounding to {got.dtype}"


def tables(rows: int, half: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    angles = torch.rand(rows, half, dtype=torch.float64) * 6.28
    return angles.cos().to(dtype), angles.sin().to(dtype)
