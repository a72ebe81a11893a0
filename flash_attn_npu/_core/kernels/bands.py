"""Which keys the queries of a sequence see: flash-attn's window, aligned at the bottom right."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Band", "spans"]


class Band(NamedTuple):
    """Which keys a query sees: offset - left <= j - i <= offset + right, None for no limit."""

    seqlen_q: int
    seqlen_k: int
    left: int | None
    right: int | None

    @property
    def offset(self) -> int:
        return self.seqlen_k - self.seqlen_q

    @property
    def blind(self) -> int:
        """How many queries see no key: always the first ones."""
        if self.seqlen_k == 0:
            return self.seqlen_q
        return 0 if self.right is None else min(self.seqlen_q, max(0, -self.offset - self.right))

    def keys(self, first: int, last: int) -> tuple[int, int]:
        """The range of keys that queries first..last-1 see between them."""
        low = 0 if self.left is None else max(0, first + self.offset - self.left)
        high = self.seqlen_k
        if self.right is not None:
            high = min(high, last + self.offset + self.right)
        return low, high

    def hides(self, rows: tuple[int, int], cols: tuple[int, int]) -> tuple[bool, bool]:
        """Whether the bound on the left, and that on the right, hides a pair of the tile."""
        low, high = rows[0] + self.offset, rows[1] - 1 + self.offset
        return (
            self.left is not None and cols[0] < high - self.left,
            self.right is not None and cols[1] - 1 > low + self.right,
        )

    def clear(
        self, pairs: Tensor, rows: tuple[int, int], cols: tuple[int, int]
    ) -> tuple[Tensor, bool]:
        """Numbers (..., rows, cols) of a tile, 0 where hidden, in place; and whether any is.

        What stood there, NaN or infinity perhaps, is not read.
        """
        left, right = self.hides(rows, cols)
        diagonal = rows[0] + self.offset - cols[0]
        if right and self.right is not None:
            pairs.tril_(diagonal + self.right)
        if left and self.left is not None:
            pairs.triu_(diagonal - self.left)
        return pairs, left or right

    def hidden(self, rows: tuple[int, int], cols: tuple[int, int], like: Tensor) -> Tensor | None:
        """True where a query of the tile does not see a key; None if it sees them all."""
        left, right = self.hides(rows, cols)
        found = []
        if left or right:
            distance = self.distance(rows, cols, like)
        if left and self.left is not None:
            found.append(distance < -self.left)
        if right and self.right is not None:
            found.append(distance > self.right)
        return torch.logical_or(*found) if len(found) > 1 else next(iter(found), None)

    def distance(self, rows: tuple[int, int], cols: tuple[int, int], like: Tensor) -> Tensor:
        """j - (i + offset) for every pair of the tile."""
        i = torch.arange(*rows, device=like.device) + self.offset
        j = torch.arange(*cols, device=like.device)
        return j[None, :] - i[:, None]

    def alibi(self, rows: tuple[int, int], cols: tuple[int, int], slopes: Tensor) -> Tensor:
        """What ALiBi adds to the scores of a tile, for slopes (..., 1, 1) and of their dtype."""
        return self.distance(rows, cols, slopes).abs_().to(slopes.dtype) * -slopes

    def bias(
        self, rows: tuple[int, int], cols: tuple[int, int], slopes: Tensor | None, like: Tensor
    ) -> Tensor | None:
        """What is added to the scores of a tile, of the dtype of `like`; None if it is nothing.

        Args:
            slopes: of ALiBi, (batch or 1, nheads, 1, 1), of the dtype of `like`, or None.
        """
        hidden = self.hidden(rows, cols, like)
        if slopes is not None:
            biased = self.alibi(rows, cols, slopes)
            return biased if hidden is None else biased.masked_fill_(hidden, -math.inf)
        if hidden is None:
            return None
        shape = (rows[1] - rows[0], cols[1] - cols[0])
        return like.new_zeros(shape).masked_fill_(hidden, -math.inf)


def spans(first: int, last: int, size: int) -> Iterator[tuple[int, int]]:
    """first..last cut into ranges of `size`, the last one shorter."""
    for start in range(first, last, size):
        yield start, min(start + size, last)
