"""One attention problem, described once and validated: what is asked, without the tensors.

The description holds facts only (shapes, dtypes, lengths, options); tensors travel beside it. What
is decided from it is remembered under the `Ask` it was made from. Everything a kernel reads here is
already in flash-attn's conventions: bottom-right alignment and inclusive window bounds, where
query i of a sequence sees key j if  i + seqlen_k - seqlen_q - left <= j <= i + seqlen_k -
seqlen_q + right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ..ground.lengths import Lengths
from .ask import Ask, Pages

__all__ = ["DTYPES", "FEW_SINGLES", "Problem", "default_scale"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""float32 and float64 go beyond upstream, which takes the half precisions only."""


FEW_SINGLES = 16
"""Packed sequences of one token that a kernel is not spared: they crash it by the hundreds."""


@dataclass(frozen=True, eq=False)
class Problem:
    """A validated attention problem.

    `left` and `right` are the window after flash-attn's normalisation, None for unlimited;
    plain causal attention is (None, 0). `lengths_q` and `lengths_k` are None for dense layouts
    (batch, seqlen, nheads, headdim); with them q is (rows_q, nheads, headdim), and rows past the
    last cumulative length belong to no sequence. `headdim_v`, that of v and out, is that of q and
    k, or smaller where FlashAttention 3 is asked.
    """

    ask: Ask
    dtype: torch.dtype
    device: torch.device
    nheads: int
    nheads_k: int
    headdim: int
    headdim_v: int
    batch: int
    rows_q: int
    rows_k: int
    lengths_q: Lengths | None
    lengths_k: Lengths | None
    max_seqlen_q: int
    max_seqlen_k: int
    softmax_scale: float
    left: int | None
    right: int | None
    softcap: float
    alibi: bool
    dropout_p: float
    deterministic: bool
    s_dmask: bool
    uses_lse: bool
    needs_grad: bool
    sink: bool

    @property
    def function(self) -> str:
        """The public function, as users know it."""
        return self.ask.function

    @property
    def mask_from(self) -> str | None:
        return self.ask.mask_from

    @property
    def pages(self) -> Pages | None:
        return self.ask.pages

    @property
    def varlen(self) -> bool:
        return self.lengths_q is not None

    @cached_property
    def sequences(self) -> dict[tuple[int, int], Sequence[int]]:
        """The sequences of each pair (seqlen_q, seqlen_k) of lengths: few, even of many."""
        if self.lengths_q is None or self.lengths_k is None:
            same = (self.max_seqlen_q, self.max_seqlen_k)
            return {same: range(self.batch)} if self.batch else {}
        found: dict[tuple[int, int], list[int]] = {}
        pairs = zip(self.lengths_q.seqlens, self.lengths_k.seqlens, strict=True)
        for sequence, pair in enumerate(pairs):
            found.setdefault(pair, []).append(sequence)
        return {**found}

    @property
    def causal(self) -> bool:
        """Plain causal attention; with a finite `left` it is a window."""
        return self.left is None and self.right == 0

    @property
    def windowed(self) -> bool:
        return not self.causal and (self.left is not None or self.right is not None)

    def blind(self, seqlen_q: int, seqlen_k: int) -> int:
        """How many queries of such a sequence see no key: always the first ones.

        The left bound never empties a row, and the last query sees the last key.
        """
        if seqlen_k == 0:
            return seqlen_q
        return 0 if self.right is None else max(0, seqlen_q - seqlen_k - self.right)

    @cached_property
    def most_blind(self) -> int:
        """The most queries of one sequence that see no key."""
        return max((self.blind(*lengths) for lengths in self.sequences), default=0)

    @cached_property
    def many_singles(self) -> bool:
        """Whether more than `FEW_SINGLES` packed sequences are one token that looks at itself."""
        return self.varlen and len(self.sequences.get((1, 1), ())) > FEW_SINGLES

    @cached_property
    def with_empty(self) -> bool:
        """Whether some sequence has no queries or no keys."""
        return any(0 in lengths for lengths in self.sequences)

    @cached_property
    def empty(self) -> bool:
        """Whether no query sees a key."""
        return not (self.nheads > 0 and self.headdim > 0 and self.seeing_rows > 0)

    @cached_property
    def seeing_rows(self) -> int:
        return sum(
            (lengths[0] - self.blind(*lengths)) * len(them)
            for lengths, them in self.sequences.items()
        )

    @cached_property
    def seeing_offset(self) -> int | None:
        """seqlen_k - seqlen_q if it is the same for all sequences, else None.

        Queries that see no key do not count: without them, causal attention of more queries than
        keys has as many of both.
        """
        offsets = {k - q + self.blind(q, k) for q, k in self.sequences}
        return offsets.pop() if len(offsets) == 1 else None

    @cached_property
    def most_missing(self) -> int:
        """By how much one sequence has more keys than queries that see a key, at most."""
        return max((k - q + self.blind(q, k) for q, k in self.sequences), default=0)

    @cached_property
    def most_surplus(self) -> int:
        """By how much one sequence has more queries that see a key than keys, at most."""
        return max((q - self.blind(q, k) - k for q, k in self.sequences), default=0)

    @property
    def total_q(self) -> int:
        """Rows of q that belong to sequences."""
        return self.rows_q if self.lengths_q is None else self.lengths_q.total

    @property
    def total_k(self) -> int:
        """Rows of k and v that belong to sequences."""
        return self.rows_k if self.lengths_k is None else self.lengths_k.total

    @property
    def tail_q(self) -> int:
        """Rows of q past the last sequence."""
        return self.rows_q - self.total_q

    @property
    def tail_k(self) -> int:
        """Rows of k and v past the last sequence."""
        return self.rows_k - self.total_k

    @property
    def nbytes(self) -> int:
        """What its lengths and lists of sequences take, about."""
        return 128 * self.batch if self.varlen else 0


def default_scale(headdim: int) -> float:
    """headdim ** -0.5, the softmax_scale that None stands for."""
    return headdim**-0.5 if headdim else 1.0
