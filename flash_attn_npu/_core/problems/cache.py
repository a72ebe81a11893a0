"""A key-value cache as flash-attention lays it out, and where in it each sequence lies.

A cache is (batch_cache, seqlen_cache, nheads_k, headdim), or, with a block table, pages of
(num_blocks, page_block_size, nheads_k, headdim). Lengths and block ids are read on the host, once
per tensor and version, and checked before anything is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TypeGuard

import torch
from torch import Tensor

from ...errors import ArgumentError, ArgumentTypeError
from ..ground.arguments import require_plain, require_values
from ..ground.functions import listed
from ..ground.memory import PerTensorMemo
from ..ground.storage import overlaps_itself
from .ask import Pages
from .buffers import rows_share, share, written_twice
from .places import Layout, Span, positions, wrong_block

__all__ = [
    "MAX_PAGE",
    "PAGE_UNIT",
    "Cache",
    "Span",
    "cache_lengths",
    "check_layout",
    "host_values",
    "pages_of",
]

MAX_PAGE = 512
PAGE_UNIT = 16
"""Positions of the pages that a kernel can read: a multiple of the one, up to the other."""

_memo: PerTensorMemo[tuple[int, ...]] = PerTensorMemo("lengths and block tables of a cache", 64)


class Cache:
    """A validated cache.

    Attributes:
        k, v: the caller's tensors; `names` are what the caller calls them and their lengths.
        capacity: positions that each sequence may use.
        rows: for each sequence the row of the cache that holds it, None when paged.
        ids, width: block ids of all sequences in a row, and how many each has, when paged.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        batch: int,
        block_table: Tensor | None,
        batch_idx: Tensor | None,
        names: tuple[str, str, str] = ("k_cache", "v_cache", "cache_seqlens"),
    ) -> None:
        if block_table is not None:
            require_plain(block_table=block_table)
        if batch_idx is not None:
            require_plain(cache_batch_idx=batch_idx)
        check_layout(k, v, batch, block_table, names[:2])
        self.k, self.v = k, v
        self._names, self._lengths = names[:2], names[2]
        self.block_table = block_table
        self.ids: tuple[int, ...] = ()
        self.width = 1
        self.rows: tuple[int, ...] | None = None
        if block_table is None:
            self.capacity = k.shape[1]
            self.rows = _rows(batch, k.shape[0], batch_idx)
            return
        if batch_idx is not None:
            raise ArgumentError(
                "cache_batch_idx",
                "a tensor beside block_table",
                "one of them",
                "name the pages of each sequence in block_table alone",
            )
        self.ids = host_values("block_table", block_table)
        self.width = block_table.shape[1]
        self.capacity = block_table.shape[1] * k.shape[1]

    @property
    def page(self) -> int:
        """Positions of a page; of a whole row when not paged."""
        return self.k.shape[1]

    @property
    def layout(self) -> Layout:
        ids, width = (self.ids, self.width) if self.rows is None else (self.rows, 1)
        return Layout(self.page, self.k.shape[0], ids, width)

    def block(self, spans: Sequence[Span]) -> tuple[slice, slice] | None:
        """Rows and positions where the spans are a block of an unpaged cache; None if not."""
        rows = self.rows
        if not rows:
            return None
        first, last = rows[0], rows[0] + len(rows)
        if rows != tuple(range(first, last)) or spans.count(spans[0]) != len(spans):
            return None
        return slice(first, last), slice(*spans[0])

    def check(self, spans: Sequence[Span]) -> None:
        """Refuse spans that leave the cache, and the block ids that they would use."""
        for index, span in enumerate(spans):
            if span.end > self.capacity:
                raise ArgumentError(
                    self._lengths,
                    f"{span.end} positions for sequence {index}, new keys included",
                    f"at most {self.capacity}, which the cache holds",
                    "pass a longer cache or more pages",
                )
        if self.rows is not None:
            return
        wrong = wrong_block(self.layout, spans)
        if wrong is not None:
            raise ArgumentError(
                "block_table",
                f"block id {wrong[1]} for sequence {wrong[0]}",
                f"ids from 0 to {self.k.shape[0] - 1}, the blocks of the cache",
                f"fill the entries of every page that {self._lengths} reaches",
            )

    def gather(self, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
        """Packed copies (total_k, nheads_k, headdim) of the keys and values of every span."""
        where = positions(self.layout, spans, self.k.device)
        return self.k[where], self.v[where]

    def check_written(self, spans: Sequence[Span]) -> None:
        """Refuse to write `spans` where some of it would be lost."""
        for name, tensor in zip(self._names, (self.k, self.v), strict=True):
            if overlaps_itself(tensor):
                came = f"shape {tuple(tensor.shape)} with strides {tensor.stride()}"
                allowed = "a cache with memory for each element"
                raise ArgumentError(name, came, allowed, f"pass {name}.clone()")
        twice = written_twice(self.layout, spans)
        if twice is not None:
            raise ArgumentError(
                "block_table" if self.rows is None else "cache_batch_idx",
                f"the same positions for sequences {twice[0]} and {twice[1]}",
                "a place of its own for the new keys of each sequence",
                "give each sequence a row, or the pages that it fills, of its own",
            )
        if share(self.k, self.v):
            where = positions(self.layout, spans, torch.device("cpu"))
            if rows_share((self.k, self.v), where):
                name, other = self._names[1], self._names[0]
                came = f"a tensor that shares memory with {other}"
                allowed = "memory of its own for the new values"
                raise ArgumentError(name, came, allowed, f"pass {name}.clone()")

    def write(self, spans: Sequence[Span], k: Tensor, v: Tensor) -> None:
        """Write packed keys and values where the spans lie, and nowhere else."""
        block = self.block(spans)
        if block is not None:
            sides = tuple(side.stop - side.start for side in block)
            for cache, values in ((self.k, k), (self.v, v)):
                cache[block].copy_(values.view(*sides, *values.shape[1:]))
            return
        where = positions(self.layout, spans, self.k.device)
        for cache, values in ((self.k, k), (self.v, v)):
            cache.index_put_(where, values)


def pages_of(cache: Cache, spans: Sequence[Span]) -> Pages:
    """How a kernel that reads pages sees the keys of `spans`.

    A row of an unpaged cache counts as the largest pages that fill it.
    """
    rows, whole = cache.rows, cache.page
    size = _legal_page(whole, cut=rows is not None)
    padded, used = False, 0
    for start, end in spans:
        padded = padded or start > 0
        used += -(-end // size) if size else 0
    return Pages(
        size,
        cache.k.is_contiguous() and cache.v.is_contiguous(),
        padded,
        size is not None and used > cache.k.shape[0] * whole // size,
        rows is not None and rows == tuple(range(len(spans))),
    )


def _legal_page(whole: int, *, cut: bool) -> int | None:
    """The largest page that a kernel can read: a page as it is, or what a row can be cut into."""
    if not whole or whole % PAGE_UNIT:
        return None
    if whole <= MAX_PAGE:
        return whole
    legal = range(MAX_PAGE, 0, -PAGE_UNIT)
    return next(size for size in legal if whole % size == 0) if cut else None


def host_values(argument: str, tensor: Tensor) -> tuple[int, ...]:
    """The entries of an int32 tensor, flattened; one copy for each tensor and version."""
    if _readable(tensor):
        return _memo.get(tensor, _values)
    require_values(**{argument: tensor})
    if tensor.dtype != torch.int32:
        raise ArgumentError(
            argument,
            f"a {tensor.dtype} tensor",
            "a torch.int32 tensor",
            f"pass {argument}.to(torch.int32)",
        )
    return _memo.get(tensor, _values)


def _readable(tensor: Tensor) -> bool:
    """Whether a look tells that there is nothing to refuse."""
    return (
        type(tensor) is Tensor
        and tensor.dtype is torch.int32
        and tensor.layout is torch.strided
        and not (tensor.is_meta or tensor.is_nested)
    )


def _values(tensor: Tensor) -> tuple[int, ...]:
    return tuple(listed(tensor if tensor.dim() == 1 else tensor.flatten()))


def _rows(batch: int, batch_cache: int, batch_idx: Tensor | None) -> tuple[int, ...]:
    rows = tuple(range(batch)) if batch_idx is None else host_values("cache_batch_idx", batch_idx)
    outside = rows and not 0 <= min(rows) <= max(rows) < batch_cache
    if len(rows) != batch or outside:
        raise ArgumentError(
            "k_cache" if batch_idx is None else "cache_batch_idx",
            f"{batch_cache} rows" if batch_idx is None else str(rows),
            f"a row of the cache, 0 to {batch_cache - 1}, for each of {batch} sequences",
            "pass cache_batch_idx with one row for each sequence",
        )
    return rows


def check_layout(
    k: Tensor,
    v: Tensor,
    batch: int,
    block_table: Tensor | None,
    names: Sequence[str] = ("k", "v"),
) -> None:
    """Refuse what is no cache, or no table of its pages, by what is known without reading."""
    if block_table is not None:
        _check_table(block_table, batch)
    pages = "(num_blocks, page_block_size, nheads_k, headdim)"
    layouts = f"(batch_cache, seqlen_cache, nheads_k, headdim), or with a block_table {pages}"
    alike = k.shape == v.shape and k.dtype == v.dtype and k.device == v.device
    if k.dim() != 4 or not alike:
        came = [f"a {x.dtype} tensor of shape {tuple(x.shape)} on {x.device}" for x in (k, v)]
        raise ArgumentError(
            f"{names[0]}, {names[1]}",
            f"{came[0]} each" if alike else " and ".join(came),
            f"two tensors alike, {layouts if block_table is None else pages}",
            "give both four dimensions, and lay them out in the same way"
            + (", or pass no block_table" if block_table is not None and alike else ""),
        )
    if block_table is not None:
        _check_pages(block_table, k, names[0])


def _check_table(table: Tensor, batch: int) -> None:
    if table.dim() != 2 or table.shape[0] != batch or table.dtype != torch.int32:
        raise ArgumentError(
            "block_table",
            f"a {table.dtype} tensor of shape {tuple(table.shape)}",
            f"a torch.int32 tensor of shape ({batch}, max_blocks)",
            "pass one row of block ids for each sequence, or None where k and v are no pages",
        )


def _check_pages(table: Tensor, k: Tensor, name: str) -> None:
    if k.shape[1] == 0:
        raise ArgumentError(name, "pages of 0 positions", "pages of at least 1", "pass real pages")
    if table.device not in (k.device, torch.device("cpu")):
        device = k.device
        raise ArgumentError(
            "block_table", table.device, f"{device}, as the cache", "move it to the cache's device"
        )


def cache_lengths(
    argument: str, value: int | Tensor | Sequence[int] | None, batch: int, default: int
) -> tuple[int, ...]:
    """One length for each sequence, from an int, a list, an int32 tensor (batch,) or None."""
    if value is None:
        return (default,) * batch
    if isinstance(value, Tensor):
        lengths = host_values(argument, value)
        lengths = lengths * batch if value.dim() == 0 else lengths
    elif _whole(value):
        lengths = (int(value),) * batch
    elif isinstance(value, (list, tuple)) and all(_whole(length) for length in value):
        lengths = tuple(int(length) for length in value)
    else:
        raise ArgumentTypeError(
            argument,
            type(value).__name__,
            "an int, a list of ints, or an int32 tensor of shape (batch,)",
            f"pass {argument} as one of them",
        )
    if len(lengths) != batch or min(lengths, default=0) < 0:
        raise ArgumentError(
            argument,
            str(lengths),
            f"{batch} lengths of at least 0",
            "pass an int, or an int32 tensor with one length for each sequence",
        )
    return lengths


def _whole(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)
