"""The forward over tiles: a running maximum and sum for each row (online softmax)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..bands import Band
from .tiles import Scoring, Streams, Tiles

__all__ = ["attend", "probabilities"]

HIGHEST_CAP = 64.0
"""Scores up to this, and sums of exp of them, stay far inside float32 without a maximum taken off.

exp(64) is 6e27 and exp(-64) 2e-28, in a range of 1e-38 to 3e38."""


def attend(streams: Streams, band: Band, scoring: Scoring) -> None:
    """Fill `streams.out` and `streams.lse`."""
    streams.out[..., : band.blind, :] = 0
    streams.lse[..., : band.blind] = math.inf
    tiles = Tiles(streams, band, scoring)
    bounded = 0 < scoring.softcap <= HIGHEST_CAP
    # nor may a bias push all scores of a row far below
    sums = _sums if scoring.slopes is not None or scoring.sink is not None else _bounded_sums
    for rows in tiles.rows():
        out, top, total = (sums if bounded else _sums)(tiles, rows)
        silent = total == 0
        total.masked_fill_(silent, 1.0)
        streams.out[..., slice(*rows), :].copy_(tiles.split(out.div_(total)))
        lse = total.log_() if top is None else total.log_().add_(top, alpha=1 / tiles.unit)
        lse = tiles.split(lse.masked_fill_(silent, math.inf)).squeeze(-1)
        streams.lse[..., slice(*rows)].copy_(lse)


def _sums(tiles: Tiles, rows: tuple[int, int]) -> tuple[Tensor, Tensor | None, Tensor]:
    """What a block of rows adds up to, under its running maximum: out, the maximum, the total."""
    scoring, queries = tiles.scoring, tiles.scaled(tiles.queries(rows))
    out = torch.zeros_like(queries)
    # not -inf, as -inf - -inf is NaN
    top = queries.new_full((*queries.shape[:2], 1), torch.finfo(tiles.kept).min)
    total = torch.zeros_like(top)
    if scoring.sink is not None:
        tiles.split(top).copy_(scoring.sink[..., None].to(tiles.kept) * tiles.unit)
        total.fill_(1.0)
    for cols in tiles.cols(rows):
        scores = tiles.products(queries, tiles.keys(cols))
        if scoring.softcap:
            scores.mul_(tiles.gain)
        tiles.biased(scores, rows, cols)
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        fade = tiles.raised(top.sub_(new_top))
        weights = tiles.raised(scores.sub_(new_top))
        total.mul_(fade).add_(weights.sum(-1, keepdim=True))
        tiles.drop(weights, rows, cols)
        out.mul_(fade).baddbmm_(weights, tiles.values(cols))
        top = new_top
        del scores, weights  # before the next tile is made
    return out, top, total


def _bounded_sums(tiles: Tiles, rows: tuple[int, int]) -> tuple[Tensor, None, Tensor]:
    """`_sums` where no score is so high that a maximum need be taken off."""
    queries = tiles.scaled(tiles.queries(rows))
    out, total = torch.zeros_like(queries), queries.new_zeros(*queries.shape[:2], 1)
    for cols in tiles.cols(rows):
        products = tiles.products(queries, tiles.keys(cols))
        weights = tiles.cleared(tiles.raised(products, tiles.gain), rows, cols)
        total.add_(weights.sum(-1, keepdim=True))
        tiles.drop(weights, rows, cols)
        out.baddbmm_(weights, tiles.values(cols))
        del products, weights
    return out, None, total


def probabilities(streams: Streams, band: Band, scoring: Scoring, square: Tensor) -> None:
    """Fill (batch, nheads_k, group, seqlen_q, seqlen_k) from `streams.lse`, negative where dropped.

    The tiles are those of `attend`, so the dropout mask is too.
    """
    tiles = Tiles(streams, band, scoring)
    for rows in tiles.rows():
        queries, lse = tiles.scaled(tiles.queries(rows)), tiles.statistics(rows)
        for cols in tiles.cols(rows):
            products = tiles.products(queries, tiles.keys(cols))
            weights = tiles.weights(products, lse, rows, cols)
            kept = tiles.drop(torch.ones_like(weights), rows, cols)
            signed = torch.where(kept > 0, weights, -weights)
            square[..., slice(*rows), slice(*cols)] = tiles.split(signed).to(square.dtype)
