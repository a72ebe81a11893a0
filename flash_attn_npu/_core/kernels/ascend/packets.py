"""Torch's operators as C calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverloadPacket

from ...ground.memory import Memo

__all__ = ["behind", "launcher"]

_compiling = torch.compiler.is_dynamo_compiling
_behind: Memo[str, tuple[Callable[..., Any], Callable[..., Any]]] = Memo(
    "C functions of operators", 64
)


def behind(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The C function that a call of `torch.ops.npu.NAME` ends in, 0.5 us of Python later.

    What is not such an operator, but stands in for one, is given back as it is, and so is
    everything while torch.compile traces, which cannot trace the C function.
    """
    if _compiling() or type(operator) is not OpOverloadPacket:
        return operator
    # scripted objects among its arguments would have to be looked for first
    if getattr(operator, "_has_torchbind_op_overload", False):
        return operator
    return getattr(operator, "_op", operator)


def launcher(name: str) -> Callable[..., Any]:
    """What is `behind` torch_npu's operator of this name, which tools may have replaced."""
    import torch_npu

    operator: Callable[..., Any] = getattr(torch_npu, name)
    if _compiling():
        return operator
    known = _behind.recall(name)
    if known is None or known[0] is not operator:
        known = operator, behind(operator)
        _behind.put(name, known)
    return known[1]
