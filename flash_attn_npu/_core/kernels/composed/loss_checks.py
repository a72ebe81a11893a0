"""What logits and labels have to be."""

from __future__ import annotations

from torch import Tensor

from ....errors import ArgumentError

__all__ = ["check_floating", "check_logits", "check_range", "check_rows"]


def check_logits(logits: Tensor) -> None:
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ArgumentError(
            "logits",
            f"shape {tuple(logits.shape)}",
            "(batch, vocab), with at least one class",
            "pass logits.view(-1, vocab), and the labels as labels.view(-1)",
        )
    check_floating("logits", logits)


def check_floating(argument: str, tensor: Tensor) -> None:
    if not tensor.dtype.is_floating_point:
        raise ArgumentError(argument, tensor.dtype, "a floating dtype", f"pass {argument}.float()")


def check_rows(argument: str, tensor: Tensor, logits: Tensor) -> None:
    if tensor.shape != logits.shape[:1]:
        raise ArgumentError(
            argument,
            f"shape {tuple(tensor.shape)}",
            f"({logits.shape[0]},), one for each row of logits",
            f"pass {argument}.view(-1), and the logits as (batch, vocab)",
        )
    if tensor.device != logits.device:
        raise ArgumentError(
            argument,
            tensor.device,
            f"{logits.device}, as logits",
            f"pass {argument}.to(logits.device)",
        )


def check_range(labels: Tensor, ignore_index: int, classes: int) -> None:
    """Raise ArgumentError for the first label that is neither a class nor ignored."""
    counted = labels.long()
    foreign = counted[((counted < 0) | (counted >= classes)) & (counted != ignore_index)]
    if foreign.numel():
        raise ArgumentError(
            "labels",
            f"a label {foreign[0].item()}",
            f"0 to {classes - 1}, or ignore_index={ignore_index}",
            "pass ignore_index for labels that do not count, and global indices with process_group",
        )
