"""Keys and values into a cache, and out of it: by one launch where an operator takes them.

That they are moved by several is no loss that anybody is told of: the report counts the attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..problems.cache import Cache, Span
from ..problems.transfer import MANY_TOKENS, Append, Gather
from ..table.choice import plan

__all__ = ["append", "gather"]

_INT32 = 1 << 31


def append(function: str, cache: Cache, spans: Sequence[Span], new: tuple[Tensor, Tensor]) -> None:
    """Write packed keys and values, apart from the caches, where the spans lie.

    Called without gradients.
    """
    k, v = new
    problem = Append(
        function,
        cache.k.device,
        cache.k.dtype,
        empty=not k.numel(),
        token_bytes=_token_bytes(cache),
        contiguous=cache.k.is_contiguous() and cache.v.is_contiguous(),
        huge=_huge(cache),
        strided=not (k.is_contiguous() or v.is_contiguous()),
        many=k.shape[0] >= MANY_TOKENS,
    )
    # what was made in inference mode can be written there alone
    made_there = cache.k.is_inference() or cache.v.is_inference()
    if made_there and not torch.is_inference_mode_enabled():
        with torch.inference_mode():
            plan(problem).kernel.forward(problem, cache, spans, k, v)
    else:
        plan(problem).kernel.forward(problem, cache, spans, k, v)


def gather(function: str, cache: Cache, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
    """Packed copies (total_k, nheads_k, headdim) of the keys and values of every span."""
    total = sum(span.end - span.start for span in spans)
    problem = Gather(
        function,
        cache.k.device,
        cache.k.dtype,
        empty=not total or not cache.k.numel(),
        token_bytes=_token_bytes(cache),
        contiguous=cache.k.is_contiguous() and cache.v.is_contiguous(),
        huge=_huge(cache) or total * _token(cache) >= _INT32,
        padded=any(span.start for span in spans),
        needs_grad=torch.is_grad_enabled() and (cache.k.requires_grad or cache.v.requires_grad),
    )
    gathered: tuple[Tensor, Tensor] = plan(problem).kernel.forward(problem, cache, spans)
    return gathered


def _token(cache: Cache) -> int:
    """Numbers of a position."""
    return cache.k.shape[2] * cache.k.shape[3]


def _token_bytes(cache: Cache) -> int:
    return _token(cache) * cache.k.element_size()


def _huge(cache: Cache) -> bool:
    return cache.k.numel() >= _INT32
