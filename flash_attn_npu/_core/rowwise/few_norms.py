"""Autograd of layer norms of a few rows on a CPU: as few steps of Python as torch has kernels.

It is that of `norms` for calls with several results, whose gradients are left to autograd to round.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ground.second_derivatives import first_order
from ..kernels.composed import layer_norm, norms
from ..problems.norms import NormCall

__all__ = ["recorded", "serves"]

TENSORS = 7
"""x, weight, bias, residual, x1, weight1, bias1: the first fields of a call."""


def serves(call: NormCall) -> bool:
    """Whether `FewLayerNorms` differentiates a small call on a CPU."""
    return not call.is_rms_norm and call.rowscale is None and call.layerscale is None


def recorded(
    call: NormCall, masks: tuple[Tensor | None, Tensor | None]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y, y1 if there is a weight1, and the rounded sum if prenorm."""
    results = FewLayerNorms.apply(*call[:TENSORS], call, masks)  # type: ignore[no-untyped-call]
    y1 = None if call.weight1 is None else results[1]
    return results[0], y1, results[-1] if call.prenorm else None


class FewLayerNorms(torch.autograd.Function):
    """Its arguments are the first tensors of a call, the call, and the masks of its dropout.

    Its results are y, y1 if there is a weight1, and the rounded sum if prenorm.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, ...]:
        call, (mask, mask1) = given[TENSORS:]
        weight1, prenorm, terms = call.weight1, call.prenorm, norms.terms_of(call)
        rows = norms.summed(call, mask, mask1)
        total = norms.rounded_total(call, norms.is_alone(call, mask), rows)
        y, mean, rstd = norms.by_torch(call, rows, call.weight, call.bias)
        ctx.save_for_backward(total, mean, rstd, call.weight, weight1, mask, mask1)
        ctx.how = prenorm, terms
        if weight1 is None:
            return (y, total) if prenorm else (y,)
        y1 = norms.by_torch(call, rows, weight1, call.bias1)[0]
        return (y, y1, total) if prenorm else (y, y1)

    @staticmethod
    def backward(ctx: Any, *douts: Tensor) -> Any:
        saved = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return _gradients(ctx, saved, douts)
        with torch.no_grad():
            found = _gradients(ctx, saved, douts)
        return first_order("a norm", found, *douts, *saved)


def _gradients(
    ctx: Any, saved: tuple[Tensor, ...], douts: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Autograd rounds them to the dtypes of the arguments."""
    total, mean, rstd, weight, weight1, mask, mask1 = saved
    (prenorm, terms), needs = ctx.how, ctx.needs_input_grad
    wide, zero_centered = terms.wide, terms.zero_centered_weight
    rows, statistics = norms.cast(total, wide), (mean, rstd)
    scale = norms.effective(weight, wide, zero_centered)
    dy = norms.cast(douts[0], wide)
    ds, dweight, dbias = layer_norm.backward(dy, rows, statistics, scale, needs[1:3])
    dweight1 = dbias1 = None
    if weight1 is not None:
        scale = norms.effective(weight1, wide, zero_centered)
        dy = norms.cast(douts[1], wide)
        more, dweight1, dbias1 = layer_norm.backward(dy, rows, statistics, scale, needs[5:7])
        ds = ds.add_(more)
    if prenorm:
        ds = ds + douts[-1]
    dx = ds if mask is None or not needs[0] else norms.kept(ds, mask, None, terms)
    dx1 = ds if mask1 is None or not needs[4] else norms.kept(ds, mask1, None, terms)
    found = (dx, dweight, dbias, ds, dx1, dweight1, dbias1, None, None)
    return tuple([one if needed else None for one, needed in zip(found, needs, strict=True)])
