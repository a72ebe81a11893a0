"""Mirror of `flash_attn.ops.triton.rotary`: one function; the Triton kernel itself is absent.

MindSpeed replaces `apply_rotary`, in every module that holds it, by a function that raises. Nothing
in this package calls it for that reason: the rotation is `rowwise.rotation`.
"""

from __future__ import annotations

from torch import Tensor

from ..._core.problems.rowwise import Turn
from ..._core.rowwise.rotation import rotate

__all__ = ["apply_rotary"]


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | Tensor | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """Rotate the first rotary_dim dimensions of every head, and copy the others.

    Computed in float32 and rounded once (in float64 for a float64 x).

    Args:
        x: (batch, seqlen, nheads, headdim), or (total, nheads, headdim) with cu_seqlens; any
            floating dtype, any strides, and any number of head axes.
        cos, sin: (seqlen_ro, rotary_dim / 2), any floating dtype, rotary_dim <= headdim.
        seqlen_offsets: position of the first token: an int, or (batch,) int32 or int64.
        cu_seqlens: (batch + 1,) int32 or int64, where each packed sequence starts and ends.
        max_seqlen: the longest packed sequence at least; not needed.
        interleaved: the pairs are dimensions (0, 1), (2, 3), ... instead of the two halves.
        inplace: write x where it lies, and nothing beside it.
        conjugate: rotate back.

    Returns:
        x if inplace, else a new contiguous tensor of its shape and dtype.

    Raises:
        ArgumentError: shapes, dtypes or devices do not fit, or a position is not in the tables.
            Offsets on a device are not looked at, nor are lengths under torch.compile: there
            the lookup itself fails, as the device's index_select does.
        ArgumentTypeError: an argument is an object of the wrong type.

    Contract: flash-attention 2.8, `apply_rotary`. Wider: dtypes of cos and sin, more head axes,
    max_seqlen may be None.
    """
    turn = Turn(seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace, conjugate)
    return rotate(x, cos, sin, turn)
