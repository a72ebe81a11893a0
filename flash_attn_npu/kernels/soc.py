"""Which Ascend chip a device is."""

from __future__ import annotations

import torch

__all__ = ["forget_soc_names", "soc_name"]

_names: dict[torch.device, str] = {}


def soc_name(device: torch.device) -> str:
    """The chip's name, such as "Ascend910B3"; empty for a device that is no NPU."""
    if device.type != "npu":
        return ""
    if device not in _names:
        import torch_npu

        _names[device] = str(torch_npu.npu.get_device_name(device))
    return _names[device]


# what torch.compiler.assume_constant_result sets; that would import torch._dynamo, which is slow
soc_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


def forget_soc_names() -> None:
    """Ask again."""
    _names.clear()
