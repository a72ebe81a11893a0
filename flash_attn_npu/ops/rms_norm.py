"""Mirror of `flash_attn.ops.rms_norm`: dropout, add and RMS norm, without a CUDA extension.

s is the sum, z its norm: s * rsqrt(mean(s * s) + epsilon) * weight + bias. All else is as in
`layer_norm`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._core.problems.norms import NormCall
from .._core.rowwise.dropout_norms import (
    DropoutAddLayerNormFn,
    DropoutAddLayerNormParallelResidualFn,
    DropoutAddLayerNormSubsetFn,
    Subsets,
    dropout_add,
    dropout_add_parallel_residual,
    dropout_add_subset,
)
from .._core.rowwise.norms import normed
from ._norm_modules import DropoutAddNorm

__all__ = [
    "DropoutAddLayerNormFn",
    "DropoutAddLayerNormParallelResidualFn",
    "DropoutAddLayerNormSubsetFn",
    "DropoutAddRMSNorm",
    "RMSNorm",
    "dropout_add_rms_norm",
    "dropout_add_rms_norm_parallel_residual",
    "dropout_add_rms_norm_subset",
    "rms_norm",
]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The RMS norm of x, (..., hidden), times weight, (hidden,).

    Raises:
        ArgumentError, ArgumentTypeError: as `dropout_add_rms_norm`.

    Contract: flash-attention 2.8, `rms_norm`.
    """
    y: Tensor = normed("rms_norm", NormCall(x, weight, eps=epsilon, is_rms_norm=True), False)
    return y


def dropout_add_rms_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """z, the RMS norm of s = dropout(x0 * rowscale) * layerscale + residual.

    Arguments, results and errors are those of `layer_norm.dropout_add_layer_norm`.

    Contract: flash-attention 2.8, `dropout_add_rms_norm`. Different: other random bits.
    """
    # fmt: off
    fields = (
        x0, weight, bias, residual, None, None, None, rowscale, layerscale, None, None, epsilon,
        dropout_p, prenorm, residual_in_fp32, False, True, None, 1.0,
    )
    # fmt: on
    return dropout_add("dropout_add_rms_norm", fields, return_dropout_mask)


def dropout_add_rms_norm_subset(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    layerscale: Tensor | None = None,
    x0_subset: Tensor | None = None,
    out_subset: Tensor | None = None,
    rowscale_const: float = 1.0,
    out_numrows: int = 0,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """`dropout_add_rms_norm` where x0, or z, or both have rows for some of the tokens only.

    Arguments, results and errors are those of `layer_norm.dropout_add_layer_norm_subset`.

    Contract: flash-attention 2.8, `dropout_add_rms_norm_subset`. Different: other random bits.
    """
    # fmt: off
    call = NormCall(
        x0, weight, bias, residual, layerscale=layerscale, eps=epsilon, dropout_p=dropout_p,
        prenorm=prenorm, residual_in_fp32=residual_in_fp32, is_rms_norm=True,
        rowscale_const=rowscale_const,
    )
    # fmt: on
    return dropout_add_subset(
        call, Subsets(x0_subset, out_subset, out_numrows), return_dropout_mask
    )


def dropout_add_rms_norm_parallel_residual(
    x0: Tensor,
    x1: Tensor | None,
    residual: Tensor | None,
    weight0: Tensor,
    bias0: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    dropout_p: float,
    epsilon: float,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """z0 and z1, two RMS norms of s = dropout(x0) + dropout(x1) + residual.

    Arguments, results and errors are those of
    `layer_norm.dropout_add_layer_norm_parallel_residual`.

    Contract: flash-attention 2.8, `dropout_add_rms_norm_parallel_residual`. Different: other random
    bits.
    """
    # fmt: off
    fields = (
        x0, weight0, bias0, residual, x1, weight1, bias1, None, None, None, None, epsilon,
        dropout_p, prenorm, residual_in_fp32, False, True, None, 1.0,
    )
    # fmt: on
    function = "dropout_add_rms_norm_parallel_residual"
    return dropout_add_parallel_residual(function, fields, return_dropout_mask)


class RMSNorm(nn.Module):
    """`rms_norm` with a weight of its own.

    Contract: flash-attention 2.8, `RMSNorm` of ops.rms_norm.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Ones."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The norm of x."""
        return rms_norm(x, self.weight, self.eps)


class DropoutAddRMSNorm(DropoutAddNorm):
    """`dropout_add_rms_norm` with a weight of its own; dropout while training.

    Contract: flash-attention 2.8, `DropoutAddRMSNorm`.
    """

    def _add_bias(self) -> None:
        self.register_parameter("bias", None)

    def _function(self) -> Callable[..., Any]:
        return dropout_add_rms_norm
