"""Mirror of `flash_attn.utils.distributed`: collectives, and what parallel layers share.

Each collective comes twice: `*_raw` works on values and returns (output, handle), where handle is
None, or with async_op=True the work to wait for before output is read; the other is differentiable.
The backend of the process group does the work: HCCL, NCCL or gloo, whichever serves the tensor's
device. Every rank of the group must make the same call with the same shapes and dtypes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._core.ground.arguments import require_tensors
from .._core.ground.collectives import gather_rows
from ..errors import ArgumentError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work

__all__ = [
    "AllGatherFunc",
    "AllReduceFunc",
    "ReduceScatterFunc",
    "all_gather",
    "all_gather_raw",
    "all_reduce",
    "all_reduce_raw",
    "allreduce_sequence_parallel_grad",
    "get_dim_for_local_rank",
    "reduce_scatter",
    "reduce_scatter_raw",
    "sync_shared_params",
]


def all_gather_raw(
    input_: Tensor, process_group: ProcessGroup | None, async_op: bool = False
) -> tuple[Tensor, Work | None]:
    """Concatenate the ranks' tensors along their first dimension.

    Args:
        input_: (n, ...), any dtype of the backend, any strides; the same shape in every rank.
        process_group: the ranks that take part; None for all.
        async_op: return before the output is complete.

    Returns:
        (output, handle): output (world_size * n, ...), rank 0's rows first.

    Raises:
        ArgumentError: input_ has no dimension.

    Contract: flash-attention 2.8, `all_gather_raw`.
    """
    _rows(input_)
    return gather_rows(input_, process_group, async_op)


def reduce_scatter_raw(
    input_: Tensor, process_group: ProcessGroup | None, async_op: bool = False
) -> tuple[Tensor, Work | None]:
    """Add the ranks' tensors up, and keep this rank's part of the rows.

    Args:
        input_: (n, ...), any strides, n a multiple of the group's size.
        process_group: the ranks that take part; None for all.
        async_op: return before the output is complete.

    Returns:
        (output, handle): output (n / world_size, ...).

    Raises:
        ArgumentError: the group's size does not divide n.

    Contract: flash-attention 2.8, `reduce_scatter_raw`.
    """
    rows, world_size = _rows(input_), dist.get_world_size(process_group)
    if rows % world_size:
        raise ArgumentError(
            "input_",
            f"shape {tuple(input_.shape)}",
            f"a first dimension that {world_size}, the size of process_group, divides",
            "pad input_ along its first dimension",
        )
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    output = input_.new_empty((rows // world_size, *input_.shape[1:]))
    source = input_.detach().contiguous()
    return output, scatter(output, source, group=process_group, async_op=async_op)


def all_reduce_raw(
    input_: Tensor, process_group: ProcessGroup | None, async_op: bool = False
) -> tuple[Tensor, Work | None]:
    """Add the ranks' tensors up.

    Args:
        input_: any shape, any strides.
        process_group: the ranks that take part; None for all.
        async_op: return before the output is complete.

    Returns:
        (output, handle): output is contiguous, of input_'s shape.

    Contract: flash-attention 2.8, `all_reduce_raw`. Different: input_ keeps its values; upstream
    writes the sum over a contiguous input_ and returns that.
    """
    require_tensors(input_=input_)
    output = input_.detach().clone(memory_format=torch.contiguous_format)
    return output, dist.all_reduce(output, group=process_group, async_op=async_op)


class AllGatherFunc(torch.autograd.Function):
    """Autograd of `all_gather`."""

    @staticmethod
    def forward(ctx: Any, input_: Tensor, process_group: ProcessGroup | None) -> Tensor:
        """`all_gather_raw`."""
        ctx.process_group = process_group
        return all_gather_raw(input_, process_group)[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        """Every rank used every row: add up the gradients of this rank's rows."""
        # the differentiable one, for the gradient of a gradient
        grad: Tensor = reduce_scatter(grad_output, ctx.process_group)  # type: ignore[no-untyped-call]
        return grad, None


class ReduceScatterFunc(torch.autograd.Function):
    """Autograd of `reduce_scatter`."""

    @staticmethod
    def forward(ctx: Any, input_: Tensor, process_group: ProcessGroup | None) -> Tensor:
        """`reduce_scatter_raw`."""
        ctx.process_group = process_group
        return reduce_scatter_raw(input_, process_group)[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        """Every rank's rows went into every sum: all the gradients, rank by rank."""
        grad: Tensor = all_gather(grad_output, ctx.process_group)  # type: ignore[no-untyped-call]
        return grad, None


class AllReduceFunc(torch.autograd.Function):
    """Autograd of `all_reduce`."""

    @staticmethod
    def forward(ctx: Any, input_: Tensor, process_group: ProcessGroup | None) -> Tensor:
        """`all_reduce_raw`."""
        return all_reduce_raw(input_, process_group)[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        """What follows is the same in every rank, so its gradient is complete already."""
        return grad_output, None


all_gather = AllGatherFunc.apply
"""`all_gather(input_, process_group)`: `all_gather_raw`'s output, differentiable."""

reduce_scatter = ReduceScatterFunc.apply
"""`reduce_scatter(input_, process_group)`: `reduce_scatter_raw`'s output, differentiable."""

all_reduce = AllReduceFunc.apply
"""`all_reduce(input_, process_group)`: `all_reduce_raw`'s output, for a loss that all ranks share:
its gradient is the gradient of the output, not the sum over the ranks."""


def sync_shared_params(model: nn.Module, process_group: ProcessGroup | None) -> None:
    """Give every rank the first rank's values of the parameters that are marked as shared.

    Args:
        model: its parameters with a true attribute `_shared_params` are written in place, in the
            order of their names, which must be the same in every rank.
        process_group: the ranks that take part; None for all.

    Contract: flash-attention 2.8, `sync_shared_params`.
    """
    first = 0 if process_group is None else dist.get_global_rank(process_group, 0)
    for parameter in _marked(model, "_shared_params"):
        values = parameter.detach()
        received = values.contiguous()
        dist.broadcast(received, src=first, group=process_group)
        if received is not values:
            values.copy_(received)


def allreduce_sequence_parallel_grad(model: nn.Module, process_group: ProcessGroup | None) -> None:
    """Add up over the ranks the gradients of the parameters that are marked as sequence parallel.

    Args:
        model: the `.grad` of its parameters with a true attribute `_sequence_parallel` is written
            in place. Frozen parameters are passed over. A trainable parameter without a gradient
            counts as a gradient of zeros, and gets the sum too, so that ranks in which it was not
            used agree with the others.
        process_group: the ranks that take part; None for all.

    Contract: flash-attention 2.8, `allreduce_sequence_parallel_grad`. Wider: missing gradients,
    and gradients of several dtypes or devices, each of which is reduced by itself.
    """
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for parameter in _marked(model, "_sequence_parallel"):
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            grad = parameter.grad.detach()
            kinds.setdefault((grad.dtype, grad.device), []).append(grad)
    for grads in kinds.values():
        total = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(total, group=process_group)
        for grad, part in zip(grads, total.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view(grad.shape))


def get_dim_for_local_rank(dim: int, world_size: int, local_rank: int, multiple_of: int = 1) -> int:
    """How much of a dimension one rank holds, in whole units of multiple_of.

    Args:
        dim: the whole dimension; what exceeds a multiple of multiple_of goes to no rank.
        world_size: how many ranks share it.
        local_rank: which of them is asked for, 0 to world_size - 1.
        multiple_of: the size of a unit.

    Returns:
        The rank's share: the units dealt evenly, and one more to each of the first ranks while
        some are left.

    Contract: flash-attention 2.8, `get_dim_for_local_rank`.
    """
    units, left = divmod(dim // multiple_of, world_size)
    return (units + (local_rank < left)) * multiple_of


def _rows(input_: Tensor) -> int:
    require_tensors(input_=input_)
    if input_.dim() == 0:
        raise ArgumentError(
            "input_", "a scalar tensor", "at least one dimension", "pass input_[None]"
        )
    return input_.shape[0]


def _marked(model: nn.Module, mark: str) -> list[nn.Parameter]:
    """The parameters with a true attribute of this name, in the order of their own names."""
    named = sorted(model.named_parameters(), key=lambda item: item[0])
    return [parameter for _, parameter in named if getattr(parameter, mark, False)]
