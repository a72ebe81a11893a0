"""The dropout mask of the fused training kernel, drawn again for whoever has to compare with it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["bits"]

MOST = 1 << 33
"""Bits that are drawn, in memory an eighth as large."""


def bits(q: Tensor, count: int, dropout_p: float, seed: int, offset: int) -> Tensor | None:
    """`count` bits, eight to a byte and the first the lowest, 1 where a probability is kept.

    No random number is taken. None where it cannot be done: not every chip has the operator.
    """
    import torch_npu

    draw: Callable[..., Tensor] | None = getattr(torch_npu, "_npu_dropout_gen_mask", None)
    if draw is None or not 0 < count <= MOST:
        return None
    options = {"seed": seed, "offset": offset, "parallel": False, "sync": True}
    try:
        return draw(q.detach(), [count], p=dropout_p, **options)
    except RuntimeError:
        return None
