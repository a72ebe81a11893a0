"""Cross entropy in float64 from its definition, and the calls it is compared over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORE = -100

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "scale": {"logit_scale": 0.37},
    "z": {"lse_square_scale": 0.05},
    "ignore a class": {"ignore_index": 0},
    "all": {
        "label_smoothing": 0.3,
        "logit_scale": 1.9,
        "lse_square_scale": 0.02,
        "ignore_index": 2,
    },
}


def reference(
    logits: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = IGNORE,
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, z_losses, gradient of losses.sum() for logits), of rows with one label each."""
    x = logits.detach().double().requires_grad_()
    counted = labels != ignore_index
    target = torch.zeros_like(x.detach())
    for row, label in enumerate(labels.tolist()):
        if label != ignore_index:
            target[row, label] = 1.0
    target = (1 - label_smoothing) * target + label_smoothing / x.shape[1]
    scaled = x * logit_scale
    top = scaled.detach().amax(dim=1, keepdim=True)
    normalizer = top + (scaled - top).exp().sum(dim=1, keepdim=True).log()
    surprise = torch.where(target > 0, target * (normalizer - scaled), torch.zeros(()).double())
    z_losses = torch.where(counted, lse_square_scale * normalizer[:, 0] ** 2, 0.0)
    losses = torch.where(counted, surprise.sum(dim=1), 0.0) + z_losses
    (grad,) = torch.autograd.grad(losses.sum(), x)
    return losses.detach(), z_losses.detach(), grad


def make(
    batch: int, vocab: int, dtype: torch.dtype, ignore_index: int = IGNORE, spread: float = 3.0
) -> tuple[Tensor, Tensor]:
    """Logits and labels; some of the labels are ignore_index, from the third on every fourth."""
    logits = (torch.randn(batch, vocab, dtype=torch.float64) * spread).to(dtype)
    labels = torch.randint(0, vocab, (batch,))
    labels[2::4] = ignore_index
    return logits, labels


def assert_rounded_once(values: Tensor, expected: Tensor, noise: Tensor | float) -> None:
    """`values` is `expected` but for `noise` before it was rounded, and that rounding."""
    info = torch.finfo(values.dtype)
    # half an ulp is at most eps / 2 of the value, and half the smallest number near 0
    rounding = expected.abs() * info.eps / 2 + info.smallest_normal * info.eps
    error = (values.cpu().double() - expected).abs()
    assert (error <= 1.01 * rounding + noise).all(), (error - rounding).max()
