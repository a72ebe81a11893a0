"""What the autograd functions of dense layers are made of: checks, casts, products, exchanges.

A pending tensor is a pair (tensor, work): `ready` waits for the work, so that a product can be
computed while rows travel. Without a process group nothing travels and the work is None.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import linear

from .._core.ground.autocast import has_autocast
from .._core.ground.dense_arguments import require_group, whole
from .._core.rowwise.gates import require_floating
from ..errors import ArgumentError, UnsupportedError
from ..utils.distributed import (
    all_gather_raw,
    all_reduce_raw,
    get_dim_for_local_rank,
    reduce_scatter_raw,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work

    Pending = tuple[Tensor, Work | None]

__all__ = [
    "begin_gather",
    "begin_reduce",
    "bias_gradient",
    "cast",
    "check_linear",
    "check_once",
    "differentiated_again",
    "input_gradient",
    "linear_gradients",
    "place",
    "product",
    "ready",
    "rounded",
    "share",
    "weight_gradient",
    "without_autocast",
]


def place(process_group: ProcessGroup | None) -> tuple[int, int]:
    """(rank, world_size) in a process group; one process is (0, 1)."""
    if process_group is None:
        return 0, 1
    require_group(process_group)
    return dist.get_rank(process_group), dist.get_world_size(process_group)


def share(argument: str, size: int, process_group: ProcessGroup | None, multiple_of: int) -> int:
    """How many of a layer's features this rank holds."""
    size, multiple_of = whole(argument, size, 1), whole("multiple_of", multiple_of, 1)
    if size % multiple_of:
        raise ArgumentError(
            argument,
            size,
            f"a multiple of multiple_of = {multiple_of}",
            f"pass another {argument} or another multiple_of",
        )
    rank, world_size = place(process_group)
    return get_dim_for_local_rank(size, world_size, rank, multiple_of)


def begin_gather(x: Tensor, group: ProcessGroup | None, sequence_parallel: bool) -> Pending:
    """The rows of all ranks; x itself where every rank holds them already."""
    if group is None or not sequence_parallel:
        return x, None
    return all_gather_raw(x, group, async_op=True)


def begin_reduce(partial: Tensor, group: ProcessGroup | None, sequence_parallel: bool) -> Pending:
    """The sum over the ranks, of this rank's rows alone where `begin_gather` gathered."""
    if group is None:
        return partial, None
    reduce = reduce_scatter_raw if sequence_parallel else all_reduce_raw
    return reduce(partial, group, async_op=True)


def ready(pending: Pending) -> Tensor:
    """The tensor, complete."""
    tensor, work = pending
    if work is not None:
        work.wait()
    return tensor


def linear_gradients(
    needed: tuple[bool, bool, bool],
    dout: Tensor,
    total: Pending | None,
    weight: Tensor,
    residual: Tensor | None,
    group: ProcessGroup | None,
    sequence_parallel: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of a linear layer's x, weight and bias, None where they are not needed.

    Args:
        dout: (rows of all ranks..., out).
        total: the input that the weight was multiplied with; only the gradient of weight needs it.
        residual: what is to be added to the gradient of x, None for nothing.
    """
    of_x, of_weight, of_bias = needed
    pending = None
    if of_x:
        more = residual if group is None else None
        pending = begin_reduce(input_gradient(dout, weight, more), group, sequence_parallel)
    dweight = weight_gradient(dout, ready(total)) if of_weight and total is not None else None
    dbias = bias_gradient(dout) if of_bias else None
    dx = None if pending is None else ready(pending)
    if dx is not None and residual is not None and group is not None:
        dx = dx + residual
    return dx, dweight, dbias


def input_gradient(dout: Tensor, weight: Tensor, more: Tensor | None = None) -> Tensor:
    """dout (..., out) times weight (out, in), plus `more` (..., in) before it is rounded."""
    if more is None:
        return dout @ weight
    return torch.addmm(_rows(more), _rows(dout), weight).view(more.shape)


def weight_gradient(dout: Tensor, x: Tensor) -> Tensor:
    """(out, in), of dout (..., out) and x (..., in)."""
    return _rows(dout).t() @ _rows(x)


def bias_gradient(dout: Tensor) -> Tensor:
    """(out,), of dout (..., out)."""
    return _rows(dout).sum(0)


def rounded(
    gradients: Iterable[Tensor | None], dtypes: Iterable[torch.dtype | None]
) -> tuple[Tensor | None, ...]:
    """Each gradient in the dtype of the argument that it belongs to."""
    return tuple(
        None if gradient is None else gradient.to(dtype)
        for gradient, dtype in zip(gradients, dtypes, strict=True)
    )


def _rows(x: Tensor) -> Tensor:
    # not -1 for the rows, which are ambiguous where a row is empty
    return x.flatten(0, -2) if x.dim() > 1 else x[None]


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear`, as a tensor of its own.

    With a bias and three dimensions `linear` returns a view, and a view that an autograd.Function
    has made must not be changed in place: rotary embedding does.
    """
    out = linear(_rows(x), weight, bias)
    whole: Tensor = torch.ops.aten._unsafe_view.default(out, (*x.shape[:-1], out.shape[-1]))
    return whole


def cast(**tensors: Any) -> tuple[list[Any], list[torch.dtype | None], bool]:
    """The tensors in autocast's dtype, if it is on for x's device; float64 stays, as in torch.

    One of them is x; those named bias may be None.

    Returns:
        (tensors, dtypes, changed): what to compute with, the dtypes that came, and whether any of
        them changed.

    Raises:
        ArgumentError, ArgumentTypeError: one is no tensor of a floating dtype, or x is a scalar.
    """
    for name, tensor in tensors.items():
        if tensor is not None or not name.startswith("bias"):
            require_floating(**{name: tensor})
    x = tensors["x"]
    if x.dim() == 0:
        raise ArgumentError("x", "a scalar", "(..., in_features)", "pass x[None]")
    dtypes = [None if tensor is None else tensor.dtype for tensor in tensors.values()]
    device_type = x.device.type
    if not has_autocast(device_type) or not torch.is_autocast_enabled(device_type):
        return list(tensors.values()), dtypes, False
    dtype = torch.get_autocast_dtype(device_type)
    computed = [
        tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)
        for tensor in tensors.values()
    ]
    return computed, dtypes, any(kind not in (None, dtype, torch.float64) for kind in dtypes)


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """What was cast by `cast` is computed as it is; a backward may run in or out of autocast."""
    if not has_autocast(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def differentiated_again() -> bool:
    """In a backward: whether it is itself recorded, which torch.compile never does."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def check_once(function: str, differentiable: bool) -> None:
    """Refuse a backward that could not be differentiated where its caller is about to do so."""
    if not differentiable and differentiated_again():
        raise UnsupportedError(
            "create_graph",
            f"True in the backward of {function}",
            "False under autocast, with a process_group, or with a frozen first weight",
            "take second derivatives on one process and outside torch.autocast",
        )


def check_linear(
    x: Tensor, in_features: int, weight: Tensor, bias: Tensor | None, names: tuple[str, str]
) -> None:
    """Raise unless weight is (out, in_features), bias (out,), and both are of x's kind.

    Names are those of weight and bias.
    """
    name, bias_name = names
    if weight.dim() != 2 or weight.shape[1] != in_features:
        raise ArgumentError(
            name,
            f"shape {tuple(weight.shape)}",
            f"(out_features, {in_features}), as its input has {in_features} columns",
            "pass the weight of a linear layer with these in_features",
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ArgumentError(
            bias_name,
            f"shape {tuple(bias.shape)}",
            f"({weight.shape[0]},), as {name} has {weight.shape[0]} rows",
            "pass one entry for each out_feature",
        )
    for argument, tensor in ((name, weight), (bias_name, bias)):
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise ArgumentError(
                argument,
                f"{tensor.dtype} on {tensor.device}",
                f"{x.dtype} on {x.device}, as x",
                "convert one of them, or call it under torch.autocast",
            )
