"""What packed tensors and tables must look like, for `_rotary_functions` and `rotary`."""

from __future__ import annotations

import torch
from torch import Tensor

from .._core.ground.dense_arguments import require_dense, whole
from .._core.rowwise.gates import require_floating
from ..errors import ArgumentError

__all__ = ["check_k_tables", "check_kv", "check_plain", "packed_heads"]


def packed_heads(qkv: Tensor, num_heads_q: int | None) -> tuple[int, int]:
    """How much of axis 2 of a packed qkv is q, and how much is k.

    Raises:
        ArgumentError: qkv has another shape, or num_heads_q leaves k and v unequal.
    """
    require_floating(qkv=qkv)
    if qkv.dim() == 5 and qkv.shape[2] == 3:
        return 1, 1
    if qkv.dim() == 4 and num_heads_q is not None:
        num_heads_q = whole("num_heads_q", num_heads_q)
        rest = qkv.shape[2] - num_heads_q
        if num_heads_q > 0 and rest > 0 and rest % 2 == 0:
            return num_heads_q, rest // 2
    raise ArgumentError(
        "qkv",
        f"shape {tuple(qkv.shape)} and num_heads_q={num_heads_q}",
        "(batch, seqlen, 3, nheads, headdim), or "
        "(batch, seqlen, num_heads_q + 2 * num_heads_k, headdim) with num_heads_q",
        "pass num_heads_q for a 4-dimensional qkv, or stack q, k and v along axis 2",
    )


def check_k_tables(cos: Tensor, cos_k: Tensor, sin_k: Tensor) -> None:
    """Raise ArgumentError unless the tables of k are such as cos; before q is written."""
    require_dense(cos=cos, cos_k=cos_k, sin_k=sin_k)
    for name, table in (("cos_k", cos_k), ("sin_k", sin_k)):
        if table.shape != cos.shape or table.dtype != cos.dtype or table.device != cos.device:
            raise ArgumentError(
                name,
                f"a {table.dtype} tensor of shape {tuple(table.shape)} on {table.device}",
                f"{cos.dtype}, shape {tuple(cos.shape)} and {cos.device}, as cos",
                "pass four tables of one kind",
            )


def check_kv(kv: Tensor) -> None:
    """Raise ArgumentError unless kv is (batch, seqlen, 2, nheads_k, headdim)."""
    require_floating(kv=kv)
    if kv.dim() != 5 or kv.shape[2] != 2:
        raise ArgumentError(
            "kv",
            f"shape {tuple(kv.shape)}",
            "(batch, seqlen, 2, nheads_k, headdim)",
            "stack k and v along axis 2",
        )


def check_plain(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raise ArgumentError unless cos and sin are tables for the tokens of x."""
    require_dense(x=x, cos=cos, sin=sin)
    for name, tensor in (("x", x), ("cos", cos), ("sin", sin)):
        if tensor.dim() == 0 or tensor.dtype == torch.bool:
            came = f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)}"
            allowed = "numbers, with a dimension at least"
            raise ArgumentError(name, came, allowed, f"pass another {name}")
        if tensor.device != x.device:
            allowed = f"{x.device}, as x"
            raise ArgumentError(name, tensor.device, allowed, f"pass {name}.to(x.device)")
    if sin.shape != cos.shape:
        came, allowed = f"shape {tuple(sin.shape)}", f"{tuple(cos.shape)}, the shape of cos"
        raise ArgumentError("sin", came, allowed, "pass both of the same shape")
    tokens, rows = x.shape[-3:-1], (*cos.shape[:-1], 1)
    beyond = len(rows) > x.dim() - 1
    # torch 2.6 and 2.8 trace strict=False as True
    aligned = zip(rows[::-1], x.shape[-2::-1][: len(rows)], strict=True)
    if beyond or any(n not in (1, m) for n, m in aligned):
        came, allowed = f"shape {tuple(cos.shape)}", f"a row for each of the {tokens[:1]} tokens"
        raise ArgumentError("cos", came, allowed, "pass cos[:seqlen] and sin[:seqlen]")
