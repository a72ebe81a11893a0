"""What a kernel gives back, in flash-attn's conventions."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Result"]


class Result(NamedTuple):
    """The result of one attention call.

    out: shape and dtype of q, contiguous; zeros where a query sees no key.
    softmax_lse: natural-log sum of exp(scores), scale and bias included, (batch, nheads,
        seqlen_q) or (nheads, total_q), float32 (float64 for float64 inputs); +inf where a query
        sees no key. None where the caller did not ask and the kernel has it only on request.
    rng_state: int64 (seed, offset) of the dropout mask.
    """

    out: Tensor
    softmax_lse: Tensor | None
    rng_state: Tensor | None
