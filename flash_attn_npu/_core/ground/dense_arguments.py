"""Checks of arguments of everything that is not attention: dense tensors, sizes, process groups.

Each raises an error that names the argument. Under torch.compile only types are looked at: the
rest would be guards on values.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from ...errors import ArgumentError, ArgumentTypeError, UnsupportedError
from .arguments import flag, named, real, require_tensors

__all__ = [
    "LARGEST",
    "number",
    "refuse_transforms",
    "require_alike",
    "require_dense",
    "require_group",
    "require_local",
    "require_truth",
    "require_values",
    "truth",
    "whole",
]

LARGEST = (1 << 31) - 1
"""flash-attn counts tokens and positions in 32 bits."""


def require_dense(**tensors: Any) -> None:
    """Raise for the first argument that is no tensor, or a sparse or nested one."""
    if torch.compiler.is_compiling():
        require_tensors(**tensors)
        return
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            require_tensors(**{name: tensor})
        if tensor.is_nested or tensor.layout is not torch.strided:
            kind = "a nested tensor" if tensor.is_nested else f"a tensor of {tensor.layout}"
            how = f"{name}.to_padded_tensor(0.0)" if tensor.is_nested else f"{name}.to_dense()"
            raise ArgumentError(name, kind, "a dense tensor", f"pass {how}")


def require_values(**tensors: Any) -> None:
    """`require_dense`, and each has values that can be read."""
    require_dense(**tensors)
    for name, tensor in tensors.items():
        if tensor.is_meta and not torch.compiler.is_compiling():
            came = "a tensor on meta, which has no values"
            raise ArgumentError(name, came, "a tensor with values", "make it on the host")


def whole(name: str, value: Any, least: int = 0) -> int:
    """`value` as an int, least to 2**31 - 1; numpy's and tensors of one element are taken too."""
    if torch.compiler.is_compiling():
        return value  # type: ignore[no-any-return]
    number = value
    if isinstance(value, Tensor):
        require_values(**{name: value})
        one = value.numel() == 1 and not value.is_floating_point() and not value.is_complex()
        number = value.item() if one else None
    if not isinstance(number, (int, Integral)):
        raise ArgumentTypeError(name, named(value), "an int", f"pass {name} as an int")
    if not least <= int(number) <= LARGEST:
        allowed = f"an int, {least} to {LARGEST}"
        raise ArgumentError(name, number, allowed, f"pass another {name}")
    return int(number)


def number(name: str, value: Any) -> float:
    """`value` as a finite float."""
    # asked first because torch.compile has no Real for its symbols
    if isinstance(value, float) and torch.compiler.is_compiling():
        return value
    if isinstance(value, Tensor):
        require_dense(**{name: value})
    return real(name, value)


def truth(name: str, value: Any) -> bool:
    """`value` as a bool, as attention's flags are taken; None is False."""
    if value is True or value is False or value is None:
        return bool(value)
    return flag(name, value)


def require_truth(**flags: Any) -> None:
    """Raise for the first that is neither true nor false."""
    for name, value in flags.items():
        truth(name, value)


def require_alike(**tensors: Any) -> None:
    """Raise for the first DTensor if others are plain tensors; all may be DTensors, or none."""
    if torch.compiler.is_compiling():
        return
    given = {name: x for name, x in tensors.items() if isinstance(x, Tensor)}
    distributed = [name for name, x in given.items() if type(x).__name__ == "DTensor"]
    if distributed and len(distributed) < len(given):
        _refuse_distributed(distributed[0], "a DTensor beside plain tensors", "one kind of tensor")


def require_local(**tensors: Any) -> None:
    """Raise for the first DTensor."""
    for name, tensor in tensors.items():
        if type(tensor).__name__ == "DTensor" and not torch.compiler.is_compiling():
            _refuse_distributed(name, "a DTensor", "a plain tensor")


def _refuse_distributed(name: str, came: str, allowed: str) -> NoReturn:
    raise ArgumentTypeError(
        name,
        came,
        f"{allowed}: rows of other ranks are not seen here",
        f"pass {name}.to_local(), or wrap the call in "
        "torch.distributed.tensor.experimental.local_map",
    )


def require_group(process_group: Any) -> None:
    """Raise unless it is a process group that this process belongs to, or None."""
    if process_group is None or torch.compiler.is_compiling():
        return
    if not dist.is_available() or not isinstance(process_group, dist.ProcessGroup):
        came = named(process_group)
        if process_group is getattr(dist.GroupMember, "NON_GROUP_MEMBER", None):
            came = "a group that this process does not belong to"
        raise ArgumentTypeError(
            "process_group",
            came,
            "a torch.distributed.ProcessGroup with this process in it, or None",
            "pass what torch.distributed.new_group returned in one of its ranks",
        )


def refuse_transforms(name: str) -> None:
    """Raise inside torch.func's transforms, which want a setup_context of autograd.Functions."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise UnsupportedError(
            name,
            "a tensor inside a transform of torch.func (grad, vjp, jvp, vmap)",
            "a call outside of them",
            "differentiate with torch.autograd.grad, or call plain torch operations there",
        )
