"""What a norm answers, in the buffers of the call and as public functions return it."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..ground.records import replaced
from ..problems.norms import NormCall

__all__ = ["Answer", "arranged", "in_buffer", "in_buffers"]

OptionalTensor = TypeVar("OptionalTensor", Tensor, Tensor | None)


class Answer(NamedTuple):
    """y, y1 if there is a weight1, the rounded sum if prenorm, and the masks that were drawn."""

    y: Tensor
    y1: Tensor | None
    total: Tensor | None
    mask: Tensor | None
    mask1: Tensor | None


def in_buffers(call: NormCall, answer: Answer) -> Answer:
    """`answer` with y and the sum in the buffers of `call`, where it has some."""
    if call.out is None and call.residual_out is None:
        return answer
    y = in_buffer(call.out, answer.y)
    total = in_buffer(call.residual_out, answer.total)
    return replaced(answer, y=y, total=total if call.prenorm else None)


def in_buffer(buffer: Tensor | None, value: OptionalTensor) -> OptionalTensor:
    """Write a result to a buffer. What is returned has the gradient, the buffer has none.

    It is the buffer's memory. Under torch.compile it is not: there the gradient of what lies in
    an argument of the graph would get lost.
    """
    if buffer is None or value is None:
        return value
    if torch.compiler.is_compiling():
        buffer.copy_(value.detach())
        return value
    return buffer.detach().copy_(value)


def arranged(answer: Answer, two: bool, prenorm: bool, return_dropout_mask: bool) -> Any:
    """`answer` as `layer_norm_fn` returns it; `two`: there is a weight1."""
    if not (two or prenorm or return_dropout_mask):
        return answer.y
    results: tuple[Tensor | None, ...] = (answer.y,)
    if two:
        results += (answer.y1,)
    if prenorm:
        results += (answer.total,)
    if return_dropout_mask:
        results += (answer.mask, answer.mask1)
    return results
