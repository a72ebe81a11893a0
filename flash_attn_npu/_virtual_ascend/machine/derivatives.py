"""Operators of torch_npu's own that its autograd formulas call in place of aten's, composed of aten
operators on device tensors. What they compute is what the CPU's formulas compute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import copies, randomness
from .memory import host_view

_MEAN = 1


def matmul_backward(
    grad: torch.Tensor, self: torch.Tensor, other: torch.Tensor, mask: Sequence[bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    left = self.unsqueeze(0) if self.dim() == 1 else self
    right = other.unsqueeze(1) if other.dim() == 1 else other
    if other.dim() == 1:
        grad = grad.unsqueeze(-1)
    if self.dim() == 1:
        grad = grad.unsqueeze(-2)
    dleft = grad @ right.transpose(-1, -2) if mask[0] else None
    dright = _right_gradient(grad, left, right) if mask[1] else None
    if dleft is not None:
        dleft = dleft.sum_to_size(left.shape).reshape(self.shape)
    return dleft, dright if dright is None else dright.reshape(other.shape)


def _right_gradient(grad: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if right.dim() == 2:
        # One product over all rows: summing per batch would round in the input's dtype
        return left.reshape(-1, left.shape[-1]).T @ grad.reshape(-1, grad.shape[-1])
    return (left.transpose(-1, -2) @ grad).sum_to_size(right.shape)


def _repeat_interleave_backward(
    grad: torch.Tensor, input: torch.Tensor, repeats: Any, dim: int | None = None
) -> torch.Tensor:
    axis = 0 if dim is None else dim
    size = input.numel() if dim is None else input.shape[dim]
    source = torch.arange(size, device=grad.device).repeat_interleave(repeats)
    shape = [size] if dim is None else list(input.shape)
    return grad.new_zeros(shape).index_add_(axis, source, grad).reshape(input.shape)


def _gather_backward(
    grad: torch.Tensor, self_size: Sequence[int], dim: int, index: torch.Tensor, sparse_grad: bool
) -> torch.Tensor:
    return grad.new_zeros(self_size).scatter_add_(dim, index, grad)


def _l1_loss_backward(
    grad_output: torch.Tensor, input: torch.Tensor, target: torch.Tensor, reduction: int
) -> torch.Tensor:
    gradient = torch.sign(input - target) * grad_output
    return gradient / input.numel() if reduction == _MEAN else gradient


def _kl_div_backward(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    target: torch.Tensor,
    reduction: int = _MEAN,
    *,
    log_target: bool = False,
) -> torch.Tensor:
    gradient = -(target.exp() if log_target else target) * grad_output
    return gradient / input.numel() if reduction == _MEAN else gradient


def _kl_div_target_backward(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    target: torch.Tensor,
    reduction: int = _MEAN,
    *,
    log_target: bool = False,
) -> torch.Tensor:
    if log_target:
        gradient = target.exp() * (target - input + 1) * grad_output
    else:
        gradient = torch.where(target > 0, (target.log() - input + 1) * grad_output, 0.0)
    return gradient / input.numel() if reduction == _MEAN else gradient


def _bce_with_logits_backward(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    target: torch.Tensor,
    weight_opt: torch.Tensor | None,
    pos_weight_opt: torch.Tensor | None,
    reduction: int,
) -> torch.Tensor:
    sigmoid = torch.sigmoid(input)
    if pos_weight_opt is None:
        gradient = sigmoid - target
    else:
        positive = pos_weight_opt * target
        gradient = (positive + 1 - target) * sigmoid - positive
    if weight_opt is not None:
        gradient = gradient * weight_opt
    gradient = gradient * grad_output
    return gradient / input.numel() if reduction == _MEAN else gradient


def _dropout(input: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask is a byte for an element here, a bit on a card: it is opaque to its callers."""
    generator = randomness.host_generator(randomness.draw_seed(None))
    kept = torch.rand(input.shape, generator=generator, device="cpu") >= p
    mask = torch.empty(input.shape, dtype=torch.uint8, device=input.device)
    host_view(mask).copy_(kept)
    return _dropout_backward(input, mask, p), mask


def _dropout_backward(grad_output: torch.Tensor, mask: torch.Tensor, p: float) -> torch.Tensor:
    scale = 1 / (1 - p) if p < 1 else 0.0
    return grad_output * mask.to(grad_output.dtype) * scale


def _dtype_cast(input: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # not `to`: torch_npu before 2.9 asks this operator for it
    return copies.to_copy(input, dtype=dtype)


KERNELS: dict[str, Callable[..., Any]] = {
    "_npu_dropout": _dropout,
    "_npu_dtype_cast": _dtype_cast,
    "_npu_dtype_cast_backward": _dtype_cast,
    "npu_dtype_cast": _dtype_cast,
    "npu_dtype_cast_backward": _dtype_cast,
    "kl_div_backward": _kl_div_backward,
    "kl_div_target_backward": _kl_div_target_backward,
    "l1_loss_backward": _l1_loss_backward,
    "npu_binary_cross_entropy_with_logits_backward": _bce_with_logits_backward,
    "npu_dropout_backward": _dropout_backward,
    "npu_gather_backward": _gather_backward,
    "repeat_interleave_backward_int": _repeat_interleave_backward,
    "repeat_interleave_backward_tensor": _repeat_interleave_backward,
}
