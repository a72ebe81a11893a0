"""Mirror of `flash_attn.bert_padding`: between padded batches and packed sequences.

The conventions are those of 2.8: `unpad_input` returns five values. Unpadding copies the lengths
to the host once, padding copies nothing; everything is differentiable.
"""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import _rearranging
from ._core.ground.dense_arguments import (
    LARGEST,
    refuse_transforms,
    require_dense,
    whole,
)
from ._core.ground.lengths import remember_lengths
from ._core.ground.padding_arguments import (
    are_few_on_host,
    check_device,
    check_mask,
    check_numbers,
    check_put,
    check_row,
    check_rows,
    fits_on_host,
)
from .errors import ArgumentError, ArgumentTypeError, renamed

__all__ = [
    "IndexFirstAxis",
    "IndexFirstAxisResidual",
    "IndexPutFirstAxis",
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def __getattr__(name: str) -> Any:
    """`rearrange` and `repeat` of einops, which clients import from here; ours if it is missing."""
    if name in ("rearrange", "repeat"):
        try:
            return getattr(importlib.import_module("einops"), name)
        except ModuleNotFoundError:
            if name == "rearrange":
                return _rearranging.rearrange
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class IndexFirstAxis(torch.autograd.Function):
    """Autograd of `index_first_axis`."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, indices: Tensor) -> Tensor:
        """Gather rows."""
        check_rows(input, indices)
        check_numbers(indices, input.shape[0], "input")
        ctx.save_for_backward(indices)
        ctx.rows = input.shape[0]
        return input.index_select(0, indices)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        """Add rows up where they came from."""
        (indices,) = ctx.saved_tensors
        zeros = grad_output.new_zeros(ctx.rows, *grad_output.shape[1:])
        return zeros.index_add_(0, indices, grad_output), None


class IndexPutFirstAxis(torch.autograd.Function):
    """Autograd of `index_put_first_axis`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
        """Put rows among zeros."""
        first_axis_dim = check_put(values, indices, first_axis_dim)
        check_numbers(indices, first_axis_dim, "first_axis_dim")
        ctx.save_for_backward(indices)
        return _put(values, indices, first_axis_dim)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        """Gather the rows that were put."""
        (indices,) = ctx.saved_tensors
        return grad_output.index_select(0, indices), None, None


class IndexFirstAxisResidual(torch.autograd.Function):
    """Autograd of `index_first_axis_residual`."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Gather rows, and hand the input on."""
        check_rows(input, indices)
        check_numbers(indices, input.shape[0], "input")
        ctx.save_for_backward(indices)
        return input.index_select(0, indices), input.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, grad_residual: Tensor) -> tuple[Tensor, None]:
        """Add the rows' gradients to that of the residual."""
        (indices,) = ctx.saved_tensors
        return grad_residual.index_add(0, indices, grad_output), None


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Rows `indices`, (n,) int32 or int64, of input (rows, ...): (n, ...).

    Raises:
        ArgumentError: indices have another rank, dtype or device; on the host, or name a row that
            does not exist.

    >>> index_first_axis(torch.randn(5, 3), torch.tensor([4, 0])).shape
    torch.Size([2, 3])

    Contract: flash-attention 2.8, `index_first_axis`.
    """
    refuse_transforms("input")
    check_rows(input, indices)
    try:
        # torch's autograd of it is that of IndexFirstAxis
        return input.index_select(0, indices)
    except (IndexError, RuntimeError):
        check_numbers(indices, input.shape[0], "input")
        raise


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """(first_axis_dim, ...) with values (n, ...) at the rows `indices`, zeros elsewhere.

    The indices, (n,) int32 or int64, must differ from one another.

    Raises:
        ArgumentError: indices have another rank, dtype, device or length than values allow; on the
            host, or name a row that does not exist.

    Contract: flash-attention 2.8, `index_put_first_axis`.
    """
    refuse_transforms("values")
    first_axis_dim = check_put(values, indices, first_axis_dim)
    try:
        return _put(values, indices, first_axis_dim)
    except (IndexError, RuntimeError):
        check_numbers(indices, first_axis_dim, "first_axis_dim")
        raise


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """`index_first_axis`, and input itself for a residual connection, in one autograd node.

    Raises:
        ArgumentError: indices have another rank, dtype or device; on the host, or name a row that
            does not exist.

    Contract: flash-attention 2.8, `index_first_axis_residual`.
    """
    refuse_transforms("input")
    both: tuple[Tensor, Tensor]
    both = IndexFirstAxisResidual.apply(input, indices)  # type: ignore[no-untyped-call]
    return both


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Pack the tokens of a padded batch.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), nonzero for a token. On the host it costs no copy to it.
        unused_mask: (batch, seqlen), nonzero for a row that is kept but holds no token; on the
            device of attention_mask.

    Returns:
        packed (total, ...), where total counts both masks; indices (total,) int64 of the packed
        rows in the flattened batch; cu_seqlens (batch + 1,) int32; max_seqlen, int; seqused
        (batch,) int32, which counts attention_mask alone.

    Raises:
        ArgumentError: shapes or devices do not fit.

    >>> mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    >>> packed, indices, cu_seqlens, max_seqlen, seqused = unpad_input(torch.randn(2, 3, 8), mask)
    >>> packed.shape, indices.tolist(), cu_seqlens.tolist(), max_seqlen
    (torch.Size([5, 8]), [0, 1, 3, 4, 5], [0, 2, 5], 3)

    Contract: flash-attention 2.8, `unpad_input`. Wider: masks on the host. In one graph under
    torch.compile if `torch._dynamo.config` captures scalar outputs and dynamic output shapes.
    """
    if unused_mask is None and are_few_on_host(hidden_states, attention_mask):
        return _unpadded(hidden_states, attention_mask.tolist())
    require_dense(hidden_states=hidden_states)
    check_mask("attention_mask", attention_mask, hidden_states)
    kept = attention_mask if attention_mask.dtype is torch.bool else attention_mask != 0
    seqused = kept.sum(dim=-1, dtype=torch.int32)
    seqlens = seqused
    if unused_mask is not None:
        check_mask("unused_mask", unused_mask, hidden_states)
        check_device("unused_mask", unused_mask, attention_mask.device, "attention_mask")
        kept = kept | (unused_mask != 0)
        seqlens = kept.sum(dim=-1, dtype=torch.int32)
    if torch.compiler.is_compiling():
        # one number for the graph, not a list of them
        indices, lengths = kept.flatten().nonzero().flatten(), []
        longest = int(seqlens.max().item()) if seqlens.shape[0] else 0
    else:
        lengths = seqlens.tolist()
        indices, longest = _kept_rows(kept, sum(lengths)), max(lengths, default=0)
    device = hidden_states.device
    if indices.device != device:
        indices, seqlens, seqused = indices.to(device), seqlens.to(device), seqused.to(device)
    packed = index_first_axis(hidden_states.flatten(0, 1), indices)
    return packed, indices, _cumulative(seqlens, lengths), longest, seqused


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Pack a padded batch whose rows each hold several sequences, one behind the other.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask_in_length: (batch, seqlen), int: the lengths of the sequences of each row,
            zeros elsewhere. A row [2, 3, 0, 0, 0, 0] holds a sequence of 2 tokens, one of 3, and
            one token of padding. On the host it costs no copy to it.

    Returns:
        packed (total, ...); indices (total,) int64 of the packed rows in the flattened batch;
        cu_seqlens (sequences + 1,) int32; max_seqlen, int.

    Raises:
        ArgumentError: shapes or devices do not fit, or lengths are not integers, are negative, or
            exceed seqlen together.

    >>> lengths = torch.tensor([[2, 3, 0, 0, 0, 0]])
    >>> packed, _, cu_seqlens, _ = unpad_input_for_concatenated_sequences(
    ...     torch.randn(1, 6, 8), lengths
    ... )
    >>> packed.shape, cu_seqlens.tolist()
    (torch.Size([5, 8]), [0, 2, 5])

    Contract: flash-attention 2.8, `unpad_input_for_concatenated_sequences`. Wider: lengths on the
    host.
    """
    require_dense(hidden_states=hidden_states)
    check_mask("attention_mask_in_length", attention_mask_in_length, hidden_states)
    rows = attention_mask_in_length.tolist()
    seqlen = hidden_states.shape[1]
    for row in rows:
        check_row(row, seqlen)
    lengths = [length for row in rows for length in row if length]
    used = attention_mask_in_length.sum(dim=-1, keepdim=True)
    kept = torch.arange(seqlen, device=used.device) < used
    indices = _kept_rows(kept, sum(lengths)).to(hidden_states.device)
    packed = index_first_axis(hidden_states.flatten(0, 1), indices)
    seqlens = torch.tensor(lengths, dtype=torch.int32, device="cpu").to(hidden_states.device)
    return packed, indices, _cumulative(seqlens, lengths), max(lengths, default=0)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Undo `unpad_input`.

    Args:
        hidden_states: (total, ...).
        indices: (total,), as `unpad_input` returned them.

    Returns:
        (batch, seqlen, ...), with zeros where there was padding.

    Raises:
        ArgumentError: as `index_put_first_axis`, or a size is negative, or both are too large.

    >>> pad_input(torch.randn(5, 8), torch.tensor([0, 1, 3, 4, 5]), batch=2, seqlen=3).shape
    torch.Size([2, 3, 8])

    Contract: flash-attention 2.8, `pad_input`.
    """
    if type(batch) is type(seqlen) is int:
        try:
            if fits_on_host(hidden_states, indices, batch, seqlen):
                rest = hidden_states.shape[1:]
                zeros = hidden_states.new_zeros((batch * seqlen, *rest))
                return zeros.index_copy_(0, indices, hidden_states).view(batch, seqlen, *rest)
        except (IndexError, RuntimeError):
            # what is wrong is found and named below
            pass
    batch, seqlen = whole("batch", batch), whole("seqlen", seqlen)
    if not torch.compiler.is_compiling() and batch * seqlen > LARGEST:
        raise ArgumentError(
            "seqlen",
            f"{seqlen}, in a batch of {batch}",
            f"{LARGEST} tokens at most",
            "pass the batch and seqlen that unpad_input got",
        )
    try:
        padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    except (ArgumentError, ArgumentTypeError) as error:
        names = {"values": "hidden_states", "first_axis_dim": "seqlen"}
        raise renamed(error, names) from None
    return padded.view(batch, seqlen, *padded.shape[1:])


def _unpadded(
    hidden_states: Tensor, rows: list[list[Any]]
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """`unpad_input` of a few tokens on the host, whose mask is read faster than it is computed."""
    lengths = [len(row) - row.count(0) for row in rows]
    places = [place for place, token in enumerate(chain.from_iterable(rows)) if token != 0]
    indices = torch.tensor(places, dtype=torch.int64, device="cpu")
    known = [0, *accumulate(lengths)]
    if not torch.is_inference_mode_enabled():
        cumulative = torch.tensor(known, dtype=torch.int32, device="cpu")
    else:
        # an inference tensor could not be saved for a backward
        with torch.inference_mode(False):
            cumulative = torch.tensor(known, dtype=torch.int32, device="cpu")
    seqused = torch.tensor(lengths, dtype=torch.int32, device="cpu")
    packed = hidden_states.flatten(0, 1).index_select(0, indices)
    return packed, indices, cumulative, max(lengths, default=0), seqused


def _kept_rows(kept: Tensor, total: int) -> Tensor:
    """Where `kept` is True, counted in the flattened mask; nonzero would ask the device for total.

    A row that is kept goes to as many places from the start as rows are kept before it, and all
    others to one place behind the end.
    """
    kept = kept.flatten()
    if kept.device.type == "cpu":
        return kept.nonzero().flatten()
    places = torch.where(kept, kept.cumsum(0) - 1, total)
    every = torch.arange(kept.shape[0], device=kept.device)
    return every.new_empty(total + 1).scatter_(0, places, every)[:total]


def _cumulative(seqlens: Tensor, lengths: list[int]) -> Tensor:
    """cu_seqlens, whose contents need not be copied to the host again."""
    if torch.compiler.is_compiling():
        return _added_up(seqlens)
    known = tuple(accumulate(lengths, initial=0))
    # inference tensors have no version counter, so nothing could be remembered about them
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
        if seqlens.is_cpu:
            cu_seqlens = torch.tensor(known, dtype=torch.int32, device="cpu")
        else:
            cu_seqlens = _added_up(seqlens)
    remember_lengths(cu_seqlens, known)
    return cu_seqlens


def _added_up(seqlens: Tensor) -> Tensor:
    return pad(torch.cumsum(seqlens, dim=0, dtype=torch.int32), (1, 0))


def _put(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    zeros = values.new_zeros((first_axis_dim, *values.shape[1:]))
    rows = indices if indices.dtype is torch.int64 else indices.long()
    return zeros.index_copy_(0, rows, values)
