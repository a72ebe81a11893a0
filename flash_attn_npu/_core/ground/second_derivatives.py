"""Gradients that cannot be differentiated again, and refuse it instead of losing a term.

A gradient that autograd does not know how it came about counts as a constant: with
create_graph=True, whatever is differentiated next silently lacks its share.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedError

__all__ = ["first_order", "once", "refuse_second", "watch"]

_compiling = torch.compiler.is_compiling


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


def once(function: str) -> Tensor:
    """What `watch` attaches to a call of one of torch_npu's differentiable operators.

    Their second derivatives are not there, and the terms get lost. The hooks of this tensor are
    shared with the node of a call, for a tenth of what `node.register_hook` costs.
    """

    def foresee(_: Tensor | None) -> None:
        if torch.is_grad_enabled():
            _refuse_at(torch._C._current_autograd_node(), function)

    with torch.inference_mode(False):
        carrier = torch.empty(0, device="cpu", requires_grad=True)
    carrier.register_hook(foresee)
    return carrier


def watch(first_output: Tensor, mark: Tensor) -> None:
    """Refuse derivatives of the gradients of the operator that made this output, its first."""
    if not _compiling():
        node: Any = first_output.grad_fn
        if node is not None:
            node._register_hook_dict(mark)


def _refuse_at(node: Any, function: str) -> None:
    """Refuse a derivative of the gradients that this node of the graph is about to compute."""

    def refuse(gradients: tuple[Tensor | None, ...], _: Any) -> tuple[Tensor | None, ...]:
        handle.remove()
        return tuple(
            gradient
            if gradient is None or not gradient.requires_grad
            else refuse_second(function, gradient.detach(), gradient)
            for gradient in gradients
        )

    handle = node.register_hook(refuse)


class _Refused(torch.autograd.Function):
    """A node between a gradient and its sources, which autograd cannot pass over."""

    generate_vmap_rule = True

    @staticmethod
    def forward(function: str, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.function = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise UnsupportedError(
            "create_graph",
            f"a second derivative of {ctx.function}",
            "first derivatives",
            "leave create_graph out, or take second derivatives of plain torch operations",
        )
