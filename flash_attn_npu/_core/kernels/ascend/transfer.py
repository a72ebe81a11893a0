"""torch_npu's operators that write tokens into the pages of a cache, and gather them again.

Contract: the operator documentation of torch_npu and CANN (aclnnScatterPaKvCache,
aclnnGatherPaKvCache). A row of an unpaged cache is a page as long as itself. Called outside of
autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...ground.memory import Memo
from ...problems.cache import Cache, Span
from ...problems.places import Layout, slots
from ..kernel import Kernel
from .infer_attention import page_table

__all__ = ["APPEND", "GATHER"]

_lengths: Memo[tuple[tuple[int, ...], torch.device], Tensor] = Memo(
    "lengths of keys that are gathered", 16, nbytes=1 << 20, contents=True
)

_tables: Memo[tuple[Layout, tuple[int, ...], torch.device], Tensor] = Memo(
    "block tables without foreign ids", 16, nbytes=1 << 24, contents=True
)


def _append(problem: Any, cache: Cache, spans: Sequence[Span], k: Tensor, v: Tensor) -> None:
    """Write packed keys and values where the spans lie."""
    import torch_npu

    # another cache_mode, its default among them, is for caches of another format
    torch_npu.npu_scatter_pa_kv_cache(
        k.contiguous(),
        v.contiguous(),
        cache.k,
        cache.v,
        slots(cache.layout, spans, cache.k.device),
        cache_mode="Norm",
    )
    # torch_npu does not tell autograd that it has written
    for cached in (cache.k, cache.v):
        if not cached.is_inference():
            torch.autograd.graph.increment_version(cached)


def _gather(problem: Any, cache: Cache, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
    """Packed copies of the keys and values of every span, each of which starts at 0."""
    import torch_npu

    device, seqlens = cache.k.device, tuple(span.end for span in spans)
    k, v = (x.new_empty(sum(seqlens), *x.shape[2:]) for x in (cache.k, cache.v))
    table = page_table(cache, cache.page) if _own_ids(cache) else _used(cache, seqlens)
    torch_npu.npu_gather_pa_kv_cache(cache.k, cache.v, table, _on(seqlens, device), k, v)
    return k, v


def _own_ids(cache: Cache) -> bool:
    """Whether the table holds ids of blocks only, as the operator wants it."""
    ids, blocks = cache.ids, cache.k.shape[0]
    return cache.rows is not None or (min(ids) >= 0 and max(ids) < blocks)


def _used(cache: Cache, seqlens: tuple[int, ...]) -> Tensor:
    """The table with 0 where no sequence reaches, whatever is there."""
    layout = cache.layout
    pages = tuple(-(-seqlen // cache.page) for seqlen in seqlens)
    key = layout, pages, cache.k.device
    table = _tables.recall(key)
    if table is None:
        # it outlives this call
        with torch.inference_mode(False):
            ids = torch.tensor(layout.ids, dtype=torch.int32, device="cpu").view(-1, layout.width)
            counts = torch.tensor(pages, device="cpu")[:, None]
            used = torch.arange(layout.width, device="cpu") < counts
            table = ids.masked_fill(~used, 0).to(cache.k.device)
        _tables.put(key, table)
    return table


def _on(seqlens: tuple[int, ...], device: torch.device) -> Tensor:
    lengths = _lengths.recall((seqlens, device))
    if lengths is None:
        # it outlives this call
        with torch.inference_mode(False):
            lengths = torch.tensor(seqlens, dtype=torch.int32, device="cpu").to(device)
        _lengths.put((seqlens, device), lengths)
    return lengths


APPEND, GATHER = Kernel(_append), Kernel(_gather)
