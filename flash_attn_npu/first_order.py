"""Gradients that cannot be differentiated again, and refuse it instead of losing a term.

A gradient that autograd does not know how it came about counts as a constant: with
create_graph=True, whatever is differentiated next silently lacks its share.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .errors import UnsupportedError, explain

__all__ = ["first_order", "refuse_second"]


def first_order(function: str, gradients: Iterable[Any], *sources: Any) -> tuple[Any, ...]:
    """What a backward returns, with a refusal between it and what it was computed from.

    Args:
        function: whose gradients they are, for the message.
        gradients: tensors, and None.
        sources: what they depend on; what is no tensor, or needs no gradient, counts for nothing.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return tuple(gradients)
    known = [source for source in sources if isinstance(source, Tensor) and source.requires_grad]
    return tuple(
        None if gradient is None else refuse_second(function, gradient.detach(), *known)
        for gradient in gradients
    )


def refuse_second(function: str, gradient: Tensor, *sources: Tensor) -> Tensor:
    """The gradient, from which a backward to any of the sources raises UnsupportedError."""
    return _Refused.apply(function, gradient, *sources)  # type: ignore[no-any-return, no-untyped-call]


class _Refused(torch.autograd.Function):
    """A node between a gradient and its sources, which autograd cannot pass over."""

    @staticmethod
    def forward(ctx: Any, function: str, gradient: Tensor, *sources: Tensor) -> Tensor:
        ctx.function = function
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise UnsupportedError(
            explain(
                "create_graph",
                f"a second derivative of {ctx.function}",
                "first derivatives",
                "leave create_graph out, or take second derivatives of plain torch operations",
            )
        )
