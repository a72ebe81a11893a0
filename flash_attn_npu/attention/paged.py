"""Packed queries against keys that are not simply packed: pages, used lengths, left padding.

`block_table` makes k and v pages (num_blocks, page_block_size, nheads_k, headdim), whose lengths
are those of cu_seqlens_k; `seqused_k` shortens sequences, `leftpad_k` lets them start later.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ArgumentError, explain
from . import checks
from .cache import Cache, Span, pages_of
from .decode import cache_lengths
from .dispatch import Plan, lookup, permit
from .lengths import Lengths, interned
from .problem import Facts, Pages
from .result import Forward
from .support import INFER

__all__ = ["Keys", "forward", "gather", "read_keys"]


class Keys(NamedTuple):
    """Where the keys of each sequence lie: in pages, or in rows of packed tensors.

    lengths: of the keys that are seen, packed one sequence after the other.
    """

    k: Tensor
    v: Tensor
    cache: Cache | None
    spans: list[Span]
    lengths: Lengths


def read_keys(
    k: Tensor,
    v: Tensor,
    lengths_k: Lengths,
    block_table: Tensor | None,
    seqused_k: Tensor | None,
    leftpad_k: Tensor | None,
) -> Keys:
    """Check the three arguments, and find the keys."""
    checks.require_plain(k=k, v=v)
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
            explain(
                "seqused_k",
                str(used),
                f"at most the lengths in cu_seqlens_k, {lengths_k.seqlens}",
                "let cu_seqlens_k leave room for every key that is used",
            )
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
    if k.dim() != 3 or k.shape != v.shape or k.shape[0] < lengths_k.total:
        raise ArgumentError(
            explain(
                "k" if k.dim() != 3 or k.shape[0] < lengths_k.total else "v",
                f"shapes {tuple(k.shape)} and {tuple(v.shape)} of k and v",
                f"(total_k, nheads_k, headdim) alike, total_k at least {lengths_k.total}",
                "pass one key and one value for each position of cu_seqlens_k",
            )
        )


def gather(keys: Keys) -> tuple[Tensor, Tensor]:
    """Packed k and v (total, nheads_k, headdim); differentiable."""
    if keys.cache is not None:
        return keys.cache.gather(keys.spans)
    rows = [torch.arange(span.start, span.end, device="cpu") for span in keys.spans]
    index = torch.cat([torch.empty(0, dtype=torch.int64, device="cpu"), *rows]).to(keys.k.device)
    return keys.k[index], keys.v[index]


def forward(
    function: str,
    q: Tensor,
    keys: Keys,
    lengths_q: Lengths,
    max_seqlens: tuple[int, int],
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
    sink: Tensor | None,
) -> Forward:
    """Attention without autograd, over the pages themselves where a kernel can read them."""
    checks.require_plain(q=q)
    for argument, tensor in (("alibi_slopes", alibi_slopes), ("sink", sink)):
        if tensor is not None:
            checks.require_plain(**{argument: tensor})
    # fmt: off
    found = lookup(
        function, q, *_facts(keys), lengths_q, keys.lengths, *max_seqlens, dropout_p,
        softmax_scale, causal, window_size, softcap, alibi_slopes, False, return_softmax, True,
        dropout_p > 0, sink, None, _pages(keys),
    )
    # fmt: on
    permit(found)
    found.tally.calls += 1
    if found.name == INFER:
        return _over_pages(found, q, keys)
    answer: Forward = found.kernel.forward(found.problem, q, *gather(keys), alibi_slopes, sink)
    return answer


def _over_pages(found: Plan, q: Tensor, keys: Keys) -> Forward:
    total = found.problem.rows_q - found.problem.tail_q
    out, lse = found.kernel.forward(found.problem, q[:total], keys.cache, keys.spans, True)
    if found.problem.tail_q:
        tail = (0, 0, 0, 0, 0, found.problem.tail_q)
        out = torch.nn.functional.pad(out, tail)
        lse = torch.nn.functional.pad(lse, (0, found.problem.tail_q), value=torch.inf)
    rng_state = torch.zeros(2, dtype=torch.int64, device="cpu")
    return Forward(out, lse, q.new_empty(0), rng_state)


def _facts(keys: Keys) -> tuple[Facts, Facts]:
    total = keys.lengths.total
    k, v = (Facts((total, *x.shape[-2:]), x.dtype, x.device) for x in (keys.k, keys.v))
    return k, v


def _pages(keys: Keys) -> Pages:
    if keys.cache is None:
        return Pages(None, False, False, False)
    return pages_of(keys.cache, keys.spans)
