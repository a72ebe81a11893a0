"""Packed queries against keys that are not simply packed: pages, used lengths, left padding.

`block_table` makes k and v pages (num_blocks, page_block_size, nheads_k, headdim), whose lengths
are those of cu_seqlens_k; `seqused_k` shortens sequences, `leftpad_k` lets them start later.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import ArgumentError
from ..ground.lengths import Lengths, interned
from ..problems.ask import Facts, Pages
from ..problems.cache import Cache, Span, cache_lengths, pages_of
from . import moving

__all__ = ["Keys", "Placement", "gather", "read_keys", "spaced"]

MOST_SPACED = 10_000
"""Sequences; with as many again between them a kernel still takes all."""


class Placement(NamedTuple):
    """The arguments that say where the keys of a sequence lie, besides cu_seqlens_k."""

    block_table: Tensor | None = None
    seqused_k: Tensor | None = None
    leftpad_k: Tensor | None = None

    @property
    def given(self) -> bool:
        return any(argument is not None for argument in self)


class Keys(NamedTuple):
    """Where the keys of each sequence lie: in pages, or in rows of packed tensors.

    lengths: of the keys that are seen, packed one sequence after the other.
    """

    k: Tensor
    v: Tensor
    cache: Cache | None
    spans: list[Span]
    lengths: Lengths

    @property
    def facts(self) -> tuple[Facts, Facts]:
        """Of the packed keys and values that these stand for."""
        total = self.lengths.total
        k, v = self.k, self.v
        facts = Facts((total, *k.shape[-2:]), k.dtype, k.device)
        if self.cache is not None:
            # its halves are alike
            return facts, facts
        return facts, Facts((total, *v.shape[-2:]), v.dtype, v.device)

    @property
    def pages(self) -> Pages:
        if self.cache is None:
            return Pages(None, False, False, False)
        return pages_of(self.cache, self.spans)


def read_keys(k: Tensor, v: Tensor, lengths_k: Lengths, placement: Placement) -> Keys:
    """Check the arguments, and find the keys."""
    block_table, seqused_k, leftpad_k = placement
    if block_table is None:
        _check_packed(k, v, lengths_k)
    batch = len(lengths_k.seqlens)
    names = ("k", "v", "cu_seqlens_k" if seqused_k is None else "seqused_k")
    used = lengths_k.seqlens
    if seqused_k is not None:
        used = cache_lengths("seqused_k", seqused_k, batch, 0)
    pads = cache_lengths("leftpad_k", leftpad_k, batch, 0)
    cache = None if block_table is None else Cache(k, v, batch, block_table, None, names)
    starts = lengths_k.cumulative if cache is None else (0,) * (batch + 1)
    if cache is None and any(
        count > room for count, room in zip(used, lengths_k.seqlens, strict=True)
    ):
        raise ArgumentError(
            "seqused_k",
            str(used),
            f"at most the lengths in cu_seqlens_k, {lengths_k.seqlens}",
            "let cu_seqlens_k leave room for every key that is used",
        )
    spans = [
        Span(start + min(pad, count), start + count)
        for start, count, pad in zip(starts, used, pads, strict=False)
    ]
    if cache is not None:
        cache.check(spans)
    ends = accumulate(span.end - span.start for span in spans)
    return Keys(k, v, cache, spans, interned((0, *ends), "cu_seqlens_k"))


def _check_packed(k: Tensor, v: Tensor, lengths_k: Lengths) -> None:
    if k.dim() != 3 or k.shape[:-1] != v.shape[:-1] or k.shape[0] < lengths_k.total:
        raise ArgumentError(
            "k" if k.dim() != 3 or k.shape[0] < lengths_k.total else "v",
            f"shapes {tuple(k.shape)} and {tuple(v.shape)} of k and v",
            f"(total_k, nheads_k, headdim) alike, total_k at least {lengths_k.total}",
            "pass one key and one value for each position of cu_seqlens_k",
        )


def spaced(lengths_q: Lengths, keys: Keys, longest: int) -> tuple[Lengths, Lengths] | None:
    """Lengths by which packed keys are seen as they lie; None where they have to be gathered.

    What lies between the keys of two sequences is a sequence too, without queries. No kernel looks
    at its keys, and their gradient is 0.

    Args:
        longest: no such sequence is longer.
    """
    if keys.cache is not None or len(keys.spans) > MOST_SPACED:
        return None
    seqlens_q, seqlens_k, at = [0], [0], 0
    for seqlen_q, span in zip(lengths_q.seqlens, keys.spans, strict=True):
        room = span.start - at
        steps = [*(longest,) * (room // longest), room % longest] if longest and room else []
        seqlens_q += [*(0,) * len(steps), seqlen_q]
        seqlens_k += [*steps, span.end - span.start]
        at = span.end
    spaced_q, spaced_k = (accumulate(seqlens) for seqlens in (seqlens_q, seqlens_k))
    return interned(tuple(spaced_q), "cu_seqlens_q"), interned(tuple(spaced_k), "cu_seqlens_k")


def gather(function: str, keys: Keys) -> tuple[Tensor, Tensor]:
    """Packed k and v (total, nheads_k, headdim); differentiable."""
    if keys.cache is not None:
        return moving.gather(function, keys.cache, keys.spans)
    rows = [torch.arange(span.start, span.end, device="cpu") for span in keys.spans]
    index = torch.cat([torch.empty(0, dtype=torch.int64, device="cpu"), *rows]).to(keys.k.device)
    return keys.k[index], keys.v[index]
