"""Mirror of `flash_attn.flash_attn_interface`: unpacks layouts and nothing else.

Arguments, layouts and results are those of flash-attention 2.8. float32 and float64 are taken
as well, and so is any headdim a kernel takes; cu_seqlens may also be a CPU tensor or a list.
Shapes use batch, seqlen, nheads, nheads_k (a divisor of nheads: GQA, MQA), headdim, and total
for packed sequences. Errors are those of `flash_attn_npu.errors`.
"""

from __future__ import annotations

from torch import Tensor

from . import _extension as flash_attn_gpu
from . import _overloads
from ._autograd_classes import (
    FlashAttnFunc,
    FlashAttnKVPackedFunc,
    FlashAttnQKVPackedFunc,
    FlashAttnVarlenFunc,
    FlashAttnVarlenKVPackedFunc,
    FlashAttnVarlenQKVPackedFunc,
)
from ._core.attention import cache_operators, call
from ._core.attention.call import Answer
from ._core.attention.decode import CacheCall
from ._low_level import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
    _wrapped_flash_attn_backward,
    _wrapped_flash_attn_forward,
    _wrapped_flash_attn_varlen_backward,
    _wrapped_flash_attn_varlen_forward,
)
from ._operator_wrappers import (
    USE_TRITON_ROCM,
    _flash_attn_backward_fake,
    _flash_attn_forward_fake,
    _flash_attn_varlen_backward_fake,
    _flash_attn_varlen_forward_fake,
    _torch_custom_op_wrapper,
    _torch_register_fake_wrapper,
    maybe_contiguous,
    noop_custom_op_wrapper,
    noop_register_fake_wrapper,
    round_multiple,
)
from .errors import ArgumentError, ArgumentTypeError, UnsupportedError, renamed

__all__ = [
    "USE_TRITON_ROCM",
    "FlashAttnFunc",
    "FlashAttnKVPackedFunc",
    "FlashAttnQKVPackedFunc",
    "FlashAttnVarlenFunc",
    "FlashAttnVarlenKVPackedFunc",
    "FlashAttnVarlenQKVPackedFunc",
    "_flash_attn_backward",
    "_flash_attn_backward_fake",
    "_flash_attn_forward",
    "_flash_attn_forward_fake",
    "_flash_attn_varlen_backward",
    "_flash_attn_varlen_backward_fake",
    "_flash_attn_varlen_forward",
    "_flash_attn_varlen_forward_fake",
    "_torch_custom_op_wrapper",
    "_torch_register_fake_wrapper",
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
    "flash_attn_with_kvcache",
    "maybe_contiguous",
    "noop_custom_op_wrapper",
    "noop_register_fake_wrapper",
    "round_multiple",
]

_ERRORS = (ArgumentError, ArgumentTypeError, UnsupportedError)
_KV = {"k": "kv", "v": "kv"}
_QKV = {"q": "qkv", "k": "qkv", "v": "qkv"} | {
    f"{name}_{side}": name for name in ("cu_seqlens", "max_seqlen") for side in "qk"
}
"""What a function calls the arguments that its tensor packs; errors say those names."""


@_overloads.dense
def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Answer:  # fmt: skip
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
            -slope * abs(i + seqlen_k - seqlen_q - j) added.
        deterministic: the backward gives the same bits at every run.
        return_attn_probs: also return softmax_lse and S_dmask.

    Returns:
        out (batch, seqlen_q, nheads, headdim), or (out, softmax_lse, S_dmask) with softmax_lse
        (batch, nheads, seqlen_q) in float32 (float64 for float64) and S_dmask empty without
        dropout.

    >>> q, k, v = torch.randn(2, 5, 8, 64), torch.randn(2, 7, 2, 64), torch.randn(2, 7, 2, 64)
    >>> flash_attn_func(q, k, v, causal=True).shape
    torch.Size([2, 5, 8, 64])

    Contract: flash-attention 2.8, `flash_attn_func`.
    """
    options = (
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        deterministic,
        return_attn_probs,
    )
    return call.attend("flash_attn_func", (q, k, v), None, options, alibi_slopes)


@_overloads.varlen
def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor, max_seqlen_k: int | Tensor, dropout_p: float = 0.0,
    softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False, block_table: Tensor | None = None,
) -> Answer:  # fmt: skip
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
        block_table: int32 (batch, max_blocks): k and v are pages (num_blocks, page_block_size,
            nheads_k, headdim), and sequence i lies in the pages of row i.

    The other arguments are those of `flash_attn_func`, alibi_slopes per sequence included.

    Returns:
        out (total_q, nheads, headdim), or (out, softmax_lse, S_dmask) with softmax_lse
        (nheads, total_q) in float32 (float64 for float64).

    >>> q, k, v = (torch.randn(9, nheads, 64) for nheads in (8, 2, 2))
    >>> cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    >>> flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 5, 5, causal=True).shape
    torch.Size([9, 8, 64])

    Contract: flash-attention 2.8, `flash_attn_varlen_func`.
    """
    options = (
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        deterministic,
        return_attn_probs,
    )
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if block_table is not None:
        return call.attend_paged(
            "flash_attn_varlen_func", (q, k, v), lengths, options, alibi_slopes, block_table
        )
    return call.attend("flash_attn_varlen_func", (q, k, v), lengths, options, alibi_slopes)


@_overloads.qkvpacked
def flash_attn_qkvpacked_func(
    qkv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Answer:  # fmt: skip
    """`flash_attn_func` on qkv (batch, seqlen, 3, nheads, headdim).

    >>> flash_attn_qkvpacked_func(torch.randn(2, 5, 3, 8, 64)).shape
    torch.Size([2, 5, 8, 64])

    Contract: flash-attention 2.8, `flash_attn_qkvpacked_func`.
    """
    q, k, v = call.unpacked("qkv", qkv, 3, 5)
    options = (
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        deterministic,
        return_attn_probs,
    )
    try:
        return call.attend("flash_attn_qkvpacked_func", (q, k, v), None, options, alibi_slopes)
    except _ERRORS as error:
        raise renamed(error, _QKV) from None


@_overloads.kvpacked
def flash_attn_kvpacked_func(
    q: Tensor, kv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Answer:  # fmt: skip
    """`flash_attn_func` on q and a packed kv (batch, seqlen_k, 2, nheads_k, headdim).

    >>> flash_attn_kvpacked_func(torch.randn(2, 5, 8, 64), torch.randn(2, 7, 2, 2, 64)).shape
    torch.Size([2, 5, 8, 64])

    Contract: flash-attention 2.8, `flash_attn_kvpacked_func`.
    """
    k, v = call.unpacked("kv", kv, 2, 5)
    options = (
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        deterministic,
        return_attn_probs,
    )
    try:
        return call.attend("flash_attn_kvpacked_func", (q, k, v), None, options, alibi_slopes)
    except _ERRORS as error:
        raise renamed(error, _KV) from None


@_overloads.varlen_qkvpacked
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int | Tensor, dropout_p: float = 0.0,
    softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Answer:  # fmt: skip
    """`flash_attn_varlen_func` on qkv (total, 3, nheads, headdim).

    >>> cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    >>> flash_attn_varlen_qkvpacked_func(torch.randn(9, 3, 8, 64), cu_seqlens, 5).shape
    torch.Size([9, 8, 64])

    Contract: flash-attention 2.8, `flash_attn_varlen_qkvpacked_func`.
    """
    q, k, v = call.unpacked("qkv", qkv, 3, 4)
    options = (
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        deterministic,
        return_attn_probs,
    )
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    try:
        return call.attend(
            "flash_attn_varlen_qkvpacked_func", (q, k, v), lengths, options, alibi_slopes
        )
    except _ERRORS as error:
        raise renamed(error, _QKV) from None


@_overloads.varlen_kvpacked
def flash_attn_varlen_kvpacked_func(
    q: Tensor, kv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Answer:  # fmt: skip
    """`flash_attn_varlen_func` on q and a packed kv (total_k, 2, nheads_k, headdim).

    >>> q, kv, cu_seqlens = torch.randn(9, 8, 64), torch.randn(9, 2, 2, 64), [0, 4, 9]
    >>> flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens, cu_seqlens, 5, 5).shape
    torch.Size([9, 8, 64])

    Contract: flash-attention 2.8, `flash_attn_varlen_kvpacked_func`.
    """
    k, v = call.unpacked("kv", kv, 2, 4)
    options = (
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        deterministic,
        return_attn_probs,
    )
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    try:
        return call.attend(
            "flash_attn_varlen_kvpacked_func", (q, k, v), lengths, options, alibi_slopes
        )
    except _ERRORS as error:
        raise renamed(error, _KV) from None


@_overloads.with_kvcache
def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
    rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None, cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None, block_table: Tensor | None = None,
    softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None, num_splits: int = 0, return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attention over a key-value cache, appending new keys and values to it in place.

    Args:
        q: (batch, seqlen_q, nheads, headdim).
        k_cache, v_cache: (batch_cache, seqlen_cache, nheads_k, headdim), or with block_table
            (num_blocks, page_block_size, nheads_k, headdim), pages of any size.
        k, v: (batch, seqlen_new, nheads_k, headdim), written behind cache_seqlens.
        rotary_cos, rotary_sin: (seqlen_ro, rotary_dim / 2), applied to k and q at the positions
            from cache_seqlens on; to q at cache_seqlens alone without causal or window_size.
        cache_seqlens: lengths before the new keys, int or int32 (batch,); the whole cache if
            None. A tensor on the device costs one host copy each time it has changed.
        cache_batch_idx: int32 (batch,), the row of the cache of each sequence.
        cache_leftpad: int32 (batch,), the first position of the cache that is used.
        block_table: int32 (batch, max_blocks), the pages of each sequence.
        causal, window_size: aligned to the bottom right of the keys, new ones included.
        num_splits: accepted; it changes no number.
        return_softmax_lse: also return softmax_lse (batch, nheads, seqlen_q), float32 (float64
            for float64).

    Everything is checked before anything is written. There is no backward.

    Returns:
        out (batch, seqlen_q, nheads, headdim), or (out, softmax_lse).

    >>> k_cache, v_cache = torch.zeros(2, 32, 2, 64), torch.zeros(2, 32, 2, 64)
    >>> q, k, v = (torch.randn(2, 1, nheads, 64) for nheads in (8, 2, 2))
    >>> flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=20, causal=True).shape
    torch.Size([2, 1, 8, 64])

    Contract: flash-attention 2.8, `flash_attn_with_kvcache`.
    """
    out, lse = cache_operators.attend(
        CacheCall(
            q,
            k_cache,
            v_cache,
            k,
            v,
            rotary_cos,
            rotary_sin,
            cache_seqlens,
            cache_batch_idx,
            cache_leftpad,
            block_table,
            softmax_scale,
            causal,
            window_size,
            softcap,
            rotary_interleaved,
            alibi_slopes,
            num_splits,
            return_softmax_lse,
        )
    )
    return out if lse is None else (out, lse)
