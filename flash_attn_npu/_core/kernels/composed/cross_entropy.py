"""Cross entropy of rows of logits and its gradient, in float32 (float64 for float64 logits).

`forward` and `backward` work on values; `rowwise.losses` makes a differentiable function of
them. Rows are taken in chunks, so that 16-bit logits are never held in float32 as a whole.
`_row_terms` and `_gradient` see all classes; everything else works on one number for each row.
"""

from __future__ import annotations

from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ....errors import ArgumentError, ArgumentTypeError, UnsupportedError
from ...ground.collectives import gather_rows
from ...ground.dense_arguments import number, require_dense, require_group
from ...ground.storage import overlaps_itself
from .loss_checks import check_floating, check_logits, check_range, check_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "Options",
    "backward",
    "check",
    "forward",
    "ignored",
    "recorded",
    "takes_lse",
    "unrecorded",
    "unscaled",
]

CHUNK_ELEMENTS = 1 << 22
"""Logits that are widened at a time."""

HOST_CHUNK = 1 << 17
"""The same on the CPU, where what is computed on the way stays in a core's cache."""


READ = 64
"""Labels that are read one by one."""

_ALREADY_WIDE = (torch.float32, torch.float64)
_cross_entropy: Any = torch._C._nn.cross_entropy_loss
"""That of torch.nn.functional without the way there."""

_NO_REDUCTION = 0


class Options(NamedTuple):
    """What a loss is made of beside its tensors."""

    smoothing: float
    logit_scale: float
    lse_square_scale: float
    ignore_index: int


def check(
    logits: Any,
    labels: Any,
    precomputed_lse: Any,
    smoothing: Any,
    logit_scale: Any,
    lse_square_scale: Any,
    ignore_index: Any,
    process_group: ProcessGroup | None,
) -> Options:
    """The options as plain numbers, once every argument is found to fit."""
    require_dense(logits=logits, labels=labels)
    check_logits(logits)
    check_rows("labels", labels, logits)
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise ArgumentError("labels", labels.dtype, "an integer dtype", "pass labels.long()")
    if precomputed_lse is not None:
        require_dense(precomputed_lse=precomputed_lse)
        check_rows("precomputed_lse", precomputed_lse, logits)
        check_floating("precomputed_lse", precomputed_lse)
    if not isinstance(ignore_index, (int, Integral)):
        raise ArgumentTypeError(
            "ignore_index", type(ignore_index).__name__, "an int", "pass a class index"
        )
    require_group(process_group)
    options = Options(
        number("label_smoothing", smoothing),
        number("logit_scale", logit_scale),
        number("lse_square_scale", lse_square_scale),
        int(ignore_index),
    )
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        check_range(labels, options.ignore_index, _classes(logits, process_group)[1])
    return options


def forward(
    logits: Tensor,
    labels: Tensor,
    precomputed_lse: Tensor | None,
    options: Options,
    process_group: ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, z_losses, lse), each (batch,), of logits (batch, classes of this rank).

    Here and in `backward` labels are int64: -100 compared with uint8 is not what it seems.
    """
    first, classes = _classes(logits, process_group)
    own_lse = precomputed_lse if takes_lse(precomputed_lse, options) else None
    terms = _row_terms(logits, labels, first, options, own_lse)
    if process_group is not None and terms.numel():
        gathered = gather_rows(terms, process_group)[0].unflatten(0, (-1, 3))
        terms = torch.stack((gathered[:, 0].logsumexp(0), *gathered[:, 1:].sum(0)))
    lse, target, total = terms
    losses = lse - (1 - options.smoothing) * target
    if options.smoothing != 0:
        losses = losses - (options.smoothing / classes) * total
    z_losses = torch.zeros_like(lse)
    if options.lse_square_scale != 0:
        z_losses = options.lse_square_scale * lse.square()
        losses = losses + z_losses
    # a label that could not be refused without a look at the device must not pass for a number
    foreign = (labels < 0) | (labels >= classes)
    ignored = labels == options.ignore_index
    losses = losses.masked_fill(foreign, float("nan")).masked_fill(ignored, 0.0)
    return losses, z_losses.masked_fill(ignored, 0.0), lse


def recorded(options: Options, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """losses and z_losses by torch's own cross entropy, which its autograd can differentiate.

    Labels may be of any integer dtype.

    Raises:
        IndexError: a label is not a class.
    """
    smoothing, scale, square, ignore = options
    labels = labels if labels.dtype is torch.int64 else labels.long()
    # no call of `to` where there is nothing to convert: it would be a third of all that is done
    scaled = logits if logits.dtype in _ALREADY_WIDE else logits.float()
    if scale != 1:
        scaled = scaled * scale
    without = None
    # without a gradient torch's loss leaves out what ignored rows hold by itself
    if square != 0 or (scaled.requires_grad and torch.is_grad_enabled()):
        without = ignored(labels, ignore)
    if without is not None:
        # their gradient is 0 whatever they hold
        scaled = scaled.masked_fill(without[:, None], 0.0)
    losses: Tensor = _cross_entropy(scaled, labels, None, _NO_REDUCTION, ignore, smoothing)
    if square == 0:
        return losses, torch.zeros_like(losses)
    z_losses = square * scaled.logsumexp(1).square()
    if without is not None:
        z_losses = z_losses.masked_fill(without, 0.0)
    return losses + z_losses, z_losses.detach()


def unscaled(
    widens: bool, ignore_index: int, smoothing: float, logits: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """`recorded` of int64 labels without a gradient, a scale and a square.

    Args:
        widens: the logits are of 16 bit.
    """
    wide = logits.float() if widens else logits
    losses: Tensor = _cross_entropy(wide, labels, None, _NO_REDUCTION, ignore_index, smoothing)
    return losses, torch.zeros_like(losses)


def ignored(labels: Tensor, ignore_index: int) -> Tensor | None:
    """Which rows do not count; None where all do, as they nearly always do in a small call."""
    # a few numbers are read faster than they are compared
    if labels.shape[0] <= READ and ignore_index not in labels.tolist():
        return None
    without = labels == ignore_index
    return without if bool(without.any()) else None


def unrecorded(options: Options, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`recorded` of many logits, without a gradient."""
    parts = [recorded(options, logits[rows], labels[rows]) for rows in _chunks(logits)]
    losses, z_losses = (torch.cat(part) for part in zip(*parts, strict=True))
    return losses, z_losses


def backward(
    dlosses: Tensor,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    options: Options,
    process_group: ProcessGroup | None,
    inplace: bool,
) -> Tensor:
    """The gradient of this rank's logits, in their dtype; over them if inplace.

    Under grad mode it is differentiable itself, and never in place.
    """
    compiling = torch.compiler.is_compiling()
    if torch.is_grad_enabled() and not compiling:
        return _differentiable(dlosses, logits, labels, lse, options, process_group)
    with torch.no_grad():
        if inplace and not compiling and not overlaps_itself(logits):
            dlogits = logits.detach()
        else:
            dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        classes = _classes(logits, process_group)
        for rows in _chunks(logits):
            tensors = dlosses[rows], logits[rows], labels[rows], lse[rows]
            if compiling:
                dlogits[rows] = _gradient(*tensors, options, *classes)
            else:
                _write_gradient(dlogits[rows], *tensors, options, *classes)
    return dlogits


def _differentiable(
    dlosses: Tensor,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    options: Options,
    process_group: ProcessGroup | None,
) -> Tensor:
    """The gradient as a function of dlosses and logits, by operations that autograd knows."""
    if process_group is not None:
        raise UnsupportedError(
            "create_graph",
            "True with a process_group",
            "second derivatives on one process",
            "leave create_graph out, or gather the logits and leave process_group out",
        )
    traced = _scaled(logits, options.logit_scale).logsumexp(1)
    lse = lse + (traced - traced.detach())  # the value that came, which may be a precomputed one
    grad = _gradient(dlosses, logits, labels, lse, options, 0, logits.shape[1])
    return grad.to(logits.dtype)


def _gradient(
    dlosses: Tensor,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    options: Options,
    first: int,
    classes: int,
) -> Tensor:
    """The gradient of some rows, not rounded yet."""
    lse, factor = lse[:, None], dlosses[:, None].to(lse.dtype) * options.logit_scale
    column, owned = _column(labels, first, logits.shape[1])
    grad = (_scaled(logits, options.logit_scale) - lse).exp()
    if options.lse_square_scale != 0:
        grad = grad * (1 + 2 * options.lse_square_scale * lse)
    if options.smoothing != 0:
        grad = grad - options.smoothing / classes
    target = owned.to(grad.dtype) * (1 - options.smoothing)
    grad = grad.scatter(1, column, grad.gather(1, column) - target)
    # filled, not multiplied by 0: what comes for an ignored row may be infinite
    return (grad * factor).masked_fill((labels == options.ignore_index)[:, None], 0.0)


def _write_gradient(
    out: Tensor,
    dlosses: Tensor,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    options: Options,
    first: int,
    classes: int,
) -> None:
    """`_gradient` written to `out`, which may be the logits, and computed there if it is wide."""
    lse, factor = lse[:, None], dlosses[:, None].to(lse.dtype) * options.logit_scale
    column, owned = _column(labels, first, logits.shape[1])
    scaled = _scaled(logits, options.logit_scale)
    buffer = out if out.dtype == scaled.dtype else torch.empty_like(scaled)
    grad = torch.sub(scaled, lse, out=buffer).exp_()
    along = factor
    if options.lse_square_scale != 0:
        along = factor * (1 + 2 * options.lse_square_scale * lse)
    grad.mul_(along)
    if options.smoothing != 0:
        grad.sub_(factor * (options.smoothing / classes))
    grad.scatter_add_(1, column, owned * factor * (options.smoothing - 1))
    ignored = labels == options.ignore_index
    # filled, not multiplied by 0: what comes for an ignored row may be infinite
    if grad.device.type != "cpu" or bool(ignored.any()):
        grad.masked_fill_(ignored[:, None], 0.0)
    if grad is not out:
        out.copy_(grad)


def takes_lse(precomputed_lse: Tensor | None, options: Options) -> bool:
    """Whether a given lse is used: with a scale or smoothing flash-attention computes its own."""
    return precomputed_lse is not None and options.logit_scale == 1 and options.smoothing == 0


def _row_terms(
    logits: Tensor, labels: Tensor, first: int, options: Options, own_lse: Tensor | None
) -> Tensor:
    """(3, batch): lse, the target's logit and the sum of the logits, over this rank's classes.

    Logits are scaled. The lse is own_lse if that is given. The target's logit is 0 where another
    rank holds it. The sum is 0 without smoothing, where it would be -inf * 0 for masked classes.
    """
    terms = torch.zeros((3, logits.shape[0]), dtype=_wide(logits), device=logits.device)
    if own_lse is not None:
        terms[0] = own_lse.detach()
    column, owned = _column(labels, first, logits.shape[1])
    target = _scaled(logits.gather(1, column), options.logit_scale)
    terms[1] = target.masked_fill(~owned, 0.0)[:, 0]
    for rows in _chunks(logits) if own_lse is None or options.smoothing != 0 else ():
        scaled = _scaled(logits[rows], options.logit_scale)
        if own_lse is None:
            terms[0, rows] = scaled.logsumexp(1)
        if options.smoothing != 0:
            terms[2, rows] = scaled.sum(1)
    return terms


def _wide(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _scaled(logits: Tensor, scale: float) -> Tensor:
    wide = logits.to(_wide(logits))
    return wide if scale == 1 else wide * scale


def _chunks(logits: Tensor) -> list[slice]:
    """Which rows are widened at a time; all of them for a compiler, which plans by itself."""
    rows, columns = logits.shape
    if torch.compiler.is_compiling():
        return [slice(None)]
    limit = min(CHUNK_ELEMENTS, HOST_CHUNK) if logits.device.type == "cpu" else CHUNK_ELEMENTS
    step = max(1, limit // columns)
    return [slice(start, start + step) for start in range(0, rows, step)]


def _column(labels: Tensor, first: int, columns: int) -> tuple[Tensor, Tensor]:
    """Each row's own column, (batch, 1), and whether this rank has it; if not, any column."""
    column = labels[:, None] - first
    owned = (column >= 0) & (column < columns)
    return column.clamp(0, columns - 1), owned


def _classes(logits: Tensor, process_group: ProcessGroup | None) -> tuple[int, int]:
    """The first of this rank's classes, and how many there are in all ranks."""
    columns = logits.shape[1]
    if process_group is None:
        return 0, columns
    rank, ranks = dist.get_rank(process_group), dist.get_world_size(process_group)
    return rank * columns, ranks * columns
