"""Autograd of a norm and the projection behind it, as one function that keeps no y."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..ground.autocast import custom_bwd, custom_fwd, has_autocast
from ..ground.dense_arguments import require_dense
from ..ground.records import replaced
from ..ground.second_derivatives import first_order
from ..kernels.composed import norm_checks, norms
from ..problems.norms import NormCall
from .norms import RENAMED, compose, gradients, serve

__all__ = ["LayerNormLinearFn"]


class LayerNormLinearFn(torch.autograd.Function):
    """Autograd of `layer_norm_linear_fn`, with its arguments and results."""

    @staticmethod
    @custom_fwd
    def forward(
        ctx: Any,
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
        """Add, normalise and project."""
        # fmt: off
        call = NormCall(
            x, norm_weight, norm_bias, residual, eps=eps, prenorm=prenorm,
            residual_in_fp32=residual_in_fp32, is_rms_norm=is_rms_norm,
        )
        # fmt: on
        norm_checks.check(call, RENAMED["layer_norm_linear_fn"])
        _check_linear(x, linear_weight, linear_bias)
        compose("layer_norm_linear_fn", call)
        kind = x.device.type
        autocast = has_autocast(kind) and torch.is_autocast_enabled(kind)
        call = replaced(call, out_dtype=torch.get_autocast_dtype(kind) if autocast else x.dtype)
        answer = serve(ctx, call, norm_bias, linear_weight)
        ctx.prenorm, ctx.out_dtype = prenorm, call.out_dtype
        ctx.linear_bias_dtype = None if linear_bias is None else linear_bias.dtype
        bias = None if linear_bias is None else linear_bias.to(call.out_dtype)
        # linear may return a view, and what a Function returns as a view cannot be written to
        out = linear(answer.y, linear_weight.to(call.out_dtype), bias).detach()
        return (out, answer.total) if prenorm else out

    @staticmethod
    @custom_bwd
    def backward(ctx: Any, dout: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
        """The gradients of the tensors; y is computed again."""
        saved_tensors = ctx.saved_tensors
        dtotal = args[0] if ctx.prenorm else None
        with torch.no_grad():
            grads = _linear_gradients(ctx, saved_tensors, dout, dtotal)
        return first_order("layer_norm_linear_fn", grads, dout, dtotal, *saved_tensors)


def _linear_gradients(
    ctx: Any, saved_tensors: tuple[Tensor, ...], dout: Tensor, dtotal: Tensor | None
) -> tuple[Tensor | None, ...]:
    *saved, norm_bias, linear_weight = saved_tensors
    total, mean, rstd, norm_weight = saved[:4]
    rows = dout.flatten(0, -2) if dout.dim() > 1 else dout[None]
    dy = (rows @ linear_weight.to(dout.dtype)).view(total.shape)
    order = ("x", "weight", "bias", "linear_weight", "linear_bias", "residual")
    needs = dict(zip(order, ctx.needs_input_grad[: len(order)], strict=True))
    grads = gradients(ctx, saved_tensors, order, dy, None, dtotal)
    wide = ctx.terms.wide
    dweight = dbias = None
    if needs["linear_weight"]:
        normal = norms.standardised(total.to(wide), mean, rstd)
        y = norms.affine(normal, norm_weight, norm_bias, False).to(ctx.out_dtype)
        dweight = (rows.t() @ y.reshape(-1, y.shape[-1])).to(linear_weight.dtype)
    if needs["linear_bias"]:
        dbias = rows.sum(0, dtype=wide).to(ctx.linear_bias_dtype)
    return *grads[:3], dweight, dbias, *grads[5:]


def _check_linear(x: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    require_dense(linear_weight=linear_weight)
    features = linear_weight.shape[0] if linear_weight.dim() else 1
    norm_checks.check_tensor("linear_weight", linear_weight, (features, x.shape[-1]), x)
    if linear_bias is not None:
        norm_checks.check_tensor("linear_bias", linear_bias, (features,), x)
