"""Mirror of `flash_attn.ops.activations`: activations, their gradients, and autograd of both.

GELU means its tanh approximation, 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), everywhere.
Everything is computed in float32 at least and rounded once; autocast changes nothing. SwiGLU
itself is `rowwise.gates`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, relu

from .._core.ground.dtypes import widened
from .._core.ground.functions import PLAIN, bare, is_undisturbed, unwrapped
from .._core.rowwise.gates import require_floating, swiglu_bwd, swiglu_fwd
from ..errors import ArgumentError

__all__ = [
    "FastGeLUFunction",
    "GeLUFunction",
    "SwiGLUFunction",
    "bias_gelu",
    "bias_gelu_back",
    "bias_gelu_impl",
    "fast_gelu_impl",
    "gelu_bwd",
    "gelu_fwd",
    "relu_bwd",
    "sqrelu_bwd",
    "sqrelu_fwd",
    "swiglu",
    "swiglu_bwd",
    "swiglu_fwd",
]


def bias_gelu(y: Tensor, bias: Tensor) -> Tensor:
    """GELU of y + bias.

    Args:
        y: any shape, floating.
        bias: floating, of a shape that broadcasts to y's.

    Returns:
        Contiguous, y's shape and dtype.

    Raises:
        ArgumentError: bias does not broadcast to y's shape, or a dtype is not floating.

    Contract: flash-attention 2.8, `bias_gelu`.
    """
    _check_bias(y, bias)
    return gelu(widened(y) + bias, approximate="tanh").to(y.dtype).contiguous()


def bias_gelu_back(g: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """The gradient of `bias_gelu` in y + bias, in y's dtype, not yet summed to bias's shape.

    Args:
        g: the gradient of its result, of y's shape.
        y, bias: as in `bias_gelu`.

    Raises:
        ArgumentError: as `bias_gelu`, or g does not fit y.

    Contract: flash-attention 2.8, `bias_gelu_back`.
    """
    _check_bias(y, bias)
    _check_gradient(g, y=y)
    return _gelu_gradient(g, widened(y) + bias).to(y.dtype).contiguous()


class GeLUFunction(torch.autograd.Function):
    """Autograd of `bias_gelu_impl`. Different: the gradient of bias is summed to bias's shape."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor) -> Tensor:
        """`bias_gelu`."""
        ctx.save_for_backward(input, bias)
        return bias_gelu(input, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of both."""
        input, bias = ctx.saved_tensors
        grad = bias_gelu_back(grad_output, input, bias)
        return grad, grad.sum_to_size(bias.shape).to(bias.dtype)


bias_gelu_impl = GeLUFunction.apply
"""`bias_gelu_impl(input, bias)`: `bias_gelu`, differentiable in both, keeping only its inputs."""


def gelu_fwd(x: Tensor) -> Tensor:
    """GELU of x: contiguous, x's shape and dtype.

    Raises:
        ArgumentError: x is not floating.

    Contract: flash-attention 2.8, `gelu_fwd`.
    """
    require_floating(x=x)
    return gelu(x, approximate="tanh").contiguous()


def gelu_bwd(g: Tensor, x: Tensor) -> Tensor:
    """The gradient of `gelu_fwd`: contiguous, x's shape and dtype; g has x's shape.

    Raises:
        ArgumentError: the shapes differ, or a dtype is not floating.

    Contract: flash-attention 2.8, `gelu_bwd`.
    """
    _check_gradient(g, x=x)
    return _gelu_gradient(g, widened(x)).to(x.dtype).contiguous()


class FastGeLUFunction(torch.autograd.Function):
    """Autograd of `fast_gelu_impl`."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        """`gelu_fwd`."""
        ctx.save_for_backward(input)
        return gelu_fwd(input)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        """`gelu_bwd`."""
        (input,) = ctx.saved_tensors
        return gelu_bwd(grad_output, input)


fast_gelu_impl = FastGeLUFunction.apply
"""`fast_gelu_impl(input)`: `gelu_fwd`, differentiable."""


def relu_bwd(g: Tensor, x: Tensor) -> Tensor:
    """The gradient of relu: contiguous, x's shape and dtype; g has x's shape.

    It passes at 0, where torch's own is 0.

    Raises:
        ArgumentError: the shapes differ, or a dtype is not floating.

    Contract: flash-attention 2.8, `relu_bwd`.
    """
    _check_gradient(g, x=x)
    return torch.where(x >= 0, g, 0.0).to(x.dtype).contiguous()


def sqrelu_fwd(x: Tensor) -> Tensor:
    """relu(x)^2: contiguous, x's shape and dtype.

    Raises:
        ArgumentError: x is not floating.

    Contract: flash-attention 2.8, `sqrelu_fwd`.
    """
    require_floating(x=x)
    return relu(widened(x)).square().to(x.dtype).contiguous()


def sqrelu_bwd(g: Tensor, x: Tensor) -> Tensor:
    """The gradient of `sqrelu_fwd`, 2 g relu(x): contiguous, x's shape and dtype; g has x's shape.

    Raises:
        ArgumentError: the shapes differ, or a dtype is not floating.

    Contract: flash-attention 2.8, `sqrelu_bwd`.
    """
    _check_gradient(g, x=x)
    return (2.0 * relu(widened(x)) * g).to(x.dtype).contiguous()


class SwiGLUFunction(torch.autograd.Function):
    """Autograd of `swiglu`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        """`swiglu_fwd`."""
        ctx.save_for_backward(x, y)
        return swiglu_fwd(x, y)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
        """`swiglu_bwd`."""
        x, y = ctx.saved_tensors
        return swiglu_bwd(x, y, dout)


def swiglu(x: Tensor, y: Tensor) -> Tensor:
    """silu(x) * y, differentiable in both, keeping only its inputs.

    Arguments, result and errors are those of `swiglu_fwd`.

    Contract: flash-attention 2.8, `swiglu`.
    """
    if not (is_undisturbed() and type(x) in PLAIN and type(y) in PLAIN):
        return SwiGLUFunction.apply(x, y)  # type: ignore[no-any-return, no-untyped-call]
    x, y = unwrapped(x), unwrapped(y)
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
        return _recorded(x, y)  # type: ignore[no-any-return]
    return swiglu_fwd(x, y)


_recorded = bare(SwiGLUFunction)


def _gelu_gradient(g: Tensor, x: Tensor) -> Tensor:
    """In the dtype of x, which is wide."""
    grad: Tensor = torch.ops.aten.gelu_backward(g.to(x.dtype), x, approximate="tanh")
    return grad


def _check_bias(y: Tensor, bias: Tensor) -> None:
    require_floating(y=y, bias=bias)
    # torch 2.6 and 2.8 trace strict=False as True
    aligned = zip(bias.shape[::-1], y.shape[::-1][: bias.dim()], strict=True)
    if bias.dim() > y.dim() or any(b not in (1, n) for b, n in aligned):
        raise ArgumentError(
            "bias",
            f"shape {tuple(bias.shape)}",
            f"one that broadcasts to {tuple(y.shape)}, the shape of the input",
            f"pass ({y.shape[-1] if y.dim() else ''},), one entry for each column",
        )


def _check_gradient(g: Tensor, **inputs: Tensor) -> None:
    require_floating(g=g, **inputs)
    for name, tensor in inputs.items():
        if g.shape != tensor.shape:
            raise ArgumentError(
                "g",
                f"shape {tuple(g.shape)}",
                f"{tuple(tensor.shape)}, the shape of {name}",
                f"pass the gradient of what was computed from {name}",
            )
