"""Dropout where its mask is not to be had: whether what is kept is scaled, by chance alone.

The sum of out along the truth is one of independent terms, one for each probability. It is off by
more than Bernstein's bound once in `ODDS`, however few of the terms count.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import truth
from .judging import Finding
from .reading import Reader
from .samples import MOST_SCORES, Spot, spots

__all__ = ["judge_dropped"]

ODDS = 1e9
MOST_SPOTS = 3
MOST_ROWS = 128
MOST_HEADS = 16
"""More than of other samples, as each row tells little."""


def judge_dropped(reader: Reader, out: Tensor) -> Finding:
    """The scale of out, against what chance allows."""
    dropout_p = reader.problem.dropout_p
    against = dropout_p / (1 - dropout_p)
    off = variance = rounding = largest = 0.0
    for spot in spots(reader.problem)[:MOST_SPOTS]:
        wide = _wide(reader, spot)
        rows = torch.tensor(wide.rows, dtype=torch.int64, device="cpu")
        columns = torch.arange(wide.seqlen_k, device="cpu")
        if not len(columns):
            continue
        piece = reader.piece(wide, rows, columns, wide.heads)
        actual = reader.rows(out, wide, rows, wide.heads).double()
        exact, terms, told = _terms(piece)
        along = ((actual - exact) * exact).sum(-1) * told
        off += along.sum().item()
        variance += against * terms.square().sum().item()
        largest = max(largest, terms.abs().max().item() * max(1.0, against))
        size = (actual * exact).abs().sum(-1) * told
        rounding += torch.finfo(out.dtype).eps * size.sum().item()
    chance = math.log(2 * ODDS)
    edge = largest * chance / 3
    allowed = edge + math.sqrt(edge**2 + 2 * chance * variance) + rounding
    return Finding("out (its scale)", abs(off), allowed, "the sum of a sample of rows")


def _terms(piece: truth.Piece) -> tuple[Tensor, Tensor, Tensor]:
    """(the truth, what each probability adds along it (heads, rows, columns), weights of rows).

    Rows count by how much they tell: one that sees a single key tells least.
    """
    exact, _ = truth.attention(piece, torch.float64)
    weights = torch.softmax(piece.scores(torch.float64), -1).nan_to_num(0.0)
    terms = weights * (exact.transpose(0, 1) @ piece.v.double().permute(1, 2, 0))
    told = exact.square().sum(-1) / terms.square().sum(-1).t()
    told = told.nan_to_num(0.0, 0.0, 0.0)
    return exact, terms * told.t()[..., None], told


def _wide(reader: Reader, spot: Spot) -> Spot:
    """More rows of a sequence, and more heads."""
    heads = _spread(reader.problem.nheads, MOST_HEADS)
    most = max(4, min(MOST_ROWS, MOST_SCORES // max(1, spot.seqlen_k * len(heads))))
    return spot._replace(rows=_spread(spot.seqlen_q, most), heads=heads)


def _spread(size: int, most: int) -> tuple[int, ...]:
    places = torch.linspace(0, size - 1, min(size, most), device="cpu").long().tolist()
    return tuple(dict.fromkeys(places))
