"""Cross entropy as a differentiable function, or on Ascend, where it may serve, torch_npu's."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ...errors import UnsupportedError
from ..ground.dense_arguments import refuse_transforms
from ..ground.functions import FORWARD, refuse_tangents
from ..ground.storage import overlaps_itself
from ..kernels.composed import cross_entropy as kernel
from ..problems.rowwise import Loss
from ..table.choice import begin, choose, recall
from ..verification.kinds import Refuted
from .keys import PLAIN_TORCH, key_of
from .small import is_few, is_small

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["CrossEntropyLoss", "LossCall", "cross_entropy"]


class LossCall(NamedTuple):
    """A call of `cross_entropy_loss`: its arguments, in flash-attention 2.8's order."""

    logits: Tensor
    labels: Tensor
    precomputed_lse: Tensor | None = None
    label_smoothing: float = 0.0
    logit_scale: float = 1.0
    lse_square_scale: float = 0.0
    ignore_index: int = -100
    inplace_backward: bool = False
    process_group: ProcessGroup | None = None


class CrossEntropyLoss(torch.autograd.Function):
    """Autograd of `cross_entropy_loss`. It keeps logits, labels and one number for each row."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        precomputed_lse: Tensor | None = None,
        smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        ignore_index: int = -100,
        inplace_backward: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> tuple[Tensor, Tensor]:
        """losses and z_losses of each row."""
        options = kernel.check(
            logits,
            labels,
            precomputed_lse,
            smoothing,
            logit_scale,
            lse_square_scale,
            ignore_index,
            process_group,
        )
        labels = labels.long()
        losses, z_losses, lse = kernel.forward(
            logits, labels, precomputed_lse, options, process_group
        )
        ctx.save_for_backward(logits, labels, lse)
        ctx.mark_non_differentiable(z_losses)
        ctx.options, ctx.process_group, ctx.inplace = options, process_group, inplace_backward
        return losses, z_losses

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor, grad_z_losses: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the logits; z_losses are in losses already, and have none."""
        logits, labels, lse = ctx.saved_tensors
        dlogits = kernel.backward(
            grad_losses, logits, labels, lse, ctx.options, ctx.process_group, ctx.inplace
        )
        return dlogits, None, None, None, None, None, None, None, None


def cross_entropy(call: LossCall) -> tuple[Tensor, Tensor]:
    """(losses, z_losses) of each row."""
    key = _key(call)
    found = None if key is None else recall(key)
    if found is None:
        options = _checked(call)
        found = choose(_problem(call, options), key)
    else:
        # numbers as they came: what equals a checked key is checked
        options = kernel.Options(*call[3:7])
        begin(found)
    if found.direct is not None:
        if FORWARD._current_level >= 0:
            refuse_tangents(PLAIN_TORCH, logits=call.logits)
        try:
            losses, z_losses = found.direct(call.logits, call.labels, options.ignore_index)
        except Refuted as refuted:
            return refuted.answer(lambda: cross_entropy(call))
        return losses, z_losses
    refuse_transforms("logits")
    if key is None and not _is_by_torch(call, options):
        losses, z_losses = CrossEntropyLoss.apply(*call)  # type: ignore[no-untyped-call]
        return losses, z_losses
    logits = call.logits
    loss = kernel.unrecorded
    if key is not None or is_small(logits):
        loss = kernel.recorded
        if call.inplace_backward and logits.requires_grad and torch.is_grad_enabled():
            logits = _overwritten(logits)
    try:
        return loss(logits, call.labels.long(), options)
    except IndexError:
        kernel.check_range(call.labels, options, logits.shape[1])
        raise


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


def _checked(call: LossCall) -> kernel.Options:
    # one by one: torch 2.6 and 2.8 cannot trace a slice of a NamedTuple
    return kernel.check(
        call.logits,
        call.labels,
        call.precomputed_lse,
        call.label_smoothing,
        call.logit_scale,
        call.lse_square_scale,
        call.ignore_index,
        call.process_group,
    )


def _is_by_torch(call: LossCall, options: kernel.Options) -> bool:
    """Whether torch's own loss serves, and its autograd if that keeps little."""
    logits = call.logits
    if torch.compiler.is_compiling() or logits.device.type != "cpu" or not logits.shape[0]:
        return False
    if call.process_group is not None or not 0 <= options.smoothing <= 1:
        return False
    if kernel.takes_lse(call.precomputed_lse, options):
        return False
    if torch.is_grad_enabled() and logits.requires_grad:
        return is_small(logits)
    return True


def _key(call: LossCall) -> Hashable:
    """`key_of` for a small call, whose labels are not looked at; else None."""
    logits, labels, lse, smoothing, scale, square, ignore, inplace, group = call
    if lse is not None or group is not None or type(ignore) is not int or type(inplace) is not bool:
        return None
    # written out: `any` over these would cost as much as the key
    if not type(smoothing) is type(scale) is type(square) is float or not 0 <= smoothing <= 1:
        return None
    options = (smoothing, scale, square, ignore, inplace)
    key = key_of("cross_entropy_loss", options, logits, labels)
    return key if key is not None and is_few(logits) else None


def _problem(call: LossCall, options: kernel.Options) -> Loss:
    logits = call.logits
    return Loss(
        function="cross_entropy_loss",
        device=logits.device,
        dtype=logits.dtype,
        empty=logits.numel() == 0,
        rows=logits.shape[0],
        label_smoothing=options.smoothing,
        logit_scale=options.logit_scale,
        lse_square_scale=options.lse_square_scale,
        precomputed=kernel.takes_lse(call.precomputed_lse, options),
        parallel=call.process_group is not None,
        inplace_backward=bool(call.inplace_backward),
        needs_grad=torch.is_grad_enabled() and logits.requires_grad,
        compiling=torch.compiler.is_compiling(),
    )
