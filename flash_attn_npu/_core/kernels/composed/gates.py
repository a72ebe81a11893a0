"""Gated activations composed of torch operations: in float32 (float64 for it), rounded once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from ...problems.rowwise import Gate, Geglu
from ..kernel import Kernel

__all__ = ["GEGLU", "KERNEL"]


def forward(_: Gate, x: Tensor, y: Tensor) -> Tensor:
    """silu(x) * y, contiguous, in the dtype that x and y promote to."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    return (silu(x.to(_wide(x, y))) * y).to(dtype).contiguous()


def backward(_: Gate, g: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and y, contiguous, each in the dtype of its tensor."""
    wide = _wide(x, y)
    gate, g = x.to(wide), g.to(wide)
    # not aten.silu_backward, which has no derivative of its own
    chance = torch.sigmoid(gate)
    dx = g * y * chance * (1 + gate * (1 - chance))
    dy = silu(gate) * g
    return dx.to(x.dtype).contiguous(), dy.to(y.dtype).contiguous()


def _wide(x: Tensor, y: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)


def _geglu(_: Geglu, both: Tensor) -> Tensor:
    """y * gelu(gate) of both = [y, gate], in its dtype and step by step, as upstream."""
    y, gate = both.chunk(2, dim=-1)
    return y * gelu(gate)


KERNEL = Kernel(forward, backward)
GEGLU = Kernel(_geglu)
