"""Mirror of `flash_attn.ops.layer_norm`: dropout, add and layer norm, without a CUDA extension.

s is the sum, z its norm. Both are computed in float32 (float64 if an addend is float64) and rounded
once. Autocast changes nothing. rms_norm is the same module for RMS norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

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
    "DropoutAddLayerNorm",
    "DropoutAddLayerNormFn",
    "DropoutAddLayerNormParallelResidualFn",
    "DropoutAddLayerNormSubsetFn",
    "dropout_add_layer_norm",
    "dropout_add_layer_norm_parallel_residual",
    "dropout_add_layer_norm_subset",
    "layer_norm",
    "maybe_align",
]


def maybe_align(x: Tensor, alignment_in_bytes: int = 16) -> Tensor:
    """x, copied if its memory does not start at a multiple of alignment_in_bytes.

    Contract: flash-attention 2.8, `maybe_align`.
    """
    return x if x.data_ptr() % alignment_in_bytes == 0 else x.clone()


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """The layer norm of x, (..., hidden), times weight, (hidden,), plus bias, (hidden,) or None.

    Raises:
        ArgumentError, ArgumentTypeError: as `dropout_add_layer_norm`.

    Contract: flash-attention 2.8, `layer_norm`.
    """
    y: Tensor = normed("layer_norm", NormCall(x, weight, bias, eps=epsilon), False)
    return y


def dropout_add_layer_norm(
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
    """z, the layer norm of s = dropout(x0 * rowscale) * layerscale + residual.

    Differentiable in all tensors but rowscale, once.

    Args:
        x0: (..., hidden), any floating dtype, any strides.
        residual: x0's shape, or None.
        weight, bias: (hidden,), of any floating dtype; bias may be None.
        dropout_p: the probability to drop a value; what is kept is scaled by 1 / (1 - dropout_p).
        epsilon: added to the variance.
        rowscale: a factor for each row: x0's shape without the last dimension, or flattened.
        layerscale: (hidden,).
        prenorm: return s too.
        residual_in_fp32: s is float32 at least; it counts without a residual only.
        return_dropout_mask: return what was kept.

    Returns:
        z in x0's dtype, followed by s with prenorm, in residual's dtype (without one in x0's, or
        float32), and by a mask with return_dropout_mask: uint8, x0's shape, 1 for what was kept.
        A lone z is no tuple.

    Raises:
        ArgumentError: shapes, dtypes, devices or values do not fit.
        ArgumentTypeError: an argument is an object of the wrong type.

    Contract: flash-attention 2.8, `dropout_add_layer_norm`. Different: other random bits.
    """
    # fmt: off
    fields = (
        x0, weight, bias, residual, None, None, None, rowscale, layerscale, None, None, epsilon,
        dropout_p, prenorm, residual_in_fp32, False, False, None, 1.0,
    )
    # fmt: on
    return dropout_add("dropout_add_layer_norm", fields, return_dropout_mask)


def dropout_add_layer_norm_subset(
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
    """`dropout_add_layer_norm` where x0, or z, or both have rows for some of the tokens only.

    Args:
        x0: (..., hidden): a row for each token, or with x0_subset one for each that has one.
        residual: (..., hidden), a row for each token, or None.
        x0_subset: int32 or int64, one element for each token: j > 0 for row j - 1 of x0, 0 for a
            token without a row, for which zeros are added.
        out_subset: as x0_subset, for the rows of z.
        rowscale_const: a factor of all rows of x0.
        out_numrows: how many rows z has, with out_subset: no more than it has elements.
        others: as in `dropout_add_layer_norm`.

    Returns:
        As `dropout_add_layer_norm`; z and s have x0's shape but for the first dimension, which is
        as long as it takes to hold a row for each token, with out_subset out_numrows rows of z.
        Rows that no token goes to are zeros. The mask has x0's shape.

    Raises:
        ArgumentError, ArgumentTypeError: as `dropout_add_layer_norm`, or a subset has another
            dtype or number of elements, names a row that does not exist, or one row of z twice; on
            a device such names are not looked at, and the lookup itself may fail. Or the rows of z
            or s are no multiple of those that x0 has behind its first dimension.

    Contract: flash-attention 2.8, `dropout_add_layer_norm_subset`. Different: other random bits;
    rows of z that no token goes to are zeros instead of undefined.
    """
    # fmt: off
    call = NormCall(
        x0, weight, bias, residual, layerscale=layerscale, eps=epsilon, dropout_p=dropout_p,
        prenorm=prenorm, residual_in_fp32=residual_in_fp32, rowscale_const=rowscale_const,
    )
    # fmt: on
    return dropout_add_subset(
        call, Subsets(x0_subset, out_subset, out_numrows), return_dropout_mask
    )


def dropout_add_layer_norm_parallel_residual(
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
    """z0 and z1, two layer norms of s = dropout(x0) + dropout(x1) + residual.

    Args:
        x0, x1: (..., hidden); x1 may be None. Their dropout is independent.
        residual: x0's shape, or None.
        weight0, bias0: (hidden,), of z0; bias0 may be None.
        weight1, bias1: (hidden,), of z1, or None.
        others: as in `dropout_add_layer_norm`.

    Returns:
        z0, z1 (None without weight1), followed by s with prenorm, and by the masks of x0 and x1
        (None without x1) with return_dropout_mask; dtypes as in `dropout_add_layer_norm`.

    Raises:
        ArgumentError, ArgumentTypeError: as `dropout_add_layer_norm`.

    Contract: flash-attention 2.8, `dropout_add_layer_norm_parallel_residual`. Different: other
    random bits.
    """
    # fmt: off
    fields = (
        x0, weight0, bias0, residual, x1, weight1, bias1, None, None, None, None, epsilon,
        dropout_p, prenorm, residual_in_fp32, False, False, None, 1.0,
    )
    # fmt: on
    function = "dropout_add_layer_norm_parallel_residual"
    return dropout_add_parallel_residual(function, fields, return_dropout_mask)


class DropoutAddLayerNorm(DropoutAddNorm):
    """`dropout_add_layer_norm` with weight and bias of its own; dropout while training.

    Contract: flash-attention 2.8, `DropoutAddLayerNorm`.
    """

    def _function(self) -> Callable[..., Any]:
        return dropout_add_layer_norm
