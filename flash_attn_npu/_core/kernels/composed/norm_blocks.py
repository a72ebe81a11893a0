"""Norms of many rows, block by block: what is computed on the way takes memory of a fixed size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...ground.storage import blocks
from ...problems.buffers import share
from ...problems.norms import NormCall
from . import layer_norm, norms
from .norms import Normed, Saved, Terms

__all__ = ["backward", "forward", "in_blocks", "with_hidden_mask"]

BLOCK_ELEMENTS = 1 << 20
"""What is normalised at a time."""

HOST_BLOCK = 1 << 17
"""The same on the CPU, where it is to stay in a core's cache."""

OF_ROWS = ("residual", "x1", "x")
"""The gradients that have rows; all others are sums over rows."""

SAVED_BY_ROW = ("total", "mean", "rstd", "rowscale", "mask", "mask1", "x")


def forward(call: NormCall, mask: Tensor | None, mask1: Tensor | None) -> Normed:
    """`norms.forward`, in blocks where that is faster; buffers in `call` are not looked at."""
    # a layer norm of what came is one kernel
    one = layer_norm.serves(call.x, call.is_rms_norm)
    if not _is_large(call.x) or (one and norms.is_alone(call, mask)):
        return norms.forward(call, mask, mask1)
    bare = call._replace(out=None, residual_out=None)
    normed = in_blocks(bare, mask, mask1, keep=True)
    assert normed is not None
    return normed


def backward(
    saved: Saved,
    terms: Terms,
    dtypes: Mapping[str, torch.dtype],
    dy: Tensor,
    dy1: Tensor | None,
    dtotal: Tensor | None,
) -> dict[str, Tensor]:
    """`norms.backward` of what is named in `dtypes`, rounded to these."""
    if dy1 is None and dtotal is None and _is_by_torch(saved, terms, dtypes, dy):
        return _by_torch(saved, terms, dtypes, dy)
    if not _is_large(saved.total):
        return _rounded(norms.backward(saved, terms, dtypes, dy, dy1, dtotal), dtypes)
    rows, whole = saved.total.shape[:-1], saved.total.shape
    shared = "x" in dtypes and "residual" in dtypes and _are_one(saved, terms, dtypes)
    grads = {
        name: torch.empty(whole, dtype=dtypes[name], device=dy.device)
        for name in OF_ROWS
        if name in dtypes and not (shared and name == "residual")
    }
    if saved.rowscale is not None:
        saved = saved._replace(rowscale=saved.rowscale.reshape(rows))
    for part in blocks(rows, whole[-1], HOST_BLOCK):
        some: Any = {name: _part(getattr(saved, name), part) for name in SAVED_BY_ROW}
        given = (dy[part], _part(dy1, part), _part(dtotal, part))
        piece = norms.backward(saved._replace(**some), terms, dtypes, *given)
        for name, gradient in piece.items():
            if name not in OF_ROWS:
                grads[name] = gradient if name not in grads else grads[name].add_(gradient)
            elif name in grads:
                grads[name][part].copy_(gradient)
    if shared:
        grads["residual"] = grads["x"]
    return _rounded(grads, dtypes)


def _rounded(grads: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, gradient in grads.items():
        dtype = dtypes[name]
        known = found.get("residual") if name == "x" else None
        if known is not None and known.dtype == dtype and gradient is grads["residual"]:
            found[name] = known
        else:
            found[name] = gradient if gradient.dtype == dtype else gradient.to(dtype)
    return found


def _is_by_torch(saved: Saved, terms: Terms, dtypes: Mapping[str, torch.dtype], dy: Tensor) -> bool:
    """Whether torch has one kernel for all of it. In 16 bit it would round its sums over rows."""
    if torch.compiler.is_compiling() or not layer_norm.serves(saved.total, saved.mean is None):
        return False
    changed = (saved.rowscale, saved.layerscale, saved.mask)
    plain = terms.scale == 1 and all(given is None for given in changed)
    alone = "residual" not in dtypes and "x1" not in dtypes
    return plain and alone and dy.dtype == saved.total.dtype == terms.wide


def _by_torch(
    saved: Saved, terms: Terms, dtypes: Mapping[str, torch.dtype], dy: Tensor
) -> dict[str, Tensor]:
    assert saved.mean is not None
    weight = norms.effective(saved.weight, terms.wide, terms.zero_centered_weight)
    sums = ("weight" in dtypes, "bias" in dtypes)
    found = layer_norm.backward(dy, saved.total, (saved.mean, saved.rstd), weight, sums)
    grads = dict(zip(("x", "weight", "bias"), found, strict=True))
    rounded = {}
    for name, dtype in dtypes.items():
        gradient = grads[name]
        assert gradient is not None
        rounded[name] = gradient.to(dtype)
    return rounded


def _part(tensor: Tensor | None, part: tuple[slice, ...]) -> Tensor | None:
    return None if tensor is None else tensor[part]


def _are_one(saved: Saved, terms: Terms, dtypes: Mapping[str, torch.dtype]) -> bool:
    """Whether x and the residual are added as they are, so that they have one gradient."""
    changed = (saved.rowscale, saved.layerscale, saved.mask)
    plain = all(given is None for given in changed) and terms.scale == 1
    return plain and dtypes["x"] == dtypes["residual"]


def _is_large(x: Tensor) -> bool:
    """Whether blocks of rows stay in a cache, and all of them do not."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    return x.numel() > HOST_BLOCK


def in_blocks(
    call: NormCall, mask: Tensor | None, mask1: Tensor | None, keep: bool = False
) -> Normed | None:
    """As `forward`, but block by block of rows, and in call's buffers.

    Beside the results it takes memory of a fixed size, whatever the size of x. None, and nothing
    is written, where a buffer lies over an argument in such a way that a block would spoil others.

    Args:
        keep: whether the gradient needs the sum; without it there is one if it is a result.
    """
    buffers = [buffer for buffer in (call.out, call.residual_out) if buffer is not None]
    addends = [addend for addend in (call.x, call.x1, call.residual) if addend is not None]
    if any(_shifted(buffer, addend) for buffer in buffers for addend in addends):
        return None
    x, rows = call.x, call.x.shape[:-1]
    targets = _targets(call, keep and not norms.is_alone(call, mask))
    rowscale = None if call.rowscale is None else call.rowscale.reshape(rows)
    limit = min(HOST_BLOCK, BLOCK_ELEMENTS) if x.device.type == "cpu" else BLOCK_ELEMENTS
    for part in blocks(rows, x.shape[-1], limit):
        some = [None if t is None else t[part] for t in (call.x1, call.residual, rowscale)]
        piece = norms.forward(
            call._replace(x=x[part], x1=some[0], residual=some[1], rowscale=some[2]),
            *(None if given is None else given[part] for given in (mask, mask1)),
        )
        for target, values in zip(targets, piece, strict=True):
            if target is not None and values is not None and target is not x:
                target[part].copy_(values)
        # the next block would be computed beside this one
        del piece, values
    return targets


def with_hidden_mask(call: NormCall) -> Normed | None:
    """`forward` with dropout of many rows of x, whose mask nobody asks for and no gradient needs.

    It takes no memory of its own: it lies at the end of y's. y comes block by block from the start,
    and the first n elements of y reach no further than the first n of the mask, which were read.
    """
    x = call.x
    if call.dropout_p == 0 or call.x1 is not None or not _is_large(x):
        return None
    y = torch.empty(x.shape, dtype=norms.out_dtype(call), device=x.device)
    mask = y.view(-1).view(torch.bool)[-x.numel() :].view(x.shape)
    normed = in_blocks(call._replace(out=y), mask.bernoulli_(1.0 - call.dropout_p), None)
    return None if normed is None else normed._replace(y=y)


def _targets(call: NormCall, keep: bool) -> Normed:
    """Where `in_blocks` writes to; total is x where nobody asks for the sum."""
    x, dtype, wide = call.x, norms.out_dtype(call), norms.wide_dtype(call)

    def made(dtype: torch.dtype, hidden: int = x.shape[-1]) -> Tensor:
        return torch.empty((*x.shape[:-1], hidden), dtype=dtype, device=x.device)

    total = x
    if call.residual_out is not None:
        total = call.residual_out.detach()
    elif call.prenorm or keep:
        total = made(norms.total_dtype(call))
    return Normed(
        made(dtype) if call.out is None else call.out.detach(),
        None if call.weight1 is None else made(dtype),
        total,
        None if call.is_rms_norm else made(wide, 1),
        made(wide, 1),
    )


def _shifted(buffer: Tensor, addend: Tensor) -> bool:
    """Whether both share memory, but not element by element."""
    same = (addend.data_ptr(), addend.dtype, addend.stride())
    return share(buffer, addend) and same != (
        buffer.data_ptr(),
        buffer.dtype,
        buffer.stride(),
    )
