"""Autograd of `layer_norm_fn` as flash-attention has it, a class that is public there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.composed import norm_checks
from ..problems.norms import NormCall
from .answers import arranged, in_buffers
from .norms import compose, gradients, serve, unaliased

__all__ = ["LayerNormFn"]


class LayerNormFn(torch.autograd.Function):
    """Autograd of `layer_norm_fn`, with its arguments and results."""

    @staticmethod
    def forward(
        ctx: Any,
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
        """Add and normalise."""
        call = NormCall(
            x=x,
            weight=weight,
            bias=bias,
            residual=residual,
            x1=x1,
            weight1=weight1,
            bias1=bias1,
            rowscale=rowscale,
            out=out,
            residual_out=residual_out,
            eps=eps,
            dropout_p=dropout_p,
            residual_in_fp32=residual_in_fp32,
            zero_centered_weight=zero_centered_weight,
            is_rms_norm=is_rms_norm,
            out_dtype=out_dtype,
            prenorm=prenorm or residual_out is not None,
        )
        norm_checks.check(call, {})
        compose("LayerNormFn", call)
        ctx.two, ctx.prenorm = weight1 is not None, prenorm
        answer = in_buffers(call, serve(ctx, unaliased(call)))
        return arranged(answer, ctx.two, prenorm, return_dropout_mask)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
        """The gradients of the tensors, none of rowscale."""
        dy1 = args[0] if ctx.two else None
        dtotal = args[int(ctx.two)] if ctx.prenorm else None
        order = ("x", "weight", "bias", "residual", "x1", "weight1", "bias1")
        return gradients(ctx, ctx.saved_tensors, order, dy, dy1, dtotal)
