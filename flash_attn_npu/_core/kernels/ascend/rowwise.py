"""torch_npu's fused operators other than attention, one kernel for each.

`table.rowwise` has admitted the call before. Gradients are those of torch_npu's own autograd,
except where a function says that it is called outside of autograd. Losses have a first derivative
only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...ground.functions import PLAIN, bare, is_undisturbed, unwrapped
from ...ground.second_derivatives import first_order, once, refuse_second, watch
from ...problems.norms import NormCall
from ...problems.rowwise import (
    ADD_LAYER_NORM,
    ADD_RMS_NORM,
    RMS_NORM,
    Gate,
    Geglu,
    Loss,
    Norm,
    Rotation,
)
from ..kernel import Kernel
from .packets import behind, launcher

__all__ = ["GATE", "GEGLU", "LOSS", "ROTATION", "norm"]

AT_ONCE = 1 << 26
"""Elements that are rotated at a time, so that in place means in place."""

MOST_HEADS = 1000
"""A batch must have fewer sequences, or interleaved fewer heads in all, to share its tables."""

MOST_DIMS = 8
"""A norm's backward takes two to eight dimensions."""

_norm_once = once("a norm")


class _Once(torch.autograd.Function):
    """The tensor itself, whose gradient is refused a derivative: torch_npu's depends on nothing."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if not torch.is_grad_enabled():
            return grad
        return refuse_second("a fused cross entropy", grad, *ctx.saved_tensors)


class _AddRmsNorm(torch.autograd.Function):
    """npu_add_rms_norm, which has no gradient, with that of npu_rms_norm at its rounded sum."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        normed, rstd, total = launcher("npu_add_rms_norm")(x, residual, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        ctx.set_materialize_grads(False)
        return normed, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, rstd = ctx.saved_tensors
        dx, dweight = dtotal, None
        if dy is not None:
            with torch.no_grad():
                dx, dweight = torch.ops.npu.npu_rms_norm_backward(dy, total, weight, rstd)
                dweight = dweight.to(weight.dtype)
                if dtotal is not None:
                    dx = dx + dtotal
        once = first_order("a norm", (dx, dweight), dy, dtotal, total, weight)
        return once[0], once[0], once[1], None


_bare_add_rms_norm = bare(_AddRmsNorm)


def _recorded_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`_AddRmsNorm.apply`, without its questions where they need not be asked."""
    plain = type(x) in PLAIN and type(residual) in PLAIN and type(weight) in PLAIN
    if plain and is_undisturbed():
        given = unwrapped(x), unwrapped(residual), unwrapped(weight)
        return _bare_add_rms_norm(*given, eps)  # type: ignore[no-any-return]
    return _AddRmsNorm.apply(x, residual, weight, eps)  # type: ignore[no-any-return, no-untyped-call]


def _rotated(problem: Rotation, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (*tokens, *heads, rotary_dim) rotated, as a new tensor; called outside of autograd."""
    if cos.dtype != x.dtype:
        # the operator would round the tables to the dtype of x; rounded once, as upstream does
        return _rotated(problem, x.float(), cos.float(), sin.float()).to(x.dtype)
    if x.dim() == 4 and _may_share(problem, x.shape[0], x.shape[2]):
        if cos.dim() == 3:
            cos, sin = cos[None], sin[None]
        if cos.shape[0] == 1:
            return _turned(x, cos, sin, problem.interleaved).contiguous()
    tokens = x.dim() - problem.head_dims - 1
    total = math.prod(x.shape[:tokens])
    shape = (*x.shape[:tokens], *cos.shape[cos.dim() - x.dim() + tokens :])
    cos, sin = (table.expand(shape).reshape(total, 1, -1)[None] for table in (cos, sin))
    # one batch of all tokens: the layout that takes tables of each token in both modes
    turned = _turned(x.reshape(1, total, -1, x.shape[-1]), cos, sin, problem.interleaved)
    # what an autograd.Function returns must be no view, else nobody may write to it
    whole: Tensor = torch.ops.aten._unsafe_view.default(turned, x.shape)
    return whole


def _may_share(problem: Rotation, batch: int, nheads: int) -> bool:
    """Whether a padded batch goes as it is, with one table for all of its sequences."""
    if problem.head_dims != 1:
        return False
    return batch * nheads < MOST_HEADS if problem.interleaved else batch < MOST_HEADS


def _rotate(problem: Rotation, x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Write the rotated dimensions of x to out, which may be x."""
    head = x[..., : problem.rotary_dim]
    if out is x and torch.is_grad_enabled() and x.requires_grad:
        # autograd keeps what the operator got, also to differentiate a gradient
        head = head.clone()
    out[..., : problem.rotary_dim].copy_(_rotated(problem, head, cos, sin))


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (batch, tokens, nheads, rotary_dim) by (1, tokens, 1, rotary_dim / 2) of cos and sin."""
    turned: Tensor
    if interleaved:
        cos, sin = cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)
        turned = launcher("npu_rotary_mul")(x, cos, sin, "interleave")
    else:
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        turned = launcher("npu_rotary_mul")(x, cos, sin)
    return turned


def norm(operator: str) -> Kernel:
    """The kernel of one of the fused norms."""

    def direct(problem: Norm) -> Callable[..., tuple[Tensor, Tensor]]:
        return partial(_add_and_norm, operator, problem.needs_grad)

    return Kernel(direct=direct)


def _add_and_norm(
    operator: str,
    needs_grad: bool,
    call: NormCall,
    total_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The norm of x + residual in out_dtype, and that sum in total_dtype.

    Where dtypes are mixed, the sum and the norm are computed in float32.
    """
    # one by one: torch 2.6 and 2.8 cannot trace a slice of a NamedTuple
    x, weight, bias, residual, eps = call.x, call.weight, call.bias, call.residual, call.eps
    reshaped = not 1 < x.dim() <= MOST_DIMS
    if reshaped:
        rows = x.reshape(-1, x.shape[-1])
        added = None if residual is None else residual.reshape(rows.shape)
    else:
        rows, added = x, residual
    if call.zero_centered_weight:
        weight = weight.float() + 1
    if operator == ADD_RMS_NORM and needs_grad:
        assert added is not None
        normed, total = _recorded_norm(rows, added, weight, eps)
    elif operator in (ADD_RMS_NORM, ADD_LAYER_NORM):
        normed, total = _added_norm(operator, rows, weight, bias, added, eps)
    else:
        if out_dtype != x.dtype or (added is not None and x.dtype == torch.float16):
            # what is returned in float32 must not be rounded before, and a sum not overflow
            rows = rows.float()
        total = rows if added is None else rows + added
        normed = _norm(operator, total, weight, bias, eps)
    # a sum of strided rows has their strides
    total = _in(total_dtype, total).contiguous()
    normed = _in(out_dtype, normed).contiguous()
    if reshaped:
        return normed.view(x.shape), total.view(x.shape)
    return normed, total


def _in(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    """`tensor.to(dtype)`, which takes 0.7 us to do nothing."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _norm(operator: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    normed: Tensor
    if operator == RMS_NORM:
        if weight.dtype not in (x.dtype, torch.float32):
            x, weight = x.float(), weight.float()
        normed = launcher("npu_rms_norm")(x, weight, eps)[0]
        watch(normed, _norm_once)
        return normed
    if any(given is not None and given.dtype != x.dtype for given in (weight, bias)):
        x, weight, bias = x.float(), weight.float(), None if bias is None else bias.float()
    normed = functional.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    watch(normed, _norm_once)
    return normed


def _added_norm(
    operator: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    if operator == ADD_RMS_NORM:
        normed, _, total = launcher("npu_add_rms_norm")(x, residual, weight, eps)
    else:
        if residual is not None and residual.dtype != x.dtype:
            # parameters of the sum's dtype: it has no kernel for others
            assert bias is not None
            weight, bias = weight.float(), bias.float()
        normed, _, _, total = launcher("npu_add_layer_norm")(x, residual, weight, bias, eps, True)
    watch(normed, _norm_once)
    return normed, total


def _gate(problem: Gate, x: Tensor, y: Tensor) -> Tensor:
    """silu(x) * y."""
    gated: Tensor = _gated(problem)(x, y)
    return gated


def _gated(problem: Gate) -> Callable[[Tensor, Tensor], Tensor]:
    """`_gate` of a problem."""
    import torch_npu

    operator, whole = torch_npu.npu_swiglu, problem.whole
    fast = behind(operator)

    def run(x: Tensor, y: Tensor) -> Tensor:
        both = torch.cat((x, y), -1) if whole is None else torch.as_strided(x, *whole)
        # tools that watch operators put their own in its place
        call = fast if torch_npu.npu_swiglu is operator else torch_npu.npu_swiglu
        return call(both, -1)  # type: ignore[no-any-return]

    return run


def _gate_backward(problem: Gate, grad: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and y; called outside of autograd."""
    both = torch.ops.npu.npu_swiglu_backward(grad.contiguous(), _whole(problem, x, y), -1)
    dx, dy = both.chunk(2, dim=-1)
    return dx.contiguous(), dy.contiguous()


def _whole(problem: Gate, x: Tensor, y: Tensor) -> Tensor:
    """The rows of x, each followed by its row of y: where they lie so, without a copy."""
    if problem.whole is not None:
        return x.as_strided(*problem.whole)
    return torch.cat((x, y), dim=-1)


def _geglu(_: Geglu, both: Tensor) -> Tensor:
    """y * gelu(gate) of both = [y, gate]; called outside of autograd."""
    import torch_npu

    # the right half is activated: so say the words of every document of aclnnGeGluV3, though the
    # formulas of CANN 8.0 to 8.2 have it the other way round
    gated: Tensor = torch_npu.npu_geglu(both, dim=-1, approximate=0, activate_left=False)[0]
    return gated


def _losses(
    smoothing: float, logits: Tensor, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """The cross entropy of each row, 0 where the label is ignore_index, and zeros as z-losses."""
    import torch_npu

    if torch.is_grad_enabled() and logits.requires_grad and not torch.compiler.is_compiling():
        logits = _Once.apply(logits)  # type: ignore[no-untyped-call]
    labels = labels.long()
    known = (labels >= 0) & (labels < logits.shape[1])
    # a negative ignore_index is documented to ignore nothing, so every label must be a class
    classes = labels.masked_fill(~known, 0)
    smooth = {"label_smoothing": smoothing} if smoothing else {}
    loss: Tensor = torch_npu.npu_cross_entropy_loss(logits, classes, reduction="none", **smooth)[0]
    loss = loss.masked_fill(~known, float("nan")).masked_fill(labels == ignore_index, 0.0)
    return loss, torch.zeros_like(loss)


def _differentiable_losses(problem: Loss) -> Callable[..., tuple[Tensor, Tensor]]:
    return partial(_losses, problem.label_smoothing)


ROTATION = Kernel(_rotate, direct=lambda problem: partial(_rotated, problem), at_once=AT_ONCE)
GATE = Kernel(_gate, _gate_backward, direct=_gated)
GEGLU = Kernel(_geglu)
LOSS = Kernel(direct=_differentiable_losses)
