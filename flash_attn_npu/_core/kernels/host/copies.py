"""Copies in another dtype that are written again and again into one block of memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Copies"]


class Copies:
    """Of one part after another, each valid until the next.

    New pages cost a CPU a fifth of a kernel's time, and of one block, unlike of several or of
    growing ones, the C library keeps them from one call to the next (mallopt(3): M_MMAP_THRESHOLD
    is raised by a free, and M_TRIM_THRESHOLD to twice that).
    """

    def __init__(self, dtype: torch.dtype, most: int = 0) -> None:
        """most: numbers of the largest part, where it is not the first."""
        self.dtype, self._most = dtype, most
        self._block: Tensor | None = None

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors (batch, nheads, seqlen, headdim), laid out position by position."""
        sizes = [x.numel() for x in tensors]
        numbers = sum(sizes)
        if self._block is None or self._block.numel() < numbers:
            most = max(self._most, numbers)
            self._block = torch.empty(most, dtype=self.dtype, device="cpu")
        found = []
        for x, space in zip(tensors, self._block[:numbers].split(sizes), strict=True):
            batch, heads, seqlen, headdim = x.shape
            found.append(space.view(batch, seqlen, heads, headdim).transpose(1, 2).copy_(x))
        return found
