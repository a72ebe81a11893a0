"""What plans of calls that are not attention are remembered by."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

__all__ = ["key_of"]

PLAIN = (Tensor, torch.nn.Parameter)


def key_of(
    function: str, options: tuple[Hashable, ...], *tensors: Any, optional: tuple[Any, ...] = ()
) -> Hashable:
    """All that checks and table look at, of a call whose tensors are plain; else None.

    None, too, while a call is traced. What equals a checked key need not be checked again.

    Args:
        options: what matters besides the tensors, in one order.
        tensors, optional: each in one order; of the latter any may be None.
    """
    if torch.compiler.is_compiling():
        return None
    facts: list[Any] = [function, torch.is_grad_enabled(), *options]
    for tensor in (*tensors, *optional) if optional else tensors:
        if type(tensor) in PLAIN and tensor.layout is torch.strided and not tensor.is_nested:
            facts += (tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad)
        elif tensor is None and optional:
            facts.append(None)
        else:
            return None
    return tuple(facts)
