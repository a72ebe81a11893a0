"""What the arguments of a norm must be, whichever public function they came to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from ....errors import ArgumentError
from ...ground.dense_arguments import number, require_alike, require_dense, require_truth
from ...ground.storage import require_writable
from ...problems.buffers import share
from ...problems.norms import NormCall
from .norms import LIKE_WEIGHT, tensors_of, total_dtype

__all__ = ["FLAGS", "check", "check_tensor"]

FLAGS = ("prenorm", "residual_in_fp32", "zero_centered_weight", "is_rms_norm")


def check(call: NormCall, renamed: Mapping[str, str]) -> None:
    """Raise for the first argument that does not fit.

    Args:
        renamed: the names of the caller's arguments where they are not those of NormCall.

    Raises:
        ArgumentError: a shape, dtype, device or value does not fit the others.
        ArgumentTypeError: an argument is an object of the wrong type.
    """
    x, of_x = call.x, renamed.get("x", "x")
    require_dense(**{of_x: x, renamed.get("weight", "weight"): call.weight})
    require_truth(**{name: getattr(call, name) for name in FLAGS})
    given = {field: getattr(call, field) for field in tensors_of(call)}
    require_alike(**{of_x: x, **{renamed.get(field, field): t for field, t in given.items()}})
    if x.dim() == 0:
        _refuse(of_x, "a tensor without dimensions", "(..., hidden)", f"reshape {of_x}")
    whole, hidden = x.shape, x.shape[-1:]
    for field, tensor in tensors_of(call).items():
        shape = hidden if field in LIKE_WEIGHT else whole
        if field == "rowscale":
            # flattened rows, and rows with a last dimension of 1, are as good
            known = isinstance(tensor, Tensor) and tensor.numel() == whole[:-1].numel()
            shape = tensor.shape if known else whole[:-1]
        check_tensor(renamed.get(field, field), tensor, shape, x, of_x)
    if call.bias1 is not None and call.weight1 is None:
        _refuse(
            renamed.get("bias1", "bias1"), "a tensor", "None without weight1", "pass weight1 too"
        )
    if call.rowscale is not None and call.x1 is not None:
        _refuse("rowscale", "a tensor", "None with x1", f"multiply {of_x} by it before the call")
    _check_options(call, renamed)
    if call.out is not None:
        _check_buffer("out", call, call.out, call.out_dtype or x.dtype)
    if call.residual_out is not None:
        _check_buffer("residual_out", call, call.residual_out, total_dtype(call))
        if call.out is not None and share(call.out, call.residual_out):
            _refuse("out", "memory of residual_out", "memory of its own", "pass two tensors")


def check_tensor(
    name: str, tensor: Tensor, shape: Sequence[int], x: Tensor, of_x: str = "x"
) -> None:
    """Raise unless `tensor` is floating, of this shape, and on x's device; x is called of_x."""
    require_dense(**{name: tensor})
    if tensor.shape != shape:
        allowed = f"{tuple(shape)}, to fit {of_x} of shape {tuple(x.shape)}"
        _refuse(name, f"shape {tuple(tensor.shape)}", allowed, f"reshape or expand {name}")
    if not tensor.dtype.is_floating_point:
        _refuse(name, tensor.dtype, "a floating dtype", f"convert {name}, e.g. by .float()")
    if tensor.device != x.device:
        allowed = f"{x.device}, as {of_x}"
        _refuse(name, tensor.device, allowed, f"move {name} by .to({of_x}.device)")


def _check_options(call: NormCall, renamed: Mapping[str, str]) -> None:
    for field, value in (("eps", call.eps), ("dropout_p", call.dropout_p)):
        if type(value) is not float:
            number(renamed.get(field, field), value)
    if not 0.0 <= call.dropout_p <= 1.0:
        name = renamed.get("dropout_p", "dropout_p")
        _refuse(name, call.dropout_p, "a probability, 0 to 1", "pass the share to drop")
    dtype = call.out_dtype
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        _refuse("out_dtype", dtype, "None or a floating torch.dtype", "pass e.g. torch.float32")


def _check_buffer(name: str, call: NormCall, buffer: Tensor, dtype: torch.dtype) -> None:
    if buffer.dtype != dtype:
        allowed = f"{dtype}, the dtype of what is written"
        _refuse(name, buffer.dtype, allowed, f"allocate it with dtype={dtype}")
    if buffer.requires_grad:
        allowed = "a tensor that requires no gradient: the result that is returned has one"
        _refuse(name, "a tensor that requires a gradient", allowed, f"pass {name}.detach()")
    require_writable(**{name: buffer})
    for field in (*LIKE_WEIGHT, "rowscale"):
        parameter = getattr(call, field)
        if parameter is not None and share(buffer, parameter):
            allowed = "memory that no parameter lies in"
            _refuse(name, f"memory of {field}", allowed, "pass torch.empty_like(x)")


def _refuse(name: str, came: object, allowed: str, remedy: str) -> NoReturn:
    raise ArgumentError(name, came, allowed, remedy)
