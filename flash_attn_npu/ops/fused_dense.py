"""Mirror of `flash_attn.ops.fused_dense`: linear layers and MLPs, on one process or over several.

The products are torch's. What is added is autograd that keeps little, gradients of a residual in
the same sum, and tensor parallelism: a process_group of None means one process; upstream takes it
for the default group in some places and refuses it in others. `fused_mlp_func` is in `fused_mlp`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._core.ground.dense_arguments import refuse_transforms, require_group
from ..utils.distributed import (
    all_gather_raw,
    all_reduce,
    all_reduce_raw,
    reduce_scatter,
    reduce_scatter_raw,
)
from ..utils.torch import custom_bwd, custom_fwd
from ._dense_steps import (
    begin_gather,
    cast,
    check_linear,
    check_once,
    linear_gradients,
    place,
    product,
    ready,
    rounded,
    share,
    without_autocast,
)
from ._fused_mlp import FusedMLPFunc, check_options, fused_mlp_func
from .activations import gelu_bwd, relu_bwd, sqrelu_bwd, sqrelu_fwd

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "ColumnParallelLinear",
    "FusedDense",
    "FusedDenseFunc",
    "FusedMLP",
    "FusedMLPFunc",
    "ParallelFusedMLP",
    "RowParallelLinear",
    "all_gather_raw",
    "all_reduce",
    "all_reduce_raw",
    "custom_bwd",
    "custom_fwd",
    "fused_dense_func",
    "fused_mlp_func",
    "gelu_bwd",
    "reduce_scatter",
    "reduce_scatter_raw",
    "relu_bwd",
    "sqrelu_bwd",
    "sqrelu_fwd",
]


class FusedDenseFunc(torch.autograd.Function):
    """Autograd of `fused_dense_func`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        return_residual: bool = False,
        process_group: ProcessGroup | None = None,
        sequence_parallel: bool = True,
    ) -> Any:
        """The product."""
        tensors, ctx.dtypes, changed = cast(x=x, weight=weight, bias=bias)
        x, weight, bias = tensors
        check_linear(x, x.shape[-1], weight, bias, ("weight", "bias"))
        require_group(process_group)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.process_group, ctx.sequence_parallel = process_group, sequence_parallel
        ctx.whole = process_group is None and not changed
        with without_autocast(x):
            total = ready(begin_gather(x, process_group, sequence_parallel))
            out = product(total, weight, bias)
        return (out, x.detach()) if return_residual else out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *args: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, weight and bias."""
        x, weight = ctx.saved_tensors
        check_once("fused_dense_func", ctx.whole)
        exchange = ctx.process_group, ctx.sequence_parallel
        residual = args[0] if args else None
        with without_autocast(weight):
            total = None if x is None else begin_gather(x, *exchange)
            gradients = linear_gradients(
                ctx.needs_input_grad[:3], grad_output, total, weight, residual, *exchange
            )
        return *rounded(gradients, ctx.dtypes), None, None, None


def fused_dense_func(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    return_residual: bool = False,
    process_group: ProcessGroup | None = None,
    sequence_parallel: bool = True,
) -> Any:
    """x times weight transposed, plus bias.

    Args:
        x: (..., in_features); with a process_group and sequence_parallel, this rank's part of
            the first dimension, and every rank has the same shape.
        weight: (out_features, in_features).
        bias: (out_features,), or None.
        return_residual: also return x, so that its other use and this one share a gradient.
        process_group: the ranks that share a layer whose out_features are split over them.
        sequence_parallel: with a process_group, whether x is gathered along its first dimension
            and its gradient scattered; else x is whole in every rank, and its gradient reduced.

    All tensors are of one floating dtype, or all are cast to autocast's.

    Returns:
        out (..., out_features), contiguous, with as many rows as the gathered x, or (out, x).

    Raises:
        ArgumentError: shapes, dtypes or devices do not fit.
        UnsupportedError: a second derivative under autocast or with a process_group.

    Contract: flash-attention 2.8, `fused_dense_func`. Wider: a process_group and return_residual
    together, any device, float32 and float64, any sizes, second derivatives.
    """
    refuse_transforms("x")
    return FusedDenseFunc.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, return_residual, process_group, sequence_parallel
    )


class FusedDense(nn.Linear):
    """nn.Linear over `fused_dense_func`; with return_residual it returns (out, x).

    Contract: flash-attention 2.8, `FusedDense`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        return_residual: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.return_residual = return_residual

    def forward(self, x: Tensor, process_group: ProcessGroup | None = None) -> Any:
        """x (..., in_features), gathered along its first dimension over a process_group."""
        return fused_dense_func(
            x,
            self.weight,
            self.bias,
            return_residual=self.return_residual,
            process_group=process_group,
        )


class ColumnParallelLinear(nn.Linear):
    """This rank's rows of the weight of a linear layer, and its entries of the bias.

    Args:
        in_features: of the whole layer.
        out_features: of the whole layer; `self.out_features` is what this rank holds.
        process_group: the ranks that share it; None for one process.
        sequence_parallel: whether x is gathered along its first dimension.
        multiple_of: out_features are dealt to the ranks in units of this many.

    Raises:
        ArgumentError: out_features is no multiple of multiple_of.

    Contract: flash-attention 2.8, `ColumnParallelLinear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        process_group: ProcessGroup | None,
        bias: bool = True,
        sequence_parallel: bool = True,
        multiple_of: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        held = share("out_features", out_features, process_group, multiple_of)
        super().__init__(in_features, held, bias=bias, device=device, dtype=dtype)
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features), gathered if sequence_parallel, to the rank's out_features."""
        out: Tensor = fused_dense_func(
            x,
            self.weight,
            self.bias,
            process_group=self.process_group,
            sequence_parallel=self.sequence_parallel,
        )
        return out


class RowParallelLinear(nn.Linear):
    """This rank's columns of the weight of a linear layer; rank 0 holds the bias.

    Args:
        in_features: of the whole layer; `self.in_features` is what this rank holds.
        out_features: of the whole layer.
        process_group: the ranks that share it; None for one process.
        sequence_parallel: whether a rank returns its part of the first dimension of the sum over
            the ranks, or all of it.
        multiple_of: in_features are dealt to the ranks in units of this many.

    Raises:
        ArgumentError: in_features is no multiple of multiple_of.

    Contract: flash-attention 2.8, `RowParallelLinear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        process_group: ProcessGroup | None,
        bias: bool = True,
        sequence_parallel: bool = True,
        multiple_of: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        held = share("in_features", in_features, process_group, multiple_of)
        bias = bias and place(process_group)[0] == 0
        super().__init__(held, out_features, bias=bias, device=device, dtype=dtype)
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features of the rank) to (..., out_features), reduced over the ranks."""
        out: Tensor = fused_dense_func(x, self.weight, self.bias)
        return _reduced(out, self.process_group, self.sequence_parallel)


class FusedMLP(nn.Module):
    """Two linear layers `fc1` and `fc2` around an activation, over `fused_mlp_func`.

    Args:
        hidden_features: 4 * in_features if None.
        out_features: in_features if None.
        bias1, bias2: whether fc1 and fc2 have one.
        activation, return_residual, checkpoint_lvl: as in `fused_mlp_func`.
        heuristic: "auto" or an int; it has no effect.

    The backward of an eval-mode module computes again what a training one keeps.

    Raises:
        ArgumentError: an unknown activation or checkpoint_lvl.

    Contract: flash-attention 2.8, `FusedMLP`.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        bias1: bool = True,
        bias2: bool = True,
        activation: str = "gelu_approx",
        return_residual: bool = False,
        checkpoint_lvl: int = 0,
        heuristic: int | str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_options(activation, checkpoint_lvl, heuristic)
        super().__init__()
        hidden = 4 * in_features if hidden_features is None else hidden_features
        out = in_features if out_features is None else out_features
        self.activation = activation
        self.return_residual = return_residual
        self.checkpoint_lvl = checkpoint_lvl
        self.heuristic = heuristic
        self.fc1 = nn.Linear(in_features, hidden, bias=bias1, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, out, bias=bias2, device=device, dtype=dtype)

    def forward(self, x: Tensor, process_group: ProcessGroup | None = None) -> Any:
        """x (..., in_features) to (..., out_features), or (out, x).

        Over a process_group, x is gathered along its first dimension, and a rank returns its part
        of the sum over the ranks, to which every rank adds the bias of its fc2.
        """
        out = _run_mlp(self, x, self.training, self.return_residual, process_group, True)
        if process_group is None:
            return out
        if self.return_residual:
            return _reduced(out[0], process_group, True), out[1]
        return _reduced(out, process_group, True)


class ParallelFusedMLP(nn.Module):
    """`FusedMLP` over a process group: `fc1` column-parallel, `fc2` row-parallel.

    Args:
        process_group: the ranks that share it; None for one process.
        sequence_parallel: whether x is gathered along its first dimension, and a rank returns its
            part of it; else x and the result are whole in every rank.
        others: as in `FusedMLP`; sizes are those of the whole layer.

    Contract: flash-attention 2.8, `ParallelFusedMLP`, which refuses a process_group of None.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: str = "gelu_approx",
        process_group: ProcessGroup | None = None,
        bias1: bool = True,
        bias2: bool = True,
        sequence_parallel: bool = True,
        checkpoint_lvl: int = 0,
        heuristic: int | str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_options(activation, checkpoint_lvl, heuristic)
        super().__init__()
        hidden = 4 * in_features if hidden_features is None else hidden_features
        out = in_features if out_features is None else out_features
        self.activation = activation
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel
        self.checkpoint_lvl = checkpoint_lvl
        self.heuristic = heuristic
        self.fc1 = ColumnParallelLinear(
            in_features, hidden, process_group, bias1, sequence_parallel, 1, device, dtype
        )
        self.fc2 = RowParallelLinear(
            hidden, out, process_group, bias2, sequence_parallel, 1, device, dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) to (..., out_features)."""
        group = self.process_group
        out = _run_mlp(self, x, self.training, False, group, self.sequence_parallel)
        return _reduced(out, group, self.sequence_parallel)


def _run_mlp(
    mlp: FusedMLP | ParallelFusedMLP,
    x: Tensor,
    save_pre_act: bool,
    return_residual: bool,
    process_group: ProcessGroup | None,
    sequence_parallel: bool,
) -> Any:
    return fused_mlp_func(
        x,
        mlp.fc1.weight,
        mlp.fc2.weight,
        mlp.fc1.bias,
        mlp.fc2.bias,
        activation=mlp.activation,
        save_pre_act=save_pre_act,
        return_residual=return_residual,
        checkpoint_lvl=mlp.checkpoint_lvl,
        process_group=process_group,
        sequence_parallel=sequence_parallel,
    )


def _reduced(out: Tensor, process_group: ProcessGroup | None, sequence_parallel: bool) -> Tensor:
    if process_group is None:
        return out
    reduce = reduce_scatter if sequence_parallel else all_reduce
    total: Tensor = reduce(out, process_group)  # type: ignore[no-untyped-call]
    return total
