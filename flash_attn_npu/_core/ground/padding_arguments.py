"""Masks, indices and lengths of `bert_padding`, checked before anything is moved."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ArgumentError
from .dense_arguments import LARGEST, require_dense, require_values, whole
from .functions import PLAIN

__all__ = [
    "are_few_on_host",
    "check_device",
    "check_indices",
    "check_mask",
    "check_numbers",
    "check_put",
    "check_row",
    "check_rows",
    "fits_on_host",
]

FEW = 128
"""Tokens whose mask is read as a list, which takes a few operations' time for more."""

_compiling = torch.compiler.is_compiling
_transforming = torch._C._are_functorch_transforms_active


def are_few_on_host(hidden_states: Tensor, mask: Tensor) -> bool:
    """Whether the arguments of `unpad_input` fit, and are a few tokens on the host.

    What does not fit, and transforms, are refused elsewhere.
    """
    if _compiling() or _transforming():
        return False
    if type(hidden_states) not in PLAIN or type(mask) not in PLAIN:
        return False
    if not (hidden_states.is_cpu and mask.is_cpu) or hidden_states.is_nested or mask.is_nested:
        return False
    if not (hidden_states.layout is mask.layout is torch.strided) or mask.numel() > FEW:
        return False
    return mask.dim() == 2 and mask.shape == hidden_states.shape[:2]


def fits_on_host(values: Tensor, indices: Tensor, batch: int, seqlen: int) -> bool:
    """Whether the arguments of `pad_input` fit, but for the contents of int64 indices, on the host.

    Raises:
        RuntimeError: a tensor is nested, and has no shape.
    """
    if _compiling() or _transforming() or batch < 0 or seqlen < 0 or batch * seqlen > LARGEST:
        return False
    if type(values) not in PLAIN or type(indices) not in PLAIN:
        return False
    if not (values.is_cpu and indices.is_cpu and indices.dtype is torch.int64):
        return False
    if not (values.layout is indices.layout is torch.strided):
        return False
    return indices.dim() == 1 and values.shape[:1] == indices.shape


def check_put(values: Tensor, indices: Tensor, first_axis_dim: int) -> int:
    require_dense(values=values, indices=indices)
    first_axis_dim = whole("first_axis_dim", first_axis_dim)
    check_indices(indices, values.device)
    if values.shape[:1] != indices.shape:
        raise ArgumentError(
            "values",
            f"shape {tuple(values.shape)}",
            f"({indices.shape[0]}, ...), a row for every index",
            "pass the indices that the rows were packed with",
        )
    return first_axis_dim


def check_rows(input: Tensor, indices: Tensor) -> None:
    require_dense(input=input, indices=indices)
    if input.dim() == 0:
        allowed = "(rows, ...)"
        raise ArgumentError("input", "a scalar tensor", allowed, "pass input[None]")
    check_indices(indices, input.device)


def check_indices(indices: Tensor, device: torch.device) -> None:
    if indices.dim() != 1 or indices.dtype not in (torch.int32, torch.int64):
        raise ArgumentError(
            "indices",
            f"a {indices.dtype} tensor of shape {tuple(indices.shape)}",
            "a torch.int32 or torch.int64 tensor of one dimension",
            "pass the indices that unpad_input returned",
        )
    if not torch.compiler.is_compiling() and indices.device != device:
        remedy = "pass indices.to(the device of the rows)"
        raise ArgumentError("indices", indices.device, f"{device}, as the rows", remedy)


def check_numbers(indices: Tensor, rows: int, of: str) -> None:
    """Raise for the number of a row that does not exist, where that can be read."""
    if torch.compiler.is_compiling():
        return
    if indices.device.type == "cpu" and indices.numel():
        least, largest = (int(end) for end in indices.aminmax())
        if least < 0 or largest >= rows:
            came = f"row {least if least < 0 else largest}"
            allowed = f"0 to {rows - 1}, the rows of {of}"
            remedy = "pass the indices that unpad_input returned"
            raise ArgumentError("indices", came, allowed, remedy)


def check_mask(argument: str, mask: Tensor, hidden_states: Tensor) -> None:
    require_values(**{argument: mask})
    if mask.dim() != 2 or mask.shape != hidden_states.shape[:2]:
        raise ArgumentError(
            argument,
            f"shape {tuple(mask.shape)}",
            f"{tuple(hidden_states.shape[:2])}, the (batch, seqlen) of hidden_states",
            "pass one entry for each token of hidden_states",
        )
    if mask.device.type != "cpu":
        check_device(argument, mask, hidden_states.device, "hidden_states")


def check_device(argument: str, mask: Tensor, device: torch.device, other: str) -> None:
    if mask.device != device:
        raise ArgumentError(
            argument, mask.device, f"{device}, as {other}", f"pass {argument}.to({other}.device)"
        )


def check_row(row: list[int], seqlen: int) -> None:
    if not all(isinstance(length, int) and length >= 0 for length in row) or sum(row) > seqlen:
        raise ArgumentError(
            "attention_mask_in_length",
            f"a row {row[:12]}{' ...' if len(row) > 12 else ''}",
            f"integers of at least 0 that sum up to at most seqlen = {seqlen}",
            "pass the lengths of the sequences of each row, and zeros behind them",
        )
