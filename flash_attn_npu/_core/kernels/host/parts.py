"""Some heads, and some rows, at a time: what is copied, biased and added up for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...problems.results import accumulator
from ..bands import Band
from .copies import Copies
from .steps import SMALLEST_BLOCK, Step

__all__ = [
    "COPIED_BYTES",
    "TOGETHER_BYTES",
    "Biases",
    "Part",
    "Rows",
    "Rule",
    "Sums",
    "Triple",
    "dense",
    "parts",
    "shares",
]

COPIED_BYTES = 1 << 22
"""Of the float32 copy of one tensor: what one head takes beyond it is copied by pieces of rows."""

TOGETHER_BYTES = 1 << 20
"""Of the float32 copy of one tensor for several sequences together: it stays in a cache."""

PIECE_BYTES = 1 << 20
"""Of the float32 copy of such a piece, unless SMALLEST_PIECE rows take more."""

SMALLEST_PIECE, LARGEST_PIECE = 1 << 11, 1 << 12
"""Rows of a piece: to merge what fewer keys answer costs more than 2% of computing it."""

BIAS_BYTES = 1 << 23
"""Of the bias of one launch, unless one head takes more."""

Triple = tuple[Tensor, Tensor, Tensor]


class Rule(NamedTuple):
    """What is asked.

    slopes: of ALiBi, (batch or 1, nheads), or None.
    told: softmax_lse is not for the backward only.
    """

    band: Band
    scale: float
    slopes: Tensor | None = None
    told: bool = False


def dense(x: Tensor) -> Tensor:
    """The kernel reads whole rows: it assumes that the last dimension lies together, and that rows
    and heads, which may be rows to it, do not reach into each other."""
    (_, rows, heads, width), (_, row, head, step) = x.shape, x.stride()
    together = step == 1 or width == 1
    apart_rows = row == 0 or row >= width or rows == 1
    apart_heads = head == 0 or head >= width or heads == 1
    return x if together and apart_rows and apart_heads else x.contiguous()


class Part(NamedTuple):
    """Some of the sequences, and some of the heads.

    size: rows that are copied at a time, 0 for all.
    """

    batch: slice
    heads: slice
    heads_k: slice
    size: int = 0

    def q(self, x: Tensor) -> Tensor:
        return x[self.batch, self.heads]

    def k(self, x: Tensor) -> Tensor:
        return x[self.batch, self.heads_k]

    def of(self, inputs: Triple, answer: tuple[Tensor, ...], copies: Copies) -> list[Tensor]:
        """Of q, k and v, and of what is laid out as q: copies, or as they are if dense."""
        found = [*self.grads(inputs), *map(self.q, answer)]
        return copies.of(found) if inputs[0].dtype != copies.dtype else [dense(x) for x in found]

    def grads(self, three: Triple) -> Triple:
        return self.q(three[0]), self.k(three[1]), self.k(three[2])


def parts(q: Tensor, k: Tensor, rule: Rule, dtype: torch.dtype) -> Iterator[Part]:
    """The whole in one, but where copies or biases would take much memory."""
    batch, heads_k, seqlen_k, headdim = k.shape
    group = q.shape[1] // heads_k
    room, size = batch * heads_k, 0
    if q.dtype != dtype:
        of_one = dtype.itemsize * max(group * q.shape[2], seqlen_k) * headdim
        # the backward shares out nothing but heads among threads
        threads, together = torch.get_num_threads(), TOGETHER_BYTES // max(of_one, 1)
        few = max(threads, COPIED_BYTES // max(of_one, 1))
        room = min(room, few, max(threads, heads_k, together))
    if rule.slopes is not None:
        numbers = group * min(SMALLEST_BLOCK, q.shape[2]) * seqlen_k
        room = max(1, min(room, BIAS_BYTES // (dtype.itemsize * max(numbers, 1))))
    if q.dtype != dtype and of_one >= COPIED_BYTES:
        few = PIECE_BYTES // (dtype.itemsize * room * group * headdim)
        size = max(SMALLEST_PIECE, min(LARGEST_PIECE, few))
    yield from shares(batch, heads_k, group, room, size)


def shares(batch: int, heads_k: int, group: int, room: int, size: int = 0) -> Iterator[Part]:
    """So many sequences times heads of k at a time, at most."""
    some, few = max(1, room // heads_k), max(1, min(room, heads_k))
    for first in range(0, batch, some):
        for head in range(0, heads_k, few):
            last = min(head + few, heads_k)
            yield Part(
                slice(first, min(first + some, batch)),
                slice(head * group, last * group),
                slice(head, last),
                size,
            )


class Rows:
    """A tensor in another dtype, of which no more is copied at once than is asked for together.

    Steps ask for ranges that slide: a copy reaches `size` rows ahead.
    """

    def __init__(self, x: Tensor, dtype: torch.dtype, size: int) -> None:
        self._x, self._dtype, self._size = x, dtype, size
        self._first = self._last = 0
        self._copy: Tensor | None = None

    def __getitem__(self, rows: tuple[int, int]) -> Tensor:
        first, last = rows
        if self._copy is None or first < self._first or last > self._last:
            # not two of them at once
            self._copy = None
            self._first, self._last = first, max(last, min(first + self._size, self._x.shape[2]))
            self._copy = dense(self._x[:, :, first : self._last].to(self._dtype))
        return self._copy[:, :, first - self._first : last - self._first]


class Biases:
    """The biases of the steps of a part; steps of one shape share theirs."""

    def __init__(self, rule: Rule, part: Part, like: Tensor) -> None:
        self._band = rule.band
        self._slopes, self.streams = None, 0
        # the kernel adds a bias in float32 to whatever is narrower
        dtype = accumulator(like.dtype)
        self._like = like.new_empty(0, dtype=dtype)
        if rule.slopes is not None:
            batch = part.batch if rule.slopes.shape[0] > 1 else slice(None)
            self._slopes = rule.slopes[batch, part.heads, None, None].to(dtype)
            self.streams = self._slopes.numel()
        self._last: tuple[tuple[int, ...], Tensor | None] = ((), None)

    def of(self, step: Step) -> Tensor | None:
        if not step.biased:
            return None
        (first, last), (low, high) = step.rows, step.keys
        shape = (last - first, high - low, low - first)
        if self._last[0] != shape:
            bias = self._band.bias(step.rows, step.keys, self._slopes, self._like)
            self._last = (shape, bias)
        return self._last[1]


class Sums:
    """Where the gradients of steps add up: in the caller's tensors, if there is one step only."""

    def __init__(self, grads: Triple, band: Band, steps: list[Step], dtype: torch.dtype) -> None:
        self._grads = grads
        self._alone = len(steps) == 1
        seqlens = (band.seqlen_q, band.seqlen_k, band.seqlen_k)
        if not self._alone:
            self._sums = tuple(torch.zeros_like(x, dtype=dtype) for x in grads)
            return
        ranges = (steps[0].rows, steps[0].keys, steps[0].keys)
        for grad, seqlen, (first, last) in zip(grads, seqlens, ranges, strict=True):
            if first:
                grad[:, :, :first] = 0
            if last < seqlen:
                grad[:, :, last:] = 0

    def add(self, step: Step, found: Triple) -> None:
        ranges = (step.rows, step.keys, step.keys)
        targets = self._grads if self._alone else self._sums
        for target, (first, last), more in zip(targets, ranges, found, strict=True):
            place = target[:, :, first:last]
            if self._alone:
                place.copy_(more)
            else:
                place.add_(more)

    def write(self) -> None:
        if not self._alone:
            for grad, total in zip(self._grads, self._sums, strict=True):
                grad.copy_(total)
