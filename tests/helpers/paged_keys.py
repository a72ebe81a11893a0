"""Packed keys and values cut into pages, for the tests of packed queries over a cache."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

GARBAGE = 1_000_000
"""Block ids behind the pages that a sequence needs: nobody may follow them."""


def block_table(lengths: Sequence[int], size: int) -> Tensor:
    """Pages in random order, one page of the cache belonging to nobody."""
    needed = [-(-length // size) for length in lengths]
    order = torch.randperm(sum(needed) + 1, generator=torch.Generator().manual_seed(size)).int()
    table = torch.full((len(lengths), max(1, *needed) + 1), GARBAGE, dtype=torch.int32)
    for row, pages in zip(table, order[: sum(needed)].split(needed), strict=True):
        row[: len(pages)] = pages
    return table


def to_pages(
    packed: Tensor, lengths: Sequence[int], table: Tensor, size: int, elsewhere: float
) -> Tensor:
    """Rows [total, heads, headdim], those of each sequence where its row of the table says."""
    blocks = int((table != GARBAGE).sum()) + 1
    pages = packed.new_full((blocks, size, *packed.shape[1:]), elsewhere)
    for index, rows in enumerate(packed[: sum(lengths)].split(list(lengths))):
        for position, row in enumerate(rows):
            pages[table[index, position // size], position % size] = row
    return pages


def hide(packed: Tensor, cumulative: Sequence[int], spans: Sequence[tuple[int, int]]) -> Tensor:
    """The rows, with NaN in place of those outside the span of their sequence."""
    hidden = torch.full_like(packed, torch.nan)
    for (start, _), (first, end) in zip(pairwise(cumulative), spans, strict=True):
        hidden[start + first : start + end] = packed[start + first : start + end]
    return hidden


def only(packed: Tensor, cumulative: Sequence[int], spans: Sequence[tuple[int, int]]) -> Tensor:
    """The rows inside the spans, packed again."""
    parts = [
        packed[start + first : start + end]
        for (start, _), (first, end) in zip(pairwise(cumulative), spans, strict=True)
    ]
    return torch.cat(parts) if parts else packed[:0]
