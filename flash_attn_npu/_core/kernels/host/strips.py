"""The backward of bfloat16 over strips: a block of keys against all queries that see one of them.

On a CPU torch rounds a product of bfloat16 to bfloat16, once, after adding up in float32. So what
is added up whole by one product may be one: dk and dv of a block of keys, from probabilities and
their gradients of a whole strip, as plain PyTorch has them of all keys. dq adds up over blocks: by
one product too where all strips are kept, else in float32. Torch's own 16-bit backward adds up dk
and dv in bfloat16, and is off by 2 to 36 times plain PyTorch's error.

Tensors here are (streams, rows, headdim): a stream is a head of k in a sequence, and its rows are
those of all heads that share it, position by position.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..bands import Band, spans
from .parts import Rule, Triple, shares

__all__ = ["backward_by_strips"]

STREAM_ROWS = 1 << 12
"""Rows of streams that share strips: short ones are few launches then."""

STRIP_BYTES = 1 << 22
"""Of a strip of bfloat16, unless SMALLEST_BLOCK keys take more; there are two."""

KEPT_BYTES = 12 << 20
"""Of strips that are kept until dq is one product of them."""

SMALLEST_BLOCK, LARGEST_CUT, LARGEST_BLOCK = 64, 256, 512
"""Keys of a block: a diagonal wastes half of what it cuts, and products like it large."""

TILE_ELEMENTS = 1 << 18
"""Scores that are computed at once."""

PAD = 32
"""Numbers behind a row of what is kept: rows that lie powers of two apart share a cache's lines."""

LOG2_E = math.log2(math.e)

TERMS = 3
"""So many bfloat16 add up to a float32."""

Range = tuple[int, int]


class Given(NamedTuple):
    """The tensors of some heads, softmax_lse (streams, rows); and how many heads share a stream."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    out: Tensor
    lse: Tensor
    group: int
    band: Band

    @property
    def block(self) -> int:
        """Keys of a strip."""
        few = STRIP_BYTES // (2 * self.q.shape[:2].numel()) // SMALLEST_BLOCK * SMALLEST_BLOCK
        most = LARGEST_BLOCK if self.band.right is None else LARGEST_CUT
        return max(SMALLEST_BLOCK, min(most, few))

    @property
    def positions(self) -> int:
        """Of a tile."""
        return max(1, TILE_ELEMENTS // (self.block * self.group * self.q.shape[0]))

    def first(self, key: int) -> int:
        """The first query that sees this key, or one behind it."""
        if self.band.right is None:
            return self.band.blind
        return max(self.band.blind, key - self.band.offset - self.band.right)


class Spaces:
    """Where all is written, head after head, in one piece.

    New pages cost a CPU a fifth; of one piece, unlike of several, the C library keeps the pages
    from one call to the next, up to 32 MiB (mallopt(3): M_MMAP_THRESHOLD is raised by a free, and
    M_TRIM_THRESHOLD to twice that).
    """

    def __init__(self, largest: Given, kept: bool) -> None:
        (count, rows, width), keys = largest.q.shape, largest.block
        # of fewer streams a tile has more rows, and may have a few numbers more
        tile = min(count * rows * keys, max(TILE_ELEMENTS, count * largest.group * keys))
        wide = {
            "scaled": count * rows * (width + 1),
            "sums": count * rows * width,
            "keys": count * keys * (width + 1),
            "wide": tile,
        }
        narrow = {
            "douts": count * rows * (width + TERMS),
            "values": count * keys * (width + TERMS),
            "weights": count * rows * keys,
            "dscores": count * rows * (largest.k.shape[1] + PAD if kept else keys),
            "found": tile,
        }
        numbers = [(name, torch.float32, count) for name, count in wide.items()]
        numbers += [(name, largest.q.dtype, count) for name, count in narrow.items()]
        # each begins where a line of a cache does
        sizes = [-(-count * dtype.itemsize // 64) * 64 for _, dtype, count in numbers]
        pieces = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu").split(sizes)
        self._held = {
            name: piece.view(dtype) for (name, dtype, _), piece in zip(numbers, pieces, strict=True)
        }
        self._last: dict[str, Tensor] = {}

    def of(self, name: str, *shape: int) -> Tensor:
        last = self._last.get(name)
        if last is not None and last.shape == shape:
            return last
        found: Tensor = self._held[name][: math.prod(shape)].view(shape)
        self._last[name] = found
        return found


class Rows(NamedTuple):
    """Products of columns that stand behind others save a pass over a tile.

    scaled: float32; its product with keys and a one is the log2 of probabilities.
    douts: bfloat16; its product with values and ones is dout.v - sum(dout * out).
    """

    scaled: Tensor
    douts: Tensor


class Added:
    """dq as float32 sums, block after block: a partial sum must not be rounded."""

    def __init__(self, given: Given, spaces: Spaces) -> None:
        self._given, self._spaces = given, spaces
        self._sums = spaces.of("sums", *given.q.shape).zero_()

    def strip(self, first: int, cols: Range) -> Tensor:
        count, rows, _ = self._given.q.shape
        return self._spaces.of("dscores", count, rows - first, cols[1] - cols[0])

    def add(self, rows: Range, dscores: Tensor, keys: Tensor) -> None:
        self._sums[:, slice(*rows)].baddbmm_(dscores, keys)

    def whole(self) -> Tensor:
        return self._sums


class Kept:
    """dq as one product of all strips, of a band without a bound.

    Where queries see few keys, the rounding of each gradient of a score shows in dq.
    """

    def __init__(self, given: Given, spaces: Spaces) -> None:
        self._keys = given.k
        (count, rows, _), self._seqlen_k = given.q.shape, given.k.shape[1]
        self._all = spaces.of("dscores", count, rows, self._seqlen_k + PAD)

    def strip(self, _: int, cols: Range) -> Tensor:
        return self._all[..., slice(*cols)]

    def add(self, *_: object) -> None:
        """Their bfloat16 is kept."""

    def whole(self) -> Tensor:
        # a plain product reads what lies apart as it is
        found = zip(self._all[..., : self._seqlen_k], self._keys, strict=True)
        return torch.stack([dscores @ keys for dscores, keys in found]).float()


def backward_by_strips(
    inputs: Triple, answer: tuple[Tensor, Tensor, Tensor], grads: Triple, rule: Rule
) -> None:
    """Fill dq, dk and dv, (batch, nheads, seqlen, headdim) as all here is.

    Args:
        answer: dout, out and softmax_lse (batch, nheads, seqlen_q).
    """
    (_, heads_q, seqlen_q, _), (batch, heads_k, seqlen_k, _) = (x.shape for x in inputs[:2])
    group, spaces = heads_q // heads_k, None
    rows = seqlen_q * group
    kept = rule.band.right is None and 2 * rows * (seqlen_k + PAD) <= KEPT_BYTES
    for part in shares(batch, heads_k, group, 1 if kept else STREAM_ROWS // rows):
        heads = part.heads_k.stop - part.heads_k.start
        dout, out, lse = (part.q(x) for x in answer)
        flat = (_streams(x, heads) for x in (*part.grads(inputs), dout, out, lse[..., None]))
        q, k, v, dout, out, lse = flat
        given = Given(q, k, v, dout, out, lse[..., 0], group, rule.band)
        # the first share is the largest
        spaces = Spaces(given, kept) if spaces is None else spaces
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            columns = _rows(given, rule.scale, spaces)
            sums = Kept(given, spaces) if kept else Added(given, spaces)
            _fill(given, part.grads(grads), columns, sums, spaces)
            part.grads(grads)[1].mul_(rule.scale)
            _write(part.grads(grads)[0], sums.whole().mul_(rule.scale), heads, group)


def _streams(x: Tensor, heads: int) -> Tensor:
    """(streams, rows, headdim) of (batch, nheads, seqlen, headdim), `heads` of which share them."""
    split: Tensor = x.unflatten(1, (heads, -1)).transpose(2, 3)
    return split.flatten(2, 3).flatten(0, 1)


def _write(x: Tensor, found: Tensor, heads: int, group: int) -> None:
    """Streams, where they come from."""
    split = found.unflatten(0, (-1, heads)).unflatten(2, (-1, group))
    x.unflatten(1, (heads, -1)).copy_(split.transpose(2, 3))


def _rows(given: Given, scale: float, spaces: Spaces) -> Rows:
    count, rows, width = given.q.shape
    scaled = spaces.of("scaled", count, rows, width + 1)
    scaled[..., :width].copy_(given.q).mul_(scale * LOG2_E)
    torch.mul(given.lse, -LOG2_E, out=scaled[..., width])
    douts = spaces.of("douts", count, rows, width + TERMS)
    douts[..., :width] = given.dout
    # dq is not yet added up there
    rest = spaces.of("sums", count, rows, width)
    rest = rest.copy_(douts[..., :width]).mul_(given.out).sum(-1).neg_()
    for place in range(width, width + TERMS):
        douts[..., place] = rest
        rest -= douts[..., place]
    return Rows(scaled, douts)


def _with_ones(x: Tensor, wider: Tensor) -> Tensor:
    """x, with columns of ones behind it."""
    width = x.shape[-1]
    wider[..., :width] = x
    wider[..., width:] = 1
    return wider


def _fill(given: Given, grads: Triple, rows: Rows, sums: Added | Kept, spaces: Spaces) -> None:
    """dk over the scale, dv, and what `sums` adds up."""
    (_, dk, dv), band, heads = grads, given.band, grads[1].shape[1]
    for cols in spans(0, band.seqlen_k, given.block):
        part, first = slice(*cols), given.first(cols[0])
        if first >= band.seqlen_q:
            dk[:, :, part], dv[:, :, part] = 0, 0
            continue
        strips = _strip(given, rows, sums, spaces, (first, cols))
        seen = slice(first * given.group, None)
        douts, queries = rows.douts[:, seen, :-TERMS], given.q[:, seen]
        for one, (weights, dscores) in enumerate(zip(*strips, strict=True)):
            place = (*divmod(one, heads), part)
            dv[place] = weights.t() @ douts[one]
            dk[place] = dscores.t() @ queries[one]


def _strip(
    given: Given, rows: Rows, sums: Added | Kept, spaces: Spaces, place: tuple[int, Range]
) -> tuple[Tensor, Tensor]:
    """Probabilities of a block of keys and their gradients, whose part of dq is added."""
    (first, cols), group, (count, total, width) = place, given.group, given.q.shape
    part, keys = slice(*cols), cols[1] - cols[0]
    beside = _with_ones(given.k[:, part], spaces.of("keys", count, keys, width + 1))
    values = _with_ones(given.v[:, part], spaces.of("values", count, keys, width + TERMS))
    across, values, plain = beside.transpose(1, 2), values.transpose(1, 2), beside[..., :width]
    strips = (
        spaces.of("weights", count, total - first * group, keys),
        sums.strip(first * group, cols),
    )
    seen = (x[:, first * group :] for x in rows)
    cut = (x.split(given.positions * group, 1) for x in (*seen, *strips))
    ranges = spans(first, given.band.seqlen_q, given.positions)
    for span, scaled, douts, weights, dscores in zip(ranges, *cut, strict=True):
        wide, found = (spaces.of(name, *weights.shape) for name in ("wide", "found"))
        torch.bmm(scaled, across, out=wide).exp2_()
        _clear(given, wide, span, cols)
        weights.copy_(wide)
        wide.mul_(torch.bmm(douts, values, out=found))
        _clear(given, wide, span, cols)
        dscores.copy_(wide)
        sums.add((span[0] * group, span[1] * group), wide, plain)
    return strips


def _clear(given: Given, tile: Tensor, rows: Range, cols: Range) -> None:
    """Zeros where hidden, whatever stands there."""
    band, group = given.band, given.group
    if band.right is None:
        return
    # rows behind these see all of these keys
    rows = rows[0], min(rows[1], cols[1] - 1 - band.offset - band.right)
    if rows[0] >= rows[1]:
        return
    tile = tile[:, : (rows[1] - rows[0]) * group]
    if group == 1:
        band.clear(tile, rows, cols)
        return
    hidden = band.hidden(rows, cols, tile)
    if hidden is not None:
        tile.unflatten(1, (-1, group)).masked_fill_(hidden[:, None], 0.0)
