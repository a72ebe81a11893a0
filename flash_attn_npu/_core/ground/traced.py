"""The policy and the report of what torch.compile traces: applied once for each graph.

A graph of plain torch operations has no place for a count without losing what a compiler gains, so
a call is counted where it is traced. The policy is read by traced code, and so guarded: a call
under another policy is traced, and decided, anew.
"""

from __future__ import annotations

from typing import Any

import torch

from ...errors import UnsupportedError
from . import policy, usage
from .settings import traced

__all__ = ["note"]

UNASKED = "not known of a call that torch.compile traces"
"""Told of an Ascend in the report: the reasons of a graph off a card are those of its device."""


def note(function: str, device: str, operator: str, reasons: tuple[str, ...], work: bool) -> None:
    """Count one call in a graph, and apply the fallback policy to it.

    Args:
        reasons: why no fused operator serves; empty if one does.
        work: there is something to compute.

    Raises:
        UnsupportedError: the call is composed, and the policy is `error`.
    """
    _note(function, device, operator, reasons, work, traced.policy)


def _note(
    function: str, device: str, operator: str, reasons: tuple[str, ...], work: bool, _: str
) -> None:
    if reasons and work:
        try:
            policy.permit(function, torch.device(device), reasons)
        except UnsupportedError as error:
            raise _refusal()(error) from None
    told = "" if device == "npu" else UNASKED
    usage.tally(f"{function} (compiled)", operator, reasons, told).calls += 1


# what torch.compiler.assume_constant_result sets, which would import all of dynamo: the compiler
# calls it while it traces, and puts nothing into the graph
_note._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _refusal() -> Any:
    """An UnsupportedError that dynamo hands on: a graph break, or the end of a fullgraph."""
    from torch._dynamo.exc import Unsupported

    class RefusedError(UnsupportedError, Unsupported):
        """A call that the policy refuses, found while tracing."""

        def __init__(self, error: UnsupportedError) -> None:
            Unsupported.__init__(self, str(error))
            self.__dict__.update(vars(error))

    RefusedError.__name__ = RefusedError.__qualname__ = UnsupportedError.__name__
    return RefusedError
