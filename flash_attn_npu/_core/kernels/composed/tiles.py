"""The tiles of scores of exact attention in linear memory: how large they are, what is in one.

Everything is accumulated in float32, or float64 for float64 inputs. Tensors here are (batch,
nheads_k, group, seqlen, headdim), group = nheads // nheads_k, so that grouped query heads share a
key tile without copying it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...problems.results import accumulator
from ..bands import Band, spans

__all__ = ["Scoring", "Streams", "Tiles", "parts", "tile_elements"]

TILE_BYTES = 1 << 30
"""All that is held at once because of a tile, where launches cost."""
TILE_ELEMENTS = 1 << 25
TILE_ELEMENTS_ON_CPU = 1 << 19
"""Scores of a tile of short sequences, and on a CPU, whose caches hold them, of any tile."""

STREAMS_ON_CPU = 8
"""Sequences times heads that share a tile, at most: more would make it small."""

LARGEST_TILE = 2048
LARGEST_TILE_ON_CPU = 256
WIDER = 2
"""How many times as large on a CPU a side may be without softcap and dropout: there is little to
pass over, and products like it large."""

CONVERTED_BYTES = 1 << 22
"""Of the keys that a CPU converts at once, and no tile again."""

SMALLEST_TILE = 32
EVEN_TILE = 64
"""Sides are multiples of it, if they are larger: products are slow at odd ones."""

SHARED_BYTES = 24
"""A pair's part in what all heads share: a distance in int64, that in float32, who is hidden."""

BIASES_KEPT = 4
"""Of a group: those of the tiles on the diagonal, and at the rims of a window.

ALiBi's are as large as a tile: a device keeps one."""

LOG2_E = math.log2(math.e)

SATURATED = 20.0
"""From here on tanh is 1 in float32, and exp of twice as much is finite."""


class Scoring(NamedTuple):
    """How a score is made from q.k, and how probabilities are dropped.

    slopes: (batch or 1, nheads_k, group, 1, 1) float32 or None; sink: (nheads_k, group, 1) or None.
    """

    scale: float
    softcap: float = 0.0
    slopes: Tensor | None = None
    sink: Tensor | None = None
    dropout_p: float = 0.0
    seed: int = 0

    def keep(self, shape: torch.Size, place: tuple[int, ...], like: Tensor) -> Tensor:
        """1 / (1 - dropout_p) where a probability of this tile is kept, else 0."""
        generator = torch.Generator(device=like.device)
        generator.manual_seed(hash((self.seed, *place)) & ((1 << 63) - 1))
        drawn = torch.rand(shape, generator=generator, device=like.device, dtype=torch.float32)
        return drawn.ge_(self.dropout_p).to(like.dtype).div_(1.0 - self.dropout_p)


class Streams(NamedTuple):
    """The tensors of one group of equally long sequences, as views into the caller's tensors.

    `place` tells them apart from others of one call, for their dropout masks.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    place: tuple[int, ...]


def parts(streams: Streams, scoring: Scoring) -> Iterator[tuple[slice, Streams, Scoring]]:
    """The whole on a device; on a CPU some heads of k at a time, so that tiles stay large."""
    batch, heads, group = streams.q.shape[:3]
    few = max(1, STREAMS_ON_CPU // max(1, batch * group))
    scores = batch * heads * group * streams.q.shape[3] * streams.k.shape[3]
    in_one = few >= heads or scores <= tile_elements(streams.q.device)
    if streams.q.device.type != "cpu" or in_one:
        yield slice(0, heads), streams, scoring
        return
    tensors = (streams.q, streams.k, streams.v, streams.out, streams.lse)
    slopes, sink = scoring.slopes, scoring.sink
    for first in range(0, heads, few):
        part = slice(first, first + few)
        q, k, v, out, lse = (x[:, part] for x in tensors)
        some = Streams(q, k, v, out, lse, (*streams.place, first))
        slopes_of = None if slopes is None else slopes[:, part]
        sink_of = None if sink is None else sink[part]
        yield part, some, scoring._replace(slopes=slopes_of, sink=sink_of)


def tile_elements(device: torch.device) -> int:
    """How many scores short sequences that share a tile have, at most."""
    return TILE_ELEMENTS_ON_CPU if device.type == "cpu" else TILE_ELEMENTS


def _tile_sides(streams: Streams, band: Band, scoring: Scoring, backward: bool) -> tuple[int, int]:
    """Rows and columns of a tile; with dropout they must be those of the forward."""
    q, heads = streams.q, max(1, math.prod(streams.q.shape[:3]))
    if q.device.type != "cpu":
        scores = TILE_BYTES // (
            heads * _held(scoring, backward) * accumulator(q.dtype).itemsize + SHARED_BYTES
        )
        return (_side(scores, LARGEST_TILE),) * 2
    scores = TILE_ELEMENTS_ON_CPU // heads
    if scoring.softcap or scoring.dropout_p:
        return (_side(scores, LARGEST_TILE_ON_CPU),) * 2
    side = _side(scores, WIDER * LARGEST_TILE_ON_CPU)
    # few rows waste little on the diagonal
    few = max(LARGEST_TILE_ON_CPU, band.seqlen_q // 8 // EVEN_TILE * EVEN_TILE)
    return side if band.right is None else min(side, few), side


def _side(scores: int, largest: int) -> int:
    size = math.isqrt(scores)
    return max(SMALLEST_TILE, min(largest, size - size % EVEN_TILE or size))


def _held(scoring: Scoring, backward: bool) -> int:
    """How many tensors as large as a tile there are at once: its scores, and what is made of them.

    With dropout they are counted alike in both directions: a mask is drawn tile by tile.
    """
    dropped = scoring.dropout_p > 0
    gradients = 1 + (scoring.softcap > 0) if backward or dropped else 0
    return 1 + gradients + 2 * dropped + (scoring.slopes is not None)


class Tiles:
    """The tiles of a group: what is computed once for all of them, and the scores of each.

    Tensors are (batch * nheads_k, group * rows, ...), so that one product serves the heads that
    share keys. On a CPU exp2 is several times as fast as exp, and expm1 twice as fast as tanh.

    Attributes:
        kept: the dtype of scores and sums.
        unit: what scores are multiplied by, so that 2 to their power is exp; 1 where that is left
            to `raised`: what large scores would be rounded by is seen in float32.
        gain: what `products` are multiplied by to be scores, where there is a softcap.
    """

    def __init__(
        self, streams: Streams, band: Band, scoring: Scoring, backward: bool = False
    ) -> None:
        self.band, self.scoring, self._streams = band, scoring, streams
        dtype, self._on_cpu = streams.q.dtype, streams.q.device.type == "cpu"
        self.kept = accumulator(dtype)
        self.unit = LOG2_E if self._on_cpu and dtype.itemsize == 2 else 1.0
        self._by_expm1 = self._on_cpu and self.kept == torch.float32
        self.gain = (scoring.softcap or 1.0) * self.unit
        few = streams.k.numel() * self.kept.itemsize <= CONVERTED_BYTES
        at_once = few or not self._on_cpu
        self._converted = (self.flat(streams.k), self.flat(streams.v)) if at_once else None
        self._sides = _tile_sides(streams, band, scoring, backward)
        spare = scoring.slopes is None or self._on_cpu
        self._biases_kept = BIASES_KEPT if spare else 1
        self._biases: dict[tuple[int, ...], Tensor] = {}
        self._spaces: dict[tuple[str, torch.Size], Tensor] = {}

    def flat(self, x: Tensor) -> Tensor:
        """(batch, nheads_k, group, rows, headdim) as rows of a product, in float32."""
        return x.to(self.kept).flatten(2, 3).flatten(0, 1)

    def split(self, flat: Tensor) -> Tensor:
        """(batch, nheads_k, group, rows, ...) of (batch * nheads_k, group * rows, ...)."""
        batch, heads, group = self._streams.q.shape[:3]
        # not -1, which a headdim of 0 leaves open
        return flat.view(batch, heads, group, flat.shape[1] // max(group, 1), flat.shape[-1])

    def space(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
        """Where something of a tile is written, tile after tile: new pages cost a CPU a fifth.

        None for new memory on a device, whose allocator keeps what it has.
        """
        if not self._on_cpu:
            return None
        held = self._spaces.get((name, shape))
        if held is None:
            held = self._spaces[name, shape] = self._streams.q.new_empty(shape, dtype=dtype)
        return held

    def product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """a @ b, in the space of this name."""
        shape = torch.Size((*a.shape[:2], b.shape[2]))
        return torch.bmm(a, b, out=self.space(name, shape, a.dtype))

    def rows(self) -> Iterator[tuple[int, int]]:
        """Blocks of the queries that see a key."""
        return spans(self.band.blind, self.band.seqlen_q, self._sides[0])

    def cols(self, rows: tuple[int, int]) -> Iterator[tuple[int, int]]:
        return spans(*self.band.keys(*rows), self._sides[1])

    def queries(self, rows: tuple[int, int]) -> Tensor:
        return self.flat(self._streams.q[..., slice(*rows), :])

    def keys(self, cols: tuple[int, int]) -> Tensor:
        return self._side(0, self._streams.k, cols)

    def values(self, cols: tuple[int, int]) -> Tensor:
        return self._side(1, self._streams.v, cols)

    def _side(self, which: int, x: Tensor, cols: tuple[int, int]) -> Tensor:
        if self._converted is None:
            return self.flat(x[..., slice(*cols), :])
        return self._converted[which][:, slice(*cols)]

    def scaled(self, queries: Tensor) -> Tensor:
        """Queries whose products with keys are scores, or what tanh is taken of."""
        if not self.scoring.softcap:
            return queries * (self.scoring.scale * self.unit)
        # tanh(x) = e / (e + 2), e = expm1(2 x)
        twice = 2.0 if self._by_expm1 else 1.0
        return queries * (twice * self.scoring.scale / self.scoring.softcap)

    def products(self, queries: Tensor, keys: Tensor) -> Tensor:
        """q.k of one tile, bent by tanh where there is a softcap: scores, but for `gain`."""
        products = self.product("products", queries, keys.transpose(1, 2))
        if not self.scoring.softcap:
            return products
        if not self._by_expm1:
            return products.tanh_()
        grown = products.clamp_(max=2 * SATURATED).expm1_()
        more = self.space("grown", grown.shape, self.kept)
        return grown.div_(torch.add(grown, 2.0, out=more))

    def raised(self, scores: Tensor, gain: float = 1.0) -> Tensor:
        """exp of gain * scores, in place."""
        factor = gain * LOG2_E / self.unit if self._on_cpu else gain
        if factor != 1:
            scores.mul_(factor)
        return scores.exp2_() if self._on_cpu else scores.exp_()

    def statistics(self, rows: tuple[int, int]) -> Tensor:
        """-softmax_lse of a block of rows, in units."""
        return self.flat(self._streams.lse[..., slice(*rows), None]) * -self.unit

    def weights(
        self, products: Tensor, statistics: Tensor, rows: tuple[int, int], cols: tuple[int, int]
    ) -> Tensor:
        """Probabilities of a tile before dropout; where there is a softcap `products` stay."""
        if self.scoring.softcap:
            scores = self.space("weights", products.shape, self.kept)
            scores = torch.add(statistics, products, alpha=self.gain, out=scores)
        else:
            scores = products.add_(statistics)
        if self.scoring.slopes is not None:
            self.split(scores).add_(self._bias(rows, cols, hides=False))
        return self.cleared(self.raised(scores), rows, cols)

    def drop(self, weights: Tensor, rows: tuple[int, int], cols: tuple[int, int]) -> Tensor:
        """Weights with some dropped, in place, and the others larger for it."""
        if self.scoring.dropout_p:
            split = self.split(weights)
            place = (*self._streams.place, rows[0], cols[0])
            split.mul_(self.scoring.keep(split.shape, place, split))
        return weights

    def cleared(self, weights: Tensor, rows: tuple[int, int], cols: tuple[int, int]) -> Tensor:
        """Weights, 0 where hidden, in place."""
        self.band.clear(self.split(weights), rows, cols)
        return weights

    def biased(self, scores: Tensor, rows: tuple[int, int], cols: tuple[int, int]) -> Tensor:
        """Scores with ALiBi, and -inf where hidden, in place."""
        # cleared first: NaN, or inf, of a key that is not seen would stay
        pairs, hides = self.band.clear(self.split(scores), rows, cols)
        if hides or self.scoring.slopes is not None:
            pairs.add_(self._bias(rows, cols, hides))
        return scores

    def _bias(self, rows: tuple[int, int], cols: tuple[int, int], hides: bool) -> Tensor:
        """What is added to scores; tiles that lie alike share it."""
        place = (rows[1] - rows[0], cols[1] - cols[0], cols[0] - rows[0], hides)
        found = self._biases.get(place)
        if found is None:
            if len(self._biases) >= self._biases_kept:
                self._biases.clear()
            slopes = self.scoring.slopes
            slopes = None if slopes is None else slopes.to(self.kept) * self.unit
            like = self._streams.q.new_empty(0, dtype=self.kept)
            found = self.band.bias(rows, cols, slopes, like) if hides else None
            if found is None:
                assert slopes is not None
                found = self.band.alibi(rows, cols, slopes)
            self._biases[place] = found
        return found
