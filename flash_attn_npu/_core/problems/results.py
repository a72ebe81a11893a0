"""What kernels take and give, in flash-attn's conventions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .cache import Cache
from .places import Span

__all__ = ["ROUNDING", "Forward", "Inputs", "Saved", "accumulator", "rounded_up"]

ROUNDING = 128
"""Upstream rounds the sides of S_dmask, and of the row sums, up to a multiple of this."""


class Inputs(NamedTuple):
    """The tensors of a forward.

    cache, spans: where the keys lie, for a kernel that reads pages; k and v are the cache then.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    alibi_slopes: Tensor | None = None
    sink: Tensor | None = None
    cache: Cache | None = None
    spans: Sequence[Span] = ()


class Forward(NamedTuple):
    """The result of one attention call, in the order of upstream's low-level functions.

    out: shape and dtype of q, contiguous; zeros where a query sees no key.
    softmax_lse: natural log of the sum of exp(scores), scale and bias included, (batch, nheads,
        seqlen_q) or (nheads, total_q), float32 (float64 for float64 inputs); +inf where a query
        sees no key. With a sink it counts the sink too. Empty where a kernel was not asked for it.
    s_dmask: (batch, nheads, seqlen_q, seqlen_k), both lengths rounded up to 128: the
        probabilities before dropout, negative where dropped. Empty unless asked for.
    rng_state: int64 (seed, offset) of the dropout mask, on the host.
    """

    out: Tensor
    softmax_lse: Tensor
    s_dmask: Tensor
    rng_state: Tensor


class Saved(NamedTuple):
    """What a backward recomputes the probabilities from."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    softmax_lse: Tensor
    alibi_slopes: Tensor | None = None
    rng_state: Tensor | None = None


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax_lse, and of every sum, for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rounded_up(length: int) -> int:
    """The least multiple of ROUNDING that holds `length`."""
    return (length + ROUNDING - 1) // ROUNDING * ROUNDING
