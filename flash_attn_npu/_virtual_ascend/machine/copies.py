"""Copies between host and device, and between device tensors, counted as they happen."""

from __future__ import annotations

from typing import Any

import torch

from . import journal
from .memory import host_view


def copy_(self: torch.Tensor, src: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """aten::copy_ where either side is on the device."""
    with torch._C.DisableTorchFunction():
        if self.device.type == src.device.type:
            journal.copied_on_device(self)
        _move(self, src)
    return self


def to_copy(
    self: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
) -> torch.Tensor:
    with torch._C.DisableTorchFunction():
        out = torch.empty_like(
            self,
            dtype=dtype or self.dtype,
            device=device or self.device,
            memory_format=memory_format or torch.preserve_format,
        )
        _move(out, self)
    return out


def _copy_from_and_resize(self: torch.Tensor, dst: torch.Tensor) -> torch.Tensor:
    with torch._C.DisableTorchFunction():
        if dst.shape != self.shape:
            dst.resize_(self.shape)
        _move(dst, self)
    return dst


def _local_scalar_dense(self: torch.Tensor) -> Any:
    with torch._C.DisableTorchFunction():
        journal.copied_to_host(self)
        return host_view(self).item()


def _move(target: torch.Tensor, source: torch.Tensor) -> None:
    onto_device = target.device.type == "npu"
    from_device = source.device.type == "npu"
    if onto_device and not from_device:
        journal.copied_to_device(source)
    elif from_device and not onto_device:
        journal.copied_to_host(source)
    else:
        journal.asked("aten::copy_")
    to = host_view(target) if onto_device else target.detach()
    to.copy_(host_view(source) if from_device else source.detach())


KERNELS = {
    "_copy_from_and_resize": _copy_from_and_resize,
    "_local_scalar_dense": _local_scalar_dense,
    "_to_copy": to_copy,
    "copy_": copy_,
}
