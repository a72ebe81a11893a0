"""Where the tokens of a rotation stand: the rows of its tables, its arguments checked."""

from __future__ import annotations

from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import ArgumentError, ArgumentTypeError
from ..ground import arguments as checks
from ..ground.dense_arguments import require_dense, require_values
from ..ground.functions import listed
from ..ground.lengths import Lengths, host_lengths
from ..problems.rowwise import Turn

__all__ = ["Part", "Positions", "check_dense", "dense_positions", "positions_of"]

Part = tuple[slice, ...]
"""A block of tokens: some sequences and positions, or some of all tokens."""

Rows = slice | Tensor
"""Which rows of the tables: a range shared by the batch, or one index for every token."""


class Positions(NamedTuple):
    """The row of the tables for each token.

    Attributes:
        starts: of the first token of each sequence, or of all; of packed sequences less the number
            of tokens before them.
        ends: where packed sequences end; None for a padded batch.
        device: where the rows are computed.
    """

    starts: int | Tensor
    ends: Tensor | None
    device: torch.device

    def rows(self, part: Part) -> Rows:
        """The rows for a block of tokens: all of them, or some sequences and positions of these."""
        span = part[-1]
        if isinstance(self.starts, int):
            return slice(self.starts + span.start, self.starts + span.stop)
        if self.ends is None and (span.start, span.stop) == (0, 1):
            # a step of decoding
            return self.starts[part[0], None]
        tokens = torch.arange(span.start, span.stop, device=self.device)
        if self.ends is None:
            return self.starts[part[0], None] + tokens
        return self.starts[torch.searchsorted(self.ends, tokens, right=True)] + tokens


def positions_of(x: Tensor, cos: Tensor, sin: Tensor, turn: Turn) -> Positions:
    offsets, cu_seqlens = turn.seqlen_offsets, turn.cu_seqlens
    if cu_seqlens is None:
        check_dense(x, cos, sin, offsets)
        return dense_positions(x, offsets)
    _check_kinds(x, cos, sin, 3)
    return _packed_positions(x, cos.shape[0], offsets, cu_seqlens, turn.max_seqlen)


def check_dense(x: Tensor, cos: Tensor, sin: Tensor, seqlen_offsets: int | Tensor) -> None:
    """Raise what `rotate` raises for a padded batch, before a caller writes something else."""
    _check_kinds(x, cos, sin, 4)
    seqlen_ro, (batch, seqlen) = cos.shape[0], x.shape[:2]
    if not isinstance(seqlen_offsets, Tensor):
        start = _checked_offset(seqlen_offsets)
        _check_reach("seqlen_offsets", start, start + seqlen, seqlen_ro)
        return
    _check_offsets(seqlen_offsets, batch, x)
    _check_reach("cos", 0, seqlen, seqlen_ro)
    if _readable(seqlen_offsets):
        for start in listed(seqlen_offsets):
            _check_reach("seqlen_offsets", start, start + seqlen, seqlen_ro)


def dense_positions(x: Tensor, seqlen_offsets: int | Tensor) -> Positions:
    if not isinstance(seqlen_offsets, Tensor):
        return Positions(_checked_offset(seqlen_offsets), None, x.device)
    # those on the host are counted up there, and copied as rows
    return Positions(seqlen_offsets.to(torch.int64), None, seqlen_offsets.device)


def _packed_positions(
    x: Tensor,
    seqlen_ro: int,
    seqlen_offsets: int | Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor | None,
) -> Positions:
    require_values(cu_seqlens=cu_seqlens)
    if cu_seqlens.dtype == torch.int64:
        cu_seqlens = cu_seqlens.to(torch.int32)
    offsets: int | Tensor
    if isinstance(seqlen_offsets, Tensor):
        _check_offsets(seqlen_offsets, cu_seqlens.shape[0] - 1, x)
        offsets = seqlen_offsets.to(x.device, torch.int64)
    else:
        offsets = _checked_offset(seqlen_offsets)
    if not torch.compiler.is_compiling():
        lengths = host_lengths("cu_seqlens", cu_seqlens)
        _check_packed(x, lengths, max_seqlen)
        starts = [0 if isinstance(offsets, Tensor) else offsets] * len(lengths.seqlens)
        if isinstance(seqlen_offsets, Tensor) and _readable(seqlen_offsets):
            starts = listed(seqlen_offsets)
        for start, seqlen in zip(starts, lengths.seqlens, strict=True):
            _check_reach("seqlen_offsets", start, start + seqlen, seqlen_ro)
    cumulative = cu_seqlens.to(x.device, torch.int64)
    return Positions(offsets - cumulative[:-1], cumulative[1:], x.device)


def _readable(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_kinds(x: Tensor, cos: Tensor, sin: Tensor, least: int) -> None:
    require_dense(x=x, cos=cos, sin=sin)
    _check_rank(x, least)
    _check_tables(x, cos, sin)


def _check_rank(x: Tensor, least: int) -> None:
    if x.dim() < least:
        raise ArgumentError(
            "x",
            f"shape {tuple(x.shape)}",
            "(batch, seqlen, nheads, headdim), or (total, nheads, headdim) with cu_seqlens",
            "reshape x, or pass cu_seqlens if it is packed",
        )


def _check_tables(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    for name, tensor in (("x", x), ("cos", cos), ("sin", sin)):
        if not tensor.dtype.is_floating_point:
            raise ArgumentError(name, tensor.dtype, "a floating dtype", f"pass {name}.float()")
        if tensor.device != x.device:
            raise ArgumentError(
                name, tensor.device, f"{x.device}, as x", f"pass {name}.to(x.device)"
            )
    if cos.dim() != 2 or 2 * cos.shape[1] > x.shape[-1]:
        raise ArgumentError(
            "cos",
            f"shape {tuple(cos.shape)}",
            f"(seqlen_ro, rotary_dim / 2) with rotary_dim <= headdim = {x.shape[-1]}",
            "pass one column for each pair of dimensions",
        )
    if sin.shape != cos.shape:
        raise ArgumentError(
            "sin",
            f"shape {tuple(sin.shape)}",
            f"{tuple(cos.shape)}, the shape of cos",
            "pass both of the same length and width",
        )


def _checked_offset(seqlen_offsets: object) -> int:
    # an int is asked for by itself because torch.compile has no Integral for its symbols
    if isinstance(seqlen_offsets, int):
        return seqlen_offsets
    if isinstance(seqlen_offsets, Integral):
        return int(seqlen_offsets)
    raise ArgumentTypeError(
        "seqlen_offsets",
        type(seqlen_offsets).__name__,
        "an int or a (batch,) integer tensor",
        "pass the position of the first token",
    )


def _check_offsets(seqlen_offsets: Tensor, batch: int, x: Tensor) -> None:
    if x.device.type == "meta":
        require_dense(seqlen_offsets=seqlen_offsets)
    else:
        require_values(seqlen_offsets=seqlen_offsets)
    if seqlen_offsets.dtype not in (torch.int32, torch.int64) or seqlen_offsets.shape != (batch,):
        raise ArgumentError(
            "seqlen_offsets",
            f"a {seqlen_offsets.dtype} tensor of shape {tuple(seqlen_offsets.shape)}",
            f"an int, or a torch.int32 or torch.int64 tensor of shape ({batch},)",
            "pass one position for each sequence",
        )


def _check_reach(argument: str, first: int, end: int, seqlen_ro: int) -> None:
    if end > first and (first < 0 or end > seqlen_ro):
        raise ArgumentError(
            argument,
            f"positions {first} to {end - 1}",
            f"positions 0 to {seqlen_ro - 1}, the rows of cos and sin",
            f"pass cos and sin with at least {end} rows",
        )


def _check_packed(x: Tensor, lengths: Lengths, max_seqlen: int | Tensor | None) -> None:
    if lengths.total != x.shape[0]:
        raise ArgumentError(
            "cu_seqlens",
            f"a total of {lengths.total}",
            f"{x.shape[0]}, the number of tokens in x",
            "pass the cumulative lengths of all sequences in x",
        )
    if max_seqlen is None:
        return
    if isinstance(max_seqlen, Tensor):
        require_dense(max_seqlen=max_seqlen)
    longest = checks.longest("max_seqlen", max_seqlen, lengths.longest)
    if longest < lengths.longest:
        raise ArgumentError(
            "max_seqlen",
            longest,
            f"at least {lengths.longest}, the longest sequence in cu_seqlens",
            f"pass max_seqlen={lengths.longest}",
        )
