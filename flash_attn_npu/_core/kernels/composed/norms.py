"""Layer norm and RMS norm of a sum of tensors, composed of torch operations; no autograd.

With s = dropout(rowscale * x) * layerscale + dropout(x1) + residual:

    y = standardised(s) * weight + bias,   y1 = standardised(s) * weight1 + bias1

Everything is computed in float32, or in float64 if an addend has it, and each result is rounded
once. The gradient starts from s as it was rounded for the caller.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ...ground.storage import blocks
from ...problems.buffers import share
from ...problems.norms import NormCall
from ...problems.rowwise import Norm

__all__ = [
    "Normed",
    "Saved",
    "Terms",
    "affine",
    "backward",
    "draw_masks",
    "forward",
    "in_blocks",
    "out_dtype",
    "problem_of",
    "standardised",
    "tensors_of",
    "terms_of",
    "total_dtype",
    "wide_dtype",
]


TENSORS = NormCall._fields[: NormCall._fields.index("eps")]
LIKE_WEIGHT = ("weight", "bias", "weight1", "bias1", "layerscale")

BLOCK_ELEMENTS = 1 << 20
"""What is normalised at a time into buffers."""


class Normed(NamedTuple):
    """The results: y and y1 in the output's dtype, `total` the rounded s, statistics per row.

    `total` is x itself where nothing is added to it, its dtype stays, and it is not returned.
    """

    y: Tensor
    y1: Tensor | None
    total: Tensor
    mean: Tensor | None
    rstd: Tensor


class Saved(NamedTuple):
    """The tensors that the gradient is computed from; x is needed with layerscale only."""

    total: Tensor
    mean: Tensor | None
    rstd: Tensor
    weight: Tensor
    weight1: Tensor | None
    rowscale: Tensor | None
    layerscale: Tensor | None
    mask: Tensor | None
    mask1: Tensor | None
    x: Tensor | None


class Terms(NamedTuple):
    """What else the gradient depends on: kept values are multiplied by `scale`."""

    wide: torch.dtype
    scale: float
    zero_centered_weight: bool


def tensors_of(call: NormCall) -> dict[str, Tensor]:
    """The tensors that are given, by field."""
    values = ((field, getattr(call, field)) for field in TENSORS)
    return {field: value for field, value in values if value is not None}


def wide_dtype(call: NormCall) -> torch.dtype:
    """The dtype to compute in."""
    addends = (call.x, call.x1, call.residual)
    double = any(addend is not None and addend.dtype == torch.float64 for addend in addends)
    return torch.float64 if double else torch.float32


def total_dtype(call: NormCall) -> torch.dtype:
    """The dtype that s is rounded to."""
    if call.residual is not None:
        return call.residual.dtype
    return (
        torch.promote_types(call.x.dtype, torch.float32) if call.residual_in_fp32 else call.x.dtype
    )


def out_dtype(call: NormCall) -> torch.dtype:
    """The dtype of y."""
    return call.x.dtype if call.out_dtype is None else call.out_dtype


def problem_of(function: str, call: NormCall) -> Norm:
    """What the table is asked about `call`."""
    given = (getattr(call, field) for field in TENSORS)
    tensors = [tensor for tensor in given if tensor is not None]
    return Norm(
        function=function,
        device=call.x.device,
        dtype=call.x.dtype,
        out_dtype=out_dtype(call),
        weight_dtype=call.weight.dtype,
        bias_dtype=None if call.bias is None else call.bias.dtype,
        residual_dtype=None if call.residual is None else call.residual.dtype,
        empty=call.x.numel() == 0,
        rms=call.is_rms_norm,
        zero_centered=call.zero_centered_weight,
        branches=1 if call.x1 is None else 2,
        outputs=1 if call.weight1 is None else 2,
        scaled=call.rowscale is not None or call.layerscale is not None,
        dropout=call.dropout_p > 0,
        buffers=call.out is not None or call.residual_out is not None,
        needs_grad=torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors),
        compiling=torch.compiler.is_compiling(),
    )


def terms_of(call: NormCall) -> Terms:
    """The terms of the gradient of `call`."""
    kept = 1.0 - call.dropout_p
    # nothing is kept at dropout_p = 1, so the scale does not matter there
    scale = call.rowscale_const / kept if kept else 0.0
    return Terms(wide_dtype(call), scale, call.zero_centered_weight)


def draw_masks(call: NormCall) -> tuple[Tensor | None, Tensor | None]:
    """Which values of x and x1 are kept: bool, of their shape; None where all are."""
    if call.dropout_p == 0:
        return None, None
    kept = 1.0 - call.dropout_p
    mask, mask1 = (
        None
        if addend is None
        else torch.empty(addend.shape, dtype=torch.bool, device=addend.device).bernoulli_(kept)
        for addend in (call.x, call.x1)
    )
    return mask, mask1


def forward(call: NormCall, mask: Tensor | None, mask1: Tensor | None) -> Normed:
    """The norm, with dropout by the given masks."""
    terms = terms_of(call)
    s = _kept(call.x, mask, call.rowscale, terms)
    if call.layerscale is not None:
        s = s * call.layerscale.to(terms.wide)
    if call.x1 is not None:
        s = s + _kept(call.x1, mask1, None, terms)
    if call.residual is not None:
        s = s + call.residual.to(terms.wide)
    total = _rounded_total(call, mask, s)
    mean = None if call.is_rms_norm else s.mean(-1, keepdim=True)
    centred = s if mean is None else s - mean
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + call.eps)
    normal = centred * rstd
    dtype = out_dtype(call)
    y = affine(normal, call.weight, call.bias, call.zero_centered_weight).to(dtype).contiguous()
    y1 = None
    if call.weight1 is not None:
        y1 = affine(normal, call.weight1, call.bias1, call.zero_centered_weight)
        y1 = y1.to(dtype).contiguous()
    return Normed(y, y1, total, mean, rstd)


def in_blocks(
    call: NormCall, mask: Tensor | None, mask1: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """y, y1 and the rounded s, as `forward`, but block by block of rows, and in call's buffers.

    Beside the results it takes memory of a fixed size, whatever the size of x. None, and nothing
    is written, where a buffer lies over an argument in such a way that a block would spoil others.
    """
    buffers = [buffer for buffer in (call.out, call.residual_out) if buffer is not None]
    addends = [addend for addend in (call.x, call.x1, call.residual) if addend is not None]
    if any(_shifted(buffer, addend) for buffer in buffers for addend in addends):
        return None
    x, rows = call.x, call.x.shape[:-1]
    y = x.new_empty(x.shape, dtype=out_dtype(call)) if call.out is None else call.out.detach()
    y1 = None if call.weight1 is None else x.new_empty(x.shape, dtype=out_dtype(call))
    total = None if call.residual_out is None else call.residual_out.detach()
    if total is None and call.prenorm:
        total = x.new_empty(x.shape, dtype=total_dtype(call))
    targets = (y, y1, total)
    rowscale = None if call.rowscale is None else call.rowscale.reshape(rows)
    for part in blocks(rows, x.shape[-1], BLOCK_ELEMENTS):
        some = [None if t is None else t[part] for t in (call.x1, call.residual, rowscale)]
        piece = forward(
            call._replace(x=x[part], x1=some[0], residual=some[1], rowscale=some[2]),
            *(None if given is None else given[part] for given in (mask, mask1)),
        )
        for target, values in zip(targets, piece, strict=False):
            if target is not None and values is not None:
                target[part].copy_(values)
    return targets


def _shifted(buffer: Tensor, addend: Tensor) -> bool:
    """Whether both share memory, but not element by element."""
    same = (addend.data_ptr(), addend.dtype, addend.stride())
    return share(buffer, addend) and same != (
        buffer.data_ptr(),
        buffer.dtype,
        buffer.stride(),
    )


def standardised(s: Tensor, mean: Tensor | None, rstd: Tensor) -> Tensor:
    """s without weight and bias; for RMS norm there is no mean."""
    return s * rstd if mean is None else (s - mean) * rstd


def affine(
    normal: Tensor, weight: Tensor, bias: Tensor | None, zero_centered_weight: bool
) -> Tensor:
    """normal * weight + bias, in the dtype of `normal`."""
    y = normal * _effective(weight, normal.dtype, zero_centered_weight)
    return y if bias is None else y + bias.to(normal.dtype)


def backward(
    saved: Saved,
    terms: Terms,
    wanted: Iterable[str],
    dy: Tensor,
    dy1: Tensor | None,
    dtotal: Tensor | None,
) -> dict[str, Tensor]:
    """The gradients of the arguments named in `wanted`, in terms.wide and not yet rounded.

    Args:
        dy, dy1, dtotal: those of y, y1 and the rounded s; None for zero.
        wanted: among weight, bias, weight1, bias1, residual, x1, layerscale and x.
    """
    wide = terms.wide
    normal = standardised(saved.total.to(wide), saved.mean, saved.rstd)
    grads: dict[str, Tensor] = {}
    dy = dy.to(wide)
    if "weight" in wanted:
        grads["weight"] = _over_rows(dy * normal)
    if "bias" in wanted:
        grads["bias"] = _over_rows(dy)
    pulled = dy * _effective(saved.weight, wide, terms.zero_centered_weight)
    if dy1 is not None and saved.weight1 is not None:
        dy1 = dy1.to(wide)
        if "weight1" in wanted:
            grads["weight1"] = _over_rows(dy1 * normal)
        if "bias1" in wanted:
            grads["bias1"] = _over_rows(dy1)
        pulled = pulled + dy1 * _effective(saved.weight1, wide, terms.zero_centered_weight)
    along = (pulled * normal).mean(-1, keepdim=True)
    if saved.mean is not None:
        pulled = pulled - pulled.mean(-1, keepdim=True)
    ds = (pulled - normal * along) * saved.rstd
    if dtotal is not None:
        ds = ds + dtotal.to(wide)
    if "residual" in wanted:
        grads["residual"] = ds
    if "x1" in wanted:
        grads["x1"] = _kept(ds, saved.mask1, None, terms)
    if "layerscale" in wanted and saved.x is not None:
        grads["layerscale"] = _over_rows(ds * _kept(saved.x, saved.mask, saved.rowscale, terms))
    if "x" in wanted:
        if saved.layerscale is not None:
            ds = ds * saved.layerscale.to(wide)
        grads["x"] = _kept(ds, saved.mask, saved.rowscale, terms)
    return grads


def _rounded_total(call: NormCall, mask: Tensor | None, s: Tensor) -> Tensor:
    more = (mask, call.rowscale, call.layerscale, call.x1, call.residual)
    alone = all(given is None for given in more) and call.rowscale_const == 1
    dtype = total_dtype(call)
    if not alone or dtype != call.x.dtype:
        return s.to(dtype).contiguous()
    # a returned x would be one tensor with two histories
    return call.x.clone(memory_format=torch.contiguous_format) if call.prenorm else call.x


def _kept(values: Tensor, mask: Tensor | None, rowscale: Tensor | None, terms: Terms) -> Tensor:
    """Scaling and dropout; it is linear and its own transpose, so it serves both directions."""
    values = values.to(terms.wide)
    if rowscale is not None:
        values = values * rowscale.to(terms.wide).reshape(*values.shape[:-1], 1)
    if terms.scale != 1:
        values = values * terms.scale
    return values if mask is None else values.masked_fill(mask.logical_not(), 0.0)


def _effective(weight: Tensor, wide: torch.dtype, zero_centered_weight: bool) -> Tensor:
    weight = weight.to(wide)
    return weight + 1.0 if zero_centered_weight else weight


def _over_rows(values: Tensor) -> Tensor:
    return values.flatten(0, -2).sum(0) if values.dim() > 1 else values
