"""Norms of a few rows on a CPU: as few steps of Python as torch has kernels.

What a call's key says is looked at once, and kept as `Steps`; the numbers are those of `norms`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from ..ground.dtypes import converter
from ..ground.functions import bare, unwrapped
from ..ground.second_derivatives import first_order, once, watch
from ..kernels.composed import layer_norm, norms
from ..problems.norms import NormCall

__all__ = ["FewNorms", "Steps", "serve", "steps_of"]

Convert = Callable[[Tensor], Tensor]
Masks = tuple[Tensor | None, Tensor | None]

TENSORS: Final = 7
"""x, weight, bias, residual, x1, weight1, bias1: the first fields of a call."""

_once = once("a norm")
_AS_WIDE = {torch.float32: torch.int32, torch.float64: torch.int64}

_of_gradient = attrgetter("wide", "widen", "rms", "zero_centered", "kept", "prenorm")
_NO_MASKS: Masks = (None, None)
_grad_enabled = torch.is_grad_enabled
_layer_norm = torch.layer_norm
_rms_norm = torch.rms_norm
_native_layer_norm = torch.native_layer_norm


class Steps(NamedTuple):
    """What is done for calls that have one key.

    shape: of a row.
    wide, dtype: what is computed in, and that of y; `widen` and `narrow` convert to them.
    scaled: there is a tensor of scales, so that `norms.summed` adds up.
    kept: what dropout and a constant scale make of x and x1; None where there are none.
    chance, bits: how much dropout keeps, None without it, and the dtype of its masks.
    widens: x is converted before anything is added to it.
    stored: the dtype of the sum as it is returned, if `prenorm`, and kept for the gradient.
    alone: the sum is x.
    recorded: it has several results with a gradient, which are those of `FewNorms`.
    watched: torch's own autograd differentiates it.
    """

    shape: tuple[int, ...]
    eps: float
    wide: torch.dtype
    widen: Convert
    dtype: torch.dtype
    narrow: Convert
    rms: bool
    zero_centered: bool
    scaled: bool
    kept: norms.Terms | None
    chance: float | None
    bits: torch.dtype
    widens: bool
    stored: torch.dtype
    prenorm: bool
    alone: bool
    recorded: bool
    watched: bool


def steps_of(call: NormCall, needs_grad: bool) -> Steps | None:
    """How `serve` does what equals this call; None where it does not."""
    rms, several = call.is_rms_norm, call.prenorm or call.weight1 is not None
    scaled = call.rowscale is not None or call.layerscale is not None
    if (rms and call.weight1 is not None) or (scaled and needs_grad and several):
        return None
    wide, dtype = norms.wide_dtype(call), norms.out_dtype(call)
    changed = scaled or call.dropout_p != 0 or call.rowscale_const != 1
    watched = needs_grad and not several
    alone = not changed and call.x1 is None and call.residual is None
    # torch's layer norm widens 16-bit rows itself, but its gradient would round sums over them
    inside = alone and not rms and not needs_grad and call.x.dtype == dtype
    return Steps(
        shape=tuple(call.x.shape[-1:]),
        eps=call.eps,
        wide=wide,
        widen=converter(wide),
        dtype=dtype,
        narrow=converter(dtype),
        rms=rms,
        zero_centered=call.zero_centered_weight,
        scaled=scaled,
        kept=norms.terms_of(call) if changed else None,
        chance=1.0 - call.dropout_p if call.dropout_p != 0 else None,
        bits=torch.bool if watched else _AS_WIDE[wide],
        widens=call.x.dtype != wide and not inside,
        stored=norms.total_dtype(call),
        prenorm=bool(call.prenorm),
        alone=alone,
        recorded=needs_grad and several,
        watched=watched,
    )


def serve(steps: Steps, fields: tuple[Any, ...], masks: Masks | None = None) -> Any:
    """y, followed by y1 if there is a weight1, and by the sum if prenorm; y alone is no tuple.

    Args:
        fields: those of a NormCall.
        masks: what dropout keeps of x and x1; drawn if None.
    """
    tensors = fields[:TENSORS]
    x, weight, bias, residual, x1, weight1, bias1 = tensors
    if steps.scaled:
        call = NormCall(*fields)
        rowscale = None if call.rowscale is None else call.rowscale.detach()
        rows = norms.summed(call._replace(rowscale=rowscale), *(masks or norms.draw_masks(call)))
    else:
        if steps.chance is None:
            masks = _NO_MASKS
        else:
            masks = _drawn(steps, x, x1) if masks is None else _as_bits(steps, masks)
        if steps.recorded:
            given = [None if one is None else unwrapped(one) for one in tensors]
            return _recorded(*given, steps, *masks)
        rows = _rows(steps, x, residual, x1, masks)
    y = _normed(steps, rows, weight, bias)
    if steps.watched:
        watch(y, _once)
        return y
    if weight1 is None:
        return (y, _total(steps, x, rows)) if steps.prenorm else y
    y1 = _normed(steps, rows, weight1, bias1)
    return (y, y1, _total(steps, x, rows)) if steps.prenorm else (y, y1)


def _drawn(steps: Steps, x: Tensor, x1: Tensor | None) -> Masks:
    """Masks as `_kept` takes them, of the same random numbers whatever it takes."""
    chance: Any = steps.chance

    def drawn(addend: Tensor) -> Tensor:
        mask = torch.empty(addend.shape, dtype=steps.bits, device=addend.device)
        return mask.bernoulli_(chance)

    return drawn(x), None if x1 is None else drawn(x1)


def _as_bits(steps: Steps, masks: Masks) -> Masks:
    """Masks of True and False as `_kept` takes them."""
    if steps.watched:
        return masks
    mask, mask1 = [None if mask is None else mask.to(steps.bits) for mask in masks]
    return mask, mask1


def _kept(steps: Steps, values: Tensor, mask: Tensor | None) -> Tensor:
    """`norms.kept` as a new tensor.

    Args:
        mask: 1 for what is kept, in integers as wide as what is computed in, of which it is made
            0 whatever it is; torch.where takes four times as long, but has a derivative.
    """
    kept = steps.kept
    assert kept is not None
    if steps.watched:
        return norms.kept(values, mask, None, kept)
    values = (values if values.dtype is kept.wide else steps.widen(values)) * kept.scale
    if mask is not None:
        values.view(steps.bits).mul_(mask)
    return values


def _rows(
    steps: Steps, x: Tensor, residual: Tensor | None, x1: Tensor | None, masks: Masks
) -> Tensor:
    """The sum, not rounded yet."""
    if steps.kept is None:
        rows = steps.widen(x) if steps.widens else x
    else:
        rows = _kept(steps, x, masks[0])
        x1 = None if x1 is None else _kept(steps, x1, masks[1])
    if x1 is not None:
        rows = rows + x1
    return rows if residual is None else rows + residual


def _normed(steps: Steps, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    shape, eps, wide, widen, dtype, narrow, rms, zero_centered = steps[:8]
    if weight.dtype is not wide:
        weight = widen(weight)
    if zero_centered:
        weight = weight + 1.0
    if bias is not None and bias.dtype is not wide:
        bias = widen(bias)
    if rms:
        y = _rms_norm(rows, shape, weight, eps)
        y = (y if bias is None else y + bias).contiguous()
    else:
        y = _layer_norm(rows, shape, weight, bias, eps)
    return y if y.dtype is dtype else narrow(y)


def _total(steps: Steps, x: Tensor, rows: Tensor) -> Tensor:
    """The sum as it is kept."""
    stored = steps.stored
    if not steps.alone or stored is not x.dtype:
        return (rows if rows.dtype is stored else rows.to(stored)).contiguous()
    # a returned x would be one tensor with two histories
    return x.clone(memory_format=torch.contiguous_format) if steps.prenorm else x


class FewNorms(torch.autograd.Function):
    """Its arguments are the first tensors of a call, the steps, and the masks of its dropout.

    Its results are those of `serve`: of several results, torch's autograd would take what nobody
    uses for no part of the graph. It rounds the gradients to the dtypes of the arguments.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, ...]:
        x, weight, bias, residual, x1, weight1, bias1, steps, mask, mask1 = given
        rows = _rows(steps, x, residual, x1, (mask, mask1))
        total, measured = _total(steps, x, rows), _rms if steps.rms else _layer
        y, mean, rstd = measured(steps, rows, weight, bias)
        ctx.save_for_backward(total, mean, rstd, weight, weight1, mask, mask1)
        ctx.steps = steps
        if weight1 is None:
            return y, total
        y1 = measured(steps, rows, weight1, bias1)[0]
        return (y, y1, total) if steps.prenorm else (y, y1)

    @staticmethod
    def backward(ctx: Any, *douts: Tensor) -> Any:
        saved = ctx.saved_tensors
        if not _grad_enabled():
            return _gradients(ctx, saved, douts)
        with torch.no_grad():
            found = _gradients(ctx, saved, douts)
        return first_order("a norm", found, *douts, *saved)


_recorded = bare(FewNorms)


def _layer(
    steps: Steps, rows: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`_normed`, with mean and rstd."""
    shape, eps, wide, widen, dtype, narrow, _, zero_centered = steps[:8]
    scale = weight if weight.dtype is wide else widen(weight)
    scale = scale + 1.0 if zero_centered else scale
    bias = bias if bias is None or bias.dtype is wide else widen(bias)
    y, mean, rstd = _native_layer_norm(rows, shape, scale, bias, eps)
    return y if y.dtype is dtype else narrow(y), mean, rstd


def _rms(
    steps: Steps, rows: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    rstd = rows.square().mean(-1, keepdim=True).add_(steps.eps).rsqrt_()
    y = (rows * rstd).mul_(norms.effective(weight, steps.wide, steps.zero_centered))
    y = (y if bias is None else y.add_(bias)).contiguous()
    return y if y.dtype is steps.dtype else steps.narrow(y), None, rstd


def _gradients(
    ctx: Any, saved: tuple[Tensor, ...], douts: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    total, mean, rstd, weight, weight1, mask, mask1 = saved
    steps = ctx.steps
    wide, widen, rms, zero_centered, kept, prenorm = _of_gradient(steps)
    _, *sums, of_residual, of_x1, of_weight1, of_bias1, _, _, _ = ctx.needs_input_grad
    rows = total if total.dtype is wide else widen(total)
    scale = weight if weight.dtype is wide else widen(weight)
    scale = scale + 1.0 if zero_centered else scale
    dy, back = douts[0], _rms_back if rms else layer_norm.backward
    dy = dy if dy.dtype is wide else widen(dy)
    ds, dweight, dbias = back(dy, rows, (mean, rstd), scale, sums)
    dweight1 = dbias1 = None
    if weight1 is not None:
        scale, dy = norms.effective(weight1, wide, zero_centered), norms.cast(douts[1], wide)
        more, dweight1, dbias1 = back(dy, rows, (mean, rstd), scale, [of_weight1, of_bias1])
        ds = ds.add_(more)
    if prenorm:
        ds = ds.add_(douts[-1])
    dx = ds if kept is None else _kept(steps, ds, mask)
    dx1 = None
    if of_x1:
        dx1 = ds if kept is None else _kept(steps, ds, mask1)
    return dx, dweight, dbias, ds if of_residual else None, dx1, dweight1, dbias1, None, None, None


def _rms_back(
    dy: Tensor, s: Tensor, statistics: tuple[Tensor, Tensor], scale: Tensor, sums: Sequence[bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    # step by step as `norms.backward`, so that a compiled graph gives the same bits
    normal, scaled, width = s * statistics[1], dy * scale, s.shape[-1]
    dweight = (dy * normal).reshape(-1, width).sum(0) if sums[0] else None
    dbias = dy.reshape(-1, width).sum(0) if sums[1] else None
    along = (scaled * normal).mean(-1, keepdim=True)
    return scaled.sub_(normal.mul_(along)).mul_(statistics[1]), dweight, dbias
