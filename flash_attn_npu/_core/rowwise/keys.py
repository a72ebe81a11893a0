"""What plans of calls that are not attention are remembered by."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from ..ground.functions import PLAIN

__all__ = ["key_of"]

_compiling = torch.compiler.is_compiling
_grad_enabled = torch.is_grad_enabled
_STRIDED = torch.strided


def key_of(
    function: str, options: tuple[Hashable, ...], *tensors: Any, optional: tuple[Any, ...] = ()
) -> Hashable:
    """All that checks and table look at, of a call whose tensors are plain; else None.

    None, too, while a call is traced. What equals a checked key need not be checked again.

    Args:
        options: what matters besides the tensors, in one order.
        tensors, optional: each in one order; of the latter any may be None.
    """
    if _compiling():
        return None
    grad = _grad_enabled()
    facts: list[Any] = [function, grad, *options]
    try:
        for tensor in (*tensors, *optional) if optional else tensors:
            if type(tensor) in PLAIN and tensor.layout is _STRIDED:
                facts += (tensor.shape, tensor.dtype, tensor.device, grad and tensor.requires_grad)
            elif tensor is None and optional:
                facts.append(None)
            else:
                return None
    except RuntimeError:
        # a nested tensor has no shape
        return None
    return tuple(facts)
