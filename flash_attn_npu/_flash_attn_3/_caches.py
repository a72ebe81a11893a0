"""FlashAttention 3's calls over a key-value cache, in terms of those of flash-attention 2."""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core.attention import cache_operators, operators
from .._core.attention.decode import CacheCall
from .._core.ground import arguments
from .._core.ground.records import replaced
from .._core.problems.cache import cache_lengths
from ..errors import ArgumentError, UnsupportedError
from ._composition import Heads, Options, Pair, joined, looks_ahead, narrowed, refuse, widened

__all__ = ["More", "attend"]

_ops = getattr(torch.ops, operators.NAMESPACE)


class More(NamedTuple):
    """What FlashAttention 3 takes beside the arguments of flash-attention 2."""

    qv: Tensor | None
    cu_seqlens_q: Any
    cu_seqlens_k_new: Any
    max_seqlen_q: Any


def attend(call: CacheCall, more: More) -> Pair:
    """out and softmax_lse, over rows of q or over packed ones."""
    q, k_cache, v_cache = call.q, call.k_cache, call.v_cache
    arguments.require_plain(q=q, k_cache=k_cache, v_cache=v_cache)
    packed = more.cu_seqlens_q is not None
    wider = more.qv is not None or k_cache.shape[-1] != v_cache.shape[-1]
    if packed or wider or more.cu_seqlens_k_new is not None:
        refuse(k=call.k)
    heads = widened(joined(q, k_cache, v_cache, more.qv, call.softmax_scale))
    window = Options(None, call.causal, call.window_size, call.softcap)
    if packed:
        _refuse_new(v=call.v, rotary_cos=call.rotary_cos, rotary_sin=call.rotary_sin)
        return narrowed(_over_packed(call, heads, more, window), heads)
    if q.dim() == 4 and looks_ahead(window) and q.shape[1] > _capacity(call):
        raise UnsupportedError(
            "window_size",
            f"{call.window_size} with {q.shape[1]} queries for each sequence",
            f"without causal, at most as many queries as the cache has positions, "
            f"{_capacity(call)}",
            "pass cu_seqlens_q and packed queries",
        )
    scale = heads.softmax_scale
    call = replaced(call, q=heads.q, k_cache=heads.k, v_cache=heads.v, softmax_scale=scale)
    return narrowed(cache_operators.attend(call), heads)


def _over_packed(call: CacheCall, heads: Heads, more: More, window: Options) -> Any:
    cu_q, table = more.cu_seqlens_q, call.block_table
    if not isinstance(cu_q, Tensor):
        cu_q = torch.tensor(cu_q, dtype=torch.int32, device="cpu")
    batch, capacity, rows = cu_q.shape[0] - 1, _capacity(call), call.cache_batch_idx
    ends = accumulate(cache_lengths("cache_seqlens", call.cache_seqlens, batch, capacity))
    if table is not None and rows is not None:
        raise ArgumentError(
            "cache_batch_idx", "a tensor beside page_table", "one of them", "pass page_table alone"
        )
    if table is None:
        # a row of the cache is a page as long as it
        numbers = range(batch) if rows is None else rows.tolist()
        table = torch.tensor([*numbers], dtype=torch.int32, device="cpu").view(batch, 1)
    longest = more.max_seqlen_q
    longest = heads.q.shape[0] if longest is None else operators.number(longest)
    with torch.no_grad():
        return _ops._flash_attn_varlen_forward(
            *(heads.q, heads.k, heads.v),
            cu_q,
            torch.tensor([0, *ends], dtype=torch.int32, device="cpu"),
            longest,
            max(longest, capacity) if looks_ahead(window) else capacity,
            dropout_p=0.0,
            softmax_scale=operators.number(heads.softmax_scale),
            causal=operators.number(call.causal),
            window_size_left=operators.number(call.window_size[0]),
            window_size_right=operators.number(call.window_size[1]),
            softcap=operators.number(call.softcap),
            block_table=table,
            leftpad_k=call.cache_leftpad,
            function=call.function,
        )


def _capacity(call: CacheCall) -> int:
    """Positions that each sequence may use."""
    pages = 1 if call.block_table is None else call.block_table.shape[-1]
    return call.k_cache.shape[1] * pages


def _refuse_new(**given: Tensor | None) -> None:
    for argument, tensor in given.items():
        if tensor is not None:
            raise ArgumentError(
                argument,
                "a tensor without new keys",
                "None beside cu_seqlens_q",
                "rotate, and write new keys and values into the cache, before the call",
            )
