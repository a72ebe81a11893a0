"""Calls of autograd functions, without what a call need not ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedError

__all__ = [
    "EAGER",
    "FORWARD",
    "PLAIN",
    "bare",
    "is_undisturbed",
    "listed",
    "outside_transforms",
    "refuse_tangents",
    "unwrapped",
]

PLAIN = (Tensor, torch.nn.Parameter)

unwrapped = torch._C._functorch.unwrap_if_dead
"""The tensor inside a wrapper that has outlived its functorch transform; else the tensor itself."""

_compiling = torch.compiler.is_dynamo_compiling
_transforming = torch._C._are_functorch_transforms_active
_layer = torch._C._functorch.peek_interpreter_stack
FORWARD = torch.autograd.forward_ad
"""Where a dual level is entered, its `_current_level` is not below 0."""


EAGER = "eager attention"
"""What to call for derivatives that attention here has not."""


def is_undisturbed() -> bool:
    """Whether nothing traces, transforms, or differentiates forward what is done.

    For these autograd functions have ways of their own.
    """
    return not (_compiling() or _transforming() or FORWARD._current_level >= 0)


@contextmanager
def outside_transforms() -> Iterator[None]:
    """For what is asked of torch, not of a call: a transform wraps whatever is made in it."""
    layers: list[Any] = []
    try:
        while _layer() is not None:
            layers.append(torch._C._functorch.pop_dynamic_layer_stack())
        yield
    finally:
        while layers:
            torch._C._functorch.push_dynamic_layer_stack(layers.pop())


def listed(tensor: Tensor) -> Any:
    """`tensor.tolist()`, also in torch.func.functionalize, whose tensors have no memory."""
    layer = _layer()
    if layer is None or layer.key() != torch._C._functorch.TransformType.Functionalize:
        return tensor.tolist()
    with outside_transforms():
        if torch._is_functional_tensor(tensor):
            torch._functionalize_sync(tensor)
            tensor = torch._from_functional_tensor(tensor)
        return tensor.tolist()


def bare(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` for `unwrapped` tensors of `PLAIN` types, undisturbed: 2 to 4 us less."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc, no-any-return]


def refuse_tangents(instead: str, **tensors: Any) -> None:
    """Raise for a forward-mode tangent: behind a fused kernel it would silently be zero.

    Called where a dual level is entered; nothing is asked while a graph is traced.

    Args:
        instead: what to call where one is needed.
        tensors: by the names of the caller's arguments, which may have others beside.
    """
    if _compiling():
        return
    for argument, tensor in tensors.items():
        if isinstance(tensor, Tensor) and FORWARD.unpack_dual(tensor).tangent is not None:
            raise UnsupportedError(
                argument,
                "a tensor with a forward-mode tangent",
                "reverse-mode differentiation, as in flash-attention",
                f"use torch.autograd.grad or backward() here, or {instead}",
            )
