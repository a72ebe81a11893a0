"""The rule by which a sample is judged: upstream's, with a floor."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Finding", "judge", "judge_lse", "rms"]

FLOAT32_NOISE = 512 * torch.finfo(torch.float32).eps
"""What float32 leaves where terms should cancel, as in the dq of a single key, of values about 1:
the terms are dot products of a hundred of them or so, times a few."""

ROW = 2
"""How much wider the rule is for a single row."""

LSE_NOISE = 64 * torch.finfo(torch.float32).eps
"""softmax_lse is float32 whatever the inputs: what a sum of up to 64 terms, or so, leaves."""


class Finding(NamedTuple):
    """One comparison: the largest error against float64, and what is allowed of it.

    where: the value that is furthest off.
    """

    name: str
    error: float
    allowed: float
    where: str

    @property
    def agrees(self) -> bool:
        return self.error <= self.allowed

    def __str__(self) -> str:
        return f"{self.name} is off by {self.error:.3g} at {self.where}, allowed {self.allowed:.3g}"


def judge(
    name: str, actual: Tensor, truth: Tensor, plain: Tensor, unit: float, where: str
) -> Finding:
    """At most twice the error of plain PyTorch in the same precision, plus a floor.

    The floor is one rounding of the largest value, and `FLOAT32_NOISE`. As a row of small values
    may be all wrong below that, each row alone has to hold the rule too, twice as wide.

    Args:
        actual: in the dtype that a caller gets.
        truth: in float64. plain: computed in the precision of the inputs.
        unit: the size of what is summed up.
    """
    truth = _in_range(truth, actual.dtype)
    largest = _largest(truth)
    eps, noise = torch.finfo(actual.dtype).eps, FLOAT32_NOISE * unit
    whole = _found(name, actual, truth, plain, eps * largest + noise, where)
    if not whole.agrees or not truth.numel():
        return whole
    error, plain_error = (_error(x, truth).amax(-1) for x in (actual, plain))
    rounding = eps * truth.abs().nan_to_num(0.0).amax(-1)
    allowed = 2 * ROW * (plain_error + rounding) + noise
    over = (error - allowed).flatten()
    worst = int(over.argmax())
    if over[worst] <= 0:
        return whole
    place = f"row {worst} of {where}"
    return Finding(name, error.flatten()[worst].item(), allowed.flatten()[worst].item(), place)


def judge_lse(actual: Tensor, truth: Tensor, plain: Tensor, where: str) -> Finding:
    """The same for softmax_lse; `plain` was computed in float32."""
    floor = LSE_NOISE * max(1.0, _largest(truth))
    return _found("softmax_lse", actual, truth, plain, floor, where)


def rms(x: Tensor) -> float:
    """The size of the values of a tensor; 0.0 of none, and of what is no number."""
    finite = x.double().nan_to_num(0.0, 0.0, 0.0)
    return finite.square().mean().sqrt().item() if x.numel() else 0.0


def _in_range(truth: Tensor, dtype: torch.dtype) -> Tensor:
    """The truth as a dtype holds it: what is too large for it is infinite."""
    over = truth.abs() > torch.finfo(dtype).max
    return torch.where(over, torch.inf * truth.sign(), truth)


def _largest(truth: Tensor) -> float:
    return truth.masked_fill(~truth.isfinite(), 0.0).abs().max().item() if truth.numel() else 0.0


def _found(
    name: str, actual: Tensor, truth: Tensor, plain: Tensor, floor: float, where: str
) -> Finding:
    if not truth.numel():
        return Finding(name, 0.0, 0.0, where)
    error = _error(actual, truth)
    worst = int(error.argmax())
    index = tuple(
        int(i) for i in torch.unravel_index(torch.tensor(worst, device="cpu"), truth.shape)
    )
    plain_error = _error(plain, truth)
    measured = plain_error.masked_fill(plain_error == torch.inf, 0.0).max().item()
    place = f"{index} of {where}"
    return Finding(name, error.flatten()[worst].item(), 2 * measured + floor, place)


def _error(actual: Tensor, truth: Tensor) -> Tensor:
    """|actual - truth|; infinite for a NaN, and for an infinity in the wrong place.

    Where the truth itself is no number, which inputs may bring about, nothing is wrong.
    """
    actual = actual.double()
    error = (actual - truth).abs().masked_fill((actual == truth) | truth.isnan(), 0.0)
    return error.nan_to_num(torch.inf, posinf=torch.inf)
