"""Rotary embedding as differentiable functions, under the names of `flash_attn.layers.rotary`.

The rotation itself is `rowwise.rotation`. Its gradient is the rotation back; cos and sin get
none, as upstream. A trailing underscore means: in place, and what is returned is the argument.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._core.ground.dense_arguments import refuse_transforms
from .._core.ground.functions import PLAIN, bare, is_undisturbed, unwrapped
from .._core.ground.storage import require_writable
from .._core.problems.rowwise import Turn
from .._core.rowwise.rotation import rotate
from ..errors import ArgumentError
from ._rotary_checks import check_k_tables, check_kv, check_plain, packed_heads
from ._rotary_in_place import copied, in_place, is_written_beside

__all__ = [
    "ApplyRotaryEmb",
    "ApplyRotaryEmbKV_",
    "ApplyRotaryEmbQKV_",
    "_apply_rotary_emb_qkv",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_torch",
    "rotate_half",
]


APPLY = Turn().function


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """Each pair (a, b) of the last dimension becomes (-b, a), in a new tensor.

    Pairs are the two halves, or neighbours if interleaved.

    Contract: flash-attention 2.8, `rotate_half`.
    """
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary_emb_torch(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    """The rotation in the precision of its arguments, differentiable in all three.

    Args:
        x: (batch, seqlen, nheads, headdim).
        cos, sin: (seqlen, rotary_dim / 2) or (batch, seqlen, rotary_dim / 2).

    Returns:
        x's shape, in the dtype that x and cos promote to.

    Raises:
        ArgumentError: rotary_dim exceeds headdim.

    Contract: flash-attention 2.8, `apply_rotary_emb_torch`.
    """
    check_plain(x, cos, sin)
    rotary_dim = 2 * cos.shape[-1]
    if rotary_dim > x.shape[-1]:
        raise ArgumentError(
            "cos",
            f"shape {tuple(cos.shape)}",
            f"rotary_dim / 2 columns, with rotary_dim <= headdim = {x.shape[-1]}",
            "pass one column for each pair of dimensions",
        )
    if interleaved:
        cos, sin = (table.repeat_interleave(2, dim=-1)[..., None, :] for table in (cos, sin))
    else:
        cos, sin = (torch.cat((table, table), dim=-1)[..., None, :] for table in (cos, sin))
    head = x[..., :rotary_dim]
    rotated = head * cos + rotate_half(head, interleaved) * sin
    return torch.cat((rotated, x[..., rotary_dim:]), dim=-1)


class ApplyRotaryEmb(torch.autograd.Function):
    """Autograd of `apply_rotary_emb`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        interleaved: bool = False,
        inplace: bool = False,
        seqlen_offsets: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | Tensor | None = None,
    ) -> Tensor:
        """Rotate x."""
        _save(ctx, (cos, sin, cu_seqlens), seqlen_offsets)
        ctx.interleaved, ctx.max_seqlen = interleaved, max_seqlen
        where = in_place(ctx, x) if inplace else x
        fields = seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace, False, APPLY
        out = rotate(where, cos, sin, fields)
        return x if inplace else out

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        """Rotate the gradient back."""
        (cos, sin, cu_seqlens), seqlen_offsets = _saved(ctx)
        fields = seqlen_offsets, cu_seqlens, ctx.max_seqlen, ctx.interleaved, False, True, APPLY
        dx = rotate(do, cos, sin, fields)
        return dx, None, None, None, None, None, None, None


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | Tensor | None = None,
) -> Tensor:
    """`apply_rotary`, in this order of arguments.

    Args:
        x: (batch, seqlen, nheads, headdim), or (total, nheads, headdim) with cu_seqlens.
        cos, sin: (seqlen_ro, rotary_dim / 2), rotary_dim <= headdim.
        interleaved: the pairs are dimensions (0, 1), (2, 3), ... instead of the two halves.
        inplace: write x where it lies.
        seqlen_offsets: position of the first token: an int, or (batch,) int32 or int64.
        cu_seqlens: (batch + 1,), where each packed sequence starts and ends.
        max_seqlen: the longest packed sequence at least; not needed.

    Returns:
        x if inplace, else a new contiguous tensor of its shape and dtype. A leaf that requires a
        gradient, a view of one, one of several views that were made at once, and a view that an
        autograd.Function has made are written as well, but what is returned is another tensor over
        their memory (under torch.compile a copy), and the gradient flows through that one. A graph
        that was compiled for a leaf serves other tensors so, too.

    Raises:
        ArgumentError, ArgumentTypeError: as `apply_rotary`.

    Contract: flash-attention 2.8, `apply_rotary_emb`, whose alias is `apply_rotary_emb_func`.
    """
    if not _is_differentiated(x):
        fields = seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace, False, APPLY
        return rotate(x, cos, sin, fields)
    plain = type(x) in PLAIN and type(cos) in PLAIN and type(sin) in PLAIN
    if plain and cu_seqlens is None and type(seqlen_offsets) is int and is_undisturbed():
        given = unwrapped(x), unwrapped(cos), unwrapped(sin)
        turned: Tensor = _recorded(*given, interleaved, inplace, seqlen_offsets, None, max_seqlen)
        return turned
    refuse_transforms("x")
    where = x.clone() if inplace and is_written_beside(x) else x
    out: Tensor = ApplyRotaryEmb.apply(  # type: ignore[no-untyped-call]
        where, cos, sin, interleaved, inplace, seqlen_offsets, cu_seqlens, max_seqlen
    )
    return out if where is x else copied(x, out)


_recorded = bare(ApplyRotaryEmb)

apply_rotary_emb_func = apply_rotary_emb


def _apply_rotary_emb_qkv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Rotate q and k of a packed qkv, for `apply_rotary_emb_qkv_` and its gradient."""
    queries, keys = packed_heads(qkv, num_heads_q)
    if cos_k is None and sin_k is None:
        turns = [(0, queries + keys, cos, sin)]
    else:
        cos_k, sin_k = (cos if cos_k is None else cos_k), (sin if sin_k is None else sin_k)
        check_k_tables(cos, cos_k, sin_k)
        turns = [(0, queries, cos, sin), (queries, keys, cos_k, sin_k)]
    if inplace:
        require_writable(qkv=qkv)
    out = qkv if inplace else qkv.clone(memory_format=torch.contiguous_format)
    for start, size, c, s in turns:
        part = out.narrow(2, start, size)
        turn = Turn(seqlen_offsets, None, None, interleaved, inplace=True, conjugate=conjugate)
        rotate(part, c, s, turn)
    return out


class ApplyRotaryEmbQKV_(torch.autograd.Function):  # noqa: N801
    """Autograd of `apply_rotary_emb_qkv_`."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        cos_k: Tensor | None = None,
        sin_k: Tensor | None = None,
        interleaved: bool = False,
        seqlen_offsets: int | Tensor = 0,
        num_heads_q: int | None = None,
    ) -> Tensor:
        """Rotate q and k where they lie."""
        _save(ctx, (cos, sin, cos_k, sin_k), seqlen_offsets)
        ctx.interleaved, ctx.num_heads_q = interleaved, num_heads_q
        where = in_place(ctx, qkv)
        _apply_rotary_emb_qkv(
            where, cos, sin, cos_k, sin_k, interleaved, True, False, seqlen_offsets, num_heads_q
        )
        return qkv

    @staticmethod
    def backward(ctx: Any, dqkv: Tensor) -> tuple[Tensor | None, ...]:
        """Rotate the gradients of q and k back."""
        (cos, sin, cos_k, sin_k), seqlen_offsets = _saved(ctx)
        # fmt: off
        dqkv = _apply_rotary_emb_qkv(
            dqkv, cos, sin, cos_k, sin_k, ctx.interleaved, False, True, seqlen_offsets,
            ctx.num_heads_q,
        )
        # fmt: on
        return dqkv, None, None, None, None, None, None, None


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Rotate q and k of a packed qkv in place.

    Args:
        qkv: (batch, seqlen, 3, nheads, headdim), or
            (batch, seqlen, num_heads_q + 2 * num_heads_k, headdim) with num_heads_q.
        cos, sin: (seqlen_ro, rotary_dim / 2).
        cos_k, sin_k: other tables for k, of the same shape (xPos); those of q if None.
        interleaved: the pairs are dimensions (0, 1), (2, 3), ... instead of the two halves.
        seqlen_offsets: position of the first token: an int, or (batch,) int32 or int64.
        num_heads_q: how many of the heads are queries.

    Returns:
        qkv.

    Raises:
        ArgumentError: qkv has another shape, or num_heads_q leaves k and v unequal.
        ArgumentError, ArgumentTypeError: as `apply_rotary`.

    Contract: flash-attention 2.8, `apply_rotary_emb_qkv_`.
    """
    if cos_k is cos and sin_k is sin:
        # one rotation instead of two, and torch.compile refuses to pass a tensor twice
        cos_k = sin_k = None
    if not _is_differentiated(qkv):
        # fmt: off
        return _apply_rotary_emb_qkv(
            qkv, cos, sin, cos_k, sin_k, interleaved, True, False, seqlen_offsets, num_heads_q
        )
        # fmt: on
    refuse_transforms("qkv")
    where = qkv.clone() if is_written_beside(qkv) else qkv
    out: Tensor = ApplyRotaryEmbQKV_.apply(  # type: ignore[no-untyped-call]
        where, cos, sin, cos_k, sin_k, interleaved, seqlen_offsets, num_heads_q
    )
    return out if where is qkv else copied(qkv, out)


class ApplyRotaryEmbKV_(torch.autograd.Function):  # noqa: N801
    """Autograd of `apply_rotary_emb_kv_`."""

    @staticmethod
    def forward(
        ctx: Any,
        kv: Tensor,
        cos: Tensor,
        sin: Tensor,
        interleaved: bool = False,
        seqlen_offsets: int | Tensor = 0,
    ) -> Tensor:
        """Rotate k where it lies."""
        check_kv(kv)
        require_writable(kv=kv)
        _save(ctx, (cos, sin), seqlen_offsets)
        ctx.interleaved = interleaved
        where = in_place(ctx, kv)
        turn = Turn(seqlen_offsets, None, None, interleaved, inplace=True)
        rotate(where[:, :, 0], cos, sin, turn)
        return kv

    @staticmethod
    def backward(ctx: Any, dkv: Tensor) -> tuple[Tensor | None, ...]:
        """Rotate the gradient of k back."""
        (cos, sin), seqlen_offsets = _saved(ctx)
        dkv = dkv.clone()
        turn = Turn(seqlen_offsets, None, None, ctx.interleaved, inplace=True, conjugate=True)
        rotate(dkv[:, :, 0], cos, sin, turn)
        return dkv, None, None, None, None


def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
) -> Tensor:
    """Rotate k of a packed kv in place.

    Args:
        kv: (batch, seqlen, 2, nheads_k, headdim).
        cos, sin: (seqlen_ro, rotary_dim / 2).
        interleaved: the pairs are dimensions (0, 1), (2, 3), ... instead of the two halves.
        seqlen_offsets: position of the first token: an int, or (batch,) int32 or int64.

    Returns:
        kv.

    Raises:
        ArgumentError: kv has another shape.
        ArgumentError, ArgumentTypeError: as `apply_rotary`.

    Contract: flash-attention 2.8, `apply_rotary_emb_kv_`.
    """
    if not _is_differentiated(kv):
        check_kv(kv)
        require_writable(kv=kv)
        turn = Turn(seqlen_offsets, None, None, interleaved, inplace=True)
        rotate(kv[:, :, 0], cos, sin, turn)
        return kv
    refuse_transforms("kv")
    where = kv.clone() if is_written_beside(kv) else kv
    out: Tensor = ApplyRotaryEmbKV_.apply(  # type: ignore[no-untyped-call]
        where, cos, sin, interleaved, seqlen_offsets
    )
    return out if where is kv else copied(kv, out)


def _is_differentiated(x: object) -> bool:
    # torch.compile would inline an autograd.Function that is not needed, and not its mark_dirty
    return torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad


def _save(ctx: Any, tensors: tuple[Tensor | None, ...], seqlen_offsets: int | Tensor) -> None:
    in_tensor = isinstance(seqlen_offsets, Tensor)
    ctx.save_for_backward(*tensors, seqlen_offsets if in_tensor else None)
    ctx.seqlen_offset = 0 if in_tensor else seqlen_offsets


def _saved(ctx: Any) -> tuple[tuple[Any, ...], int | Tensor]:
    *tensors, offsets = ctx.saved_tensors
    return tuple(tensors), ctx.seqlen_offset if offsets is None else offsets
