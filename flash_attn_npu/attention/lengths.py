"""Cumulative sequence lengths on the host.

Kernels take lengths as Python integers while clients keep `cu_seqlens` on the device, so each
such tensor is copied to the host once and remembered for as long as it is the same tensor with
the same contents. This file holds that memory and the checks of what it reads.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Generic, TypeVar, cast

import torch

from ..errors import ArgumentError, ArgumentTypeError, explain

__all__ = [
    "Lengths",
    "PerTensorMemo",
    "forget_lengths",
    "host_ends",
    "host_lengths",
    "interned",
    "not_lengths",
    "recall_lengths",
    "remember_lengths",
]

T = TypeVar("T")

MEMO_SIZE = 64
"""Tensors whose lengths are remembered, and distinct lists of lengths that are kept."""


class PerTensorMemo(Generic[T]):
    """Results computed from a tensor's contents, valid while those contents are.

    An entry answers only for the very same tensor object with the same version counter and the
    same memory, so neither an in-place change nor a reallocation can be served stale. Tensors
    made under `torch.inference_mode` have no version counter and are never remembered. A write
    through `tensor.data`, by a collective of torch.distributed or by a kernel that PyTorch does not
    know moves no counter either: `forget_lengths` is for those.

    Only single dictionary operations touch shared state, so threads and forks need no lock.
    """

    def __init__(self, maxsize: int) -> None:
        self.maxsize = maxsize
        self._entries: dict[int, tuple[weakref.ref[torch.Tensor], int, int, int, T]] = {}

    def recall(self, tensor: object) -> T | None:
        """What is remembered of `tensor`, None if nothing is."""
        entry = self._entries.get(id(tensor))
        if entry is not None:
            known, version, address, count, value = entry
            owner = known()
            if (
                owner is tensor
                and owner is not None
                and owner._version == version
                and owner.data_ptr() == address
                and owner.numel() == count
            ):
                return value
        return None

    def get(self, tensor: torch.Tensor, compute: Callable[[torch.Tensor], T]) -> T:
        """What `compute(tensor)` returns, or returned when it was last asked."""
        known = self.recall(tensor)
        if known is not None:
            return known
        if tensor.is_inference():
            return compute(tensor)
        # the counter is read first: a change during `compute` makes the entry stale, not wrong
        version = tensor._version
        value = compute(tensor)
        self._store(tensor, version, value)
        return value

    def put(self, tensor: torch.Tensor, value: T) -> None:
        """Remember `value` as what the present contents of `tensor` give."""
        if not tensor.is_inference():
            self._store(tensor, tensor._version, value)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)

    def _store(self, tensor: torch.Tensor, version: int, value: T) -> None:
        if len(self._entries) >= self.maxsize:
            for key, entry in list(self._entries.items()):
                if entry[0]() is None:
                    self._entries.pop(key, None)
            if len(self._entries) >= self.maxsize:
                self._entries.clear()
        try:
            address = tensor.data_ptr()
        except RuntimeError:
            # a tensor without memory of its own, inside a functorch transform
            return
        self._entries[id(tensor)] = (
            weakref.ref(tensor),
            version,
            address,
            tensor.numel(),
            value,
        )


class Lengths:
    """One validated list of cumulative lengths; compares and hashes by identity.

    Attributes:
        cumulative: batch + 1 integers, the first 0, never decreasing.
        ends: the same without the leading 0, the form that kernels take.
        seqlens: length of each sequence.
        total: last entry of `cumulative`.
        longest: the largest of `seqlens`, 0 when there are none.
    """

    __slots__ = ("cumulative", "ends", "longest", "seqlens", "total")

    def __init__(self, cumulative: tuple[int, ...]) -> None:
        self.cumulative = cumulative
        self.ends = list(cumulative[1:])
        self.seqlens = tuple(after - before for before, after in pairwise(cumulative))
        self.total = cumulative[-1]
        self.longest = max(self.seqlens, default=0)


_memo: PerTensorMemo[Lengths] = PerTensorMemo(MEMO_SIZE)
_ends_memo: PerTensorMemo[list[int]] = PerTensorMemo(MEMO_SIZE)
recall_lengths = _memo.recall
"""The lengths remembered of a tensor, None if there are none."""


def host_lengths(argument: str, cu_seqlens: torch.Tensor | Sequence[int] | None) -> Lengths:
    """The host copy of `cu_seqlens`, validated.

    Args:
        argument: name of the argument, for messages.
        cu_seqlens: (batch + 1,) int32 tensor on any device, or a list or tuple of integers.

    Raises:
        ArgumentError: wrong rank or dtype, does not start at 0, or decreases.
        ArgumentTypeError: neither a tensor nor a list or tuple of integers.
    """
    if isinstance(cu_seqlens, torch.Tensor):
        if cu_seqlens.device.type == "cpu":
            return _read(argument, cu_seqlens)
        return _memo.get(cu_seqlens, lambda tensor: _read(argument, tensor))
    if isinstance(cu_seqlens, (list, tuple)):
        if all(type(entry) is int for entry in cu_seqlens):
            return _lengths(tuple(cu_seqlens), argument)
        came = f"a {type(cu_seqlens).__name__} holding other things than int"
    else:
        came = type(cu_seqlens).__name__
    raise not_lengths(argument, came)


def host_ends(argument: str, cu_seqlens: torch.Tensor | Sequence[int]) -> list[int]:
    """The entries of `cu_seqlens` behind the first, as they are: a kernel judges them."""
    if isinstance(cu_seqlens, torch.Tensor):
        if cu_seqlens.device.type == "cpu":
            return _ends(cu_seqlens)
        return _ends_memo.get(cu_seqlens, _ends)
    if isinstance(cu_seqlens, (list, tuple)):
        return list(cu_seqlens[1:])
    raise not_lengths(argument, type(cu_seqlens).__name__)


def remember_lengths(cu_seqlens: torch.Tensor, values: tuple[int, ...]) -> None:
    """Say that `cu_seqlens` holds `values`, so that no copy has to find out.

    On the host there is nothing to save, and nothing is remembered.
    """
    if cu_seqlens.device.type == "cpu":
        return
    _memo.put(cu_seqlens, _lengths(values, "cu_seqlens"))


def interned(values: tuple[int, ...], argument: str) -> Lengths:
    """The `Lengths` of host values, the same object for the same values."""
    return _lengths(values, argument)


def forget_lengths() -> None:
    """Drop every host copy; the next calls copy again."""
    _memo.clear()
    _ends_memo.clear()
    _lengths.cache_clear()


def _ends(tensor: torch.Tensor) -> list[int]:
    return cast(list[int], tensor.tolist())[1:]


def not_lengths(argument: str, came: str) -> ArgumentTypeError:
    """The error for cumulative lengths of a wrong type."""
    return ArgumentTypeError(
        explain(
            argument,
            came,
            "an int32 tensor of shape (batch + 1,), or a list or tuple of integers",
            "pass cumulative lengths, e.g. torch.tensor([0, 5, 12], dtype=torch.int32)",
        )
    )


def _read(argument: str, tensor: torch.Tensor) -> Lengths:
    if tensor.dim() != 1 or tensor.dtype != torch.int32:
        raise ArgumentError(
            explain(
                argument,
                f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)}",
                "a torch.int32 tensor of shape (batch + 1,)",
                f"pass {argument}.flatten().to(torch.int32)",
            )
        )
    return _lengths(tuple(cast(list[int], tensor.tolist())), argument)


@lru_cache(maxsize=MEMO_SIZE)
def _lengths(cumulative: tuple[int, ...], argument: str) -> Lengths:
    if not cumulative or cumulative[0] != 0:
        complaint = "entries that start at 0"
    elif any(after < before for before, after in pairwise(cumulative)):
        complaint = "entries that never decrease"
    else:
        return Lengths(cumulative)
    raise ArgumentError(
        explain(
            argument,
            _shortened(cumulative),
            complaint,
            "pass the cumulative sum of the sequence lengths with a 0 in front",
        )
    )


def _shortened(values: tuple[int, ...]) -> str:
    shown = ", ".join(str(value) for value in values[:12])
    return f"[{shown}, ... {len(values)} entries]" if len(values) > 12 else f"[{shown}]"
