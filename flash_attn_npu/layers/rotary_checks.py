"""What packed tensors and tables must look like, for `rotary_functions` and `rotary`."""

from __future__ import annotations

from torch import Tensor

from ..attention.checks import require_tensors
from ..errors import ArgumentError, explain

__all__ = ["check_k_tables", "check_kv", "packed_heads"]


def packed_heads(qkv: Tensor, num_heads_q: int | None) -> tuple[int, int]:
    """How much of axis 2 of a packed qkv is q, and how much is k.

    Raises:
        ArgumentError: qkv has another shape, or num_heads_q leaves k and v unequal.
    """
    require_tensors(qkv=qkv)
    if qkv.dim() == 5 and qkv.shape[2] == 3:
        return 1, 1
    if qkv.dim() == 4 and num_heads_q is not None:
        rest = qkv.shape[2] - num_heads_q
        if num_heads_q > 0 and rest > 0 and rest % 2 == 0:
            return num_heads_q, rest // 2
    raise ArgumentError(
        explain(
            "qkv",
            f"shape {tuple(qkv.shape)} and num_heads_q={num_heads_q}",
            "(batch, seqlen, 3, nheads, headdim), or "
            "(batch, seqlen, num_heads_q + 2 * num_heads_k, headdim) with num_heads_q",
            "pass num_heads_q for a 4-dimensional qkv, or stack q, k and v along axis 2",
        )
    )


def check_k_tables(cos: Tensor, cos_k: Tensor, sin_k: Tensor) -> None:
    """Raise ArgumentError unless the tables of k are such as cos; before q is written."""
    require_tensors(cos=cos, cos_k=cos_k, sin_k=sin_k)
    for name, table in (("cos_k", cos_k), ("sin_k", sin_k)):
        if table.shape != cos.shape or table.dtype != cos.dtype or table.device != cos.device:
            raise ArgumentError(
                explain(
                    name,
                    f"a {table.dtype} tensor of shape {tuple(table.shape)} on {table.device}",
                    f"{cos.dtype}, shape {tuple(cos.shape)} and {cos.device}, as cos",
                    "pass four tables of one kind",
                )
            )


def check_kv(kv: Tensor) -> None:
    """Raise ArgumentError unless kv is (batch, seqlen, 2, nheads_k, headdim)."""
    require_tensors(kv=kv)
    if kv.dim() != 5 or kv.shape[2] != 2:
        raise ArgumentError(
            explain(
                "kv",
                f"shape {tuple(kv.shape)}",
                "(batch, seqlen, 2, nheads_k, headdim)",
                "stack k and v along axis 2",
            )
        )
