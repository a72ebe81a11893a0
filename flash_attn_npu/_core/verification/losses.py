"""One call of a fused cross entropy, compared on a sample of its rows and on a probe of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..problems.rowwise import Loss
from . import rows
from .judging import Finding, judge, rms

__all__ = ["compare_loss"]

WHERE = "(row, place) in the sample"


def compare_loss(
    problem: Loss,
    given: tuple[Tensor, Tensor, int],
    losses: Tensor,
    run: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[list[Finding], bool]:
    """What was found, and whether the values tell anything.

    Args:
        given: logits, labels and ignore_index. run: computes losses of other ones.
    """
    logits, labels, ignored = given
    with rows.quietly():
        picks = _rows_with_labels(labels, ignored)
        some, classes = (rows.picked(t, picks) for t in (logits, labels.long()))
        actual = rows.picked(losses, picks)
        exact, plain = (
            rows.cross_entropy(some, classes, ignored, problem.label_smoothing, d)
            for d in (torch.float64, logits.dtype)
        )
        there = classes.masked_fill(classes == ignored, 0)
        known = (there >= 0) & (there < logits.shape[1])
        unit = 1.0 + rms(some)
        found = [judge("the loss", actual[known], exact[known], plain[known], unit, WHERE)]
    if problem.needs_grad:
        found += _probe(run, some, classes, ignored, logits.device)
    told = (classes != ignored)[:, None] & (some != some[:, :1])
    return found, bool(told.any())


def _rows_with_labels(labels: Tensor, ignored: int) -> rows.Picks:
    """Rows that are looked at, and one that is ignored, whose neighbours often are too."""
    there = labels.detach().cpu() != ignored
    seen, others = there.nonzero()[:, 0], (~there).nonzero()[:1, 0]
    (picks,) = rows.some((len(seen),))
    return (torch.cat((seen[picks], others)),)


def _probe(
    run: Callable[..., tuple[Tensor, Tensor]],
    logits: Tensor,
    labels: Tensor,
    ignored: int,
    device: torch.device,
) -> list[Finding]:
    """The gradient of a few rows, by a launch of its own; with one there is no smoothing."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = logits.to(device).requires_grad_()
        loss, _ = run(leaf, labels.to(device), ignored)
        (actual,) = torch.autograd.grad(loss, leaf, rows.waves(loss))
        dy = rows.waves(loss).cpu()

        def solved(dtype: torch.dtype) -> Tensor:
            other = logits.detach().to(dtype).clone().requires_grad_()
            wanted = rows.cross_entropy(other, labels, ignored, 0.0, dtype)
            return torch.autograd.grad(wanted, other, dy.to(dtype))[0]

        exact, plain = solved(torch.float64), solved(logits.dtype)
    return [judge("dlogits", actual.cpu(), exact, plain, 1.0, WHERE)]
