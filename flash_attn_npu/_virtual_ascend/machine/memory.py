"""Device memory seen from the host: CPU tensors over the bytes of NPU tensors, and back."""

from __future__ import annotations

import ctypes

import torch


def host_view(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor over the same memory, valid as long as the device tensor lives."""
    storage = tensor.untyped_storage()
    size = storage.nbytes()
    view = torch.empty(0, dtype=tensor.dtype, device="cpu")
    if size == 0:
        return view.resize_(tensor.shape)
    memory = (ctypes.c_char * size).from_address(storage.data_ptr())
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    place = (tensor.storage_offset(), tensor.size(), tensor.stride())
    return view.set_(flat.untyped_storage(), *place)


def to_device(result: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A new device tensor with the strides and values of a CPU result; not counted as a copy."""
    if result.is_contiguous():
        out = torch.empty(result.shape, dtype=result.dtype, device=device)
    else:
        out = torch.empty_like(result, device=device)
    host_view(out).copy_(result)
    return out
