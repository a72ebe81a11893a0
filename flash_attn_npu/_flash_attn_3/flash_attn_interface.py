"""FlashAttention 3's functions, with its names, layouts and results.

float16, bfloat16, float32 and float64 are taken, float8 is not. What only divides the work among
a Hopper card's processors, num_splits, pack_gqa, sm_margin and scheduler_metadata, changes no
number and is accepted; what is not served is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._core.attention.decode import CacheCall
from .._core.ground import arguments
from ..errors import ArgumentError, ArgumentTypeError, renamed
from . import _caches, _composition
from ._composition import Options

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]

_ERRORS = (ArgumentError, ArgumentTypeError)
_QKV = {"q": "qkv", "k": "qkv", "v": "qkv"}
_CACHE = {
    "block_table": "page_table",
    "cu_seqlens_k": "cache_seqlens",
    "leftpad_k": "cache_leftpad",
}
_PACKED = {**_CACHE, "k": "k_cache", "v": "v_cache"}
_NAME = "flash_attn_3.{}".format


# fmt: off
def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False,
    qv: Tensor | None = None, q_descale: Tensor | None = None, k_descale: Tensor | None = None,
    v_descale: Tensor | None = None, window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0, softcap: float = 0.0, num_splits: int = 1,
    pack_gqa: bool | None = None, deterministic: bool = False, sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * (q k^T + qv v^T)) v for each sequence of a padded batch.

    Args:
        q: (batch, seqlen_q, nheads, headdim).
        k: (batch, seqlen_k, nheads_k, headdim).
        v: (batch, seqlen_k, nheads_k, headdim_v).
        qv: (batch, seqlen_q, nheads, headdim_v), another part of the queries that meets v.
        softmax_scale: (headdim + that of qv) ** -0.5 if None.
        return_attn_probs: also return softmax_lse (batch, nheads, seqlen_q).
        q_descale, k_descale, v_descale, attention_chunk: refused unless at their defaults.

    Contract: FlashAttention 3, `flash_attn_func`.
    """
    _composition.refuse(q_descale=q_descale, k_descale=k_descale, v_descale=v_descale,
                        attention_chunk=attention_chunk)
    heads = _composition.joined(q, k, v, qv, softmax_scale)
    options = Options(softmax_scale, causal, window_size, softcap, deterministic, return_attn_probs)
    return _answer(_composition.dense(_NAME("flash_attn_func"), heads, options))


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor, max_seqlen_k: int | Tensor, seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None, softmax_scale: float | None = None, causal: bool = False,
    qv: Tensor | None = None, q_descale: Tensor | None = None, k_descale: Tensor | None = None,
    v_descale: Tensor | None = None, window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0, softcap: float = 0.0, num_splits: int = 1,
    pack_gqa: bool | None = None, deterministic: bool = False, sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attn_func` over sequences packed one after the other.

    Args:
        seqused_q, seqused_k: int32 (batch,), how many rows of each sequence count, from its first
            one on. The other rows of q give zeros, and -inf in softmax_lse.
        return_attn_probs: also return softmax_lse (nheads, total_q).

    Contract: FlashAttention 3, `flash_attn_varlen_func`.
    """
    _composition.refuse(q_descale=q_descale, k_descale=k_descale, v_descale=v_descale,
                        attention_chunk=attention_chunk)
    heads = _composition.joined(q, k, v, qv, softmax_scale)
    options = Options(softmax_scale, causal, window_size, softcap, deterministic, return_attn_probs)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    name, used = _NAME("flash_attn_varlen_func"), (seqused_q, seqused_k)
    return _answer(_composition.packed(name, heads, lengths, used, options))


def flash_attn_qkvpacked_func(
    qkv: Tensor, softmax_scale: float | None = None, causal: bool = False,
    q_descale: Tensor | None = None, k_descale: Tensor | None = None,
    v_descale: Tensor | None = None, window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0, softcap: float = 0.0, deterministic: bool = False,
    num_heads_q: int | None = None, sm_margin: int = 0, return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attn_func` on qkv (batch, seqlen, 3, nheads, headdim).

    Or, with num_heads_q, on (batch, seqlen, num_heads_q + 2 * nheads_k, headdim).

    Contract: FlashAttention 3, `flash_attn_qkvpacked_func`.
    """
    _composition.refuse(q_descale=q_descale, k_descale=k_descale, v_descale=v_descale,
                        attention_chunk=attention_chunk)
    q, k, v = _unpacked(qkv, num_heads_q)
    options = Options(softmax_scale, causal, window_size, softcap, deterministic, return_attn_probs)
    try:
        heads = _composition.joined(q, k, v, None, softmax_scale)
        return _answer(_composition.dense(_NAME("flash_attn_qkvpacked_func"), heads, options))
    except _ERRORS as error:
        raise renamed(error, _QKV) from None


def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
    qv: Tensor | None = None, rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None, cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None, page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None, rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None, k_descale: Tensor | None = None,
    v_descale: Tensor | None = None, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), attention_chunk: int = 0, softcap: float = 0.0,
    rotary_interleaved: bool = True, scheduler_metadata: Tensor | None = None,
    num_splits: int = 0, pack_gqa: bool | None = None, sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention over a key-value cache, appending new keys and values to it in place.

    As `flash_attn.flash_attn_with_kvcache`, and besides:

    Args:
        page_table: its block_table.
        cu_seqlens_q: q is (total_q, nheads, headdim), packed sequences. New keys and values are
            written before the call then, and cu_seqlens_k_new is not read.
        qv: as in `flash_attn_func`; the cache is copied for it.
        v_cache: may have a headdim of its own; the cache is copied for it.
        return_softmax_lse: return out, softmax_lse and two empty tensors.

    Contract: FlashAttention 3, `flash_attn_with_kvcache`.
    """
    _composition.refuse(q_descale=q_descale, k_descale=k_descale, v_descale=v_descale,
                        attention_chunk=attention_chunk, rotary_seqlens=rotary_seqlens)
    call = CacheCall(
        q, k_cache, v_cache, k=k, v=v, rotary_cos=rotary_cos, rotary_sin=rotary_sin,
        cache_seqlens=cache_seqlens, cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad,
        block_table=page_table, softmax_scale=softmax_scale, causal=causal,
        window_size=window_size, softcap=softcap, rotary_interleaved=rotary_interleaved,
        return_softmax_lse=return_softmax_lse, function=_NAME("flash_attn_with_kvcache"),
    )
    try:
        more = _caches.More(qv, cu_seqlens_q, cu_seqlens_k_new, max_seqlen_q)
        out, lse = _caches.attend(call, more)
    except _ERRORS as error:
        raise renamed(error, _CACHE if cu_seqlens_q is None else _PACKED) from None
    if not return_softmax_lse:
        return out
    assert lse is not None
    # upstream's partial results, which it has where it splits the keys
    return out, _composition.told(lse), lse.new_empty(0), lse.new_empty(0)


def get_scheduler_metadata(
    batch_size: int, max_seqlen_q: int, max_seqlen_k: int, num_heads_q: int, num_heads_kv: int,
    headdim: int, cache_seqlens: Tensor, qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None, cache_leftpad: Tensor | None = None,
    page_size: int | None = None, max_seqlen_k_new: int = 0, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), attention_chunk: int = 0, has_softcap: bool = False,
    num_splits: int = 0, pack_gqa: bool | None = None, sm_margin: int = 0,
) -> Tensor:
    """An empty int32 tensor: nothing is scheduled ahead, and `flash_attn_with_kvcache` takes it.

    Contract: FlashAttention 3, `get_scheduler_metadata`.
    """
    device = cache_seqlens.device if isinstance(cache_seqlens, Tensor) else None
    return torch.empty(0, dtype=torch.int32, device=device)
# fmt: on


def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The attention over all keys, from that over parts of them.

    Args:
        out_partial: (num_splits, batch, seqlen, nheads, headdim_v), float32.
        lse_partial: (num_splits, batch, seqlen, nheads), float32; -inf or +inf where a part has
            no key that the query sees.
        out: written and returned, if given.
        out_dtype: float32, as out_partial, if None.

    Returns:
        out (batch, seqlen, nheads, headdim_v) and softmax_lse (batch, seqlen, nheads); zeros and
        -inf where no part has a key.

    Contract: FlashAttention 3, `flash_attn_combine`.
    """
    arguments.require_plain(out_partial=out_partial, lse_partial=lse_partial)
    arguments.require_plain_or_none(out=out)
    combined, lse = _composition.combined(out_partial, lse_partial)
    dtype = out_partial.dtype if out_dtype is None else out_dtype
    if out is None:
        return combined.to(dtype), lse
    if out.shape != combined.shape or out.dtype != dtype or out.device != combined.device:
        raise ArgumentError(
            "out",
            f"a {out.dtype} tensor of shape {tuple(out.shape)} on {out.device}",
            f"a {dtype} tensor of shape {tuple(combined.shape)} on {combined.device}",
            "pass such a tensor, or None",
        )
    return out.copy_(combined), lse


def _unpacked(qkv: Tensor, num_heads_q: int | None) -> Sequence[Tensor]:
    arguments.require_plain(qkv=qkv)
    if qkv.dim() == 5 and qkv.shape[-3] == 3:
        return qkv.unbind(-3)
    heads_k = 0 if num_heads_q is None or qkv.dim() != 4 else (qkv.shape[2] - num_heads_q) // 2
    if heads_k <= 0 or num_heads_q is None or 2 * heads_k + num_heads_q != qkv.shape[2]:
        raise ArgumentError(
            "qkv",
            f"shape {tuple(qkv.shape)} and num_heads_q {num_heads_q}",
            "(batch, seqlen, 3, nheads, headdim), or with num_heads_q "
            "(batch, seqlen, num_heads_q + 2 * nheads_k, headdim)",
            "stack q, k and v, or join their heads and say how many are those of q",
        )
    return torch.split(qkv, [num_heads_q, heads_k, heads_k], -2)


def _answer(found: tuple[Tensor, Tensor | None]) -> Tensor | tuple[Tensor, Tensor]:
    out, lse = found
    return out if lse is None else (out, _composition.told(lse))
