"""What the fused helper operators share: the order of a call (the real operator, the rules of a
card, then numbers into what it allocated), the names of SoCs, and rules about dtypes and shapes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch

from .memory import host_view
from .refusal import require

Kernel = Callable[..., Any]
Given = dict[str, Any]
Rules = Callable[[Given], None]
Arithmetic = Callable[[Given, tuple[torch.Tensor, ...]], None]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def is_ascend_310p() -> bool:
    return "310P" in os.environ.get("VIRTUAL_ASCEND_SOC", "")


def builder(rules: Rules, arithmetic: Arithmetic) -> Callable[[Kernel], Kernel]:
    """What makes a kernel of a real one: rules and arithmetic see host views, outputs start as NaN.

    The arguments keep what a host view has not: whether a tensor requires a gradient, under
    "requires_grad" by name.
    """

    def build(real: Kernel) -> Kernel:
        def kernel(given: Given, *args: Any, **kwargs: Any) -> Any:
            results = real(*args, **kwargs)
            with torch._C.DisableTorchFunction():
                hosted = on_host(given)
                outputs = results if isinstance(results, (tuple, list)) else (results,)
                filled = tuple(poisoned(host_view(output)) for output in outputs)
                rules(hosted)
                arithmetic(hosted, filled)
            return results

        return kernel

    return build


def poisoned(output: torch.Tensor) -> torch.Tensor:
    """The output, NaN where it can be, so that what nobody computes is seen."""
    return output.fill_(torch.nan) if output.is_floating_point() else output


def on_host(given: Given) -> Given:
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    differentiated = {name for name, value in tensors.items() if value.requires_grad}
    views = {name: host_view(value) for name, value in tensors.items()}
    return {**given, **views, "requires_grad": differentiated}


def check_dtype(tensor: torch.Tensor, name: str) -> None:
    """One of the three dtypes, bfloat16 not on a 310P."""
    allowed = (torch.float16, torch.float32) if is_ascend_310p() else DTYPES
    spelled = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
    require(tensor.dtype in allowed, f"{name} is {tensor.dtype}: only {spelled} exist")


def check_one_dtype(given: Given, names: Iterable[str]) -> None:
    """Every tensor of these names has the dtype of the first, which is one of the three."""
    present = [name for name in names if given[name] is not None]
    first = given[present[0]]
    check_dtype(first, present[0])
    for name in present[1:]:
        require(
            given[name].dtype == first.dtype,
            f"{name} must have {present[0]}'s dtype {first.dtype}, got {given[name].dtype}",
        )


def check_shape(tensor: torch.Tensor, shape: Iterable[int], name: str) -> None:
    require(
        tuple(tensor.shape) == tuple(shape),
        f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}",
    )


def check_dims(tensor: torch.Tensor, least: int, most: int, name: str) -> None:
    require(
        least <= tensor.dim() <= most,
        f"{name} must have {least} to {most} dimensions, got {tensor.dim()}",
    )


def check_not_empty(tensor: torch.Tensor, name: str) -> None:
    require(tensor.numel() > 0, f"{name} must not be empty, got {tuple(tensor.shape)}")


def check_contiguous(tensor: torch.Tensor, name: str) -> None:
    require(tensor.is_contiguous(), f"{name} must be contiguous: other strides are not supported")
