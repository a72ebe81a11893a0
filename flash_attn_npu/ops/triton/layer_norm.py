"""Mirror of `flash_attn.ops.triton.layer_norm`: functions and a module; no Triton kernels.

All of it is computed in float32, or in float64 if a tensor that is added is float64, and rounded
once. It is autocast's business only where a function says so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, layer_norm

from ..._core.ground.dense_arguments import refuse_transforms
from ..._core.ground.records import named
from ..._core.problems.norms import NormCall
from ..._core.rowwise.layer_norm_function import LayerNormFn
from ..._core.rowwise.norm_linear import LayerNormLinearFn
from ..._core.rowwise.norms import normed
from ...utils.library import triton_op
from ...utils.torch import custom_bwd, custom_fwd

__all__ = [
    "LayerNormFn",
    "LayerNormLinearFn",
    "RMSNorm",
    "custom_bwd",
    "custom_fwd",
    "layer_norm_fn",
    "layer_norm_linear_fn",
    "layer_norm_ref",
    "maybe_contiguous",
    "maybe_contiguous_lastdim",
    "rms_norm_fn",
    "rms_norm_ref",
    "triton_op",
]


def maybe_contiguous_lastdim(x: Tensor | None) -> Tensor | None:
    """x, copied if its last dimension has a stride other than 1.

    Contract: flash-attention 2.8, `maybe_contiguous_lastdim`.
    """
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x


def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    """x, copied if it is not contiguous.

    Contract: flash-attention 2.8, `maybe_contiguous`.
    """
    return None if x is None else x.contiguous()


def layer_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    zero_centered_weight: bool = False,
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
) -> Any:
    """`layer_norm_fn` step by step in plain torch, to compare with.

    Args:
        x, weight, bias, residual, x1, weight1, bias1, eps, rowscale: as in `layer_norm_fn`.
        dropout_p: what is kept is scaled by 1 / (1 - dropout_p).
        dropout_mask, dropout_mask1: what to keep of x and x1, True to keep; drawn if None.
        upcast: compute in float32 at least; otherwise in the dtypes of the arguments.

    Returns:
        y in x's dtype; (y, y1) with weight1; with prenorm the sum behind them, not rounded back
        if upcast.

    Contract: flash-attention 2.8, `layer_norm_ref`.
    """
    # fmt: off
    call = NormCall(
        x, weight, bias, residual, x1, weight1, bias1, rowscale, eps=eps, dropout_p=dropout_p,
        prenorm=prenorm, zero_centered_weight=zero_centered_weight,
    )
    # fmt: on
    return _reference(call, (dropout_mask, dropout_mask1), upcast)


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    zero_centered_weight: bool = False,
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
) -> Any:
    """`rms_norm_fn` step by step in plain torch; arguments and results as `layer_norm_ref`.

    Contract: flash-attention 2.8, `rms_norm_ref`.
    """
    # fmt: off
    call = NormCall(
        x, weight, bias, residual, x1, weight1, bias1, rowscale, eps=eps, dropout_p=dropout_p,
        prenorm=prenorm, zero_centered_weight=zero_centered_weight, is_rms_norm=True,
    )
    # fmt: on
    return _reference(call, (dropout_mask, dropout_mask1), upcast)


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Any:
    """Normalise s = dropout(x * rowscale) + dropout(x1) + residual.

    y = (s - mean) * rsqrt(variance + eps) * weight + bias, where the mean and the biased variance
    are those of each row of s before it is rounded. For RMS norm the mean is left out and the
    mean square is the variance. Differentiable in all tensors but rowscale, once.

    Args:
        x: (..., hidden), any floating dtype, any strides.
        weight, bias: (hidden,); bias may be None.
        residual, x1: x's shape.
        weight1, bias1: (hidden,), for a second result y1 of the same s.
        eps: added to the variance.
        dropout_p: the probability to drop a value of x, and independently one of x1; what is kept
            is scaled by 1 / (1 - dropout_p).
        rowscale: a factor for each row: x's shape without the last dimension, or flattened; not
            with x1.
        prenorm: return the sum too.
        residual_in_fp32: the sum is float32 at least; it counts without a residual only.
        zero_centered_weight: add 1 to weight and weight1.
        is_rms_norm: RMS norm.
        return_dropout_mask: return what was kept.
        out_dtype: dtype of y and y1; x's if None.
        out, residual_out: buffers for y and the sum, of the dtypes of these, any strides. The
            results lie in them; their gradients belong to the results, not to the buffers.

    Returns:
        y, followed by y1 with weight1, by the sum with prenorm, in the dtype of residual (without
        one in x's, or at least float32 if residual_in_fp32), and by two masks with
        return_dropout_mask: bool, x's shape, True for what was kept; None without dropout, the
        second without x1 too. A lone y is no tuple.

    Raises:
        ArgumentError: shapes, dtypes, devices or values do not fit.
        ArgumentTypeError: an argument is an object of the wrong type.

    Contract: flash-attention 2.8, `layer_norm_fn`. Different: other random bits; under
    torch.compile a result is a copy of what lies in its buffer.
    """
    # fmt: off
    return normed("layer_norm_fn", (
        x, weight, bias, residual, x1, weight1, bias1, rowscale, None, out, residual_out, eps,
        dropout_p, prenorm, residual_in_fp32, zero_centered_weight, is_rms_norm, out_dtype, 1.0,
    ), return_dropout_mask)
    # fmt: on


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Any:
    """`layer_norm_fn` with is_rms_norm; arguments, results and errors are the same.

    Contract: flash-attention 2.8, `rms_norm_fn`.
    """
    # fmt: off
    return normed("rms_norm_fn", (
        x, weight, bias, residual, x1, weight1, bias1, rowscale, None, out, residual_out, eps,
        dropout_p, prenorm, residual_in_fp32, zero_centered_weight, True, out_dtype, 1.0,
    ), return_dropout_mask)
    # fmt: on


def layer_norm_linear_fn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Any:
    """A linear layer of the norm of x + residual; the gradient computes the norm again.

    Args:
        x, norm_weight, norm_bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm: as in
            `layer_norm_fn`.
        linear_weight: (out_features, hidden).
        linear_bias: (out_features,) or None.

    Returns:
        (..., out_features) in x's dtype, inside autocast in autocast's, to which linear_weight and
        linear_bias are converted; with prenorm the sum behind it, as in `layer_norm_fn`.

    Raises:
        ArgumentError, ArgumentTypeError: as `layer_norm_fn`.

    Contract: flash-attention 2.8, `layer_norm_linear_fn`.
    """
    refuse_transforms("x")
    # fmt: off
    return LayerNormLinearFn.apply(  # type: ignore[no-untyped-call]
        x, norm_weight, norm_bias, linear_weight, linear_bias, residual, eps, prenorm,
        residual_in_fp32, is_rms_norm,
    )
    # fmt: on


class RMSNorm(nn.Module):
    """`rms_norm_fn` with a weight of its own, (hidden_size,), and dropout while training.

    The weight starts with ones, or with zeros if zero_centered_weight.

    Contract: flash-attention 2.8, `RMSNorm` of ops.triton.layer_norm.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        zero_centered_weight: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0.0 else None
        self.zero_centered_weight = zero_centered_weight
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make the norm one without a weight."""
        nn.init.constant_(self.weight, 0.0 if self.zero_centered_weight else 1.0)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Any:
        """The norm of dropout(x) + residual, and that sum if prenorm."""
        return rms_norm_fn(
            x,
            self.weight,
            self.bias,
            residual=residual,
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
            zero_centered_weight=self.zero_centered_weight,
        )


def _reference(call: NormCall, masks: tuple[Tensor | None, Tensor | None], upcast: bool) -> Any:
    dtype = call.x.dtype
    if upcast:
        wide = {name: _widened(value) for name, value in named(call).items()}
        call = NormCall(**wide)
    x = call.x if call.rowscale is None else call.x * call.rowscale[..., None]
    total = _dropped(x, call.dropout_p, masks[0])
    if call.x1 is not None:
        total = total + _dropped(call.x1, call.dropout_p, masks[1])
    if call.residual is not None:
        total = (total + call.residual).to(total.dtype)

    def norm(weight: Tensor, bias: Tensor | None) -> Tensor:
        if call.zero_centered_weight:
            weight = weight + 1.0
        s = total.to(weight.dtype)
        if call.is_rms_norm:
            y = s * torch.rsqrt(s.square().mean(dim=-1, keepdim=True) + call.eps) * weight
            return (y if bias is None else y + bias).to(dtype)
        return layer_norm(s, s.shape[-1:], weight, bias, call.eps).to(dtype)

    results: tuple[Tensor, ...] = (norm(call.weight, call.bias),)
    if call.weight1 is not None:
        results += (norm(call.weight1, call.bias1),)
    if call.prenorm:
        results += (total,)
    return results if len(results) > 1 else results[0]


def _dropped(x: Tensor, dropout_p: float, mask: Tensor | None) -> Tensor:
    if dropout_p == 0.0:
        return x
    if mask is None:
        return dropout(x, dropout_p)
    return x.masked_fill(mask.logical_not(), 0.0) / (1.0 - dropout_p)


def _widened(value: Any) -> Any:
    """A tensor in float32 at least; what is none as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.to(torch.promote_types(value.dtype, torch.float32))
