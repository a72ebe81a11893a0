"""Checks of the tensors that `models.bert` takes."""

from __future__ import annotations

from torch import Tensor

from .._core.ground.arguments import require_tensors
from ..errors import ArgumentError

__all__ = ["as_mask", "check_first", "check_labelled", "check_labels"]


def as_mask(argument: str, mask: Tensor | None, hidden_states: Tensor) -> Tensor | None:
    """mask as bool, (batch, seqlen) of hidden_states.

    Raises:
        ArgumentTypeError: mask is no tensor.
        ArgumentError: mask has another shape, or is floating.
    """
    if mask is None:
        return None
    require_tensors(**{argument: mask})
    shape = tuple(hidden_states.shape[:2])
    if mask.shape == shape and not mask.is_floating_point():
        return mask.bool()
    raise ArgumentError(
        argument,
        f"a {mask.dtype} tensor of shape {tuple(mask.shape)}",
        f"a bool or integer tensor of shape {shape}, nonzero for a token",
        "pass one entry for each token, and no mask that is to be added",
    )


def check_first(first: Tensor, batch: int) -> None:
    """first: the packed tokens that are the first of a row, of which none may be padding."""
    if first.shape[0] != batch:
        raise ArgumentError(
            "attention_mask",
            f"a mask of which {first.shape[0]} of {batch} rows begin with a token",
            "rows that all do, as the first token is pooled",
            "pad on the right, or make the model with add_pooling_layer=False",
        )


def check_labels(labels: Tensor, input_ids: Tensor) -> None:
    """Both have the same shape."""
    require_tensors(labels=labels)
    if labels.shape != input_ids.shape:
        raise ArgumentError(
            "labels",
            f"shape {tuple(labels.shape)}",
            f"{tuple(input_ids.shape)}, the shape of input_ids",
            "pass one label for each token, 0 where there is none",
        )


def check_labelled(labels: Tensor, sequence: Tensor) -> None:
    """labels: the positive ones; sequence: the tokens that the last layer ran on."""
    if labels.shape[0] != sequence.shape[0]:
        raise ArgumentError(
            "labels",
            f"{labels.shape[0]} labels above 0 for {sequence.shape[0]} tokens",
            "labels of 0 where attention_mask is",
            "pass labels.masked_fill(attention_mask == 0, 0)",
        )
