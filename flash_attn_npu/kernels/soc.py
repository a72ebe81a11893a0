"""Which Ascend chip a device is."""

from __future__ import annotations

from functools import cache

import torch

__all__ = ["soc_name"]


@cache
def soc_name(device: torch.device) -> str:
    """The chip's name, such as "Ascend910B3"; empty for a device that is no NPU."""
    if device.type != "npu":
        return ""
    import torch_npu

    return str(torch_npu.npu.get_device_name(device))
