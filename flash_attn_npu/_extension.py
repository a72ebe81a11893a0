"""The five entry points of upstream's C++ extension, which some clients call directly.

`flash_attn_interface.flash_attn_gpu` is this module. Argument order and results are those of
flash-attention 2.8's extension; generators must be None, as there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._core.attention import cache_operators, operators
from ._core.attention.decode import CacheCall
from ._core.ground import arguments as checks
from ._core.ground.storage import require_writable
from ._core.problems.buffers import require_apart
from .errors import ArgumentError, ArgumentTypeError, renamed

__all__ = ["bwd", "fwd", "fwd_kvcache", "varlen_bwd", "varlen_fwd"]

_ops = getattr(torch.ops, operators.NAMESPACE)
_ERRORS = (ArgumentError, ArgumentTypeError)
_NAMES = {
    "dropout_p": "p_dropout",
    "causal": "is_causal",
    "rotary_interleaved": "is_rotary_interleaved",
    "window_size": "window_size_left, window_size_right",
}
"""What the functions here call arguments that others know by another name."""

# fmt: off


def fwd(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, alibi_slopes: Tensor | None,
    p_dropout: float, softmax_scale: float, is_causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, return_softmax: bool, gen: Any = None,
) -> list[Tensor]:
    """[out, softmax_lse, S_dmask, rng_state]; a given `out` is written where it lies."""
    try:
        _no_generator(gen)
        _check_out(out, q, k, v)
        return _into(out, _ops._flash_attn_forward(
            q, k, v, p_dropout, softmax_scale, is_causal, window_size_left, window_size_right,
            softcap, alibi_slopes, return_softmax,
        ))
    except _ERRORS as error:
        raise renamed(error, _NAMES) from None


def varlen_fwd(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, seqused_k: Tensor | None, leftpad_k: Tensor | None,
    block_table: Tensor | None, alibi_slopes: Tensor | None, max_seqlen_q: int,
    max_seqlen_k: int, p_dropout: float, softmax_scale: float, zero_tensors: bool,
    is_causal: bool, window_size_left: int, window_size_right: int, softcap: float,
    return_softmax: bool, gen: Any = None,
) -> list[Tensor]:
    """[out, softmax_lse, S_dmask, rng_state] of packed sequences."""
    try:
        _no_generator(gen)
        _check_out(out, q, k, v)
        return _into(out, _ops._flash_attn_varlen_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, p_dropout,
            softmax_scale, is_causal, window_size_left, window_size_right, softcap, alibi_slopes,
            return_softmax, block_table, leftpad_k, seqused_k, zero_tensors,
        ))
    except _ERRORS as error:
        raise renamed(error, _NAMES) from None


def bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, alibi_slopes: Tensor | None,
    p_dropout: float, softmax_scale: float, is_causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, deterministic: bool, gen: Any = None,
    rng_state: Tensor | None = None,
) -> list[Tensor]:
    """[dq, dk, dv, row sums]; given gradients are written where they lie."""
    try:
        _no_generator(gen)
        checks.require_plain(dout=dout, q=q, k=k, v=v, out=out, softmax_lse=softmax_lse)
        grads = _grads((dq, dk, dv), (q, k, v))
        checks.require_plain(dq=grads[0], dk=grads[1], dv=grads[2])
        row_sums = _ops._flash_attn_backward(
            dout, q, k, v, out, softmax_lse, *grads, p_dropout, softmax_scale, is_causal,
            window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state,
        )
        return [*grads, row_sums]
    except _ERRORS as error:
        raise renamed(error, _NAMES) from None


def varlen_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, alibi_slopes: Tensor | None, max_seqlen_q: int, max_seqlen_k: int,
    p_dropout: float, softmax_scale: float, zero_tensors: bool, is_causal: bool,
    window_size_left: int, window_size_right: int, softcap: float, deterministic: bool,
    gen: Any = None, rng_state: Tensor | None = None,
) -> list[Tensor]:
    """[dq, dk, dv, row sums] of packed sequences."""
    try:
        _no_generator(gen)
        checks.require_plain(dout=dout, q=q, k=k, v=v, out=out, softmax_lse=softmax_lse)
        grads = _grads((dq, dk, dv), (q, k, v))
        checks.require_plain(dq=grads[0], dk=grads[1], dv=grads[2])
        row_sums = _ops._flash_attn_varlen_backward(
            dout, q, k, v, out, softmax_lse, *grads, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
            max_seqlen_k, p_dropout, softmax_scale, is_causal, window_size_left, window_size_right,
            softcap, alibi_slopes, deterministic, rng_state, zero_tensors,
        )
        return [*grads, row_sums]
    except _ERRORS as error:
        raise renamed(error, _NAMES) from None


def fwd_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None,
    cache_seqlens: Tensor | None, rotary_cos: Tensor | None, rotary_sin: Tensor | None,
    cache_batch_idx: Tensor | None, cache_leftpad: Tensor | None, block_table: Tensor | None,
    alibi_slopes: Tensor | None, out: Tensor | None, softmax_scale: float, is_causal: bool,
    window_size_left: int, window_size_right: int, softcap: float, is_rotary_interleaved: bool,
    num_splits: int = 0,
) -> list[Tensor]:
    """[out, softmax_lse] of attention over a cache."""
    try:
        _check_out(out, q, k, v, k_cache=k_cache, v_cache=v_cache)
        answer, lse = cache_operators.attend(CacheCall(
            q, k_cache, v_cache, k=k, v=v, rotary_cos=rotary_cos, rotary_sin=rotary_sin,
            cache_seqlens=cache_seqlens, cache_batch_idx=cache_batch_idx,
            cache_leftpad=cache_leftpad, block_table=block_table, softmax_scale=softmax_scale,
            causal=is_causal, window_size=(window_size_left, window_size_right), softcap=softcap,
            rotary_interleaved=is_rotary_interleaved, alibi_slopes=alibi_slopes,
            num_splits=num_splits, return_softmax_lse=True, function="fwd_kvcache",
        ))
        assert lse is not None
        return _into(out, (answer, lse))
    except _ERRORS as error:
        raise renamed(error, _NAMES) from None


# fmt: on


def _check_out(
    out: Tensor | None, q: Tensor, k: Tensor | None, v: Tensor | None, **caches: Tensor
) -> None:
    given = {"q": q, "k": k, "v": v, **caches}
    # a cache may have no new keys
    checks.require_plain(**{x: y for x, y in given.items() if y is not None or not caches})
    if out is None:
        return
    checks.require_plain(out=out)
    if (out.shape, out.dtype, out.device) != (q.shape, q.dtype, q.device):
        raise ArgumentError(
            "out",
            f"a {out.dtype} tensor of shape {tuple(out.shape)} on {out.device}",
            f"a {q.dtype} tensor of shape {tuple(q.shape)} on {q.device}, as q",
            "pass torch.empty_like(q), or None",
        )
    if not out.is_meta:
        require_writable(out=out)
        require_apart({"out": out}, caches)


def _into(out: Tensor | None, answer: tuple[Tensor, ...]) -> list[Tensor]:
    if out is None:
        return list(answer)
    # a leaf takes no gradient of what is written over it, and the extension gives none
    with torch.set_grad_enabled(torch.is_grad_enabled() and not out.requires_grad):
        return [out.copy_(answer[0]), *answer[1:]]


def _grads(given: tuple[Tensor | None, ...], like: tuple[Tensor, ...]) -> list[Tensor]:
    return [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if grad is None else grad
        for grad, x in zip(given, like, strict=True)
    ]


def _no_generator(gen: Any) -> None:
    if gen is not None:
        raise ArgumentError(
            "gen",
            type(gen).__name__,
            "None: dropout draws from torch's default generator",
            "seed it with torch.manual_seed",
        )
