"""npu_swiglu and npu_geglu with their gradients: one half of an axis gates the other."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..machine.fused_call import (
    Given,
    Kernel,
    builder,
    check_contiguous,
    check_dims,
    check_dtype,
    check_not_empty,
    check_one_dtype,
    check_shape,
    is_ascend_310p,
)
from ..machine.refusal import require

Outputs = tuple[torch.Tensor, ...]

_BLOCK_BYTES = 64
_TANH = 1


def _check_swiglu(given: Given) -> None:
    x = given["input"]
    check_dtype(x, "input")
    _check_axis(x, given["dim"])
    check_not_empty(x, "input")
    check_contiguous(x, "input")
    if is_ascend_310p():
        _check_blocks(x, given["dim"])


def _check_swiglu_backward(given: Given) -> None:
    x, dy = given["input"], given["grad_output"]
    check_one_dtype(given, ("input", "grad_output"))
    _check_axis(x, given["dim"])
    check_not_empty(x, "input")
    check_shape(dy, _halved(x, given["dim"]), "grad_output")
    check_contiguous(dy, "grad_output")
    # The documents name no product here; the tiling source asks it of the 310P alone
    _check_blocks(x, given["dim"])


def _check_geglu(given: Given) -> None:
    check_dtype(given["input"], "input")
    _check_axis(given["input"], given["dim"])
    _check_approximation(given)


def _check_geglu_grad(given: Given) -> None:
    x = given["input"]
    check_one_dtype(given, ("input", "grad_output", "gelu"))
    _check_axis(x, given["dim"])
    _check_approximation(given)
    for name in ("grad_output", "gelu"):
        check_shape(given[name], _halved(x, given["dim"]), name)
    require(
        given["approximate"] == _TANH or not is_ascend_310p(),
        "the gradient on a 310P exists for approximate 1 only",
    )


def _check_axis(x: torch.Tensor, dim: int) -> None:
    check_dims(x, 1, 8, "input")
    require(-x.dim() <= dim < x.dim(), f"dim {dim} is outside of {tuple(x.shape)}")
    require(x.shape[dim] % 2 == 0, f"axis {dim} must be even, got {tuple(x.shape)}")


def _check_approximation(given: Given) -> None:
    approximate = given["approximate"]
    require(approximate in (0, _TANH), f"approximate must be 0 or 1, got {approximate}")


def _check_blocks(x: torch.Tensor, dim: int) -> None:
    """A half row is everything from the split axis on, halved."""
    size = math.prod(x.shape[dim % x.dim() :]) // 2 * x.itemsize
    require(
        size % _BLOCK_BYTES == 0,
        f"input must be 64-byte aligned: half a row from the split axis on holds {size} bytes",
    )


def _halved(x: torch.Tensor, dim: int) -> list[int]:
    shape = list(x.shape)
    shape[dim] //= 2
    return shape


def _swiglu(given: Given, outputs: Outputs) -> None:
    gate, value = given["input"].double().chunk(2, given["dim"])
    outputs[0].copy_(gate * gate.sigmoid() * value)


def _swiglu_backward(given: Given, outputs: Outputs) -> None:
    dy = given["grad_output"].double()
    gate, value = given["input"].double().chunk(2, given["dim"])
    sigmoid = gate.sigmoid()
    slope = sigmoid + sigmoid * (1 - sigmoid) * gate
    outputs[0].copy_(torch.cat((dy * slope * value, dy * sigmoid * gate), given["dim"]))


def _gelu(x: torch.Tensor, approximate: int) -> torch.Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh" if approximate == _TANH else "none")


def _gelu_slope(x: torch.Tensor, approximate: int) -> torch.Tensor:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(_gelu(leaf, approximate).sum(), leaf)[0]


def _plain_and_activated(given: Given) -> tuple[torch.Tensor, torch.Tensor]:
    left, right = given["input"].double().chunk(2, given["dim"])
    return (right, left) if given["activate_left"] else (left, right)


def _geglu(given: Given, outputs: Outputs) -> None:
    """In float16 the kernel multiplies by the rounded gelu."""
    out, gelu = outputs
    plain, activated = _plain_and_activated(given)
    exact = _gelu(activated, given["approximate"])
    gelu.copy_(exact)
    out.copy_(plain * (gelu.double() if gelu.dtype == torch.float16 else exact))


def _geglu_grad(given: Given, outputs: Outputs) -> None:
    """The gelu of the forward pass comes in rounded; in float16 dy times plain is rounded too."""
    dy, dtype = given["grad_output"].double(), given["input"].dtype
    plain, activated = _plain_and_activated(given)
    product = dy * plain
    if dtype == torch.float16:
        product = product.to(dtype).double()
    through_gelu = product * _gelu_slope(activated, given["approximate"])
    through_plain = dy * given["gelu"].double()
    halves = (through_plain, through_gelu)
    ordered = halves[::-1] if given["activate_left"] else halves
    outputs[0].copy_(torch.cat(ordered, given["dim"]))


BUILDERS: dict[str, Callable[[Kernel], Kernel]] = {
    "npu_geglu": builder(_check_geglu, _geglu),
    "npu_geglu_grad": builder(_check_geglu_grad, _geglu_grad),
    "npu_swiglu": builder(_check_swiglu, _swiglu),
    "npu_swiglu_backward": builder(_check_swiglu_backward, _swiglu_backward),
}
