"""How type checkers see the attention functions: what they return hangs on one argument.

Each class is a signature of `flash_attn_interface`, once for each form of the answer; a test holds
them to the functions. Numbers are taken from numpy and from tensors without dimensions too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, SupportsFloat, SupportsIndex, overload

from torch import Tensor

__all__ = [
    "dense",
    "kvpacked",
    "qkvpacked",
    "varlen",
    "varlen_kvpacked",
    "varlen_qkvpacked",
    "with_kvcache",
]


class _Truth(Protocol):
    def __bool__(self) -> bool: ...


Real = SupportsFloat
Whole = SupportsIndex
Flag = SupportsIndex | _Truth
Lengths = Tensor | Sequence[int]
Window = Sequence[SupportsIndex] | Tensor
Probed = tuple[Tensor, Tensor, Tensor]


class _Function(Protocol):
    """A function, and not only something that can be called."""

    __name__: str
    __qualname__: str
    __module__: str


# fmt: off


class Dense(_Function, Protocol):
    """`flash_attn_func`."""

    @overload
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, dropout_p: Real = 0.0,
        softmax_scale: Real | None = None, causal: Flag = False, window_size: Window = (-1, -1),
        softcap: Real = 0.0, alibi_slopes: Tensor | None = None, deterministic: Flag = False,
        return_attn_probs: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, dropout_p: Real = 0.0,
        softmax_scale: Real | None = None, causal: Flag = False, window_size: Window = (-1, -1),
        softcap: Real = 0.0, alibi_slopes: Tensor | None = None, deterministic: Flag = False, *,
        return_attn_probs: Literal[True],
    ) -> Probed: ...
    @overload
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, dropout_p: Real = 0.0,
        softmax_scale: Real | None = None, causal: Flag = False, window_size: Window = (-1, -1),
        softcap: Real = 0.0, alibi_slopes: Tensor | None = None, deterministic: Flag = False,
        return_attn_probs: Flag = False,
    ) -> Tensor | Probed: ...


class Varlen(_Function, Protocol):
    """`flash_attn_varlen_func`."""

    @overload
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Lengths, cu_seqlens_k: Lengths,
        max_seqlen_q: Whole, max_seqlen_k: Whole, dropout_p: Real = 0.0,
        softmax_scale: Real | None = None, causal: Flag = False, window_size: Window = (-1, -1),
        softcap: Real = 0.0, alibi_slopes: Tensor | None = None, deterministic: Flag = False,
        return_attn_probs: Literal[False] = False, block_table: Tensor | None = None,
    ) -> Tensor: ...
    @overload
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Lengths, cu_seqlens_k: Lengths,
        max_seqlen_q: Whole, max_seqlen_k: Whole, dropout_p: Real = 0.0,
        softmax_scale: Real | None = None, causal: Flag = False, window_size: Window = (-1, -1),
        softcap: Real = 0.0, alibi_slopes: Tensor | None = None, deterministic: Flag = False, *,
        return_attn_probs: Literal[True], block_table: Tensor | None = None,
    ) -> Probed: ...
    @overload
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Lengths, cu_seqlens_k: Lengths,
        max_seqlen_q: Whole, max_seqlen_k: Whole, dropout_p: Real = 0.0,
        softmax_scale: Real | None = None, causal: Flag = False, window_size: Window = (-1, -1),
        softcap: Real = 0.0, alibi_slopes: Tensor | None = None, deterministic: Flag = False,
        return_attn_probs: Flag = False, block_table: Tensor | None = None,
    ) -> Tensor | Probed: ...


class QKVPacked(_Function, Protocol):
    """`flash_attn_qkvpacked_func`."""

    @overload
    def __call__(
        self, qkv: Tensor, dropout_p: Real = 0.0, softmax_scale: Real | None = None,
        causal: Flag = False, window_size: Window = (-1, -1), softcap: Real = 0.0,
        alibi_slopes: Tensor | None = None, deterministic: Flag = False,
        return_attn_probs: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def __call__(
        self, qkv: Tensor, dropout_p: Real = 0.0, softmax_scale: Real | None = None,
        causal: Flag = False, window_size: Window = (-1, -1), softcap: Real = 0.0,
        alibi_slopes: Tensor | None = None, deterministic: Flag = False, *,
        return_attn_probs: Literal[True],
    ) -> Probed: ...
    @overload
    def __call__(
        self, qkv: Tensor, dropout_p: Real = 0.0, softmax_scale: Real | None = None,
        causal: Flag = False, window_size: Window = (-1, -1), softcap: Real = 0.0,
        alibi_slopes: Tensor | None = None, deterministic: Flag = False,
        return_attn_probs: Flag = False,
    ) -> Tensor | Probed: ...


class KVPacked(_Function, Protocol):
    """`flash_attn_kvpacked_func`."""

    @overload
    def __call__(
        self, q: Tensor, kv: Tensor, dropout_p: Real = 0.0, softmax_scale: Real | None = None,
        causal: Flag = False, window_size: Window = (-1, -1), softcap: Real = 0.0,
        alibi_slopes: Tensor | None = None, deterministic: Flag = False,
        return_attn_probs: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def __call__(
        self, q: Tensor, kv: Tensor, dropout_p: Real = 0.0, softmax_scale: Real | None = None,
        causal: Flag = False, window_size: Window = (-1, -1), softcap: Real = 0.0,
        alibi_slopes: Tensor | None = None, deterministic: Flag = False, *,
        return_attn_probs: Literal[True],
    ) -> Probed: ...
    @overload
    def __call__(
        self, q: Tensor, kv: Tensor, dropout_p: Real = 0.0, softmax_scale: Real | None = None,
        causal: Flag = False, window_size: Window = (-1, -1), softcap: Real = 0.0,
        alibi_slopes: Tensor | None = None, deterministic: Flag = False,
        return_attn_probs: Flag = False,
    ) -> Tensor | Probed: ...


class VarlenQKVPacked(_Function, Protocol):
    """`flash_attn_varlen_qkvpacked_func`."""

    @overload
    def __call__(
        self, qkv: Tensor, cu_seqlens: Lengths, max_seqlen: Whole, dropout_p: Real = 0.0,
        softmax_scale: Real | None = None, causal: Flag = False, window_size: Window = (-1, -1),
        softcap: Real = 0.0, alibi_slopes: Tensor | None = None, deterministic: Flag = False,
        return_attn_probs: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def __call__(
        self, qkv: Tensor, cu_seqlens: Lengths, max_seqlen: Whole, dropout_p: Real = 0.0,
        softmax_scale: Real | None = None, causal: Flag = False, window_size: Window = (-1, -1),
        softcap: Real = 0.0, alibi_slopes: Tensor | None = None, deterministic: Flag = False, *,
        return_attn_probs: Literal[True],
    ) -> Probed: ...
    @overload
    def __call__(
        self, qkv: Tensor, cu_seqlens: Lengths, max_seqlen: Whole, dropout_p: Real = 0.0,
        softmax_scale: Real | None = None, causal: Flag = False, window_size: Window = (-1, -1),
        softcap: Real = 0.0, alibi_slopes: Tensor | None = None, deterministic: Flag = False,
        return_attn_probs: Flag = False,
    ) -> Tensor | Probed: ...


class VarlenKVPacked(_Function, Protocol):
    """`flash_attn_varlen_kvpacked_func`."""

    @overload
    def __call__(
        self, q: Tensor, kv: Tensor, cu_seqlens_q: Lengths, cu_seqlens_k: Lengths,
        max_seqlen_q: Whole, max_seqlen_k: Whole, dropout_p: Real = 0.0,
        softmax_scale: Real | None = None, causal: Flag = False, window_size: Window = (-1, -1),
        softcap: Real = 0.0, alibi_slopes: Tensor | None = None, deterministic: Flag = False,
        return_attn_probs: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def __call__(
        self, q: Tensor, kv: Tensor, cu_seqlens_q: Lengths, cu_seqlens_k: Lengths,
        max_seqlen_q: Whole, max_seqlen_k: Whole, dropout_p: Real = 0.0,
        softmax_scale: Real | None = None, causal: Flag = False, window_size: Window = (-1, -1),
        softcap: Real = 0.0, alibi_slopes: Tensor | None = None, deterministic: Flag = False, *,
        return_attn_probs: Literal[True],
    ) -> Probed: ...
    @overload
    def __call__(
        self, q: Tensor, kv: Tensor, cu_seqlens_q: Lengths, cu_seqlens_k: Lengths,
        max_seqlen_q: Whole, max_seqlen_k: Whole, dropout_p: Real = 0.0,
        softmax_scale: Real | None = None, causal: Flag = False, window_size: Window = (-1, -1),
        softcap: Real = 0.0, alibi_slopes: Tensor | None = None, deterministic: Flag = False,
        return_attn_probs: Flag = False,
    ) -> Tensor | Probed: ...


class WithKVCache(_Function, Protocol):
    """`flash_attn_with_kvcache`."""

    @overload
    def __call__(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None,
        v: Tensor | None = None, rotary_cos: Tensor | None = None,
        rotary_sin: Tensor | None = None, cache_seqlens: Whole | Lengths | None = None,
        cache_batch_idx: Tensor | None = None, cache_leftpad: Whole | Lengths | None = None,
        block_table: Tensor | None = None, softmax_scale: Real | None = None, causal: Flag = False,
        window_size: Window = (-1, -1), softcap: Real = 0.0, rotary_interleaved: Flag = True,
        alibi_slopes: Tensor | None = None, num_splits: Whole = 0,
        return_softmax_lse: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def __call__(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None,
        v: Tensor | None = None, rotary_cos: Tensor | None = None,
        rotary_sin: Tensor | None = None, cache_seqlens: Whole | Lengths | None = None,
        cache_batch_idx: Tensor | None = None, cache_leftpad: Whole | Lengths | None = None,
        block_table: Tensor | None = None, softmax_scale: Real | None = None, causal: Flag = False,
        window_size: Window = (-1, -1), softcap: Real = 0.0, rotary_interleaved: Flag = True,
        alibi_slopes: Tensor | None = None, num_splits: Whole = 0, *,
        return_softmax_lse: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def __call__(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None,
        v: Tensor | None = None, rotary_cos: Tensor | None = None,
        rotary_sin: Tensor | None = None, cache_seqlens: Whole | Lengths | None = None,
        cache_batch_idx: Tensor | None = None, cache_leftpad: Whole | Lengths | None = None,
        block_table: Tensor | None = None, softmax_scale: Real | None = None, causal: Flag = False,
        window_size: Window = (-1, -1), softcap: Real = 0.0, rotary_interleaved: Flag = True,
        alibi_slopes: Tensor | None = None, num_splits: Whole = 0, return_softmax_lse: Flag = False,
    ) -> Tensor | tuple[Tensor, Tensor]: ...


# fmt: on


def _as_it_is(function: Any) -> Any:
    return function


dense: Callable[[Callable[..., Any]], Dense] = _as_it_is
varlen: Callable[[Callable[..., Any]], Varlen] = _as_it_is
qkvpacked: Callable[[Callable[..., Any]], QKVPacked] = _as_it_is
kvpacked: Callable[[Callable[..., Any]], KVPacked] = _as_it_is
varlen_qkvpacked: Callable[[Callable[..., Any]], VarlenQKVPacked] = _as_it_is
varlen_kvpacked: Callable[[Callable[..., Any]], VarlenKVPacked] = _as_it_is
with_kvcache: Callable[[Callable[..., Any]], WithKVCache] = _as_it_is
