"""Layer norm by torch's own kernel for the CPU; its forward widens 16-bit rows inside."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["backward", "forward", "serves"]


def serves(x: Tensor, is_rms_norm: bool) -> bool:
    """Whether this file computes a norm of x."""
    return not is_rms_norm and x.device.type == "cpu"


def forward(
    s: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm in the dtype of s, mean and rstd of each row in that of the parameters.

    Args:
        weight, bias: in float32, or float64 as s: in 16 bit the kernel would round mean and rstd.
    """
    return torch.native_layer_norm(s, s.shape[-1:], weight, bias, eps)


def backward(
    dy: Tensor,
    s: Tensor,
    statistics: tuple[Tensor, Tensor],
    weight: Tensor,
    sums: Sequence[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of s, and where `sums` wants them of weight and bias.

    Args:
        dy, s: in float32 or float64; 16-bit rows would be summed up in 16 bit.
        statistics: mean and rstd.
        weight: as in `forward`.
    """
    # the kernel takes a bias for the shape of its gradient alone
    found: tuple[Tensor, Tensor | None, Tensor | None]
    found = torch.ops.aten.native_layer_norm_backward.default(
        dy, s, s.shape[-1:], *statistics, weight, weight, [True, *sums]
    )
    return found
