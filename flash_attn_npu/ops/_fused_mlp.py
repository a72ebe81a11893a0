"""Linear, activation, linear as one differentiable function: `fused_mlp_func` of fused_dense.

What it saves over the three is memory: the backward keeps no more than checkpoint_lvl says, and
computes the rest again.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, relu

from .._core.ground.dense_arguments import refuse_transforms, require_group
from ..errors import ArgumentError
from ._dense_steps import (
    begin_gather,
    bias_gradient,
    cast,
    check_linear,
    check_once,
    differentiated_again,
    input_gradient,
    linear_gradients,
    product,
    ready,
    rounded,
    weight_gradient,
    without_autocast,
)
from .activations import gelu_bwd, gelu_fwd, sqrelu_bwd, sqrelu_fwd

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["FusedMLPFunc", "check_options", "fused_mlp_func"]


def _relu_bwd(g: Tensor, hidden: Tensor) -> Tensor:
    """The gradient of relu from its result; at 0 it is 0, as torch's."""
    return torch.where(hidden > 0, g, 0.0)


class _Activation(NamedTuple):
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    """Takes the gradient and the input of `forward`."""


ACTIVATIONS = {
    "gelu_approx": _Activation(gelu_fwd, gelu_bwd),
    "relu": _Activation(relu, _relu_bwd),
    "sqrelu": _Activation(sqrelu_fwd, sqrelu_bwd),
}


class FusedMLPFunc(torch.autograd.Function):
    """Autograd of `fused_mlp_func`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor | None,
        weight2: Tensor,
        bias2: Tensor | None,
        activation: str = "gelu_approx",
        save_pre_act: bool = True,
        return_residual: bool = False,
        checkpoint_lvl: int = 0,
        heuristic: int = 0,
        process_group: ProcessGroup | None = None,
        sequence_parallel: bool = True,
    ) -> Any:
        """Both products."""
        check_options(activation, checkpoint_lvl, heuristic)
        tensors, ctx.dtypes, changed = cast(
            x=x, weight1=weight1, bias1=bias1, weight2=weight2, bias2=bias2
        )
        x, weight1, bias1, weight2, bias2 = tensors
        check_linear(x, x.shape[-1], weight1, bias1, ("weight1", "bias1"))
        check_linear(x, weight1.shape[0], weight2, bias2, ("weight2", "bias2"))
        require_group(process_group)
        with without_autocast(x):
            total = ready(begin_gather(x, process_group, sequence_parallel))
            pre_act = linear(total, weight1, bias1)
            hidden = ACTIVATIONS[activation].forward(pre_act)
            if activation == "relu":
                # its gradient can be told from its result, so one of them is enough
                pre_act = hidden
            out = product(hidden, weight2, bias2)
        again = checkpoint_lvl == 2 or not save_pre_act
        ctx.save_for_backward(
            x if again or ctx.needs_input_grad[1] else None,
            weight1,
            bias1,
            weight2,
            None if again else pre_act,
            hidden if ctx.needs_input_grad[3] and not again and checkpoint_lvl == 0 else None,
        )
        ctx.activation = activation
        ctx.process_group, ctx.sequence_parallel = process_group, sequence_parallel
        ctx.whole = process_group is None and not changed
        return (out, x.detach()) if return_residual else out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *args: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, both weights and both biases."""
        x, weight1, bias1, weight2, pre_act, hidden = ctx.saved_tensors
        check_once("fused_mlp_func", ctx.whole and x is not None)
        activation = ACTIVATIONS[ctx.activation]
        exchange = ctx.process_group, ctx.sequence_parallel
        residual = args[0] if args else None
        dweight2 = dbias2 = None
        with without_autocast(weight1):
            total = None if x is None else begin_gather(x, *exchange)
            # to be differentiated again, they must be functions of what came into forward
            if total is not None and (pre_act is None or differentiated_again()):
                total = ready(total), None
                pre_act, hidden = linear(total[0], weight1, bias1), None
            if ctx.needs_input_grad[3]:
                hidden = activation.forward(pre_act) if hidden is None else hidden
                dweight2 = weight_gradient(grad_output, hidden)
            if ctx.needs_input_grad[4]:
                dbias2 = bias_gradient(grad_output)
            dpre_act = activation.backward(input_gradient(grad_output, weight2), pre_act)
            dx, dweight1, dbias1 = linear_gradients(
                ctx.needs_input_grad[:3], dpre_act, total, weight1, residual, *exchange
            )
        gradients = rounded((dx, dweight1, dbias1, dweight2, dbias2), ctx.dtypes)
        return *gradients, None, None, None, None, None, None, None


def fused_mlp_func(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    activation: str = "gelu_approx",
    save_pre_act: bool = True,
    return_residual: bool = False,
    checkpoint_lvl: int = 0,
    heuristic: int = 0,
    process_group: ProcessGroup | None = None,
    sequence_parallel: bool = True,
) -> Any:
    """linear(activation(linear(x, weight1, bias1)), weight2, bias2).

    Args:
        x: (..., in_features); with a process_group and sequence_parallel, this rank's part of
            the first dimension, and every rank has the same shape.
        weight1: (hidden, in_features).
        weight2: (out_features, hidden).
        bias1, bias2: (hidden,), (out_features,), or None.
        activation: "gelu_approx" (the tanh approximation), "relu" or "sqrelu" (relu squared).
        save_pre_act: False keeps as little for the backward as checkpoint_lvl=2.
        return_residual: also return x, so that its other use and this one share a gradient.
        checkpoint_lvl: what the backward computes again: 0 nothing, 1 the activation, 2 the first
            product too. The numbers are the same.
        heuristic: chooses among kernels of cuBLAS in flash-attn; here it has no effect.
        process_group: the ranks that share a layer whose hidden features are split over them.
        sequence_parallel: with a process_group, whether x is gathered along its first dimension
            and its gradient scattered; else x is whole in every rank, and its gradient reduced.

    All tensors are of one floating dtype, or all are cast to autocast's.

    Returns:
        out (..., out_features), contiguous, with as many rows as the gathered x, or (out, x). With
        a process_group it is this rank's summand: the caller reduces.

    Raises:
        ArgumentError: an unknown activation or checkpoint_lvl; shapes, dtypes or devices that do
            not fit.
        UnsupportedError: a second derivative under autocast, with a process_group, or with a
            weight1 that needs no gradient.

    Contract: flash-attention 2.8, `fused_mlp_func`. Wider: any device, float32 and float64, any
    sizes, a backward without save_pre_act, second derivatives.
    """
    refuse_transforms("x")
    # fmt: off
    return FusedMLPFunc.apply(  # type: ignore[no-untyped-call]
        x, weight1, bias1, weight2, bias2, activation, save_pre_act, return_residual,
        checkpoint_lvl, heuristic, process_group, sequence_parallel,
    )
    # fmt: on


def check_options(activation: str, checkpoint_lvl: int, heuristic: int | str) -> None:
    """Raise unless flash-attn has this activation, level and heuristic."""
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ArgumentError(
            "activation",
            repr(activation),
            "'gelu_approx', 'relu' or 'sqrelu'",
            "use modules.mlp.Mlp for other activations",
        )
    if not isinstance(checkpoint_lvl, Integral) or checkpoint_lvl not in (0, 1, 2):
        raise ArgumentError(
            "checkpoint_lvl",
            f"{checkpoint_lvl!r:.60}",
            "0, 1 or 2",
            "pass 0 to keep everything for the backward, 2 to keep the least",
        )
    if heuristic != "auto" and not isinstance(heuristic, int):
        raise ArgumentError("heuristic", repr(heuristic), "'auto' or an int", "leave heuristic out")
