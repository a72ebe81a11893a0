"""The rotation of rotary embedding composed of torch operations: in float32, and rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

from ...problems.rowwise import Lookup, Rotation, Tables
from ..kernel import Kernel

__all__ = ["KERNEL", "LOOKUP"]

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
    if problem.interleaved and x.device.type == "cpu" and not _is_recorded(x):
        _turn_as_complex(x, torch.complex(cos, sin), out)
        return
    first, second = _pairs(2 * cos.shape[-1], problem.interleaved)
    a, b = x[..., first], x[..., second]
    if out is not x and x.dtype == wide and not _is_recorded(x):
        torch.mul(a, cos, out=out[..., first]).addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=out[..., second]).addcmul_(a, sin)
        return
    a, b = a.to(wide), b.to(wide)
    turned_a = torch.addcmul(a * cos, b, sin, value=-1)
    turned_b = torch.addcmul(b * cos, a, sin)
    # written part by part, not by torch.cat, which autocast on the CPU refuses for float16
    out[..., first].copy_(turned_a)
    out[..., second].copy_(turned_b)


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


def _is_recorded(x: Tensor) -> bool:
    """Whether somebody keeps the operations, so that none may write into a tensor it is given."""
    return torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad)


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
