"""Keys and values into a cache, and out of it, by torch's own indexing: one launch for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...problems.cache import Cache, Span
from ..kernel import Kernel

__all__ = ["APPEND", "GATHER"]


def _append(problem: Any, cache: Cache, spans: Sequence[Span], k: Tensor, v: Tensor) -> None:
    cache.write(spans, k, v)


def _gather(problem: Any, cache: Cache, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
    """Differentiable."""
    return cache.gather(spans)


APPEND, GATHER = Kernel(_append), Kernel(_gather)
