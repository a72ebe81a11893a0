"""What plans of calls that are not attention are remembered by."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from ..ground.functions import PLAIN

__all__ = ["PLAIN_TORCH", "STRIDED", "key_of"]

PLAIN_TORCH = "plain torch operations"
"""What to call for derivatives that no fused kernel has."""

_compiling = torch.compiler.is_compiling
_grad_enabled = torch.is_grad_enabled
STRIDED = torch.strided


def key_of(function: str, options: tuple[Hashable, ...], *tensors: Any) -> Hashable:
    """All that checks and table look at, of a call whose tensors are plain; else None.

    None, too, while a call is traced. What equals a checked key need not be checked again.

    Args:
        options: what matters besides the tensors, in one order.
        tensors: in one order.
    """
    if _compiling():
        return None
    grad = _grad_enabled()
    facts: list[Any] = [function, grad, *options]
    try:
        for tensor in tensors:
            if type(tensor) not in PLAIN or tensor.layout is not STRIDED:
                return None
            facts += (tensor.shape, tensor.dtype, tensor.device, grad and tensor.requires_grad)
    except RuntimeError:
        # a nested tensor has no shape
        return None
    return tuple(facts)
