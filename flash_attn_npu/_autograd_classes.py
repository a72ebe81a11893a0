"""flash-attention's autograd classes, for clients that call `.apply(...)` themselves.

`flash_attn_interface` shows them. `apply` takes, by position, the arguments of the public
function it belongs to, then return_softmax (the public return_attn_probs), block_table
(FlashAttnVarlenFunc alone) and is_grad_enabled. It returns out, or with return_softmax
(out, softmax_lse, S_dmask); gradients flow through out. The public functions do not come
through here: theirs is the shorter way.

is_grad_enabled=False keeps nothing for a backward, which then raises ArgumentError.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _low_level
from ._core.attention.call import Answer, unpacked
from ._core.ground import arguments
from ._core.ground.records import named
from ._core.ground.second_derivatives import first_order
from ._core.ground.settings import fallback, fallback_policy
from ._core.problems.ask import Options
from ._core.problems.attention import default_scale
from .errors import ArgumentError, UnsupportedError

__all__ = [
    "FlashAttnFunc",
    "FlashAttnKVPackedFunc",
    "FlashAttnQKVPackedFunc",
    "FlashAttnVarlenFunc",
    "FlashAttnVarlenKVPackedFunc",
    "FlashAttnVarlenQKVPackedFunc",
]

_compiling = torch.compiler.is_dynamo_compiling

Length = int | Tensor
Gradients = tuple[Tensor | None, ...]


class _Lengths(NamedTuple):
    """What packed sequences have besides, by the names of the low-level functions."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


class _Call(NamedTuple):
    """What the gradient needs of a call besides its results.

    inputs: (q, k, v), (q, kv) or (qkv,).
    """

    inputs: tuple[Tensor, ...]
    lengths: _Lengths | None
    options: Options
    alibi_slopes: Tensor | None
    block_table: Tensor | None = None


# fmt: off


class FlashAttnFunc(torch.autograd.Function):
    """Autograd of `flash_attn_func`.

    Contract: flash-attention 2.8, `FlashAttnFunc`.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float | None,
        causal: bool, window_size: tuple[int, int], softcap: float, alibi_slopes: Tensor | None,
        deterministic: bool, return_softmax: bool, is_grad_enabled: bool,
    ) -> Answer:
        """Attention of q, k, v (batch, seqlen, nheads, headdim)."""
        options = Options(dropout_p, softmax_scale, causal, window_size, softcap, deterministic,
                          return_softmax)
        return _forward(ctx, _Call((q, k, v), None, options, alibi_slopes), is_grad_enabled)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, *args: Any) -> Gradients:
        """dq, dk, dv."""
        return *_backward(ctx, dout), *_nothing_for(9)


class FlashAttnQKVPackedFunc(torch.autograd.Function):
    """Autograd of `flash_attn_qkvpacked_func`.

    Contract: flash-attention 2.8, `FlashAttnQKVPackedFunc`.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, dropout_p: float, softmax_scale: float | None, causal: bool,
        window_size: tuple[int, int], softcap: float, alibi_slopes: Tensor | None,
        deterministic: bool, return_softmax: bool, is_grad_enabled: bool,
    ) -> Answer:
        """Attention of qkv (batch, seqlen, 3, nheads, headdim)."""
        options = Options(dropout_p, softmax_scale, causal, window_size, softcap, deterministic,
                          return_softmax)
        return _forward(ctx, _Call((qkv,), None, options, alibi_slopes), is_grad_enabled)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, *args: Any) -> Gradients:
        """dqkv."""
        return *_backward(ctx, dout), *_nothing_for(9)


class FlashAttnKVPackedFunc(torch.autograd.Function):
    """Autograd of `flash_attn_kvpacked_func`.

    Contract: flash-attention 2.8, `FlashAttnKVPackedFunc`.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, dropout_p: float, softmax_scale: float | None,
        causal: bool, window_size: tuple[int, int], softcap: float, alibi_slopes: Tensor | None,
        deterministic: bool, return_softmax: bool, is_grad_enabled: bool,
    ) -> Answer:
        """Attention of q and kv (batch, seqlen_k, 2, nheads_k, headdim)."""
        options = Options(dropout_p, softmax_scale, causal, window_size, softcap, deterministic,
                          return_softmax)
        return _forward(ctx, _Call((q, kv), None, options, alibi_slopes), is_grad_enabled)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, *args: Any) -> Gradients:
        """dq, dkv."""
        return *_backward(ctx, dout), *_nothing_for(9)


class FlashAttnVarlenFunc(torch.autograd.Function):
    """Autograd of `flash_attn_varlen_func`; with a block_table there is no backward.

    Contract: flash-attention 2.8, `FlashAttnVarlenFunc`.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
        max_seqlen_q: Length, max_seqlen_k: Length, dropout_p: float,
        softmax_scale: float | None, causal: bool, window_size: tuple[int, int], softcap: float,
        alibi_slopes: Tensor | None, deterministic: bool, return_softmax: bool,
        block_table: Tensor | None, is_grad_enabled: bool,
    ) -> Answer:
        """Attention of packed q (total_q, nheads, headdim), k and v."""
        options = Options(dropout_p, softmax_scale, causal, window_size, softcap, deterministic,
                          return_softmax)
        lengths = _lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        call = _Call((q, k, v), lengths, options, alibi_slopes, block_table)
        return _forward(ctx, call, is_grad_enabled)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, *args: Any) -> Gradients:
        """dq, dk, dv."""
        return *_backward(ctx, dout), *_nothing_for(14)


class FlashAttnVarlenQKVPackedFunc(torch.autograd.Function):
    """Autograd of `flash_attn_varlen_qkvpacked_func`.

    Contract: flash-attention 2.8, `FlashAttnVarlenQKVPackedFunc`.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: Length, dropout_p: float,
        softmax_scale: float | None, causal: bool, window_size: tuple[int, int], softcap: float,
        alibi_slopes: Tensor | None, deterministic: bool, return_softmax: bool,
        is_grad_enabled: bool,
    ) -> Answer:
        """Attention of packed qkv (total, 3, nheads, headdim)."""
        options = Options(dropout_p, softmax_scale, causal, window_size, softcap, deterministic,
                          return_softmax)
        lengths = _lengths(cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        call = _Call((qkv,), lengths, options, alibi_slopes)
        return _forward(ctx, call, is_grad_enabled)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, *args: Any) -> Gradients:
        """dqkv."""
        return *_backward(ctx, dout), *_nothing_for(11)


class FlashAttnVarlenKVPackedFunc(torch.autograd.Function):
    """Autograd of `flash_attn_varlen_kvpacked_func`.

    Contract: flash-attention 2.8, `FlashAttnVarlenKVPackedFunc`.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
        max_seqlen_q: Length, max_seqlen_k: Length, dropout_p: float,
        softmax_scale: float | None, causal: bool, window_size: tuple[int, int], softcap: float,
        alibi_slopes: Tensor | None, deterministic: bool, return_softmax: bool,
        is_grad_enabled: bool,
    ) -> Answer:
        """Attention of packed q (total_q, nheads, headdim), kv (total_k, 2, nheads_k, headdim)."""
        options = Options(dropout_p, softmax_scale, causal, window_size, softcap, deterministic,
                          return_softmax)
        lengths = _lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        call = _Call((q, kv), lengths, options, alibi_slopes)
        return _forward(ctx, call, is_grad_enabled)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, *args: Any) -> Gradients:
        """dq, dkv."""
        return *_backward(ctx, dout), *_nothing_for(13)


# fmt: on


def _forward(ctx: Any, call: _Call, is_grad_enabled: bool) -> Answer:
    q, k, v = _parts(call.inputs, call.lengths)
    given = {"q": q, "k": k, "v": v, **_named(call, q)}
    return_softmax = call.options.return_attn_probs
    given["return_softmax"] = return_softmax and call.options.dropout_p > 0
    if call.lengths is None:
        answer = _low_level._flash_attn_forward(**given)
    else:
        answer = _low_level._flash_attn_varlen_forward(**given, block_table=call.block_table)
    out, lse, s_dmask, rng_state = answer
    ctx.is_grad_enabled = is_grad_enabled
    if is_grad_enabled:
        _save(ctx, call, (out, lse, rng_state))
    if not return_softmax:
        return out
    ctx.mark_non_differentiable(lse, s_dmask)
    return out, lse, s_dmask


def _save(ctx: Any, call: _Call, results: tuple[Tensor, ...]) -> None:
    lengths = call.lengths
    cu_seqlens = (None, None) if lengths is None else (lengths.cu_seqlens_q, lengths.cu_seqlens_k)
    ctx.save_for_backward(call.alibi_slopes, *cu_seqlens, *results, *call.inputs)
    ctx.options = call.options
    ctx.longest = None if lengths is None else (lengths.max_seqlen_q, lengths.max_seqlen_k)
    ctx.paged = call.block_table is not None
    # the backward may run in another thread, or behind the block that set the policy; a compiled
    # graph asks for the policy when it runs
    ctx.policy = None if _compiling() else fallback_policy()


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
    """The gradients of the tensors that attention was asked of, packed as they are."""
    _require_backward(ctx)
    slopes, cu_seqlens_q, cu_seqlens_k, out, lse, rng_state, *inputs = ctx.saved_tensors
    lengths = None
    if ctx.longest is not None:
        lengths = _Lengths(cu_seqlens_q, cu_seqlens_k, *ctx.longest)
    call = _Call(tuple(inputs), lengths, ctx.options, slopes)
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs)
    q, k, v = _parts(call.inputs, lengths)
    dq, dk, dv = _parts(grads, lengths)
    tensors = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "softmax_lse": lse}
    given = {**tensors, "dq": dq, "dk": dk, "dv": dv, **_named(call, q)}
    given = {**given, "deterministic": call.options.deterministic, "rng_state": rng_state}
    with nullcontext() if ctx.policy is None else fallback(ctx.policy):
        if lengths is None:
            _low_level._flash_attn_backward(**given)
        else:
            _low_level._flash_attn_varlen_backward(**given)
    return first_order("attention", grads, dout, *inputs)


def _require_backward(ctx: Any) -> None:
    if not ctx.is_grad_enabled:
        raise ArgumentError(
            "is_grad_enabled",
            "False, and then a backward",
            "True, if there is one",
            "pass torch.is_grad_enabled() as the last argument of apply",
        )
    if ctx.paged:
        raise UnsupportedError(
            "block_table",
            "a backward",
            "the forward alone",
            "call flash_attn_varlen_func, which gathers the pages where it must",
        )


def _parts(tensors: tuple[Tensor, ...], lengths: _Lengths | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, or their gradients, as views of (q, k, v), (q, kv) or (qkv,)."""
    dims = 5 if lengths is None else 4
    if len(tensors) == 1:
        tensors = unpacked("qkv", tensors[0], 3, dims)
    elif len(tensors) == 2:
        tensors = (tensors[0], *unpacked("kv", tensors[1], 2, dims))
    q, k, v = tensors
    return q, k, v


def _named(call: _Call, q: Tensor) -> dict[str, Any]:
    """What forward and backward take alike, by the names of the low-level functions."""
    arguments.require_tensors(q=q)
    options, scale = call.options, call.options.softmax_scale
    left, right = arguments.window("window_size", options.window_size)
    return {
        **({} if call.lengths is None else named(call.lengths)),
        "dropout_p": options.dropout_p,
        "softmax_scale": default_scale(q.shape[-1]) if scale is None else scale,
        "causal": options.causal,
        "window_size_left": left,
        "window_size_right": right,
        "softcap": options.softcap,
        "alibi_slopes": call.alibi_slopes,
    }


def _lengths(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: Length, max_seqlen_k: Length
) -> _Lengths:
    longest_q, longest_k = (
        int(longest.item()) if isinstance(longest, Tensor) else longest
        for longest in (max_seqlen_q, max_seqlen_k)
    )
    return _Lengths(cu_seqlens_q, cu_seqlens_k, longest_q, longest_k)


def _nothing_for(options: int) -> tuple[None, ...]:
    return (None,) * options
