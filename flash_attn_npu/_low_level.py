"""The functions below the public ones, for ring attention, Megatron and context parallelism.

They have the names, parameters and results of flash-attention 2.8; `flash_attn_interface` shows
them under upstream's module. Each calls the operator of the same name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._core.attention import operators
from ._core.ground.arguments import require_plain
from ._core.ground.functions import EAGER, FORWARD, refuse_tangents

__all__ = [
    "_flash_attn_backward",
    "_flash_attn_forward",
    "_flash_attn_varlen_backward",
    "_flash_attn_varlen_forward",
    "_wrapped_flash_attn_backward",
    "_wrapped_flash_attn_forward",
    "_wrapped_flash_attn_varlen_backward",
    "_wrapped_flash_attn_varlen_forward",
]

_ops = getattr(torch.ops, operators.NAMESPACE)

_wrapped_flash_attn_forward = _ops._flash_attn_forward
_wrapped_flash_attn_backward = _ops._flash_attn_backward
_wrapped_flash_attn_varlen_forward = _ops._flash_attn_varlen_forward
_wrapped_flash_attn_varlen_backward = _ops._flash_attn_varlen_backward

# fmt: off


def _flash_attn_forward(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool,
    window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, softmax_lse, S_dmask, rng_state) of `flash_attn_func`'s arguments.

    rng_state is an int64 tensor of 2 on the host: pass it to the backward if dropout_p is not 0.

    Contract: flash-attention 2.8, `_flash_attn_forward`.
    """
    _check(alibi_slopes, q=q, k=k, v=v)
    answer: tuple[Tensor, Tensor, Tensor, Tensor] = _wrapped_flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
        alibi_slopes, return_softmax,
    )
    return answer


def _flash_attn_varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool,
    window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, return_softmax: bool = False,
    block_table: Tensor | None = None, leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None, zero_tensors: bool = False, num_splits: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, softmax_lse, S_dmask, rng_state) of `flash_attn_varlen_func`'s arguments.

    block_table: pages, as in `flash_attn_varlen_func`; seqused_k (batch,) int32: how many of its
    keys a sequence uses; leftpad_k (batch,) int32: its first key. Rows of no sequence are always
    zeros, so zero_tensors changes nothing; nor does num_splits.

    Contract: flash-attention 2.8, `_flash_attn_varlen_forward`.
    """
    _check(alibi_slopes, q=q, k=k, v=v)
    answer: tuple[Tensor, Tensor, Tensor, Tensor] = _wrapped_flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax, block_table, leftpad_k, seqused_k, zero_tensors, num_splits,
    )
    return answer


def _flash_attn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, dropout_p: float,
    softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int,
    softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Write the gradients into dq, dk and dv, where they lie, from (out, softmax_lse) alone.

    out and softmax_lse may come from a merge over several blocks of keys: the gradients are
    then this block's share. Returns rowsum(dout * out) in float32 (float64 for float64),
    (batch, nheads, seqlen_q rounded up to 128).

    Contract: flash-attention 2.8, `_flash_attn_backward`.
    """
    _check(
        alibi_slopes, dout=dout, q=q, k=k, v=v, out=out, softmax_lse=softmax_lse, dq=dq, dk=dk,
        dv=dv,
    )
    row_sums: Tensor = _wrapped_flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
        window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state,
    )
    return row_sums


def _flash_attn_varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float,
    softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int,
    softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
    rng_state: Tensor | None = None, zero_tensors: bool = False,
) -> Tensor:
    """`_flash_attn_backward` over packed sequences; row sums are (nheads, total_q + 128 * batch).

    Contract: flash-attention 2.8, `_flash_attn_varlen_backward`.
    """
    _check(
        alibi_slopes, dout=dout, q=q, k=k, v=v, out=out, softmax_lse=softmax_lse, dq=dq, dk=dk,
        dv=dv,
    )
    row_sums: Tensor = _wrapped_flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
        softcap, alibi_slopes, deterministic, rng_state, zero_tensors,
    )
    return row_sums


# fmt: on


def _check(alibi_slopes: Tensor | None, **tensors: Tensor | None) -> None:
    require_plain(**tensors)
    if FORWARD._current_level >= 0:
        # below autograd, where operators look too, a tensor that requires a gradient shows none
        refuse_tangents(EAGER, alibi_slopes=alibi_slopes, **tensors)
