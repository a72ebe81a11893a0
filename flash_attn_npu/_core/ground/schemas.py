"""What the operators of the installed torch_npu take.

Their arguments came with post releases, in several lines at once, so no version tells of them: the
operator itself is asked, once.
"""

from __future__ import annotations

from typing import Any

import torch

from .absent import Absent, arguments
from .memory import Memo

__all__ = ["has", "lacks", "untraceable"]

_known: Memo[str, tuple[str, ...]] = Memo("arguments of torch_npu's operators", 64)


def has(operator: str, *arguments: str) -> bool:
    """Whether torch_npu has the operator, and it takes arguments of these names."""
    taken = _known.recall(operator)
    if taken is None:
        taken = _read(operator)
        _known.put(operator, taken)
    return bool(taken) and set(arguments).issubset(taken)


def lacks(device: torch.device | Absent, *needed: tuple[str, ...]) -> bool:
    """Whether something is missing for tensors on an NPU.

    Args:
        needed: (operator, argument, argument, ...) of everything that is called.
    """
    if isinstance(device, Absent):
        return not all(
            {*names}.issubset(arguments(device.torch_npu, operator))
            and arguments(device.torch_npu, operator)
            for operator, *names in needed
        )
    return device.type == "npu" and not all(has(*call) for call in needed)


def untraceable(device: torch.device | Absent, operator: str) -> bool:
    """Whether torch.compile cannot trace it: torch_npu 2.6 has no fake operator for some."""
    if isinstance(device, Absent) or device.type != "npu":
        return False
    name = f"npu::{operator}"
    fake = torch._library.simple_registry.singleton.find(name).fake_impl.kernel
    return fake is None and not torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta")


def _read(operator: str) -> tuple[str, ...]:
    """The names of an operator's arguments, none if torch_npu does not have it."""
    # a tensor on an NPU is at hand, so torch_npu has registered what it has
    packet: Any = getattr(torch.ops.npu, operator, None)
    overload = getattr(packet, "default", None)
    if overload is None:
        return ()
    return tuple(argument.name for argument in overload._schema.arguments)


# as for `chip.soc_name`: what is installed does not change while something is traced
has._dynamo_marked_constant = True  # type: ignore[attr-defined]
lacks._dynamo_marked_constant = True  # type: ignore[attr-defined]
untraceable._dynamo_marked_constant = True  # type: ignore[attr-defined]
