"""The two orders in which softmax_max and softmax_sum of packed sequences lie in memory.

Both have the shape (total_q, nheads, 8). With `softmax_layout="TND"` that is what it holds. Without
it holds one block (nheads, seqlen_q, 8) after the other, one for each sequence, as MindSpeed's
`unflatten_softmax` reads it; torch_npu's operators before the argument know this order only, and
`_v2` knows no other where it is given no sink.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...ground.memory import Memo

__all__ = ["REPEATED", "by_row", "by_sequence"]

REPEATED = 8
"""The kernel repeats each value this often along the last dimension."""

_places: Memo[tuple[tuple[int, ...], int, torch.device], tuple[Tensor, Tensor]] = Memo(
    "where packed statistics lie", 64, nbytes=1 << 26
)


def by_row(values: Tensor, ends: Sequence[int]) -> Tensor:
    """(nheads, total_q) of (total_q, nheads), values that lie in blocks, one for each sequence.

    Args:
        ends: cumulative lengths, without the leading 0.
    """
    total, nheads = values.shape
    flat = values.reshape(-1)
    equal = _equal(ends)
    if equal:
        rows = flat.view(-1, nheads, equal).transpose(0, 1).reshape(nheads, total)
        # of sequences of one row it is a view still
        return rows.contiguous()
    return flat.index_select(0, _index(ends, nheads, values.device)).view(nheads, total)


def by_sequence(values: Tensor, ends: Sequence[int]) -> Tensor:
    """What `by_row` reads: (total_q, nheads) in blocks, of (nheads, total_q)."""
    nheads, total = values.shape
    equal = _equal(ends)
    if equal:
        blocks = values.view(nheads, -1, equal).transpose(0, 1).reshape(total, nheads)
        return blocks.contiguous()
    index = _index(ends, nheads, values.device)
    flat = values.new_empty(values.numel()).index_copy_(0, index, values.reshape(-1))
    return flat.view(total, nheads)


def _equal(ends: Sequence[int]) -> int:
    """The length of the sequences if they all have one, else 0."""
    same = all(end == (place + 1) * ends[0] for place, end in enumerate(ends))
    return ends[0] if same else 0


def _index(ends: Sequence[int], nheads: int, device: torch.device) -> Tensor:
    """Where value (head, row) lies among all, of heads first and then rows."""
    key = tuple(ends), nheads, device
    known = _places.recall(key)
    if known is None:
        # it outlives this call, and a backward cannot save a tensor made in inference mode
        with torch.inference_mode(False):
            first, seqlen = _rows(ends, nheads)
            known = first.to(device), seqlen.to(device)
        _places.put(key, known)
    first, seqlen = known
    heads = torch.arange(nheads, device=device)[:, None]
    return (first + heads * seqlen).flatten()


def _rows(ends: Sequence[int], nheads: int) -> tuple[Tensor, Tensor]:
    """Of each row where its value of head 0 lies, and the length of its sequence; on the host."""
    cumulative = torch.tensor(ends, dtype=torch.int64, device="cpu")
    seqlens = cumulative.diff(prepend=cumulative.new_zeros(1))
    seqlen = seqlens.repeat_interleave(seqlens)
    start = (cumulative - seqlens).repeat_interleave(seqlens)
    # the blocks before hold nheads values of each row before, and the rows of this one follow
    return torch.arange(len(start), device="cpu") + (nheads - 1) * start, seqlen
