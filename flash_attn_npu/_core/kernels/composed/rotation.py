"""The rotation of rotary embedding composed of torch operations: in float32, and rounded once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...ground.dtypes import converter
from ...ground.functions import FORWARD
from ...problems.rowwise import Lookup, Rotation, Tables
from ..kernel import Kernel

__all__ = ["KERNEL", "LOOKUP", "few", "few_of"]

AT_ONCE = 1 << 17
"""Elements: what is computed on the way stays in a core's cache."""


def forward(problem: Rotation, x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Write the rotated dimensions of x to out, which may be x.

    Args:
        x, out: (..., headdim).
        cos, sin: (..., rotary_dim / 2), broadcast over the heads.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = cos.to(wide), sin.to(wide)
    if problem.interleaved and x.device.type == "cpu" and not _is_recorded(x, cos, sin):
        _turn_as_complex(x, torch.complex(cos, sin), out)
        return
    first, second = _pairs(2 * cos.shape[-1], problem.interleaved)
    a, b = x[..., first], x[..., second]
    if out is not x and x.dtype == wide and not _is_recorded(x, cos, sin):
        torch.mul(a, cos, out=out[..., first]).addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=out[..., second]).addcmul_(a, sin)
        return
    a, b = a.to(wide), b.to(wide)
    turned_a = torch.addcmul(a * cos, b, sin, value=-1)
    turned_b = torch.addcmul(b * cos, a, sin)
    # written part by part, not by torch.cat, which autocast on the CPU refuses for float16
    out[..., first].copy_(turned_a)
    out[..., second].copy_(turned_b)


class Few(NamedTuple):
    """How rotations of a few numbers on a CPU with one key are computed.

    wide: the dtype that is computed in, to which `widen` converts.
    narrow: converts to that of x; None if it is `wide`.
    """

    interleaved: bool
    wide: torch.dtype
    widen: Callable[[Tensor], Tensor]
    narrow: Callable[[Tensor], Tensor] | None


def few_of(problem: Rotation, x: Tensor) -> Few | None:
    """How `few` does this rotation of x, which is on a CPU; None where it does not."""
    if problem.empty or problem.rotary_dim != x.shape[-1]:
        return None
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    narrow = None if x.dtype == wide else converter(x.dtype)
    return Few(problem.interleaved, wide, converter(wide), narrow)


def few(how: Few, x: Tensor, cos: Tensor, sin: Tensor, conjugate: bool) -> Tensor:
    """x as a new tensor, in few operations, none of which autograd records or traces.

    Args:
        x: (batch, seqlen, ..., headdim), all of it rotated.
        cos, sin: (seqlen, headdim / 2).
        conjugate: rotate back.
    """
    interleaved, wide, widen, narrow = how
    cos = cos if cos.dtype is wide else widen(cos)
    sin = sin if sin.dtype is wide else widen(sin)
    given, dims = x.contiguous(), x.dim()
    if narrow is not None:
        given = widen(given)
    if interleaved:
        # in memory of its own, where a complex number begins at an even place
        out = given.clone() if narrow is None else given
        turns = torch.complex(cos, -sin if conjugate else sin)
        pairs = out.view(turns.dtype)
        pairs.mul_(turns.unsqueeze(1) if dims == 4 else _between(turns, dims))
    else:
        cos = torch.cat((cos, cos), 1)
        if dims == 4:
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        else:
            cos, sin = _between(cos, dims), _between(sin, dims)
        out, sign = given * cos, 1 if conjugate else -1
        (a, b), (turned_a, turned_b) = given.chunk(2, -1), out.chunk(2, -1)
        turned_a.addcmul_(b, sin, value=sign)
        turned_b.addcmul_(a, sin, value=-sign)
    return out if narrow is None else narrow(out)


def _between(table: Tensor, dims: int) -> Tensor:
    """(seqlen, width) to be broadcast over the heads of a tensor of `dims` dimensions."""
    seqlen, width = table.shape
    return table.view(seqlen, *(1,) * (dims - 3), width)


def _turn_as_complex(x: Tensor, turns: Tensor, out: Tensor) -> None:
    """Neighbours as one complex number: torch's CPU walks through every other number slowly."""
    size = 2 * turns.shape[-1]
    head = x[..., :size].to(turns.real.dtype).contiguous()
    # a complex number begins at an even place
    head = head.clone() if head.storage_offset() % 2 else head
    pairs = torch.view_as_complex(head.unflatten(-1, (-1, 2)))
    whole = out.shape[-1] == size and out.is_contiguous() and out.storage_offset() % 2 == 0
    if out.dtype == head.dtype and whole:
        torch.mul(pairs, turns, out=torch.view_as_complex(out.unflatten(-1, (-1, 2))))
        return
    turned = pairs * turns
    out[..., :size].copy_(torch.view_as_real(turned).flatten(-2))


def _is_recorded(*tensors: Tensor) -> bool:
    """Whether somebody keeps the operations, so that none may write into a tensor it is given."""
    if torch.compiler.is_compiling() or FORWARD._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _pairs(rotary_dim: int, interleaved: bool) -> tuple[slice, slice]:
    """Where the first and the second of each pair lie in a head: interleaved, side by side."""
    if interleaved:
        return slice(0, rotary_dim, 2), slice(1, rotary_dim, 2)
    return slice(0, rotary_dim // 2), slice(rotary_dim // 2, rotary_dim)


def _look_up(problem: Lookup, xs: tuple[Tensor, ...], tables: Tables, rows: Tensor) -> list[Tensor]:
    """New tensors; xs are (*tokens, *heads, headdim), rows (tokens,)."""
    cos, sin = (table.index_select(0, rows)[:, None] for table in tables[:2])
    outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in xs]
    turning = Rotation(*problem[:5], problem.nheads, problem.rotary_dim, problem.interleaved)
    for x, out in zip(xs, outs, strict=True):
        heads, turned = (t.view(len(rows), -1, x.shape[-1]) for t in (x.contiguous(), out))
        forward(turning, heads, cos, sin, turned)
        turned[..., problem.rotary_dim :] = heads[..., problem.rotary_dim :]
    return outs


KERNEL = Kernel(forward, at_once=AT_ONCE)
LOOKUP = Kernel(_look_up, at_once=AT_ONCE)
