"""npu_cross_entropy_loss and its gradient. The gradient starts from the log-probabilities that the
forward pass rounded to the dtype of the logits, as the kernel does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..machine.fused_call import (
    Given,
    Kernel,
    builder,
    check_dtype,
    check_not_empty,
    check_one_dtype,
    check_shape,
    is_ascend_310p,
)
from ..machine.refusal import require

Outputs = tuple[torch.Tensor, ...]

_MOST_ROWS = 200000
_NOTHING_IGNORED = -100
_REDUCTIONS = ("mean", "sum", "none")


def _check_forward(given: Given) -> None:
    _check_common(given, "input")
    smoothing = given["label_smoothing"]
    require(0 <= smoothing < 1, f"label_smoothing must be in [0, 1), got {smoothing}")
    require(not given["return_zloss"], "return_zloss is not supported yet")
    if "input" in given["requires_grad"] and torch.is_grad_enabled():
        _check_differentiable(given)


def _check_backward(given: Given) -> None:
    _check_common(given, "log_prob")
    check_one_dtype(given, ("log_prob", "grad_loss"))
    for name in ("grad_zloss", "lse_for_zloss"):
        empty = given[name] is None or given[name].numel() == 0
        require(empty, f"{name} is not supported yet")
    _check_differentiable(given)
    grad = given["grad_loss"]
    if given["reduction"] == "none":
        check_shape(grad, given["target"].shape, "grad_loss")
    else:
        require(
            grad.numel() == 1 and grad.dim() <= 1,
            f"grad_loss must hold one number, got {tuple(grad.shape)}",
        )


def _check_common(given: Given, name: str) -> None:
    logits = given[name]
    require(not is_ascend_310p(), "npu_cross_entropy_loss does not exist on a 310P")
    check_dtype(logits, name)
    require(logits.dim() == 2, f"{name} must be [N, C], got {tuple(logits.shape)}")
    check_not_empty(logits, name)
    rows, classes = logits.shape
    require(rows <= _MOST_ROWS, f"N must be in 1..{_MOST_ROWS}, got {rows}")
    require(
        given["reduction"] in _REDUCTIONS,
        f"reduction must be one of {_REDUCTIONS}, got {given['reduction']!r}",
    )
    require(
        given["lse_square_scale_for_zloss"] == 0, "lse_square_scale_for_zloss is not supported yet"
    )
    _check_target(given, rows, classes)
    _check_weight(given["weight"], classes)


def _check_target(given: Given, rows: int, classes: int) -> None:
    target, ignored = given["target"], given["ignore_index"]
    require(target.dtype == torch.int64, f"target must be int64, got {target.dtype}")
    check_shape(target, (rows,), "target")
    require(ignored < classes, f"ignore_index must be below C {classes}, got {ignored}")
    # One document says so; another, and the kernel, would ignore a negative label too
    outside = (target < 0) | (target >= classes)
    require(
        not bool(outside.any()),
        f"target must be in [0, {classes}): a negative ignore_index ignores nothing, got "
        f"{target[outside].tolist()[:4]}",
    )


def _check_weight(weight: torch.Tensor | None, classes: int) -> None:
    if weight is None:
        return
    require(weight.dtype == torch.float32, f"weight must be float32, got {weight.dtype}")
    check_shape(weight, (classes,), "weight")
    require(bool(((weight > 0) & (weight <= 1)).all()), "weight must be in (0, 1]")


def _check_differentiable(given: Given) -> None:
    """What a call with gradient may not ask for, in either direction."""
    require(given["label_smoothing"] == 0, "with a gradient label_smoothing must be 0")
    defaults = given["weight"] is None and given["ignore_index"] == _NOTHING_IGNORED
    require(
        defaults or given["reduction"] != "mean",
        'with a gradient reduction "mean" must leave every other argument at its default',
    )


def _row_weights(given: Given) -> torch.Tensor:
    """The weight of every row's class, 0 for an ignored row."""
    target, weight = given["target"], given["weight"]
    weights = torch.ones_like(target, dtype=torch.float64)
    if weight is not None:
        weights = weight.double()[target]
    return weights.masked_fill(target == given["ignore_index"], 0)


def _forward(given: Given, outputs: Outputs) -> None:
    """zloss and its logarithms stay as the real operator left them: it allocates them empty."""
    loss, log_prob = outputs[:2]
    logits, target = given["input"].double(), given["target"]
    exact, weights = logits.log_softmax(-1), _row_weights(given)
    log_prob.copy_(exact)
    rows = -weights * exact.gather(1, target[:, None])[:, 0]
    smoothing = given["label_smoothing"]
    if smoothing:
        scale = 1 if given["weight"] is None else given["weight"].double()
        spread = -(exact * scale).sum(-1).masked_fill(target == given["ignore_index"], 0)
        rows = (1 - smoothing) * rows + smoothing / logits.shape[1] * spread
    if given["reduction"] == "none":
        loss.copy_(rows)
    else:
        total = rows.sum()
        loss.fill_(total if given["reduction"] == "sum" else total / weights.sum())


def _backward(given: Given, outputs: Outputs) -> None:
    probabilities, target = given["log_prob"].double().exp(), given["target"]
    weights = _row_weights(given)
    scale = given["grad_loss"].double() * weights
    if given["reduction"] == "mean":
        scale = scale / weights.sum()
    hit = torch.nn.functional.one_hot(target, probabilities.shape[1])
    outputs[0].copy_((probabilities - hit) * scale[:, None])


BUILDERS: dict[str, Callable[[Kernel], Kernel]] = {
    "npu_cross_entropy_loss": builder(_check_forward, _forward),
    "npu_cross_entropy_loss_backward": builder(_check_backward, _backward),
}
