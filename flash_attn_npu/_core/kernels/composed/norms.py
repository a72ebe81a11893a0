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
from torch.nn import functional

from ...problems.norms import NormCall
from ...problems.rowwise import Norm
from . import layer_norm

__all__ = [
    "Normed",
    "Saved",
    "Terms",
    "affine",
    "backward",
    "by_torch",
    "cast",
    "draw_masks",
    "effective",
    "forward",
    "is_alone",
    "kept",
    "out_dtype",
    "problem_of",
    "rms_norm",
    "rounded_total",
    "standardised",
    "summed",
    "tensors_of",
    "terms_of",
    "total_dtype",
    "wide_dtype",
]


TENSORS = NormCall._fields[: NormCall._fields.index("eps")]
LIKE_WEIGHT = ("weight", "bias", "weight1", "bias1", "layerscale")


class Normed(NamedTuple):
    """The results: y and y1 in the output's dtype, `total` the rounded s, statistics per row.

    `total` is x itself where nothing is added to it, its dtype stays, and it is not returned.
    """

    y: Tensor
    y1: Tensor | None
    total: Tensor
    mean: Tensor | None
    rstd: Tensor | None


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
    for addend in (call.x, call.x1, call.residual):
        if addend is not None and addend.dtype == torch.float64:
            return torch.float64
    return torch.float32


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
    return _drawn(call.x, kept), None if call.x1 is None else _drawn(call.x1, kept)


def _drawn(addend: Tensor, kept: float) -> Tensor:
    return torch.empty(addend.shape, dtype=torch.bool, device=addend.device).bernoulli_(kept)


def forward(call: NormCall, mask: Tensor | None, mask1: Tensor | None) -> Normed:
    """The norm, with dropout by the given masks, differentiable by torch's autograd."""
    if layer_norm.serves(call.x, call.is_rms_norm):
        return _of_layer(call, mask, mask1)
    dtype, alone = out_dtype(call), is_alone(call, mask)
    s = cast(call.x, wide_dtype(call)) if alone else summed(call, mask, mask1)
    total = rounded_total(call, alone, s)
    mean = None if call.is_rms_norm else s.mean(-1, keepdim=True)
    centred = s if mean is None else s - mean
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + call.eps)
    normal = centred * rstd
    y = affine(normal, call.weight, call.bias, call.zero_centered_weight).to(dtype).contiguous()
    y1 = None
    if call.weight1 is not None:
        y1 = affine(normal, call.weight1, call.bias1, call.zero_centered_weight)
        y1 = y1.to(dtype).contiguous()
    return Normed(y, y1, total, mean, rstd)


def summed(call: NormCall, mask: Tensor | None, mask1: Tensor | None) -> Tensor:
    """s, not rounded yet: x itself, where it is nothing else."""
    wide, x1 = wide_dtype(call), call.x1
    scaled = call.rowscale is not None or call.layerscale is not None
    if scaled or mask is not None or call.rowscale_const != 1:
        terms = terms_of(call)
        s = kept(call.x, mask, call.rowscale, terms)
        if call.layerscale is not None:
            s = s * call.layerscale.to(wide)
        x1 = None if x1 is None else kept(x1, mask1, None, terms)
    else:
        s = cast(call.x, wide)
    if x1 is not None:
        s = s + _addend(x1, wide)
    return s if call.residual is None else s + _addend(call.residual, wide)


def _addend(tensor: Tensor, wide: torch.dtype) -> Tensor:
    """As it came on the host, where an addition widens what it reads."""
    # torch 2.6 cannot trace is_cpu
    return tensor if tensor.device.type == "cpu" else tensor.to(wide)


def rms_norm(call: NormCall, mask: Tensor | None, mask1: Tensor | None) -> Normed | None:
    """`forward` by torch's own rms_norm, without rstd; None where that does not give all of it."""
    if not call.is_rms_norm or call.weight1 is not None or call.x.device.type != "cpu":
        return None
    alone = is_alone(call, mask)
    s = cast(call.x, wide_dtype(call)) if alone else summed(call, mask, mask1)
    weight = effective(call.weight, s.dtype, call.zero_centered_weight)
    y = functional.rms_norm(s, s.shape[-1:], weight, call.eps)
    if call.bias is not None:
        y = y + call.bias.to(s.dtype)
    return Normed(cast(y, out_dtype(call)), None, rounded_total(call, alone, s), None, None)


def _is_recorded(call: NormCall) -> bool:
    """Of a call with one addend."""
    # a loop: a generator takes as long as a small norm's kernel
    for tensor in (call.x, call.weight, call.bias, call.weight1, call.bias1):
        if tensor is not None and tensor.requires_grad:
            return torch.is_grad_enabled()
    return False


def _of_layer(call: NormCall, mask: Tensor | None, mask1: Tensor | None) -> Normed:
    """`forward` of a layer norm on the host."""
    x, wide, dtype = call.x, wide_dtype(call), out_dtype(call)
    alone = is_alone(call, mask)
    if not alone:
        rows = summed(call, mask, mask1)
    elif x.dtype == wide or (x.dtype == dtype and not _is_recorded(call)):
        rows = x
    else:
        # not the 16-bit rows: the kernel's own gradient would round its sums over them
        rows = x.to(wide)
    y, mean, rstd = by_torch(call, rows, call.weight, call.bias)
    y1 = None
    if call.weight1 is not None:
        y1 = by_torch(call, rows, call.weight1, call.bias1)[0]
    return Normed(y, y1, rounded_total(call, alone, rows), mean, rstd)


def by_torch(
    call: NormCall, rows: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer norm of rows on the host as it is returned, their mean and rstd."""
    # 16-bit rows are widened by the kernel itself
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    scale = effective(weight, wide, call.zero_centered_weight)
    bias = None if bias is None else cast(bias, wide)
    y, mean, rstd = layer_norm.forward(rows, scale, bias, call.eps)
    return cast(y, out_dtype(call)), mean, rstd


def standardised(s: Tensor, mean: Tensor | None, rstd: Tensor) -> Tensor:
    """s without weight and bias; for RMS norm there is no mean."""
    return s * rstd if mean is None else (s - mean) * rstd


def affine(
    normal: Tensor, weight: Tensor, bias: Tensor | None, zero_centered_weight: bool
) -> Tensor:
    """normal * weight + bias, in the dtype of `normal`."""
    y = normal * effective(weight, normal.dtype, zero_centered_weight)
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
    total, dy = cast(saved.total, wide), cast(dy, wide)
    pairs = [("weight", "bias", saved.weight, dy)]
    if dy1 is not None and saved.weight1 is not None:
        pairs.append(("weight1", "bias1", saved.weight1, cast(dy1, wide)))
    grads: dict[str, Tensor] = {}
    if layer_norm.serves(total, saved.mean is None):
        ds = _back_by_torch(saved, terms, wanted, total, pairs, grads)
    else:
        ds = _back(saved, terms, wanted, total, pairs, grads)
    if dtotal is not None:
        ds = ds + _addend(dtotal, wide)
    if "residual" in wanted:
        grads["residual"] = ds
    if "x1" in wanted:
        grads["x1"] = kept(ds, saved.mask1, None, terms)
    if "layerscale" in wanted and saved.x is not None:
        grads["layerscale"] = _over_rows(ds * kept(saved.x, saved.mask, saved.rowscale, terms))
    if "x" in wanted:
        if saved.layerscale is not None:
            ds = ds * saved.layerscale.to(wide)
        grads["x"] = kept(ds, saved.mask, saved.rowscale, terms)
    return grads


_Pairs = list[tuple[str, str, Tensor, Tensor]]
"""Of each result the names of its weight and bias, the weight, and the gradient of the result."""


def _back(
    saved: Saved,
    terms: Terms,
    wanted: Iterable[str],
    total: Tensor,
    pairs: _Pairs,
    grads: dict[str, Tensor],
) -> Tensor:
    """The gradient of s as the norm depends on it; those of the parameters go into `grads`."""
    normal = standardised(total, saved.mean, saved.rstd)
    pulled = None
    for weight_name, bias_name, weight, dy in pairs:
        if weight_name in wanted:
            grads[weight_name] = _over_rows(dy * normal)
        if bias_name in wanted:
            grads[bias_name] = _over_rows(dy)
        scaled = dy * effective(weight, total.dtype, terms.zero_centered_weight)
        pulled = scaled if pulled is None else pulled + scaled
    assert pulled is not None
    along = (pulled * normal).mean(-1, keepdim=True)
    if saved.mean is not None:
        pulled = pulled - pulled.mean(-1, keepdim=True)
    return pulled.sub_(normal.mul_(along)).mul_(saved.rstd)


def _back_by_torch(
    saved: Saved,
    terms: Terms,
    wanted: Iterable[str],
    total: Tensor,
    pairs: _Pairs,
    grads: dict[str, Tensor],
) -> Tensor:
    """`_back` of a layer norm on the host."""
    assert saved.mean is not None
    ds = None
    for weight_name, bias_name, weight, dy in pairs:
        scale = effective(weight, total.dtype, terms.zero_centered_weight)
        sums = (weight_name in wanted, bias_name in wanted)
        part, *found = layer_norm.backward(dy, total, (saved.mean, saved.rstd), scale, sums)
        for name, gradient in zip((weight_name, bias_name), found, strict=True):
            if name in wanted and gradient is not None:
                grads[name] = gradient
        ds = part if ds is None else ds.add_(part)
    assert ds is not None
    return ds


def rounded_total(call: NormCall, alone: bool, s: Tensor) -> Tensor:
    """s as it is kept and returned; `alone`: it is x as it came."""
    dtype = total_dtype(call)
    if not alone or dtype != call.x.dtype:
        return s.to(dtype).contiguous()
    # a returned x would be one tensor with two histories
    return call.x.clone(memory_format=torch.contiguous_format) if call.prenorm else call.x


def is_alone(call: NormCall, mask: Tensor | None) -> bool:
    """Whether s is x as it came."""
    if mask is not None or call.x1 is not None or call.residual is not None:
        return False
    return call.rowscale is None and call.layerscale is None and call.rowscale_const == 1


def kept(values: Tensor, mask: Tensor | None, rowscale: Tensor | None, terms: Terms) -> Tensor:
    """Scaling and dropout; it is linear and its own transpose, so it serves both directions."""
    values = cast(values, terms.wide)
    if rowscale is not None:
        values = values * rowscale.to(terms.wide).reshape(*values.shape[:-1], 1)
    if terms.scale != 1:
        values = values * terms.scale
    return values if mask is None else torch.where(mask, values, 0.0)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in this dtype."""
    # a small norm is over before a few calls of `to` have found nothing to do
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def effective(weight: Tensor, wide: torch.dtype, zero_centered_weight: bool) -> Tensor:
    """What a row is multiplied by."""
    weight = cast(weight, wide)
    return weight + 1.0 if zero_centered_weight else weight


def _over_rows(values: Tensor) -> Tensor:
    return values.flatten(0, -2).sum(0) if values.dim() > 1 else values
