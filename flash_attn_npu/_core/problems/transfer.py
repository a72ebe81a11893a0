"""Keys and values on their way into a cache, or out of it: what the table asks, and no tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["APPEND", "GATHER", "MANY_TOKENS", "Append", "Gather", "Transfer"]

APPEND = "npu_scatter_pa_kv_cache"
GATHER = "npu_gather_pa_kv_cache"

MANY_TOKENS = 1000
"""From so many new tokens on CANN writes another way."""


class Append(NamedTuple):
    """New keys and values are written where they belong in their caches.

    empty: there are none.
    token_bytes: the size of one position of k_cache, and of v_cache.
    contiguous: both caches are.
    huge: a cache has more numbers than int32 counts.
    strided: neither the new keys nor the new values are contiguous.
    many: there are `MANY_TOKENS` of them, or more.
    operator: what tells it from other tuples, by which plans are remembered.
    """

    function: str
    device: torch.device
    dtype: torch.dtype
    empty: bool
    token_bytes: int
    contiguous: bool
    huge: bool
    strided: bool
    many: bool
    operator: str = APPEND


class Gather(NamedTuple):
    """The keys and values of some sequences are copied out of their caches, packed.

    padded: those of some sequence do not start at its first position.
    needs_grad: the caches have a gradient.
    """

    function: str
    device: torch.device
    dtype: torch.dtype
    empty: bool
    token_bytes: int
    contiguous: bool
    huge: bool
    padded: bool
    needs_grad: bool
    operator: str = GATHER


Transfer = Append | Gather
