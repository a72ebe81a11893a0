"""Which memory tensors have: for functions that write into what they were given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import NoReturn

import torch
from torch import Tensor

from ...errors import ArgumentError

__all__ = ["blocks", "overlaps_itself", "require_writable"]


def blocks(shape: Sequence[int], inner: int, limit: int) -> Iterable[tuple[slice, ...]]:
    """Blocks of a tensor of (*shape, inner) elements that hold about `limit` each.

    Together they are all of it. For a compiler, which plans by itself, there is one.
    """
    if torch.compiler.is_compiling():
        return [tuple(slice(0, size) for size in shape)]
    sides: list[list[slice]] = []
    for size in reversed(shape):
        step = max(1, limit // max(1, inner))
        sides.append([slice(at, min(at + step, size)) for at in range(0, size, step)])
        inner *= size
    return product(*reversed(sides))


def require_writable(**tensors: Tensor) -> None:
    """Raise ArgumentError for the first tensor whose elements cannot each be written."""
    if torch.compiler.is_compiling():
        return
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_nested:
            _refuse(name, f"a tensor of layout {tensor.layout}", "a dense one", ".to_dense()")
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            allowed = "in torch.inference_mode, where it was made, or a tensor made outside of it"
            _refuse(name, "an inference tensor", allowed, ".clone()")
        if overlaps_itself(tensor):
            came = f"shape {tuple(tensor.shape)} with strides {tensor.stride()}"
            _refuse(name, came, "a tensor with memory for each element", ".clone()")


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements share memory, as in an expanded tensor."""
    if tensor.is_contiguous():
        return False
    sides = sorted(
        (stride, size)
        for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
        if size > 1
    )
    if tensor.numel() == 0:
        return False
    reach = 0
    for stride, size in sides:
        if stride <= reach:
            break
        reach += stride * (size - 1)
    else:
        return False
    return sides[0][0] == 0 or _counted(sides) < tensor.numel()


def _counted(sides: list[tuple[int, int]]) -> int:
    """How many places in memory elements have: strides alone do not tell for interleaved ones."""
    places = torch.zeros(1, dtype=torch.int64, device="cpu")
    for stride, size in sides:
        steps = torch.arange(size, device="cpu") * stride
        places = (places[:, None] + steps).flatten()
    return int(places.unique().numel())


def _refuse(name: str, came: str, allowed: str, how: str) -> NoReturn:
    raise ArgumentError(name, came, allowed, f"pass {name}{how}")
