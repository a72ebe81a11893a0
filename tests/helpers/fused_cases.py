"""What the tests of the simulated helper operators share: random tensors, calls of torch_npu with
gradients, and how near an answer must be to one in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Tensors = Sequence[torch.Tensor]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def on_device(given: dict[str, Any]) -> dict[str, Any]:
    return {n: x.npu() if isinstance(x, torch.Tensor) else x for n, x in given.items()}


def on_npu(
    function: Callable[..., torch.Tensor], inputs: Tensors, dout: torch.Tensor
) -> list[torch.Tensor]:
    """The output of a function of device tensors, then the gradient of every input."""
    leaves = [tensor.npu().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    out.backward(dout.npu())
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def in_double(
    function: Callable[..., torch.Tensor], inputs: Tensors, dout: torch.Tensor
) -> list[torch.Tensor]:
    """The same of a function of host tensors, all in float64."""
    leaves = [tensor.double().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    out.backward(dout.double())
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def close(got: torch.Tensor, expected: torch.Tensor, roundings: float = 1) -> None:
    """Equal up to so many roundings to the dtype of `got`, at the scale of what is expected."""
    assert got.shape == expected.shape
    error = (got.cpu().double() - expected.double()).abs().max()
    # float32 statistics between float64 sums leave a few units of float32 behind
    unit = max(torch.finfo(got.dtype).eps / 2 * roundings, 4 * torch.finfo(torch.float32).eps)
    assert error <= unit * expected.double().abs().max(), f"{error} of {expected.abs().max()}"


def all_close(got: Tensors, expected: Tensors, roundings: float = 1) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        close(mine, theirs, roundings)
