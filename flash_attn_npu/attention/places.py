"""Where in a cache the positions of sequences lie: plain functions of host values, remembered.

All layers of a model ask with the same lengths and the same block table.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Layout", "Span", "forget_places", "positions", "wrong_block"]


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


def wrong_block(layout: Layout, spans: Sequence[Span]) -> tuple[int, int] | None:
    """(sequence, block id) of the first id that a span uses and the cache does not have."""
    return _wrong_block(layout, tuple(spans))


def positions(layout: Layout, spans: Sequence[Span], device: torch.device) -> tuple[Tensor, Tensor]:
    """(page or row, offset in it) of every position of every span, int64 on the device."""
    return _positions(layout, tuple(spans), device)


def forget_places() -> None:
    """Drop everything remembered here."""
    _wrong_block.cache_clear()
    _positions.cache_clear()


@lru_cache(maxsize=16)
def _wrong_block(layout: Layout, spans: tuple[Span, ...]) -> tuple[int, int] | None:
    sequence, _, page = _walk(layout, spans)
    wrong = ((page < 0) | (page >= layout.blocks)).nonzero().flatten()
    if not wrong.numel():
        return None
    return int(sequence[wrong[0]]), int(page[wrong[0]])


@lru_cache(maxsize=16)
def _positions(
    layout: Layout, spans: tuple[Span, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    # it outlives this call, and a backward cannot save a tensor made in inference mode
    with torch.inference_mode(False):
        _, position, page = _walk(layout, spans)
        return page.to(device), (position % max(layout.page, 1)).to(device)


def _walk(layout: Layout, spans: tuple[Span, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """(sequence, position, page or row) of every position of every span, on the host."""
    bounds = torch.tensor(spans, dtype=torch.int64, device="cpu").view(-1, 2)
    lengths = bounds[:, 1] - bounds[:, 0]
    sequence = torch.repeat_interleave(lengths)
    before = lengths.cumsum(0) - lengths
    count = torch.arange(sequence.numel(), device="cpu")
    position = count - before[sequence] + bounds[sequence, 0]
    ids = torch.tensor(layout.ids, dtype=torch.int64, device="cpu").view(-1, max(layout.width, 1))
    column = position // max(layout.page, 1) if layout.width > 1 else torch.zeros_like(position)
    return sequence, position, ids[sequence, column]
