"""What a stretch of code asked of the simulated card: operators, copies, memory.

Only the counting lives here; whoever simulates an operator or a copy reports it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    """One call of an operator of the npu namespace, arguments by schema name."""

    name: str
    arguments: dict[str, Any]


class Copy(NamedTuple):
    """One transfer between host and device, or into device memory that existed before."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int


def _allocated() -> int:
    """All bytes that this process ever asked the device's allocator for, 0 without a device."""
    if not hasattr(torch, "npu"):
        return 0
    return torch.npu.memory_stats().get("requested_bytes.all.allocated", 0)


@dataclass
class Record:
    """launches: of npu operators. operators: the names of all that a card would launch, in order:
    those of aten too, copies within the device among them, but neither views nor allocations.
    """

    launches: list[Launch] = field(default_factory=list)
    operators: list[str] = field(default_factory=list)
    device_to_host: list[Copy] = field(default_factory=list)
    host_to_device: list[Copy] = field(default_factory=list)
    device_to_device: list[Copy] = field(default_factory=list)
    _allocated_before: int = field(default_factory=_allocated)
    _allocated_after: int | None = None

    @property
    def allocated_bytes(self) -> int:
        """Device memory that was allocated, operators' outputs among it, or copied within the
        device: what aten or the allocator of torch_npu was asked for, at any time in the block.
        """
        after = _allocated() if self._allocated_after is None else self._allocated_after
        copied = sum(copy.bytes for copy in self.device_to_device)
        return after - self._allocated_before + copied

    def close(self) -> None:
        self._allocated_after = _allocated()


# Shared by all threads: the backward of a device runs in autograd's own thread
_open: list[Record] = []


@contextmanager
def record() -> Iterator[Record]:
    """Collect what happens inside the block, in every thread."""
    collected = Record()
    _open.append(collected)
    try:
        yield collected
    finally:
        collected.close()
        # By identity: two open records with equal contents compare equal
        _open[:] = [other for other in _open if other is not collected]


def launched(name: str, arguments: dict[str, Any]) -> None:
    for collected in _open:
        collected.launches.append(Launch(name, arguments))
    asked(f"npu::{name}")


def asked(operator: str) -> None:
    for collected in _open:
        collected.operators.append(operator)


def copied_to_host(tensor: torch.Tensor) -> None:
    for collected in _open:
        collected.device_to_host.append(_copy(tensor))


def copied_to_device(tensor: torch.Tensor) -> None:
    for collected in _open:
        collected.host_to_device.append(_copy(tensor))


def copied_on_device(tensor: torch.Tensor) -> None:
    for collected in _open:
        collected.device_to_device.append(_copy(tensor))


def _copy(tensor: torch.Tensor) -> Copy:
    return Copy(tuple(tensor.shape), tensor.dtype, tensor.numel() * tensor.element_size())
