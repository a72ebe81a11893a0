"""Buffers that a call writes: none of them may share an element with what the call reads or writes.

Slices of one packed tensor lie between each other and share nothing, so memory is compared element
by element, as numbers: an element of a tensor lies at the sum of its index times its strides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import ArgumentError
from ..ground.memory import Memo
from .places import Layout, Span

__all__ = ["require_apart", "rows_share", "share", "sharing", "written_twice"]

Sides = tuple[int, tuple[int, ...], tuple[int, ...]]
"""Bytes of an element, strides, shape."""

_answers: Memo[tuple[Sides, Sides, int], bool] = Memo("whether buffers share memory", 256)

_dispatch_modes = torch._C._len_torch_dispatch_stack

STEPS = 4096
"""A search that takes longer is given up, and the tensors count as sharing memory."""


MEMORY_BITS = 48
"""Of addresses."""


class _Extent(NamedTuple):
    """The bytes from the first element of a tensor to the end of its last."""

    tensor: Tensor
    first: int
    end: int


def require_apart(written: Mapping[str, Tensor], read: Mapping[str, Tensor]) -> None:
    """Raise ArgumentError for the first of `written` that shares memory with any other tensor."""
    if torch.compiler.is_compiling() or _dispatch_modes():
        # such tensors have no memory
        return
    extents = {name: _extent(tensor) for name, tensor in {**read, **written}.items()}
    seen = list(read)
    for name in written:
        one = extents[name]
        for other in seen:
            two = extents[other]
            if one.first < two.end and two.first < one.end and _meet(one, two):
                raise ArgumentError(
                    name,
                    f"a tensor that shares memory with {other}",
                    f"memory of its own: {name} is written while {other} is in use",
                    f"pass {name}=torch.empty_like({name}), or a clone of {other}",
                )
        seen.append(name)


def share(one: Tensor, other: Tensor) -> bool:
    """Whether an element of both lies in the same memory.

    Tensors without memory share it with themselves only.
    """
    if torch.compiler.is_compiling() or _dispatch_modes() or one.is_meta or other.is_meta:
        return one is other
    first, second = _extent(one), _extent(other)
    return first.first < second.end and second.first < first.end and _meet(first, second)


def sharing(tensors: Sequence[Tensor], memory: Sequence[Tensor]) -> list[bool]:
    """Of each of `tensors` whether it shares with any of `memory`; each is looked at once."""
    memoryless = True in [x.is_meta for x in (*tensors, *memory)]
    if memoryless or torch.compiler.is_compiling() or _dispatch_modes():
        return [any(share(x, other) for other in memory) for x in tensors]
    seconds = [_extent(other) for other in memory]
    found = []
    for x in tensors:
        first, answer = _extent(x), False
        for second in seconds:
            if first.first < second.end and second.first < first.end:
                answer = answer or _meet(first, second)
        found.append(answer)
    return found


def rows_share(caches: tuple[Tensor, Tensor], where: tuple[Tensor, Tensor]) -> bool:
    """Whether the (page, offset) of two caches, on the host, lie over each other.

    Pages of one may lie between those of the other: transformers numbers them in one buffer, which
    both caches see whole, one a page behind the other.
    """
    starts, reach, base = [], 0, _address(caches[0])
    for cache in caches:
        nbytes = cache.element_size()
        row = where[0] * cache.stride(0) + where[1] * cache.stride(1)
        starts.append(_address(cache) - base + row * nbytes)
        sides = zip(cache.stride()[2:], cache.shape[2:], strict=True)
        reach = max(reach, nbytes * (1 + sum(stride * (size - 1) for stride, size in sides)))
    return bool((torch.cat(starts).sort().values.diff() < reach).any())


def _extent(tensor: Tensor) -> _Extent:
    if not tensor.numel():
        return _Extent(tensor, 0, 0)
    first = _address(tensor)
    if tensor.is_contiguous():
        return _Extent(tensor, first, first + tensor.nbytes)
    sides = zip(tensor.stride(), tensor.shape, strict=True)
    last = sum(stride * (size - 1) for stride, size in sides)
    return _Extent(tensor, first, first + (last + 1) * tensor.element_size())


def _address(tensor: Tensor) -> int:
    """Where the first element lies; in torch.func.functionalize each storage is a memory."""
    if not torch._is_functional_tensor(tensor):
        return tensor.data_ptr()
    start: int = tensor.untyped_storage()._cdata << MEMORY_BITS
    return start + int(tensor.storage_offset()) * tensor.element_size()


def _meet(one: _Extent, other: _Extent) -> bool:
    """Whether some byte belongs to an element of both, whose extents do."""
    if one.tensor.device != other.tensor.device:
        return False
    key = (_sides(one.tensor), _sides(other.tensor), other.first - one.first)
    known = _answers.recall(key)
    if known is None:
        known = _reaches(_terms(*key[:2]), key[2])
        _answers.put(key, known)
    return known


def _sides(tensor: Tensor) -> Sides:
    return tensor.element_size(), tensor.stride(), tuple(tensor.shape)


def _terms(one: Sides, other: Sides) -> list[tuple[int, int, int]]:
    """(stride in bytes, low, high): how many such steps may lie between elements of the two."""
    low: dict[int, int] = {}
    high: dict[int, int] = {}
    for (nbytes, strides, shape), into, sign in ((one, high, 1), (other, low, -1)):
        sides = zip(strides, shape, strict=True)
        for stride, size in ((1, nbytes), *((stride * nbytes, size) for stride, size in sides)):
            into[stride] = into.get(stride, 0) + sign * (size - 1)
    steps = sorted((low.keys() | high.keys()) - {0}, reverse=True)
    return [(stride, low.get(stride, 0), high.get(stride, 0)) for stride in steps]


def _reaches(terms: Sequence[tuple[int, int, int]], distance: int) -> bool:
    """Whether whole numbers n within (low, high) of each (stride, low, high) sum to distance."""
    # what the terms behind each can add at least and at most
    rests = [(0, 0)]
    for stride, low, high in reversed(terms[1:]):
        least, most = rests[-1]
        rests.append((least + stride * low, most + stride * high))
    rests.reverse()
    waiting = [(0, distance)]
    for _ in range(STEPS):
        if not waiting:
            return False
        index, left = waiting.pop()
        if index == len(terms):
            return True
        (stride, low, high), (least, most) = terms[index], rests[index]
        first = max(low, -((most - left) // stride))
        last = min(high, (left - least) // stride, first + STEPS)
        waiting += [(index + 1, left - stride * n) for n in range(first, last + 1)]
    return True


def written_twice(layout: Layout, spans: Sequence[Span]) -> tuple[int, int] | None:
    """The first two sequences whose spans write the same position of a page or row."""
    if len(set(layout.ids)) == len(layout.ids):
        return None
    taken: dict[int, list[tuple[int, int, int]]] = {}
    for sequence, (start, end) in enumerate(spans):
        pages = range(start // layout.page, -(-end // layout.page)) if start < end else ()
        for column in pages:
            before = column * layout.page
            first, last = max(start - before, 0), min(end - before, layout.page)
            others = taken.setdefault(layout.ids[sequence * layout.width + column], [])
            for other, low, high in others:
                if low < last and first < high:
                    return other, sequence
            others.append((sequence, first, last))
    return None
