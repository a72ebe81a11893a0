"""Which Ascend chip a device is, and what runs on it."""

from __future__ import annotations

import torch

from .absent import Absent
from .confirmed import Combination, refuted
from .memory import Memo

__all__ = [
    "combination",
    "compiles_just_in_time",
    "known_wrong",
    "remembers_compiling",
    "soc_name",
]

_npus: Memo[torch.device, bool] = Memo("devices that are NPUs", 64)
_names: Memo[torch.device, str] = Memo("names of chips", 64)
_combinations: Memo[torch.device, Combination] = Memo("versions of what runs on a chip", 64)


def soc_name(device: torch.device | Absent) -> str:
    """The chip's name, such as "Ascend910B3"; empty for a device that is no NPU."""
    if isinstance(device, Absent):
        return device.soc
    if device.type != "npu":
        return ""
    name = _names.recall(device)
    if name is None:
        import torch_npu

        name = str(torch_npu.npu.get_device_name(device))
        _names.put(device, name)
    return name


def compiles_just_in_time(device: torch.device) -> bool:
    """Whether torch.npu.set_compile_mode(jit_compile=True) holds, which may change at any time."""
    return device.type == "npu" and _is_set_to_compile()


def remembers_compiling(device: torch.device) -> bool:
    """`compiles_just_in_time` for what is not traced: a device is asked once whether it is an NPU.

    The name of a device that is not torch's own takes 0.3 us.
    """
    npu = _npus.recall(device)
    if npu is None:
        npu = device.type == "npu"
        _npus.put(device, npu)
    return npu and _is_set_to_compile()


def _is_set_to_compile() -> bool:
    import torch_npu

    # unset it is what the card is for; is_jit_compile_false says no to that too, whatever the card
    return bool(torch_npu._C._npu_getOption("jitCompile") == b"enable")


def combination(device: torch.device) -> Combination:
    """Chip, CANN and torch_npu behind an NPU, by which reports are told apart."""
    known = _combinations.recall(device)
    if known is None:
        import torch_npu

        try:
            cann = str(torch_npu.npu.utils.get_cann_version())
        except Exception:  # an older torch_npu has no such function, or CANN does not say
            cann = ""
        known = Combination(soc_name(device), cann, str(torch_npu.__version__))
        _combinations.put(device, known)
    return known


def known_wrong(device: torch.device | Absent) -> str:
    """What reports have found wrong on this chip, CANN and torch_npu; nearly always nothing.

    A line for each: the row of a table, the kernel and the report, with tabs between them.
    """
    if device.type != "npu" or isinstance(device, Absent):
        return ""
    cells = refuted(combination(device)).items()
    return "\n".join("\t".join((*cell, report)) for cell, report in cells)


# what torch.compiler.assume_constant_result sets; that would import torch._dynamo, which is slow
soc_name._dynamo_marked_constant = True  # type: ignore[attr-defined]
compiles_just_in_time._dynamo_marked_constant = True  # type: ignore[attr-defined]
combination._dynamo_marked_constant = True  # type: ignore[attr-defined]
known_wrong._dynamo_marked_constant = True  # type: ignore[attr-defined]
