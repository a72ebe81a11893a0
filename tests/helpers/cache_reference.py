"""The oracle of the cache tests: flash_attn_with_kvcache as flash-attn 2.8 defines it.

Keys are looked up one position at a time and attended by the float64 oracle of `reference`:
slow and obvious. Nothing here comes from the package that is judged.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.helpers import reference


class Expected(NamedTuple):
    """The truth, plain PyTorch's answer for the error rule, and the caches after the call."""

    out: Tensor
    softmax_lse: Tensor
    plain: Tensor
    k_cache: Tensor
    v_cache: Tensor


class Place(NamedTuple):
    """Where position p of a sequence lies: in row `row` of the cache, or in pages."""

    row: int
    pages: list[int] | None
    page_size: int

    def of(self, position: int) -> tuple[int, int]:
        if self.pages is None:
            return self.row, position
        return self.pages[position // self.page_size], position % self.page_size


def solve(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    sink: Tensor | None = None,
) -> Expected:
    """What a call with these arguments returns and writes; all tensors on the host."""
    batch, seqlen_q = q.shape[:2]
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    places = [_place(i, k_cache, cache_batch_idx, block_table) for i in range(batch)]
    lengths = _per_sequence(cache_seqlens, batch, capacity)
    leftpad = _per_sequence(cache_leftpad, batch, 0)
    if rotary_cos is not None:
        tables = (rotary_cos, rotary_sin, rotary_interleaved)
        window = reference.normalise_window(window_size, causal, capacity)
        moving = window != (None, None)
        k = rotate(k, [[n + t for t in range(k.shape[1])] for n in lengths], *tables)
        q = rotate(q, [[n + moving * t for t in range(seqlen_q)] for n in lengths], *tables)
    k_after, v_after = k_cache.clone(), v_cache.clone()
    ends = lengths
    if k is not None:
        ends = [n + k.shape[1] for n in lengths]
        for i, first in enumerate(lengths):
            _append(k_after, k[i], places[i], first, leftpad[i])
            _append(v_after, v[i], places[i], first, leftpad[i])
    sequences = []
    for i, here in enumerate(places):
        positions = [here.of(p) for p in range(leftpad[i], ends[i])]
        sequences.append((q[i], _gather(k_after, positions), _gather(v_after, positions)))
    answers = _attend(
        sequences,
        alibi_slopes,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        max_seqlen_k=capacity,
        sink=sink,
    )
    return Expected(*answers, k_after, v_after)


def _attend(
    sequences: list[tuple[Tensor, Tensor, Tensor]], slopes: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, softmax_lse, plain PyTorch's out) of all sequences."""
    exact, plain = [], []
    for i, sequence in enumerate(sequences):
        if slopes is not None:
            options["alibi_slopes"] = slopes[i] if slopes.dim() == 2 else slopes
        exact.append(reference.attention(*sequence, **options))
        plain.append(reference.same_precision(*sequence, **options).out)
    return (
        torch.stack([one.out for one in exact]),
        torch.stack([one.softmax_lse for one in exact]),
        torch.stack(plain),
    )


def rotate(
    x: Tensor, positions: list[list[int]], cos: Tensor, sin: Tensor, interleaved: bool
) -> Tensor:
    """x (batch, seqlen, heads, headdim) with token t of sequence i at positions[i][t]."""
    pairs = cos.shape[1]
    first = torch.arange(pairs) * 2 if interleaved else torch.arange(pairs)
    second = first + 1 if interleaved else first + pairs
    rotated = x.clone()
    for i, row in enumerate(positions):
        for t, position in enumerate(row):
            a, b = x[i, t][:, first].double(), x[i, t][:, second].double()
            c, s = cos[position].double(), sin[position].double()
            rotated[i, t][:, first] = (a * c - b * s).to(x.dtype)
            rotated[i, t][:, second] = (a * s + b * c).to(x.dtype)
    return rotated


def _place(
    index: int, k_cache: Tensor, batch_idx: Tensor | None, block_table: Tensor | None
) -> Place:
    row = index if batch_idx is None else int(batch_idx[index])
    pages = None if block_table is None else block_table[index].tolist()
    return Place(row, pages, k_cache.shape[1])


def _per_sequence(value: int | Tensor | None, batch: int, default: int) -> list[int]:
    if isinstance(value, Tensor):
        return value.tolist()
    return [default if value is None else value] * batch


def _append(cache: Tensor, new: Tensor, place: Place, first: int, leftpad: int) -> None:
    """Rows that would come before the left padding belong to nobody and are not written."""
    for t, row in enumerate(new):
        if first + t >= leftpad:
            cache[place.of(first + t)] = row


def _gather(cache: Tensor, positions: list[tuple[int, int]]) -> Tensor:
    if not positions:
        return cache.new_empty(0, *cache.shape[2:])
    return torch.stack([cache[where] for where in positions])
