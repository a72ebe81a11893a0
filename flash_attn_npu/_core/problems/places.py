"""Where in a cache the positions of sequences lie: plain functions of host values, remembered.

All layers of a model ask with the same lengths and the same block table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ground.memory import Memo

__all__ = ["Layout", "Span", "positions", "slots", "wrong_block"]


class Span(NamedTuple):
    """The keys of one sequence: positions start..end-1 of its row or of its pages."""

    start: int
    end: int


class Layout(NamedTuple):
    """How a cache is divided.

    page: positions of a page, or of a row when not paged.
    blocks: pages, or rows, that the cache has.
    ids: block ids of all sequences one after the other when paged, else the row of each.
    width: block ids of one sequence; 1 when not paged.
    """

    page: int
    blocks: int
    ids: tuple[int, ...]
    width: int


_where: Memo[tuple[Layout, tuple[Span, ...], torch.device], tuple[Tensor, Tensor]] = Memo(
    "positions in caches", 16, nbytes=1 << 26, contents=True
)

_slots: Memo[tuple[Layout, tuple[Span, ...], torch.device], Tensor] = Memo(
    "slots of new keys in caches", 16, nbytes=1 << 24, contents=True
)


def wrong_block(layout: Layout, spans: Sequence[Span]) -> tuple[int, int] | None:
    """(sequence, block id) of the first id that a span uses and the cache does not have."""
    if not layout.ids or (min(layout.ids) >= 0 and max(layout.ids) < layout.blocks):
        return None
    bounds = torch.tensor(spans, dtype=torch.int64, device="cpu").view(-1, 2, 1)
    start, end = bounds[:, 0], bounds[:, 1]
    ids = torch.tensor(layout.ids, dtype=torch.int64, device="cpu").view(-1, max(layout.width, 1))
    first = torch.arange(ids.shape[1], device="cpu") * layout.page
    used = (first + layout.page > start) & (first < end) & (start < end)
    wrong = (used & ((ids < 0) | (ids >= layout.blocks))).nonzero()
    if not wrong.numel():
        return None
    sequence, column = wrong[0].tolist()
    return sequence, int(ids[sequence, column])


def positions(layout: Layout, spans: Sequence[Span], device: torch.device) -> tuple[Tensor, Tensor]:
    """(page or row, offset in it) of every position of every span, int64 on the device."""
    key = layout, tuple(spans), device
    known = _where.recall(key)
    if known is None:
        # it outlives this call, and a backward cannot save a tensor made in inference mode
        with torch.inference_mode(False):
            position, page = _walk(layout, key[1])
            known = page.to(device), (position % max(layout.page, 1)).to(device)
            _where.put(key, known)
    return known


def slots(layout: Layout, spans: Sequence[Span], device: torch.device) -> Tensor:
    """`positions` as one number each, int32: the page or row times its size, plus the offset."""
    key = layout, tuple(spans), device
    known = _slots.recall(key)
    if known is None:
        # it outlives this call
        with torch.inference_mode(False):
            position, page = _walk(layout, key[1])
            flat = page * layout.page + position % max(layout.page, 1)
            known = flat.to(torch.int32).to(device)
            _slots.put(key, known)
    return known


def _walk(layout: Layout, spans: tuple[Span, ...]) -> tuple[Tensor, Tensor]:
    """(position, page or row) of every position of every span, on the host."""
    bounds = torch.tensor(spans, dtype=torch.int64, device="cpu").view(-1, 2)
    lengths = bounds[:, 1] - bounds[:, 0]
    sequence = torch.repeat_interleave(lengths)
    before = lengths.cumsum(0) - lengths
    count = torch.arange(sequence.numel(), device="cpu")
    position = count - before[sequence] + bounds[sequence, 0]
    ids = torch.tensor(layout.ids, dtype=torch.int64, device="cpu").view(-1, max(layout.width, 1))
    column = position // max(layout.page, 1) if layout.width > 1 else torch.zeros_like(position)
    return position, ids[sequence, column]
