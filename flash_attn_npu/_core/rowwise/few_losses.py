"""Losses of a few rows on a CPU: torch's own, and one that writes its gradient over the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedError
from ..ground.functions import FORWARD, bare, unwrapped
from ..ground.storage import overlaps_itself
from ..kernels.composed import cross_entropy as kernel

__all__ = ["FewLossesInPlace", "in_place"]

_nll_loss = torch._C._nn.nll_loss  # type: ignore[attr-defined]
_nll_loss_backward = torch.ops.aten.nll_loss_backward.default
_log_softmax_backward = torch._C._VariableFunctions._log_softmax_backward_data
_NO_REDUCTION = 0

PLAIN_OPTIONS = (0.0, 1.0, 0.0)
"""No smoothing, no scale and no square."""


def in_place(options: kernel.Options, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`kernel.recorded` of logits with a gradient, which is written over them.

    Raises:
        IndexError: a label is not a class.
    """
    # what goes forward is left to torch, whose own operations have tangents
    if options[:3] != PLAIN_OPTIONS or FORWARD._current_level >= 0:
        return kernel.recorded(options, _overwritten(logits), labels)
    labels = labels if labels.dtype is torch.int64 else labels.long()
    losses = _recorded(unwrapped(logits), unwrapped(labels), options.ignore_index)
    return losses, torch.zeros_like(losses)


class FewLossesInPlace(torch.autograd.Function):
    """The loss without options, whose gradient lies in the logits; it keeps their log-softmax.

    The operations are those of torch's own loss and gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        wide = torch.float64 if logits.dtype is torch.float64 else torch.float32
        chances = torch.log_softmax(logits, 1, wide)
        losses: Tensor = _nll_loss(chances, labels, None, _NO_REDUCTION, ignore_index)
        # the logits, so that autograd finds out where somebody has written to them
        ctx.save_for_backward(logits, chances, labels)
        ctx.ignore_index = ignore_index
        return losses

    @staticmethod
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, None, None]:
        logits, chances, labels = ctx.saved_tensors
        ignore = ctx.ignore_index
        if torch.is_grad_enabled():
            options = kernel.Options(*PLAIN_OPTIONS, ignore)
            losses = kernel.recorded(options, logits, labels)[0]
            (gradient,) = torch.autograd.grad(losses, logits, dlosses, create_graph=True)
            return gradient, None, None
        dchances = _nll_loss_backward(
            dlosses, chances, labels, None, _NO_REDUCTION, ignore, _TOTAL_WEIGHT
        )
        target, wide = logits.detach(), chances.dtype
        ignored = kernel.ignored(labels, ignore)
        if wide is logits.dtype and logits.is_contiguous():
            _log_softmax_backward(dchances, chances, 1, wide, out=target)
        else:
            gradient = _log_softmax_backward(dchances, chances, 1, wide)
            overlaps = not logits.is_contiguous() and overlaps_itself(logits)
            target = gradient.to(logits.dtype) if overlaps else target.copy_(gradient)
        # their gradient is 0 whatever they hold
        return target if ignored is None else target.masked_fill_(ignored[:, None], 0), None, None


_recorded = bare(FewLossesInPlace)
_TOTAL_WEIGHT = torch.zeros((), device="cpu")
"""What the gradient of a mean is divided by."""


def _overwritten(logits: Tensor) -> Tensor:
    """The logits, widened, over which autograd writes their gradient once it has computed it."""
    # the first of the operations that lead away from them, and the last of the way back
    narrow = logits.dtype in (torch.float16, torch.bfloat16)
    first, version = logits.float() if narrow else logits.view_as(logits), logits._version

    def overwrite(gradients: tuple[Tensor | None, ...], _: Any) -> tuple[Tensor] | None:
        if logits._version != version:
            raise UnsupportedError(
                "inplace_backward",
                "logits modified by an inplace operation, such as a backward before this one",
                "logits that hold what they held in the forward",
                "run one backward, or leave inplace_backward out",
            )
        (gradient,) = gradients
        if gradient is None or torch.is_grad_enabled():
            return None
        if not logits.is_contiguous() and overlaps_itself(logits):
            return None
        return (logits.detach().copy_(gradient),)

    node: Any = first.grad_fn
    node.register_hook(overwrite)
    return first
