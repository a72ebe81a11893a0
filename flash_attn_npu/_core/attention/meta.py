"""Packed calls whose tensors and lengths are on meta: shapes alone, as under a FakeTensorMode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import ArgumentError
from ..ground import arguments
from ..ground.lengths import Lengths, host_lengths, interned
from ..problems.ask import Ask, Facts, Options, Packed
from ..problems.cache import check_layout
from ..problems.validation import describe
from . import operators

__all__ = ["attend", "lacks_values"]

Answer = Tensor | tuple[Tensor, Tensor, Tensor]


def lacks_values(q: Any, read: tuple[Any, ...]) -> bool:
    """Whether q is on meta, and a tensor that would be read is."""
    of_meta = isinstance(q, Tensor) and q.is_meta
    return of_meta and any(isinstance(x, Tensor) and x.is_meta for x in read)


def attend(
    function: str,
    inputs: tuple[Tensor, Tensor, Tensor],
    lengths: tuple[Any, ...],
    options: tuple[Any, ...],
    alibi_slopes: Tensor | None,
    sink: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Answer:
    """`operators.attend`, of arguments that are checked as far as they can be without values."""
    q, k, v = inputs
    arguments.require_plain(q=q, k=k, v=v)
    arguments.require_plain_or_none(alibi_slopes=alibi_slopes, sink=sink, block_table=block_table)
    plain = Options.checked(*options)
    packed = Packed(
        _some_lengths("cu_seqlens_q", lengths[0]),
        _some_lengths("cu_seqlens_k", lengths[1]),
        _longest("max_seqlen_q", lengths[2]),
        _longest("max_seqlen_k", lengths[3]),
    )
    facts_k, facts_v = Facts.of(k), Facts.of(v)
    if block_table is not None:
        check_layout(k, v, len(packed.q.seqlens), block_table)
        # keys of no sequence, of the pages' heads
        facts_k, facts_v = (x._replace(shape=(0, *x.shape[-2:])) for x in (facts_k, facts_v))
        packed = packed._replace(k=interned((0,) * len(packed.k.cumulative), "cu_seqlens_k"))
    describe(
        Ask(
            function,
            Facts.of(q),
            facts_k,
            facts_v,
            packed=packed,
            options=plain,
            alibi_slopes=None if alibi_slopes is None else Facts.of(alibi_slopes),
            sink=None if sink is None else Facts.of(sink),
            needs_grad=False,
            uses_lse=True,
        )
    )
    lengths = (*lengths[:2], *packed[2:])
    return operators.attend(
        function, inputs, lengths, plain, alibi_slopes, sink, block_table=block_table
    )


def _some_lengths(argument: str, cu_seqlens: Any) -> Lengths:
    """Those of so many sequences as the tensor has, which are not known: empty ones."""
    if not (isinstance(cu_seqlens, Tensor) and cu_seqlens.is_meta):
        return host_lengths(argument, cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or not cu_seqlens.shape[0]:
        raise ArgumentError(
            argument,
            f"a {cu_seqlens.dtype} tensor of shape {tuple(cu_seqlens.shape)}",
            "a torch.int32 tensor of shape (batch + 1,)",
            "pass the cumulative lengths of the sequences, with a 0 in front",
        )
    return interned((0,) * cu_seqlens.shape[0], argument)


def _longest(argument: str, value: Any) -> int:
    if isinstance(value, Tensor) and value.is_meta:
        raise ArgumentError(
            argument,
            "a tensor on meta, which has no values",
            "an int: results may be as long",
            f"pass {argument} as an int",
        )
    return arguments.longest(argument, value, 0)
