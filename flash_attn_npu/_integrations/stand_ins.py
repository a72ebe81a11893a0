"""flash_attn's functions as transformers calls them: the signatures name what it would drop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from .. import flash_attn_interface
from .._core.attention import cache_operators, call
from .._core.attention.decode import CacheCall
from .._core.ground.lengths import host_lengths

__all__ = [
    "STAND_INS",
    "npu_flash_attn_func",
    "npu_flash_attn_varlen_func",
    "npu_flash_attn_with_kvcache",
]


def npu_flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:
    """`flash_attn_func` as transformers calls it; `s_aux` is an attention sink, (nheads,)."""
    # fmt: off
    if s_aux is None:
        return flash_attn_interface.flash_attn_func(
            q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
            deterministic,
        )
    options = (dropout_p, softmax_scale, causal, window_size, softcap, deterministic, False)
    out = call.attend("npu_flash_attn_func", (q, k, v), None, options, alibi_slopes, s_aux)
    # fmt: on
    return cast(torch.Tensor, out)


def npu_flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:
    """`flash_attn_varlen_func` as transformers calls it: it reads this signature.

    What the signature does not name, transformers drops without a word. `max_seqlen_*` may be
    left out, as with transformers' own function.
    """
    if max_seqlen_q is None:
        max_seqlen_q = host_lengths("cu_seqlens_q", cu_seqlens_q).longest
    if max_seqlen_k is None:
        max_seqlen_k = host_lengths("cu_seqlens_k", cu_seqlens_k).longest
    # fmt: off
    if s_aux is None:
        return flash_attn_interface.flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
            softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        )
    options = (dropout_p, softmax_scale, causal, window_size, softcap, deterministic, False)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out = call.attend(
        "npu_flash_attn_varlen_func", (q, k, v), lengths, options, alibi_slopes, s_aux
    )
    # fmt: on
    return cast(torch.Tensor, out)


def npu_flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:
    """`flash_attn_with_kvcache` as transformers' continuous batching calls it.

    `s_aux` is an attention sink, (nheads,).
    """
    shared: dict[str, Any] = {
        "cache_seqlens": cache_seqlens,
        "block_table": block_table,
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": window_size,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
    }
    if s_aux is None:
        out = flash_attn_interface.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, **shared)
    else:
        out, _ = cache_operators.attend(CacheCall(q, k_cache, v_cache, k, v, sink=s_aux, **shared))
    return cast(torch.Tensor, out)


STAND_INS: dict[str, Callable[..., Any]] = {
    "flash_attn_func": npu_flash_attn_func,
    "flash_attn_varlen_func": npu_flash_attn_varlen_func,
    "flash_attn_with_kvcache": npu_flash_attn_with_kvcache,
}
"""What serves transformers for the function of flash_attn that it would call."""
