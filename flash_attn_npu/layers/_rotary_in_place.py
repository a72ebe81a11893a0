"""Rotations in place, as far as autograd lets them be declared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["copied", "in_place", "is_written_beside"]

_creation_meta = torch._C._autograd._get_creation_meta
_PLAIN_VIEW = torch._C._autograd.CreationMeta.DEFAULT


def in_place(ctx: Any, x: Tensor) -> Tensor:
    """What to write x through; the caller then returns x itself.

    Autograd lets nobody declare a leaf changed, nor one of several views that were made at once,
    nor a view that an autograd.Function has made. Those it takes for unchanged, and what is
    returned is another tensor over x's memory.
    """
    if torch.compiler.is_compiling():
        ctx.mark_dirty(x)
    elif x.requires_grad and x.is_leaf:
        return x
    elif x._is_view() and (_creation_meta(x) != _PLAIN_VIEW or _is_wanted_leaf(x._base)):
        return x.data
    else:
        ctx.mark_dirty(x)
    return x


def _is_wanted_leaf(x: Tensor | None) -> bool:
    """Whether autograd puts a gradient into x itself, and lets nobody declare it changed."""
    return x is not None and x.requires_grad and x.is_leaf


def is_written_beside(x: Tensor) -> bool:
    """Whether x is written behind an autograd.Function, and not by it, under torch.compile.

    There it may neither declare a leaf changed nor return it; and where it declares a view changed,
    AOTAutograd ends in an internal assertion, and other graphs lose the gradient of the base.
    """
    return torch.compiler.is_compiling() and (x.is_leaf or x._base is not None)


def copied(x: Tensor, rotated: Tensor) -> Tensor:
    """x with the values of `rotated`; that itself, where autograd has to take x for unchanged."""
    if not (x.is_leaf or _is_wanted_leaf(x._base)):
        return x.copy_(rotated)
    with torch.no_grad():
        x.copy_(rotated)
    return rotated
