"""Cumulative sequence lengths on the host.

Kernels take lengths as Python integers while clients keep `cu_seqlens` on the device, so each
such tensor is copied to the host once and remembered for as long as it is the same tensor with
the same contents. This file reads lengths, and checks what it reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import lt, sub
from typing import cast

import torch

from ...errors import ArgumentError, ArgumentTypeError
from .arguments import require_values
from .functions import listed
from .memory import Memo, PerTensorMemo

__all__ = [
    "Lengths",
    "host_ends",
    "host_lengths",
    "interned",
    "lengths_read",
    "not_lengths",
    "recall_lengths",
    "remember_lengths",
]

MEMO_SIZE = 64
"""Tensors whose lengths are remembered, and distinct lists of lengths that are kept."""


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
        self.seqlens = tuple(map(sub, self.ends, cumulative))
        self.total = cumulative[-1]
        self.longest = max(self.seqlens, default=0)

    @property
    def nbytes(self) -> int:
        """What its lists take, about."""
        return 128 * len(self.cumulative)


_memo: PerTensorMemo[Lengths] = PerTensorMemo(
    "cumulative lengths of a tensor", MEMO_SIZE, nbytes=1 << 26
)
_ends_memo: PerTensorMemo[list[int]] = PerTensorMemo("ends of the sequences of a tensor", MEMO_SIZE)
_interned: Memo[tuple[int, ...], Lengths] = Memo(
    "cumulative lengths by their values", MEMO_SIZE, nbytes=1 << 26
)
lengths_read = _memo.recall
"""By the id of a tensor what was read of one that had it: see `PerTensorMemo.known`."""
recall_lengths = _memo.known
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
        try:
            return _ends_memo.get(cu_seqlens, _ends)
        except RuntimeError:
            require_values(**{argument: cu_seqlens})
            raise
    if isinstance(cu_seqlens, (list, tuple)):
        return list(cu_seqlens[1:])
    raise not_lengths(argument, type(cu_seqlens).__name__)


def remember_lengths(cu_seqlens: torch.Tensor, values: tuple[int, ...]) -> None:
    """Say that `cu_seqlens` holds `values`, so that no copy has to find out."""
    _memo.tell(cu_seqlens, _lengths(values, "cu_seqlens"))


def interned(values: tuple[int, ...], argument: str) -> Lengths:
    """The `Lengths` of host values, the same object for the same values."""
    return _interned.recall(values) or _lengths(values, argument)


def _ends(tensor: torch.Tensor) -> list[int]:
    return cast(list[int], listed(tensor))[1:]


def not_lengths(argument: str, came: str) -> ArgumentTypeError:
    """The error for cumulative lengths of a wrong type."""
    return ArgumentTypeError(
        argument,
        came,
        "an int32 tensor of shape (batch + 1,), or a list or tuple of integers",
        "pass cumulative lengths, e.g. torch.tensor([0, 5, 12], dtype=torch.int32)",
    )


def _read(argument: str, tensor: torch.Tensor) -> Lengths:
    require_values(**{argument: tensor})
    if tensor.dim() != 1 or tensor.dtype != torch.int32:
        raise ArgumentError(
            argument,
            f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)}",
            "a torch.int32 tensor of shape (batch + 1,)",
            f"pass {argument}.flatten().to(torch.int32)",
        )
    return _lengths(tuple(cast(list[int], listed(tensor))), argument)


def _lengths(cumulative: tuple[int, ...], argument: str) -> Lengths:
    known = _interned.recall(cumulative)
    if known is not None:
        return known
    if not cumulative or cumulative[0] != 0:
        complaint = "entries that start at 0"
    elif any(map(lt, cumulative[1:], cumulative)):
        complaint = "entries that never decrease"
    else:
        made = Lengths(cumulative)
        _interned.put(cumulative, made)
        return made
    raise ArgumentError(
        argument,
        _shortened(cumulative),
        complaint,
        "pass the cumulative sum of the sequence lengths with a 0 in front",
    )


def _shortened(values: tuple[int, ...]) -> str:
    shown = ", ".join(str(value) for value in values[:12])
    return f"[{shown}, ... {len(values)} entries]" if len(values) > 12 else f"[{shown}]"
