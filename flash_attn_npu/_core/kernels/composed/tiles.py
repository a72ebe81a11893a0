"""The arithmetic of exact attention in linear memory: one tile of scores at a time.

Forward keeps a running maximum and sum per row (online softmax); backward recomputes each tile
from softmax_lse. Everything is accumulated in float32, or float64 for float64 inputs. Tensors
here are (batch, nheads_k, group, seqlen, headdim), group = nheads // nheads_k, so that grouped
query heads share a key tile without copying it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...problems.results import accumulator
from ..bands import Band, spans

__all__ = [
    "Scoring",
    "Streams",
    "attend",
    "attend_backward",
    "probabilities",
    "tile_elements",
]

TILE_BYTES = 1 << 30
"""All that is held at once because of a tile, where launches cost."""
TILE_ELEMENTS = 1 << 25
TILE_ELEMENTS_ON_CPU = 1 << 20
"""Scores of a tile of short sequences, and on a CPU, whose caches hold them, of any tile."""

LARGEST_TILE = 2048
LARGEST_TILE_ON_CPU = 512
SMALLEST_TILE = 32
EVEN_TILE = 64
"""Sides on a device are multiples of it, if they are larger: what its products are cut into."""

SHARED_BYTES = 24
"""A pair's part in what all heads share: a distance in int64, that in float32, who is hidden."""

BIASES_KEPT = 4
"""Of a group: those of the tiles on the diagonal, and at the rims of a window.

ALiBi's are as large as a tile: a device keeps one."""

HIGHEST_CAP = 64.0
"""Scores up to this, and sums of exp of them, stay far inside float32 without a maximum taken off.

exp(64) is 6e27 and exp(-64) 2e-28, in a range of 1e-38 to 3e38."""


@dataclass(frozen=True)
class Scoring:
    """How a score is made from q.k, and how probabilities are dropped.

    slopes: (batch or 1, nheads_k, group, 1, 1) float32 or None; sink: (nheads_k, group, 1) or None.
    """

    scale: float
    softcap: float = 0.0
    slopes: Tensor | None = None
    sink: Tensor | None = None
    dropout_p: float = 0.0
    seed: int = 0

    def keep(self, shape: torch.Size, place: tuple[int, int, int], like: Tensor) -> Tensor:
        """1 / (1 - dropout_p) where a probability of this tile is kept, else 0."""
        generator = torch.Generator(device=like.device)
        generator.manual_seed(hash((self.seed, *place)) & ((1 << 63) - 1))
        drawn = torch.rand(shape, generator=generator, device=like.device, dtype=torch.float32)
        return drawn.ge_(self.dropout_p).to(like.dtype).div_(1.0 - self.dropout_p)


@dataclass(frozen=True)
class Streams:
    """The tensors of one group of equally long sequences, as views into the caller's tensors.

    `place` tells groups of one call apart, for their dropout masks.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    place: int


def tile_elements(device: torch.device) -> int:
    """How many scores short sequences that share a tile have, at most."""
    return TILE_ELEMENTS_ON_CPU if device.type == "cpu" else TILE_ELEMENTS


def _tile_size(q: Tensor, scoring: Scoring, backward: bool) -> int:
    streams = max(1, math.prod(q.shape[:3]))
    if q.device.type == "cpu":
        size, largest = math.isqrt(TILE_ELEMENTS_ON_CPU // streams), LARGEST_TILE_ON_CPU
    else:
        size, largest = _size_on_device(q, streams * _held(scoring, backward)), LARGEST_TILE
    return max(SMALLEST_TILE, min(largest, size))


def _size_on_device(q: Tensor, heads: int) -> int:
    size = math.isqrt(TILE_BYTES // (heads * accumulator(q.dtype).itemsize + SHARED_BYTES))
    return size - size % EVEN_TILE or size


def _held(scoring: Scoring, backward: bool) -> int:
    """How many tensors as large as a tile there are at once: its scores, and what is made of them.

    With dropout they are counted alike in both directions: a mask is drawn tile by tile.
    """
    dropped = scoring.dropout_p > 0
    gradients = 1 + (scoring.softcap > 0) if backward or dropped else 0
    return 1 + gradients + 2 * dropped + (scoring.slopes is not None)


Bias = tuple[Tensor | None, Tensor | None]
"""What is added to the scores of a tile, and which of them are hidden."""


class _Tiles:
    """The tiles of a group: what is computed once for all of them, and the scores of each.

    Tensors are (batch * nheads_k, group * rows, ...), so that one product serves the heads that
    share keys.
    """

    def __init__(
        self, streams: Streams, band: Band, scoring: Scoring, backward: bool = False
    ) -> None:
        self.band, self.scoring, self._streams = band, scoring, streams
        self.kept = accumulator(streams.q.dtype)
        self._size = _tile_size(streams.q, scoring, backward)
        spare = scoring.slopes is None or streams.q.device.type == "cpu"
        self._biases_kept = BIASES_KEPT if spare else 1
        self.k, self.v = self.flat(streams.k), self.flat(streams.v)
        self._biases: dict[tuple[int, ...], Bias] = {}

    def flat(self, x: Tensor) -> Tensor:
        """(batch, nheads_k, group, rows, headdim) as rows of a product, in float32."""
        return x.to(self.kept).flatten(2, 3).flatten(0, 1)

    def split(self, flat: Tensor) -> Tensor:
        """(batch, nheads_k, group, rows, ...) of (batch * nheads_k, group * rows, ...)."""
        batch, heads, group = self._streams.q.shape[:3]
        # not -1, which a headdim of 0 leaves open
        return flat.view(batch, heads, group, flat.shape[1] // max(group, 1), flat.shape[-1])

    def statistics(self, lse: Tensor, rows: tuple[int, int]) -> Tensor:
        """softmax_lse of a block of rows, to be taken off its scores."""
        return self.flat(lse[..., slice(*rows), None])

    def rows(self) -> Iterator[tuple[int, int]]:
        """Blocks of the queries that see a key."""
        return spans(self.band.blind, self.band.seqlen_q, self._size)

    def cols(self, rows: tuple[int, int]) -> Iterator[tuple[int, int]]:
        return spans(*self.band.keys(*rows), self._size)

    def queries(self, rows: tuple[int, int]) -> Tensor:
        """Scaled, and over the softcap, if there is one."""
        queries = self.flat(self._streams.q[..., slice(*rows), :])
        return queries * (self.scoring.scale / (self.scoring.softcap or 1.0))

    def drop(self, weights: Tensor, rows: tuple[int, int], cols: tuple[int, int]) -> Tensor:
        """Weights with some dropped, in place, and the others larger for it."""
        if self.scoring.dropout_p:
            split = self.split(weights)
            place = (self._streams.place, rows[0], cols[0])
            split.mul_(self.scoring.keep(split.shape, place, split))
        return weights

    def products(self, queries: Tensor, cols: tuple[int, int]) -> Tensor:
        """q.k of one tile, bent by tanh where there is a softcap, which is not yet put back."""
        products = torch.bmm(queries, self.k[:, slice(*cols)].transpose(1, 2))
        return products.tanh_() if self.scoring.softcap else products

    def biased(self, scores: Tensor, rows: tuple[int, int], cols: tuple[int, int]) -> Tensor:
        """Scores with -inf where hidden, and ALiBi, in place; tiles that lie alike share both."""
        place = (rows[1] - rows[0], cols[1] - cols[0], cols[0] - rows[0])
        if place not in self._biases:
            if len(self._biases) >= self._biases_kept:
                self._biases.clear()
            self._biases[place] = self._bias(rows, cols)
        bias, hidden = self._biases[place]
        if bias is not None:
            self.split(scores).add_(bias)
        if hidden is not None:
            # not added: NaN, or inf, of a key that is not seen would stay
            self.split(scores).masked_fill_(hidden, -math.inf)
        return scores

    def _bias(self, rows: tuple[int, int], cols: tuple[int, int]) -> Bias:
        slopes, hidden = self.scoring.slopes, self.band.hidden(rows, cols, self.k)
        bias = None if slopes is None else self.band.alibi(rows, cols, slopes.to(self.kept))
        return bias, hidden


def attend(streams: Streams, band: Band, scoring: Scoring) -> None:
    """Fill `streams.out` and `streams.lse`."""
    streams.out[..., : band.blind, :] = 0
    streams.lse[..., : band.blind] = math.inf
    tiles = _Tiles(streams, band, scoring)
    bounded = 0 < scoring.softcap <= HIGHEST_CAP
    # nor may a bias push all scores of a row far below
    sums = _sums if scoring.slopes is not None or scoring.sink is not None else _bounded_sums
    for rows in tiles.rows():
        out, top, total = (sums if bounded else _sums)(tiles, rows)
        silent = total == 0
        total.masked_fill_(silent, 1.0)
        streams.out[..., slice(*rows), :].copy_(tiles.split(out.div_(total)))
        lse = total.log_() if top is None else total.log_().add_(top)
        lse = tiles.split(lse.masked_fill_(silent, math.inf)).squeeze(-1)
        streams.lse[..., slice(*rows)].copy_(lse)


def _sums(tiles: _Tiles, rows: tuple[int, int]) -> tuple[Tensor, Tensor | None, Tensor]:
    """What a block of rows adds up to, under its running maximum: out, the maximum, the total."""
    scoring, queries = tiles.scoring, tiles.queries(rows)
    out = torch.zeros_like(queries)
    # not -inf, as -inf - -inf is NaN
    top = queries.new_full((*queries.shape[:2], 1), torch.finfo(tiles.kept).min)
    total = torch.zeros_like(top)
    if scoring.sink is not None:
        tiles.split(top).copy_(scoring.sink[..., None])
        total.fill_(1.0)
    for cols in tiles.cols(rows):
        scores = tiles.products(queries, cols)
        if scoring.softcap:
            scores.mul_(scoring.softcap)
        tiles.biased(scores, rows, cols)
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        fade = top.sub_(new_top).exp_()
        weights = scores.sub_(new_top).exp_()
        total.mul_(fade).add_(weights.sum(-1, keepdim=True))
        tiles.drop(weights, rows, cols)
        out.mul_(fade).baddbmm_(weights, tiles.v[:, slice(*cols)])
        top = new_top
        del scores, weights  # before the next tile is made
    return out, top, total


def _bounded_sums(tiles: _Tiles, rows: tuple[int, int]) -> tuple[Tensor, None, Tensor]:
    """`_sums` where no score is so high that a maximum need be taken off."""
    queries = tiles.queries(rows)
    out, total = torch.zeros_like(queries), queries.new_zeros(*queries.shape[:2], 1)
    for cols in tiles.cols(rows):
        scores = tiles.products(queries, cols).mul_(tiles.scoring.softcap)
        weights = tiles.biased(scores, rows, cols).exp_()
        total.add_(weights.sum(-1, keepdim=True))
        tiles.drop(weights, rows, cols)
        out.baddbmm_(weights, tiles.v[:, slice(*cols)])
        del scores, weights
    return out, None, total


def probabilities(streams: Streams, band: Band, scoring: Scoring, square: Tensor) -> None:
    """Fill (batch, nheads_k, group, seqlen_q, seqlen_k) from `streams.lse`, negative where dropped.

    The tiles are those of `attend`, so the dropout mask is too.
    """
    tiles = _Tiles(streams, band, scoring)
    for rows in tiles.rows():
        queries, lse = tiles.queries(rows), tiles.statistics(streams.lse, rows)
        for cols in tiles.cols(rows):
            weights, _ = _weights(tiles, queries, lse, rows, cols)
            kept = tiles.drop(torch.ones_like(weights), rows, cols)
            signed = torch.where(kept > 0, weights, -weights)
            square[..., slice(*rows), slice(*cols)] = tiles.split(signed).to(square.dtype)


def attend_backward(
    streams: Streams, band: Band, scoring: Scoring, dout: Tensor, grads: tuple[Tensor, ...]
) -> None:
    """Fill the views `grads` = (dq, dk, dv).

    Only (q, k, v, out, lse) of the forward are needed, also when out and lse come from a merge
    over several blocks of keys or count a sink.
    """
    dq, dk, dv = grads
    tiles = _Tiles(streams, band, scoring, backward=True)
    dq[..., : band.blind, :] = 0
    sums = torch.zeros_like(tiles.k), torch.zeros_like(tiles.v)
    for rows in tiles.rows():
        douts = tiles.flat(dout[..., slice(*rows), :])
        outs = tiles.flat(streams.out[..., slice(*rows), :])
        delta = (douts * outs).sum(-1, keepdim=True)
        lse = tiles.statistics(streams.lse, rows)
        found = _backward_rows(tiles, rows, (douts, delta, lse), sums)
        dq[..., slice(*rows), :].copy_(tiles.split(found))
    for grad, total in zip((dk, dv), sums, strict=True):
        grad.copy_(total.view_as(grad))


def _weights(
    tiles: _Tiles, queries: Tensor, lse: Tensor, rows: tuple[int, int], cols: tuple[int, int]
) -> tuple[Tensor, Tensor | None]:
    """Probabilities of a tile before dropout, and tanh of the capped scores."""
    bent, scores = None, tiles.products(queries, cols)
    if tiles.scoring.softcap:
        bent, scores = scores, scores * tiles.scoring.softcap
    return tiles.biased(scores, rows, cols).sub_(lse).exp_(), bent


def _backward_rows(
    tiles: _Tiles,
    rows: tuple[int, int],
    saved: tuple[Tensor, Tensor, Tensor],
    sums: tuple[Tensor, Tensor],
) -> Tensor:
    """dq of a block of rows; what it gives to dk and dv is added to `sums`."""
    douts, delta, lse = saved
    scoring, queries = tiles.scoring, tiles.queries(rows)
    dq = torch.zeros_like(queries)
    for cols in tiles.cols(rows):
        keys, values = tiles.k[:, slice(*cols)], tiles.v[:, slice(*cols)]
        weights, bent = _weights(tiles, queries, lse, rows, cols)
        dscores = torch.bmm(douts, values.transpose(1, 2))
        dropped = weights
        if scoring.dropout_p:
            keep = tiles.drop(torch.ones_like(weights), rows, cols)
            dropped = weights * keep
            dscores.mul_(keep)
            del keep
        sums[1][:, slice(*cols)].baddbmm_(dropped.transpose(1, 2), douts)
        dscores.sub_(delta).mul_(weights)
        if bent is not None:
            dscores.addcmul_(dscores, bent.square_(), value=-1.0)
        dq.baddbmm_(dscores, keys)
        # the queries already carry the scale, and are over the softcap
        scale = scoring.softcap or 1.0
        sums[0][:, slice(*cols)].baddbmm_(dscores.transpose(1, 2), queries, alpha=scale)
        del weights, bent, dropped, dscores
    return dq.mul_(scoring.scale)
