"""SwiGLU and its gradients: arguments checked, and the operation that serves.

Every SwiGLU of this package comes through these functions, outside of autograd.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from ...errors import ArgumentError
from ..ground.dense_arguments import require_dense
from ..ground.records import replaced
from ..problems.rowwise import Gate
from ..table.choice import begin, choose, plan, recall
from .keys import key_of

__all__ = ["require_floating", "swiglu_bwd", "swiglu_fwd"]


def swiglu_fwd(x: Tensor, y: Tensor) -> Tensor:
    """silu(x) * y: x is the gate.

    Args:
        x, y: one shape, any strides, floating; they may differ in dtype.

    Returns:
        Contiguous, of their shape, in the dtype they promote to.

    Raises:
        ArgumentError: the shapes differ, or a dtype is not floating.

    Contract: flash-attention 2.8, `swiglu_fwd`. Wider: differentiable by itself.
    """
    key, halves = _key(x, y)
    found = None if key is None else recall(key)
    if found is None:
        _check(x=x, y=y)
        found = choose(_problem(x, y, halves), key)
    else:
        begin(found)
    gated: Tensor = found.kernel.forward(found.problem, x, y)
    return gated


def swiglu_bwd(x: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `swiglu_fwd`.

    Args:
        x, y: as in `swiglu_fwd`.
        g: the gradient of its result, of the same shape.

    Returns:
        (dx, dy): contiguous, each in the dtype of its tensor.

    Raises:
        ArgumentError: as `swiglu_fwd`.

    Contract: flash-attention 2.8, `swiglu_bwd`.
    """
    key, halves = _key(x, y, g)
    found = None if key is None else recall(key)
    if found is None:
        _check(x=x, y=y, g=g)
        # neither counted nor told: the forward has been
        found = plan(replaced(_problem(x, y, halves), grad_dtype=g.dtype), key)
    dx, dy = found.kernel.backward(found.problem, g, x, y)
    return dx, dy


def require_floating(**tensors: Tensor) -> None:
    """Raise unless every argument is a dense tensor of a floating dtype, all on one device."""
    require_dense(**tensors)
    first, x = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.device != x.device:
            allowed = f"{x.device}, as {first}"
            raise ArgumentError(name, tensor.device, allowed, f"pass {name}.to(...)")
        if not tensor.dtype.is_floating_point:
            raise ArgumentError(name, tensor.dtype, "a floating dtype", f"pass {name}.float()")


def _key(x: Tensor, y: Tensor, *others: Tensor) -> tuple[Hashable, bool]:
    """What a plan is remembered by, and whether x and y are halves: not known while tracing."""
    key = key_of("swiglu", (), x, y, *others)
    if key is None:
        return None, False
    halves = _are_halves(x, y)
    return (key, halves), halves


def _problem(x: Tensor, y: Tensor, halves: bool) -> Gate:
    return Gate(
        function="swiglu",
        device=x.device,
        dtype=torch.promote_types(x.dtype, y.dtype),
        empty=x.numel() == 0,
        halves=halves,
        row_bytes=x.shape[-1] * x.element_size() if x.dim() else 0,
        mixed=x.dtype != y.dtype,
        differentiated=_is_differentiated(x, y),
    )


def _is_differentiated(x: Tensor, y: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)


def _are_halves(x: Tensor, y: Tensor) -> bool:
    """Whether the rows of x and y lie behind each other in one contiguous tensor."""
    if x.device.type != "npu" or x.dtype != y.dtype or x.dim() == 0:
        return False
    strides, width = x.stride(), x.shape[-1]
    if y.storage_offset() != x.storage_offset() + width or y.stride() != strides:
        return False
    if x.untyped_storage().data_ptr() != y.untyped_storage().data_ptr():
        return False
    apart = 2 * width
    for size, stride in zip(x.shape[-2::-1], strides[-2::-1], strict=True):
        if stride != apart:
            return False
        apart *= size
    return strides[-1] == 1


def _check(x: Tensor, **others: Tensor) -> None:
    require_floating(x=x, **others)
    for name, tensor in others.items():
        if tensor.shape != x.shape:
            raise ArgumentError(
                name,
                f"shape {tuple(tensor.shape)}",
                f"{tuple(x.shape)}, the shape of x",
                "pass tensors of one shape; expand what is to be shared",
            )
