"""SwiGLU and its gradients, and exact GeGLU: the operation that serves.

Every one of this package comes through these functions, SwiGLU outside of autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu

from ...errors import ArgumentError
from ..ground.dense_arguments import require_dense
from ..ground.functions import FORWARD, PLAIN, refuse_tangents
from ..ground.records import replaced
from ..problems.rowwise import GEGLU, Gate, Geglu
from ..table.choice import begin, choose, plan, recall
from ..verification.kinds import busy
from .keys import PLAIN_TORCH, STRIDED, key_of

__all__ = ["geglu", "require_floating", "swiglu_bwd", "swiglu_fwd"]

_Placed = tuple[tuple[int, ...], tuple[int, ...], Any]
"""The strides of two tensors in one storage, and how many elements they begin apart."""

_compiling = torch.compiler.is_compiling
_grad_enabled = torch.is_grad_enabled
_is_alias: Callable[[Tensor, Tensor], bool] = torch._C._is_alias_of  # type: ignore[attr-defined]


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
    key, placed = _key(x, y)
    found = None if key is None else recall(key)
    if found is None:
        _check(x=x, y=y)
        found = choose(_problem(x, y, placed), key)
    elif found.direct is None:
        begin(found)
    else:
        # nobody was passed over, so there is no policy to ask
        found.tally.calls += 1
    if found.direct is not None:
        if FORWARD._current_level >= 0:
            refuse_tangents(PLAIN_TORCH, x=x, y=y)
        return found.direct(x, y)  # type: ignore[no-any-return]
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
    key, placed = _key(x, y, g)
    found = None if key is None else recall(key)
    if found is None:
        _check(x=x, y=y, g=g)
        # neither counted nor told: the forward has been
        found = plan(replaced(_problem(x, y, placed), grad_dtype=g.dtype), key)
    dx, dy = found.kernel.backward(found.problem, g, x, y)
    return dx, dy


def geglu(both: Tensor) -> Tensor:
    """y * gelu(gate) of both = [y, gate], (..., 2 * hidden) floating; differentiable.

    That it is two launches instead of one is no loss that anybody is told of.
    """
    found = None
    # what goes forward is left to torch, whose own operations have tangents
    asked = both.device.type == "npu" and not _compiling() and FORWARD._current_level < 0
    if asked and not busy(both):
        differentiated = _grad_enabled() and both.requires_grad
        found = plan(
            Geglu("geglu", both.device, both.dtype, not both.numel(), both.dim(), differentiated)
        )
    if found is not None and found.name == GEGLU:
        begin(found)
        gated: Tensor = found.kernel.forward(found.problem, both)
        return gated
    y, gate = both.chunk(2, dim=-1)
    return y * gelu(gate)


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


def _key(x: Tensor, y: Tensor, *others: Tensor) -> tuple[Hashable, _Placed | None]:
    """What a plan is remembered by, and how x and y lie: not known while tracing."""
    # `key_of` written out for the two that are always there
    if _compiling() or type(x) not in PLAIN or type(y) not in PLAIN:
        return None, None
    if x.layout is not STRIDED or y.layout is not STRIDED:
        return None, None
    more = key_of("swiglu", (), *others) if others else _grad_enabled()
    if more is None:
        return None, None
    placed = None
    try:
        if not x.is_cpu and _is_alias(x, y):
            placed = x.stride(), y.stride(), y.storage_offset() - x.storage_offset()
        # fmt: off
        return (
            "swiglu", more, x.shape, x.dtype, x.device, x.requires_grad,
            y.shape, y.dtype, y.device, y.requires_grad, placed,
        ), placed
        # fmt: on
    except RuntimeError:
        # a nested tensor has no shape
        return None, None


def _problem(x: Tensor, y: Tensor, placed: _Placed | None) -> Gate:
    halves = placed is not None and _are_halves(x, y, *placed)
    return Gate(
        function="swiglu",
        device=x.device,
        dtype=torch.promote_types(x.dtype, y.dtype),
        empty=x.numel() == 0,
        halves=halves,
        row_bytes=x.shape[-1] * x.element_size() if x.dim() else 0,
        mixed=x.dtype != y.dtype,
        differentiated=_is_differentiated(x, y),
        whole=((*x.shape[:-1], 2 * x.shape[-1]), x.stride()) if halves else None,
    )


def _is_differentiated(x: Tensor, y: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)


def _are_halves(
    x: Tensor, y: Tensor, strides: tuple[int, ...], others: tuple[int, ...], apart: Any
) -> bool:
    """Whether the rows of x and y lie behind each other in one contiguous tensor."""
    if x.device.type != "npu" or x.dtype != y.dtype or x.dim() == 0:
        return False
    width = x.shape[-1]
    if apart != width or strides != others or strides[-1] != 1:
        return False
    rows = 2 * width
    for size, stride in zip(x.shape[-2::-1], strides[-2::-1], strict=True):
        if stride != rows:
            return False
        rows *= size
    return True


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
