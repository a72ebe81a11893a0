"""Torch's operators as C calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverloadPacket

__all__ = ["behind"]


def behind(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The C function that a call of `torch.ops.npu.NAME` ends in, 0.5 us of Python later.

    What is not such an operator, but stands in for one, is given back as it is, and so is
    everything while torch.compile traces, which cannot trace the C function.
    """
    if torch.compiler.is_compiling() or type(operator) is not OpOverloadPacket:
        return operator
    # scripted objects among its arguments would have to be looked for first
    if getattr(operator, "_has_torchbind_op_overload", False):
        return operator
    return getattr(operator, "_op", operator)
