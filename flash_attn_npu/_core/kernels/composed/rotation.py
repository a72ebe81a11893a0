"""The rotation of rotary embedding composed of torch operations: in float32, and rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

from ...problems.rowwise import Rotation
from ..kernel import Kernel

__all__ = ["KERNEL"]

AT_ONCE = 1 << 20
"""Elements: beside x there is little else in float32."""


def forward(problem: Rotation, x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Write the rotated dimensions of x to out, which may be x.

    Args:
        x, out: (..., headdim).
        cos, sin: (..., rotary_dim / 2), broadcast over the heads.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = cos.to(wide), sin.to(wide)
    first, second = _pairs(2 * cos.shape[-1], problem.interleaved)
    a, b = x[..., first].to(wide), x[..., second].to(wide)
    turned_a, turned_b = a * cos - b * sin, a * sin + b * cos
    # written part by part, not by torch.cat, which autocast on the CPU refuses for float16
    out[..., first].copy_(turned_a)
    out[..., second].copy_(turned_b)


def _pairs(rotary_dim: int, interleaved: bool) -> tuple[slice, slice]:
    """Where the first and the second of each pair lie in a head: interleaved, side by side."""
    if interleaved:
        return slice(0, rotary_dim, 2), slice(1, rotary_dim, 2)
    return slice(0, rotary_dim // 2), slice(rotary_dim // 2, rotary_dim)


KERNEL = Kernel(forward, at_once=AT_ONCE)
