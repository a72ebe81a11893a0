"""Which rows of a problem the fused kernel is given, and how its answer is put back.

The kernel refuses packed queries that see no key, keys of length 0 under a mask, and rows past
the last sequence. They are left out before the call and answered with zeros and +inf after it.
A dense problem loses the first rows of every sequence; a packed one loses the blind rows of
each sequence, the sequences that are empty then, and the tail.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...ground.memory import Memo
from ...problems.attention import Problem

__all__ = ["Rows"]

_indices: Memo[Problem, Tensor] = Memo("positions of queries that see a key", 64, nbytes=1 << 26)


class Rows:
    """The selection for one problem.

    Attributes:
        untouched: nothing is left out.
        ends_q, ends_k: cumulative lengths of what is left, None for dense problems.
        pairs: query-key pairs of what is left, over all sequences, for one head.
    """

    def __init__(self, problem: Problem) -> None:
        self.varlen = problem.varlen
        self.blind = 0 if problem.varlen else problem.most_blind
        self.rows_q, self.rows_k = problem.rows_q, problem.rows_k
        self.total_q, self.total_k = problem.seeing_rows, problem.total_k
        self.pairs = sum(
            (seqlen_q - problem.blind(seqlen_q, seqlen_k)) * seqlen_k * len(them)
            for (seqlen_q, seqlen_k), them in problem.sequences.items()
        )
        self._problem = problem
        self._scattered = problem.varlen and problem.most_blind > 0
        self.ends_q: list[int] | None = None
        self.ends_k: list[int] | None = None
        if not problem.varlen:
            self.untouched = self.blind == 0
            return
        self.ends_q, self.ends_k = _ends(problem)
        self.untouched = self.total_q == problem.rows_q and self.total_k == problem.rows_k

    @property
    def nbytes(self) -> int:
        return self._problem.nbytes

    @property
    def index(self) -> Tensor | None:
        """Positions in q of the queries that see a key; None where these are the first ones."""
        if not self._scattered:
            return None
        index = _indices.recall(self._problem)
        if index is None:
            index = _seeing_index(self._problem)
            _indices.put(self._problem, index)
        return index

    def take_q(self, x: Tensor) -> Tensor:
        """The rows of a tensor laid out as q."""
        if not self.varlen:
            return x[:, self.blind :]
        index = self.index
        return x[: self.total_q] if index is None else x.index_select(0, index)

    def take_k(self, x: Tensor) -> Tensor:
        """The rows of a tensor laid out as k."""
        return x[: self.total_k] if self.varlen else x

    def take_lse(self, lse: Tensor) -> Tensor:
        """The rows of (batch, nheads, seqlen_q) or (nheads, total_q)."""
        if not self.varlen:
            return lse[..., self.blind :]
        index = self.index
        return lse[:, : self.total_q] if index is None else lse.index_select(1, index)

    def restore(self, out: Tensor) -> Tensor:
        """All rows of q again, zeros where nothing was computed; differentiable."""
        if not self.varlen:
            return pad(out, (0, 0, 0, 0, self.blind, 0)) if self.blind else out
        index = self.index
        if index is not None:
            return out.new_zeros(self.rows_q, *out.shape[1:]).index_copy(0, index, out)
        tail = self.rows_q - self.total_q
        return pad(out, (0, 0, 0, 0, 0, tail)) if tail else out

    def restore_lse(self, lse: Tensor) -> Tensor:
        """All rows of softmax_lse again, +inf where nothing was computed."""
        if not self.varlen:
            return pad(lse, (self.blind, 0), value=math.inf) if self.blind else lse
        index = self.index
        if index is not None:
            whole = lse.new_full((lse.shape[0], self.rows_q), math.inf)
            return whole.index_copy(1, index, lse)
        tail = self.rows_q - self.total_q
        return pad(lse, (0, tail), value=math.inf) if tail else lse

    def write_q(self, target: Tensor, part: Tensor) -> None:
        """Write rows into a tensor laid out as q, where it lies, and zeros beside them."""
        index = self.index
        if index is not None:
            target.zero_().index_copy_(0, index, part)
        elif self.varlen:
            target[: self.total_q] = part
            target[self.total_q :] = 0
        else:
            target[:, : self.blind] = 0
            target[:, self.blind :] = part

    def write_k(self, target: Tensor, part: Tensor) -> None:
        """Write rows into a tensor laid out as k, where it lies, and zeros beside them."""
        if self.varlen:
            target[: self.total_k] = part
            target[self.total_k :] = 0
        else:
            target.copy_(part)


def _ends(problem: Problem) -> tuple[list[int], list[int]]:
    """Cumulative lengths of the rows that are left, without sequences empty on both sides."""
    seqlens_q, seqlens_k, blind = _seqlens(problem)
    seeing = seqlens_q - blind
    kept = (seeing > 0) | (seqlens_k > 0)
    ends_q, ends_k = seeing.cumsum(0)[kept], seqlens_k.cumsum(0)[kept]
    return ends_q.tolist(), ends_k.tolist()


def _seeing_index(problem: Problem) -> Tensor:
    """Positions in q of the queries that see a key, made on the host and copied once."""
    # it outlives this call, and a backward cannot save a tensor made in inference mode
    with torch.inference_mode(False):
        seqlens_q, _, blind = _seqlens(problem)
        sequence = torch.repeat_interleave(seqlens_q)
        position = torch.arange(problem.total_q, device="cpu")
        first = seqlens_q.cumsum(0) - seqlens_q + blind
        return (position >= first[sequence]).nonzero().flatten().to(problem.device)


def _seqlens(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Of each sequence seqlen_q, seqlen_k, and how many queries see no key; on the host."""
    assert problem.lengths_q is not None
    assert problem.lengths_k is not None
    seqlens_q, seqlens_k = (
        torch.tensor(lengths.seqlens, dtype=torch.int64, device="cpu")
        for lengths in (problem.lengths_q, problem.lengths_k)
    )
    # `Problem.blind`, of all at once
    right = problem.max_seqlen_q if problem.right is None else problem.right
    blind = (seqlens_q - seqlens_k - right).clamp(min=0)
    return seqlens_q, seqlens_k, torch.where(seqlens_k == 0, seqlens_q, blind)
