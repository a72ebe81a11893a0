"""A sample of rows of tensors that are computed row by row, and what is to come of them.

Each function takes the dtype to compute in: float64 is the truth, that of the inputs is what plain
PyTorch makes of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import torch
from torch import Tensor

__all__ = [
    "Picks",
    "cross_entropy",
    "geglu",
    "norm",
    "picked",
    "quietly",
    "rotated",
    "some",
    "swiglu",
    "waves",
]

Picks = tuple[Tensor, ...]
"""One index tensor for each leading dimension, of one length: the rows that are looked at."""

MOST_ROWS = 64


def some(shape: tuple[int, ...]) -> Picks:
    """Rows among leading dimensions of these sizes: the first, the second, the last, the middle,
    and the edges of tiles.
    """
    sides = [_places(size) for size in shape]
    total = math.prod(map(len, sides))
    # a step that has no divisor in common with the number of all comes past every place of each
    step = max(1, total // MOST_ROWS)
    while math.gcd(step, total) > 1:
        step += 1
    every = list(product(*sides))
    rows = [every[-1 - step * i % total] for i in range(min(total, MOST_ROWS))]
    places = torch.tensor(rows, dtype=torch.int64, device="cpu").view(len(rows), len(shape))
    return tuple(places.unbind(1))


def _places(size: int) -> list[int]:
    # the last row of some tile, and the first of another, for tiles of every power of two
    power = 1 << (size.bit_length() - 1) if size else 0
    wanted = {0, 1, size // 2, power - 1, power, size - 1}
    return sorted(place for place in wanted if 0 <= place < size)


def picked(x: Tensor, picks: Picks) -> Tensor:
    """(rows, ...) of a tensor whose leading dimensions are picked from, copied to the host."""
    if not picks:
        return x.detach().cpu()[None]
    return x.detach()[tuple(pick.to(x.device) for pick in picks)].cpu()


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, dtype: torch.dtype) -> Tensor:
    """x (rows, rotary_dim) rotated by cos and sin (rows, rotary_dim / 2)."""
    x, cos, sin = (tensor.to(dtype) for tensor in (x, cos, sin))
    pairs = x.unflatten(-1, (-1, 2)) if interleaved else x.unflatten(-1, (2, -1)).transpose(-1, -2)
    first, second = pairs.unbind(-1)
    turned = torch.stack((first * cos - second * sin, first * sin + second * cos), -1)
    return turned.flatten(-2) if interleaved else turned.transpose(-1, -2).flatten(-2)


def norm(
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    eps: float,
    rms: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(the norm, the sum) of x (rows, hidden), weight, bias and residual; differentiable."""
    x, weight, bias, residual = (None if t is None else t.to(dtype) for t in tensors)
    assert x is not None
    assert weight is not None
    total = x if residual is None else x + residual
    wide = total.to(torch.promote_types(dtype, torch.float32))
    centred = wide if rms else wide - wide.mean(-1, keepdim=True)
    normal = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = normal.to(dtype) * weight
    return y if bias is None else y + bias, total


def swiglu(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """silu(x) * y; differentiable."""
    x, y = x.to(dtype), y.to(dtype)
    return torch.nn.functional.silu(x) * y


def geglu(both: Tensor, dtype: torch.dtype) -> Tensor:
    """The first half times the exact gelu of the second."""
    y, gate = both.to(dtype).chunk(2, -1)
    return y * torch.nn.functional.gelu(gate)


def cross_entropy(
    logits: Tensor, labels: Tensor, ignored: int, smoothing: float, dtype: torch.dtype
) -> Tensor:
    """The loss of each row, 0 where its label is ignored, NaN where it is no class."""
    known = (labels >= 0) & (labels < logits.shape[1])
    classes = labels.masked_fill(~known, 0)
    loss = torch.nn.functional.cross_entropy(
        logits.to(dtype), classes, reduction="none", label_smoothing=smoothing
    )
    return loss.masked_fill(~known, torch.nan).masked_fill(labels == ignored, 0.0)


def waves(like: Tensor) -> Tensor:
    """Values for a probe, of all sizes and signs, without a random number."""
    steps = torch.arange(like.numel(), dtype=torch.float32, device="cpu").view(like.shape)
    return torch.cos(steps * 1.7 + 0.3).to(like)


@contextmanager
def quietly() -> Iterator[None]:
    """Nothing here is a part of the caller's graph, or of its autocast."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield
