"""Cross entropy as a differentiable function, or on Ascend, where it may serve, torch_npu's."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..ground.dense_arguments import refuse_transforms, require_local, require_truth
from ..ground.functions import FORWARD, PLAIN, refuse_tangents
from ..kernels.composed import cross_entropy as kernel
from ..problems.rowwise import Loss
from ..table.choice import begin, choose, recall
from ..verification.kinds import Refuted
from . import few_losses
from .keys import PLAIN_TORCH
from .small import is_few, is_small

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["CrossEntropyLoss", "LossCall", "cross_entropy"]

_compiling = torch.compiler.is_compiling
_grad_enabled = torch.is_grad_enabled
_transforming = torch._C._are_functorch_transforms_active


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


def cross_entropy(fields: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """(losses, z_losses) of each row.

    Args:
        fields: those of LossCall, in their order; to make one of them takes longer than to read it.
    """
    key = _key(fields)
    found = None if key is None else recall(key)
    if found is not None and found.few is not None and not _transforming():
        # what equals a checked key is checked but for the labels, which torch looks at
        begin(found)
        try:
            return found.few(fields[0], fields[1])  # type: ignore[no-any-return]
        except IndexError:
            _checked(LossCall(*fields))
            raise
    call = LossCall(*fields)
    options = _checked(call)
    if found is None:
        key = key if is_few(call.logits) else None
        found = choose(_problem(call, options), key)
    else:
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
    if not _is_by_torch(call, options):
        losses, z_losses = CrossEntropyLoss.apply(*call)  # type: ignore[no-untyped-call]
        return losses, z_losses
    if not is_small(call.logits):
        return kernel.unrecorded(options, call.logits, call.labels)
    few = _few(call, options, found.problem.needs_grad)
    if key is not None:
        found.few = few
    return few(call.logits, call.labels)


def _few(
    call: LossCall, options: kernel.Options, needs_grad: bool
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """How calls of a few rows are served that equal this one in all that its key holds."""
    smoothing, scale, square, ignore = options
    if needs_grad:
        return partial(few_losses.in_place if call.inplace_backward else kernel.recorded, options)
    if scale != 1 or square != 0 or call.labels.dtype != torch.int64:
        return partial(kernel.recorded, options)
    widens = call.logits.dtype not in (torch.float32, torch.float64)
    return partial(kernel.unscaled, widens, ignore, smoothing)


def _checked(call: LossCall) -> kernel.Options:
    require_truth(inplace_backward=call.inplace_backward)
    require_local(logits=call.logits, labels=call.labels)
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


def _key(fields: tuple[Any, ...]) -> Hashable:
    """`key_of` written out, for a call whose labels are not looked at if it is small; else None."""
    logits, labels, lse, smoothing, scale, square, ignore, inplace, group = fields
    if lse is not None or group is not None or _compiling():
        return None
    # written out: `any` over these would cost as much as the key
    if not type(smoothing) is type(scale) is type(square) is float or not 0 <= smoothing <= 1:
        return None
    if type(ignore) is not int or type(inplace) is not bool:
        return None
    if type(logits) not in PLAIN or type(labels) not in PLAIN:
        return None
    if not (logits.is_cpu and labels.is_cpu):
        return None
    grad = _grad_enabled()
    try:
        # fmt: off
        return (
            "cross_entropy_loss", grad, smoothing, scale, square, ignore, inplace,
            logits.shape, logits.dtype, logits.layout, grad and logits.requires_grad,
            labels.shape, labels.dtype, labels.layout,
        )
        # fmt: on
    except RuntimeError:
        # a nested tensor has no shape
        return None


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
