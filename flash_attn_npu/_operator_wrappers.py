"""What upstream's interface shows of the way it registers operators, and its two small helpers.

Ours are registered in `_core.attention.operators`, in a namespace of our own. The fakes answer as
those operators do without values: no tensor is read, and the results have the right shapes and
dtypes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ._core.attention import derivatives, records

__all__ = [
    "USE_TRITON_ROCM",
    "_flash_attn_backward_fake",
    "_flash_attn_forward_fake",
    "_flash_attn_varlen_backward_fake",
    "_flash_attn_varlen_forward_fake",
    "_torch_custom_op_wrapper",
    "_torch_register_fake_wrapper",
    "maybe_contiguous",
    "noop_custom_op_wrapper",
    "noop_register_fake_wrapper",
    "round_multiple",
]

USE_TRITON_ROCM = False
"""Upstream's switch to AMD's Triton kernels, which do not exist here."""

_torch_custom_op_wrapper = torch.library.custom_op
_torch_register_fake_wrapper = torch.library.register_fake


def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    """x, copied if its last dimension has a stride other than 1; None stays None.

    Contract: flash-attention 2.8, `maybe_contiguous`.
    """
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x


def round_multiple(x: int, m: int) -> int:
    """The least multiple of m that is not below x.

    Contract: flash-attention 2.8, `round_multiple`.
    """
    return (x + m - 1) // m * m


def noop_custom_op_wrapper(
    name: str,
    fn: Callable[..., Any] | None = None,
    *,
    mutates_args: str | Iterable[str],
    device_types: Any = None,
    schema: str | None = None,
) -> Any:
    """fn as it is, or a decorator that returns its function; nothing is registered.

    Contract: flash-attention 2.8, `noop_custom_op_wrapper`.
    """
    return _unchanged if fn is None else fn


def noop_register_fake_wrapper(
    op: Any,
    fn: Callable[..., Any] | None = None,
    *,
    lib: Any = None,
    _stacklevel: int = 1,
) -> Any:
    """fn as it is, or a decorator that returns its function; nothing is registered.

    Contract: flash-attention 2.8, `noop_register_fake_wrapper`.
    """
    return _unchanged if fn is None else fn


def _unchanged(fn: Callable[..., Any]) -> Callable[..., Any]:
    return fn


# fmt: off


def _flash_attn_forward_fake(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool,
    window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, softmax_lse, S_dmask, rng_state) of `_flash_attn_forward`, uninitialised.

    Contract: flash-attention 2.8, `_flash_attn_forward_fake`.
    """
    return derivatives.dense_shapes(records.DenseForward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
        alibi_slopes, return_softmax,
    ))


def _flash_attn_varlen_forward_fake(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool,
    window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, return_softmax: bool = False,
    block_table: Tensor | None = None, leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None, zero_tensors: bool = False, num_splits: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, softmax_lse, S_dmask, rng_state) of `_flash_attn_varlen_forward`, uninitialised.

    Contract: flash-attention 2.8, `_flash_attn_varlen_forward_fake`.
    """
    return derivatives.varlen_shapes(records.VarlenForward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax, block_table, leftpad_k, seqused_k, zero_tensors, num_splits,
    ))


def _flash_attn_backward_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, dropout_p: float,
    softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int,
    softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """The row sums of `_flash_attn_backward`, uninitialised; dq, dk, dv are not touched.

    Contract: flash-attention 2.8, `_flash_attn_backward_fake`.
    """
    return derivatives.dense_row_sums(records.Backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
        window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state,
    ))


def _flash_attn_varlen_backward_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float,
    softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int,
    softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
    rng_state: Tensor | None = None, zero_tensors: bool = False,
) -> Tensor:
    """The row sums of `_flash_attn_varlen_backward`, uninitialised; dq, dk, dv are not touched.

    Contract: flash-attention 2.8, `_flash_attn_varlen_backward_fake`.
    """
    return derivatives.varlen_row_sums(records.VarlenBackward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
        softcap, alibi_slopes, deterministic, rng_state, zero_tensors,
    ))
