"""Calls of the public functions that several tests trace, with inputs whose sizes vary by step."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import flash_attn_npu as fa

HEADS, HEADS_K, HEADDIM = 4, 2, 8

Inputs = tuple[Any, ...]


class Case(NamedTuple):
    """`run(*inputs(step))` is one call; `operator` is the one it goes through when traced."""

    name: str
    operator: str
    inputs: Callable[[int], Inputs]
    run: Callable[..., Any]


def dense(step: int) -> Inputs:
    """q, k, v with more keys than queries; no two sizes alike, which tracing would guard on."""
    batch, seqlen_q, seqlen_k = 3 + 3 * step, 5 + 4 * step, 9 + 7 * step
    return (
        torch.randn(batch, seqlen_q, HEADS, HEADDIM),
        torch.randn(batch, seqlen_k, HEADS_K, HEADDIM),
        torch.randn(batch, seqlen_k, HEADS_K, HEADDIM),
    )


def dense_alibi(step: int) -> Inputs:
    return *dense(step), torch.rand(HEADS)


def dense_qkv(step: int) -> Inputs:
    return (torch.randn(5 + step, 6 + 5 * step, 3, HEADS, HEADDIM),)


def dense_kv(step: int) -> Inputs:
    q, k, v = dense(step)
    return q, torch.stack([k, v], dim=2)


def packed(step: int) -> Inputs:
    """q, k, v, cu_seqlens and the longest length of self-attention over packed sequences."""
    seqlens = [4 + step, 7 + 2 * step, 2, 5, *[3] * step]
    cu_seqlens = torch.tensor([0, *accumulate(seqlens)], dtype=torch.int32)
    tensors = [torch.randn(sum(seqlens), heads, HEADDIM) for heads in (HEADS, HEADS_K, HEADS_K)]
    return *tensors, cu_seqlens, max(seqlens)


def packed_alibi(step: int) -> Inputs:
    return *packed(step), torch.rand(HEADS)


def packed_qkv(step: int) -> Inputs:
    q, _, _, cu_seqlens, longest = packed(step)
    return torch.stack([q, q + 1, q - 1], dim=1), cu_seqlens, longest


def packed_kv(step: int) -> Inputs:
    q, k, v, cu_seqlens, longest = packed(step)
    return q, torch.stack([k, v], dim=1), cu_seqlens, longest


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, **options: Any) -> Any:
    return fa.flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, **options)


DENSE, VARLEN = "_flash_attn_forward", "_flash_attn_varlen_forward"

CASES = (
    Case("plain", DENSE, dense, lambda q, k, v: fa.flash_attn_func(q, k, v)),
    Case(
        "causal window",
        DENSE,
        dense,
        lambda q, k, v: fa.flash_attn_func(q, k, v, causal=True, window_size=(3, 3)),
    ),
    Case("softcap", DENSE, dense, lambda q, k, v: fa.flash_attn_func(q, k, v, softcap=5.0)),
    Case(
        "alibi",
        DENSE,
        dense_alibi,
        lambda q, k, v, slopes: fa.flash_attn_func(q, k, v, alibi_slopes=slopes),
    ),
    Case(
        "statistics",
        DENSE,
        dense,
        lambda q, k, v: fa.flash_attn_func(q, k, v, causal=True, return_attn_probs=True),
    ),
    Case("qkv", DENSE, dense_qkv, lambda qkv: fa.flash_attn_qkvpacked_func(qkv, causal=True)),
    Case("kv", DENSE, dense_kv, lambda q, kv: fa.flash_attn_kvpacked_func(q, kv, causal=True)),
    Case("packed", VARLEN, packed, lambda *inputs: _varlen(*inputs, causal=True)),
    Case(
        "packed causal window",
        VARLEN,
        packed,
        lambda *inputs: _varlen(*inputs, causal=True, window_size=(3, 0)),
    ),
    Case("packed softcap", VARLEN, packed, lambda *inputs: _varlen(*inputs, softcap=5.0)),
    Case(
        "packed alibi",
        VARLEN,
        packed_alibi,
        lambda *inputs: _varlen(*inputs[:-1], alibi_slopes=inputs[-1]),
    ),
    Case(
        "packed statistics",
        VARLEN,
        packed,
        lambda *inputs: _varlen(*inputs, softmax_scale=0.3, return_attn_probs=True),
    ),
    Case(
        "packed qkv",
        VARLEN,
        packed_qkv,
        lambda qkv, cu, longest: fa.flash_attn_varlen_qkvpacked_func(qkv, cu, longest, causal=True),
    ),
    Case(
        "packed kv",
        VARLEN,
        packed_kv,
        lambda q, kv, cu, longest: fa.flash_attn_varlen_kvpacked_func(
            q, kv, cu, cu, longest, longest, causal=True
        ),
    ),
)

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


importing_inductor = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


def leaves(inputs: Inputs) -> Inputs:
    """The same inputs, floating-point tensors as fresh leaves that want a gradient."""
    return tuple(
        x.detach().clone().requires_grad_()
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for x in inputs
    )


def outputs(answer: Any) -> tuple[Tensor, ...]:
    return answer if isinstance(answer, tuple) else (answer,)


def gradients(inputs: Inputs, answer: Any, dout: Tensor) -> list[Tensor]:
    """The gradients of q, k and v, however packed; not of slopes, which have none."""
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad and x.dim() > 1]
    return list(torch.autograd.grad(outputs(answer)[0], wanted, dout))
