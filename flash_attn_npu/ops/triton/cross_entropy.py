"""Mirror of `flash_attn.ops.triton.cross_entropy`: the loss; the Triton kernels are absent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..._core.rowwise.losses import CrossEntropyLoss, cross_entropy

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["CrossEntropyLoss", "cross_entropy_loss"]


def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    precomputed_lse: Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of each row, optionally with a penalty on its normalizer.

    With x = logit_scale * logits, lse = logsumexp(x) and s = label_smoothing, a row's loss is
    lse - (1 - s) * x[label] - s * mean(x) + z_loss, where z_loss = lse_square_scale * lse ** 2.

    Args:
        logits: (batch, vocab), any floating dtype, any strides; float32 inside (float64 for
            float64), also under autocast.
        labels: (batch,), any integer dtype: 0 to vocab - 1, or ignore_index.
        precomputed_lse: (batch,), the logsumexp of the logits that are passed, of this rank's
            classes with a process_group, taken for what would be computed; no gradient flows into
            it. With label_smoothing or another logit_scale than 1 it counts for nothing.
        label_smoothing: s, how much of the target is spread evenly over all classes.
        logit_scale: multiplies the logits.
        lse_square_scale: weight of z_loss.
        ignore_index: rows with this label have loss 0, z_loss 0 and gradient 0.
        inplace_backward: write the gradient over the logits, which are lost, also where they
            are a view or a leaf. What was saved for another backward is guarded by autograd as
            ever: it raises. Without effect under torch.compile, and on logits whose elements share
            memory.
        process_group: rank r of it holds classes r * vocab to (r + 1) * vocab - 1; vocab is the
            same in every rank, labels are global indices, and lse, mean and the results are
            those of all classes, the same in every rank. The gradient is that of the rank's own
            logits; every rank is to pass the same gradient of losses.

    Returns:
        (losses, z_losses), both (batch,) and float32 (float64 for float64 logits). z_losses are
        part of losses already, and carry no gradient.

    Raises:
        ArgumentError: shapes, dtypes or devices do not fit, or a label is not a class. Labels on
            a device, or under torch.compile, are not looked at: there the loss of such a row is
            nan.
        ArgumentTypeError: an argument is an object of the wrong type.
        UnsupportedError: a second derivative with a process_group, or of the fused operator.

    Contract: flash-attention 2.8, `cross_entropy_loss`. Wider: devices, float64, strides, second
    derivatives (of lse as it depends on the logits, also if it was passed) where it is composed.
    Different: labels that are not a class are refused.
    """
    # fmt: off
    return cross_entropy((
        logits, labels, precomputed_lse, label_smoothing, logit_scale, lse_square_scale,
        ignore_index, inplace_backward, process_group,
    ))
    # fmt: on
