"""Calls of autograd functions, without what a call need not ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedError

__all__ = ["PLAIN", "bare", "goes_forward", "is_undisturbed", "refuse_tangents", "unwrapped"]

PLAIN = (Tensor, torch.nn.Parameter)

unwrapped = torch._C._functorch.unwrap_if_dead
"""The tensor inside a wrapper that has outlived its functorch transform; else the tensor itself."""

_compiling = torch.compiler.is_dynamo_compiling
_transforming = torch._C._are_functorch_transforms_active
_forward_ad = torch.autograd.forward_ad


def is_undisturbed() -> bool:
    """Whether nothing traces, transforms, or differentiates forward what is done.

    For these autograd functions have ways of their own.
    """
    return not (_compiling() or _transforming() or _forward_ad._current_level >= 0)


def goes_forward() -> bool:
    """Whether forward-mode differentiation is going on; not asked while a graph is traced."""
    return not _compiling() and _forward_ad._current_level >= 0


def bare(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` for `unwrapped` tensors of `PLAIN` types, undisturbed: 2 to 4 us less."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc, no-any-return]


def refuse_tangents(instead: str, **tensors: Tensor | None) -> None:
    """Raise for a forward-mode tangent: behind a fused kernel it would silently be zero.

    Args:
        instead: what to call where one is needed.
        tensors: by the names of the caller's arguments.
    """
    if not goes_forward():
        return
    for argument, tensor in tensors.items():
        if isinstance(tensor, Tensor) and _forward_ad.unpack_dual(tensor).tangent is not None:
            raise UnsupportedError(
                argument,
                "a tensor with a forward-mode tangent",
                "reverse-mode differentiation, as in flash-attention",
                f"use torch.autograd.grad or backward() here, or {instead}",
            )
