"""Mirror of `flash_attn.flash_attn_interface`: unpacks layouts and nothing else.

Arguments, layouts and results are those of flash-attention 2.8. float32 and float64 are taken
as well, and so is any headdim a kernel takes; cu_seqlens may also be a CPU tensor or a list.
Shapes use batch, seqlen, nheads, nheads_k (a divisor of nheads: GQA, MQA), headdim, and total
for packed sequences. Errors are those of `flash_attn_npu.errors`.
"""

from __future__ import annotations

from torch import Tensor

from . import extension as flash_attn_gpu
from .attention import call
from .attention.call import Answer
from .low_level import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
    _wrapped_flash_attn_backward,
    _wrapped_flash_attn_forward,
    _wrapped_flash_attn_varlen_backward,
    _wrapped_flash_attn_varlen_forward,
)

__all__ = [
    "_flash_attn_backward",
    "_flash_attn_forward",
    "_flash_attn_varlen_backward",
    "_flash_attn_varlen_forward",
    "_wrapped_flash_attn_backward",
    "_wrapped_flash_attn_forward",
    "_wrapped_flash_attn_varlen_backward",
    "_wrapped_flash_attn_varlen_forward",
    "flash_attn_func",
    "flash_attn_gpu",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Answer:
    """softmax(scale * q k^T) v for each sequence of a padded batch.

    Query i sees key j if i + seqlen_k - seqlen_q - left <= j <= i + seqlen_k - seqlen_q + right
    for window_size = (left, right), -1 for no limit; causal sets right to 0. A query that sees
    no key gets zeros, and +inf in softmax_lse.

    Args:
        q: (batch, seqlen_q, nheads, headdim), float16, bfloat16, float32 or float64.
        k, v: (batch, seqlen_k, nheads_k, headdim), dtype and device of q.
        dropout_p: probability of dropping an attention weight; 0.0 in evaluation.
        softmax_scale: headdim ** -0.5 if None.
        softcap: scores become softcap * tanh(score / softcap); 0.0 for none.
        alibi_slopes: float32 (nheads,) or (batch, nheads): the score of query i and key j gets
            -slope * |i + seqlen_k - seqlen_q - j| added.
        deterministic: the backward gives the same bits at every run.
        return_attn_probs: also return softmax_lse and S_dmask.

    Returns:
        out (batch, seqlen_q, nheads, headdim), or (out, softmax_lse, S_dmask) with softmax_lse
        (batch, nheads, seqlen_q) in float32 and S_dmask empty without dropout.

    Contract: flash-attention 2.8, `flash_attn_func`.
    """
    # fmt: off
    return call.attend(
        "flash_attn_func", q, k, v, None, None, None, None, dropout_p, softmax_scale,
        causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )
    # fmt: on


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Answer:
    """`flash_attn_func` over sequences packed one after the other.

    Args:
        q: (total_q, nheads, headdim).
        k, v: (total_k, nheads_k, headdim).
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32: sequence i holds the rows cu[i] to
            cu[i + 1]. Rows past the last entry belong to no sequence and give zeros. A tensor on
            the device is copied to the host once, whatever the number of layers; an in-place
            change is noticed, one made through `.data` cannot be.
        max_seqlen_q, max_seqlen_k: at least the longest sequence, int or 0-d tensor. A value on
            the device is not read.
        block_table: not served yet.

    The other arguments are those of `flash_attn_func`, alibi_slopes per sequence included.

    Returns:
        out (total_q, nheads, headdim), or (out, softmax_lse, S_dmask) with softmax_lse
        (nheads, total_q) in float32.

    Contract: flash-attention 2.8, `flash_attn_varlen_func`.
    """
    if block_table is not None:
        call.refuse_block_table("flash_attn_varlen_func")
    # fmt: off
    return call.attend(
        "flash_attn_varlen_func", q, k, v, cu_seqlens_q, cu_seqlens_k,
        max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )
    # fmt: on


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Answer:
    """`flash_attn_func` on qkv (batch, seqlen, 3, nheads, headdim).

    Contract: flash-attention 2.8, `flash_attn_qkvpacked_func`.
    """
    q, k, v = call.unpacked("qkv", qkv, 3)
    # fmt: off
    return call.attend(
        "flash_attn_qkvpacked_func", q, k, v, None, None, None, None, dropout_p, softmax_scale,
        causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )
    # fmt: on


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Answer:
    """`flash_attn_func` on q and a packed kv (batch, seqlen_k, 2, nheads_k, headdim).

    Contract: flash-attention 2.8, `flash_attn_kvpacked_func`.
    """
    k, v = call.unpacked("kv", kv, 2)
    # fmt: off
    return call.attend(
        "flash_attn_kvpacked_func", q, k, v, None, None, None, None, dropout_p, softmax_scale,
        causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )
    # fmt: on


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Answer:
    """`flash_attn_varlen_func` on qkv (total, 3, nheads, headdim).

    Contract: flash-attention 2.8, `flash_attn_varlen_qkvpacked_func`.
    """
    q, k, v = call.unpacked("qkv", qkv, 3)
    # fmt: off
    return call.attend(
        "flash_attn_varlen_qkvpacked_func", q, k, v, cu_seqlens, cu_seqlens,
        max_seqlen, max_seqlen, dropout_p, softmax_scale,
        causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )
    # fmt: on


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Answer:
    """`flash_attn_varlen_func` on q and a packed kv (total_k, 2, nheads_k, headdim).

    Contract: flash-attention 2.8, `flash_attn_varlen_kvpacked_func`.
    """
    k, v = call.unpacked("kv", kv, 2)
    # fmt: off
    return call.attend(
        "flash_attn_varlen_kvpacked_func", q, k, v, cu_seqlens_q, cu_seqlens_k,
        max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )
    # fmt: on
