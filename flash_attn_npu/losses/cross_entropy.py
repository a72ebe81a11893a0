"""Mirror of `flash_attn.losses.cross_entropy`: the loss as a module that reduces over rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from .._core.ground.dense_arguments import truth
from ..errors import ArgumentError, ArgumentTypeError, UnsupportedError, renamed
from ..ops.triton.cross_entropy import cross_entropy_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["CrossEntropyLoss", "cross_entropy_loss"]


class CrossEntropyLoss(nn.Module):
    """`cross_entropy_loss`, reduced over the rows.

    Args:
        ignore_index, label_smoothing, logit_scale, lse_square_scale, inplace_backward,
            process_group: as `cross_entropy_loss`.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for (batch,).
        return_z_loss: return (loss, z_loss), both reduced; z_loss is part of loss already and
            carries no gradient.

    Raises:
        UnsupportedError: another reduction. It is a NotImplementedError.

    Contract: flash-attention 2.8, `CrossEntropyLoss`.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        inplace_backward: bool = False,
        process_group: ProcessGroup | None = None,
        return_z_loss: bool = False,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "none", "sum"):
            raise UnsupportedError(
                "reduction",
                repr(reduction),
                "'mean', 'none' or 'sum'",
                "pass reduction='none' and reduce the losses yourself",
            )
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.logit_scale = logit_scale
        self.lse_square_scale = lse_square_scale
        self.inplace_backward = inplace_backward
        self.process_group = process_group
        self.return_z_loss = truth("return_z_loss", return_z_loss)

    def forward(
        self, input: Tensor, target: Tensor, precomputed_lse: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The loss, or (loss, z_loss).

        Args:
            input: (batch, vocab), any floating dtype: the logits.
            target: (batch,), any integer dtype: the labels.
            precomputed_lse: (batch,), the logsumexp of input; as `cross_entropy_loss`.

        Returns:
            A float32 scalar (float64 for float64), or (batch,) if reduction is "none". The mean
            is nan if every row is ignored, as 0 / 0 is; its gradient is 0 even then.

        Raises:
            ArgumentError, ArgumentTypeError: as `cross_entropy_loss`.
        """
        try:
            loss, z_loss = cross_entropy_loss(
                input,
                target,
                precomputed_lse=precomputed_lse,
                label_smoothing=self.label_smoothing,
                logit_scale=self.logit_scale,
                lse_square_scale=self.lse_square_scale,
                ignore_index=self.ignore_index,
                inplace_backward=self.inplace_backward,
                process_group=self.process_group,
            )
        except (ArgumentError, ArgumentTypeError, UnsupportedError) as error:
            raise renamed(error, {"logits": "input", "labels": "target"}) from None
        if self.reduction == "mean":
            counted = (target.long() != self.ignore_index).sum()
            loss, z_loss = loss.sum() / counted, z_loss.sum() / counted
        elif self.reduction == "sum":
            loss, z_loss = loss.sum(), z_loss.sum()
        return (loss, z_loss) if self.return_z_loss else loss
