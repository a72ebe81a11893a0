"""Which Ascend chip a device is."""

from __future__ import annotations

import torch

from .memory import Memo

__all__ = ["soc_name"]

_names: Memo[torch.device, str] = Memo("names of chips", 64)


def soc_name(device: torch.device) -> str:
    """The chip's name, such as "Ascend910B3"; empty for a device that is no NPU."""
    if device.type != "npu":
        return ""
    name = _names.recall(device)
    if name is None:
        import torch_npu

        name = str(torch_npu.npu.get_device_name(device))
        _names.put(device, name)
    return name


# what torch.compiler.assume_constant_result sets; that would import torch._dynamo, which is slow
soc_name._dynamo_marked_constant = True  # type: ignore[attr-defined]
