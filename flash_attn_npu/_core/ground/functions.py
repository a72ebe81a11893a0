"""Calls of autograd functions, without what a call need not ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["PLAIN", "bare", "is_undisturbed", "unwrapped"]

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


def bare(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` for `unwrapped` tensors of `PLAIN` types, undisturbed: 2 to 4 us less."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc, no-any-return]
