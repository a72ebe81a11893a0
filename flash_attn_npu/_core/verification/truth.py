"""Attention over a sample of queries, and its gradients, as plain matrices on the host.

Each function takes the dtype to compute in: float64 is the truth, that of the inputs is what plain
PyTorch makes of them, whose error is the measure of a kernel's.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Band", "Piece", "attention", "column_gradients", "row_gradients", "sink_terms"]


class Band(NamedTuple):
    """How a query sees the keys of its sequence, and what is added to their scores.

    left, right: None for no limit. slopes: (heads,), or None.
    """

    seqlen_q: int
    seqlen_k: int
    left: int | None
    right: int | None
    scale: float
    slopes: Tensor | None

    def distance(self, rows: Tensor, columns: Tensor) -> Tensor:
        """j - i, counted from the bottom right, for every pair."""
        return columns[None, :] - rows[:, None] - (self.seqlen_k - self.seqlen_q)

    def hidden(self, distance: Tensor) -> Tensor:
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if self.left is not None:
            hidden |= distance < -self.left
        if self.right is not None:
            hidden |= distance > self.right
        return hidden


class Piece(NamedTuple):
    """Some rows, and some columns, of the scores of one sequence.

    rows, columns: positions of queries and keys. q: (rows, heads, headdim).
    k, v: (columns, heads, headdim), the key head of each query head.
    sink: (heads,), or None. kept: (heads, rows, columns), which of them dropout keeps, or None.
    """

    band: Band
    rows: Tensor
    columns: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    sink: Tensor | None = None
    kept: Tensor | None = None
    keep_prob: float = 1.0

    def scores(self, dtype: torch.dtype) -> Tensor:
        """(heads, rows, columns), -inf where hidden, in float32 at least."""
        q, k = self.q.to(dtype).transpose(0, 1), self.k.to(dtype).permute(1, 2, 0)
        scores = (q @ k).to(torch.promote_types(dtype, torch.float32)) * self.band.scale
        distance = self.band.distance(self.rows, self.columns)
        if self.band.slopes is not None:
            slopes = self.band.slopes.to(scores.dtype)[:, None, None]
            scores = scores - slopes * distance.abs().to(scores.dtype)
        return scores.masked_fill(self.band.hidden(distance), -math.inf)

    def dropped(self, weights: Tensor) -> Tensor:
        return weights if self.kept is None else weights * self.kept / self.keep_prob


def attention(piece: Piece, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(out (rows, heads, headdim), softmax_lse (heads, rows)); the piece has every column.

    Rows without keys give zeros and +inf.
    """
    scores = piece.scores(dtype)
    all_scores = scores
    if piece.sink is not None:
        sink = piece.sink.to(scores.dtype)[:, None, None].expand(*scores.shape[:2], 1)
        all_scores = torch.cat((scores, sink), -1)
    lse = all_scores.logsumexp(-1) if all_scores.shape[-1] else scores.new_full((), -math.inf)
    lse = lse.expand(scores.shape[:2])
    blind = (scores == -math.inf).all(-1)
    weights = torch.exp(scores - lse.masked_fill(blind, 0.0)[..., None])
    out = piece.dropped(weights).to(dtype) @ piece.v.to(dtype).transpose(0, 1)
    return out.transpose(0, 1), lse.masked_fill(blind, math.inf)


def row_gradients(
    piece: Piece, dout: Tensor, out: Tensor, lse: Tensor, dtype: torch.dtype
) -> Tensor:
    """dq (rows, heads, headdim) from what the forward returned; the piece has every column.

    Args:
        dout, out: as q. lse: (heads, rows).
    """
    dscores, _ = _dscores(piece, dout, out, lse, dtype)
    return (dscores @ piece.k.to(dtype).transpose(0, 1)).transpose(0, 1) * piece.band.scale


def column_gradients(
    piece: Piece, dout: Tensor, out: Tensor, lse: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(dk, dv), (columns, headdim), of the one key head of all heads; the piece has every row."""
    dscores, weights = _dscores(piece, dout, out, lse, dtype)
    q, douts = (x.to(dtype).transpose(0, 1).flatten(0, 1) for x in (piece.q, dout))
    dk = dscores.flatten(0, 1).t() @ q * piece.band.scale
    return dk, weights.flatten(0, 1).t() @ douts


def sink_terms(sink: Tensor, deltas: Tensor, lse: Tensor) -> Tensor:
    """What each row adds to the gradient of a sink: minus its share of the row times its delta.

    Args:
        sink: (heads,). deltas: rowsum(dout * out), (..., heads, rows).
        lse: as deltas; any number in a row without keys, whose out is 0.
    """
    share = torch.exp(sink[:, None] - lse)
    return torch.where(deltas == 0, 0.0, -share * deltas)


def _dscores(
    piece: Piece, dout: Tensor, out: Tensor, lse: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The gradients of the scores, and the probabilities after dropout, in dtype."""
    scores = piece.scores(dtype)
    wide = scores.dtype
    weights = torch.exp(scores - lse.to(wide)[..., None])
    douts = dout.to(dtype).transpose(0, 1)
    dweights = (douts @ piece.v.to(dtype).permute(1, 2, 0)).to(wide)
    delta = (dout.to(wide) * out.to(wide)).sum(-1).t()
    dscores = weights * (piece.dropped(dweights) - delta[..., None])
    return dscores.to(dtype), piece.dropped(weights).to(dtype)
