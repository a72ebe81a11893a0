"""A call of each operator as a value.

The record is the operator: its schema is read off the fields, and its implementation, its fake and
its gradient take it whole. Fields are the arguments of flash-attention 2.8's function of the same
name, in its order; a few of ours stand behind them.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..problems.ask import Options

__all__ = [
    "NAMESPACE",
    "AnyBackward",
    "AnyForward",
    "Backward",
    "CacheAppend",
    "CacheRead",
    "DenseForward",
    "VarlenBackward",
    "VarlenForward",
    "options",
]


NAMESPACE = "flash_attn_npu_shim"
"""Of the operators, after the distribution: MinghuasLab's kernels register flash_attn_npu:: too."""


class DenseForward(NamedTuple):
    """`_flash_attn_forward`; function is the public one, for the report."""

    q: Tensor
    k: Tensor
    v: Tensor
    dropout_p: float
    softmax_scale: float
    causal: bool
    window_size_left: int
    window_size_right: int
    softcap: float
    alibi_slopes: Tensor | None
    return_softmax: bool
    sink: Tensor | None = None
    deterministic: bool = False
    function: str = "_flash_attn_forward"


class VarlenForward(NamedTuple):
    """`_flash_attn_varlen_forward`."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    dropout_p: float
    softmax_scale: float
    causal: bool
    window_size_left: int = -1
    window_size_right: int = -1
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    return_softmax: bool = False
    block_table: Tensor | None = None
    leftpad_k: Tensor | None = None
    seqused_k: Tensor | None = None
    zero_tensors: bool = False
    num_splits: int = 0
    sink: Tensor | None = None
    deterministic: bool = False
    function: str = "_flash_attn_varlen_forward"


class Backward(NamedTuple):
    """`_flash_attn_backward`, which writes dq, dk and dv."""

    dout: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    softmax_lse: Tensor
    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    dropout_p: float
    softmax_scale: float
    causal: bool
    window_size_left: int
    window_size_right: int
    softcap: float
    alibi_slopes: Tensor | None
    deterministic: bool
    rng_state: Tensor | None = None
    function: str = "_flash_attn_backward"


class VarlenBackward(NamedTuple):
    """`_flash_attn_varlen_backward`, which writes dq, dk and dv."""

    dout: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    softmax_lse: Tensor
    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    dropout_p: float
    softmax_scale: float
    causal: bool
    window_size_left: int
    window_size_right: int
    softcap: float
    alibi_slopes: Tensor | None
    deterministic: bool
    rng_state: Tensor | None = None
    zero_tensors: bool = False
    function: str = "_flash_attn_varlen_backward"


class CacheRead(NamedTuple):
    """`_flash_attn_read_kvcache`: attention over what a cache holds. Ours; upstream has none."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cache_seqlens: Tensor | None
    cache_batch_idx: Tensor | None
    cache_leftpad: Tensor | None
    block_table: Tensor | None
    softmax_scale: float
    causal: bool
    window_size_left: int
    window_size_right: int
    softcap: float
    alibi_slopes: Tensor | None
    return_softmax_lse: bool
    sink: Tensor | None = None
    function: str = "flash_attn_with_kvcache"


class CacheAppend(NamedTuple):
    """`_flash_attn_append_kvcache`: the same, new keys being written first."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k: Tensor
    v: Tensor
    rotary_cos: Tensor | None
    rotary_sin: Tensor | None
    rotary_interleaved: bool
    cache_seqlens: Tensor | None
    cache_batch_idx: Tensor | None
    cache_leftpad: Tensor | None
    block_table: Tensor | None
    softmax_scale: float
    causal: bool
    window_size_left: int
    window_size_right: int
    softcap: float
    alibi_slopes: Tensor | None
    return_softmax_lse: bool
    sink: Tensor | None = None
    function: str = "flash_attn_with_kvcache"


AnyForward = DenseForward | VarlenForward
AnyBackward = Backward | VarlenBackward


def options(call: AnyForward | AnyBackward) -> Options:
    """The options of a call, as `Options` has them.

    Whether the forward is deterministic changes nothing, as only backwards add up in any order.
    """
    return Options(
        call.dropout_p,
        call.softmax_scale,
        call.causal,
        (call.window_size_left, call.window_size_right),
        call.softcap,
        isinstance(call, AnyBackward) and call.deterministic,
        isinstance(call, AnyForward) and call.return_softmax,
    )
