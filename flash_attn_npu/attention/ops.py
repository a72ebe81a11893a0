"""Attention as operators of torch's dispatcher, in a namespace of our own, with fakes and autograd.

`flash_attn_npu::_flash_attn_forward` and its three siblings take the arguments of the functions
of the same name in flash-attention 2.8, in that order, and a few more behind them. Compiled
graphs, exported programs, selective checkpointing and every call whose kernel has no autograd
of its own come through here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import serve, traits
from .lengths import not_lengths
from .problem import default_scale

__all__ = ["NAMESPACE", "attend"]

NAMESPACE = "flash_attn_npu"

_OPTIONS = (
    "float dropout_p, float softmax_scale, bool causal, SymInt window_size_left, "
    "SymInt window_size_right, float softcap, Tensor? alibi_slopes"
)
_VARLEN_OPTIONS = (
    "float dropout_p, float softmax_scale, bool causal, SymInt window_size_left=-1, "
    "SymInt window_size_right=-1, float softcap=0.0, Tensor? alibi_slopes=None"
)
_LENGTHS = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k"
_OURS = "Tensor? sink=None, bool deterministic=False, str function='{}'"
_SAVED = "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse"
_GRADS = "Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv"

_forward = torch.library.custom_op(
    f"{NAMESPACE}::_flash_attn_forward",
    serve.forward,
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}, bool return_softmax, "
    f"{_OURS.format('_flash_attn_forward')}) -> (Tensor, Tensor, Tensor, Tensor)",
)
_varlen_forward = torch.library.custom_op(
    f"{NAMESPACE}::_flash_attn_varlen_forward",
    serve.varlen_forward,
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_LENGTHS}, {_VARLEN_OPTIONS}, "
    "bool return_softmax=False, Tensor? block_table=None, Tensor? leftpad_k=None, "
    "Tensor? seqused_k=None, bool zero_tensors=False, SymInt num_splits=0, "
    f"{_OURS.format('_flash_attn_varlen_forward')}) -> (Tensor, Tensor, Tensor, Tensor)",
)
_backward = torch.library.custom_op(
    f"{NAMESPACE}::_flash_attn_backward",
    serve.backward,
    mutates_args=("dq", "dk", "dv"),
    schema=f"({_SAVED}, {_GRADS}, {_OPTIONS}, bool deterministic, Tensor? rng_state=None, "
    "str function='_flash_attn_backward') -> Tensor",
)
_varlen_backward = torch.library.custom_op(
    f"{NAMESPACE}::_flash_attn_varlen_backward",
    serve.varlen_backward,
    mutates_args=("dq", "dk", "dv"),
    schema=f"({_SAVED}, {_GRADS}, {_LENGTHS}, {_OPTIONS}, bool deterministic, "
    "Tensor? rng_state=None, bool zero_tensors=False, "
    "str function='_flash_attn_varlen_backward') -> Tensor",
)


def attend(
    function: str,
    packed: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | Sequence[int] | None,
    cu_seqlens_k: Tensor | Sequence[int] | None,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    deterministic: bool,
    return_attn_probs: bool,
    alibi_slopes: Tensor | None,
    sink: Tensor | None,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """What a public function returns, through the operators; can be traced."""
    scale = default_scale(q.shape[-1]) if softmax_scale is None else number(softmax_scale)
    dropout_p, window = number(dropout_p), (number(window_size[0]), number(window_size[1]))
    options = (dropout_p, scale, number(causal), *window, number(softcap), alibi_slopes)
    deterministic, return_attn_probs = number(deterministic), number(return_attn_probs)
    s_dmask = return_attn_probs and 1.0 - dropout_p < 1.0
    ops = torch.ops.flash_attn_npu
    if not packed:
        out, lse, probs, _ = ops._flash_attn_forward(
            q, k, v, *options, s_dmask, sink, deterministic, function
        )
    else:
        cu_seqlens = (_tensor("cu_seqlens_q", cu_seqlens_q), _tensor("cu_seqlens_k", cu_seqlens_k))
        lengths = (*cu_seqlens, *_longest(max_seqlen_q, max_seqlen_k))
        paged = (block_table, None, None, False, 0)
        out, lse, probs, _ = ops._flash_attn_varlen_forward(
            q, k, v, *lengths, *options, s_dmask, *paged, sink, deterministic, function
        )
    return (out, lse, probs) if return_attn_probs else out


def _longest(max_seqlen_q: Any, max_seqlen_k: Any) -> tuple[Any, Any]:
    """Both as integers; one tensor passed twice is read once."""
    longest_q = number(max_seqlen_q)
    return longest_q, longest_q if max_seqlen_k is max_seqlen_q else number(max_seqlen_k)


def number(value: Any) -> Any:
    """What a graph may hold where the schema has a number: a tensor or a numpy scalar is read."""
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        return value
    return value.item() if hasattr(value, "item") else value


def _tensor(argument: str, cu_seqlens: Tensor | Sequence[int] | None) -> Tensor:
    if isinstance(cu_seqlens, Tensor):
        return cu_seqlens
    if cu_seqlens is None:
        raise not_lengths(argument, "None")
    return torch.tensor(cu_seqlens, dtype=torch.int32, device="cpu")


for _op, _fake, _formula in (
    (_forward, traits.forward, traits.differentiate),
    (_varlen_forward, traits.varlen_forward, traits.differentiate_varlen),
    (_backward, traits.backward, None),
    (_varlen_backward, traits.varlen_backward, None),
):
    _op.register_fake(_fake)
    if _formula is not None:
        _op.register_autograd(_formula, setup_context=traits.save)
