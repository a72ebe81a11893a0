"""The backward of bfloat16 over strips: a block of keys against all queries that see one of them.

On a CPU torch rounds a product of bfloat16 to bfloat16, once, after adding up in float32. So what
is added up whole by one product may be one: dk and dv of a block of keys, from probabilities and
their gradients of a whole strip, as plain PyTorch has them of all keys. dq adds up over blocks, in
float32. Torch's own 16-bit backward adds up dk and dv in bfloat16, and is off by 2 to 36 times
plain PyTorch's error.

Tensors here are (streams, rows, headdim): a stream is a head of k in a sequence, and its rows are
those of all heads that share it, position by position.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..bands import Band, spans

__all__ = ["Spaces", "Strips", "streams", "strip_backward"]

STRIP_BYTES = 1 << 22
"""Of a strip of bfloat16, unless SMALLEST_BLOCK keys take more; there are two."""

SMALLEST_BLOCK, LARGEST_BLOCK = 64, 256
"""Keys of a block: a diagonal wastes half of what it cuts, and products like it large."""

TILE_ELEMENTS = 1 << 18
"""Scores that are computed at once."""

LOG2_E = math.log2(math.e)

TERMS = 3
"""So many bfloat16 add up to a float32."""


class Strips(NamedTuple):
    """The tensors of some heads: queries, keys, values, dout, out, and softmax_lse (streams, rows);
    and how many heads share a stream."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    out: Tensor
    lse: Tensor
    group: int


class Spaces:
    """Where all is written, head after head: new pages cost a CPU a fifth."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}
        self._last: dict[str, Tensor] = {}

    def of(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        last = self._last.get(name)
        if last is not None and last.shape == shape:
            return last
        numbers = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < numbers:
            held = self._held[name] = torch.empty(numbers, dtype=dtype, device="cpu")
        found = self._last[name] = held[:numbers].view(shape)
        return found


class _Rows(NamedTuple):
    """Products of columns that stand behind others save a pass over a tile.

    scaled: float32; its product with keys and a one is the log2 of probabilities.
    douts: bfloat16; its product with values and ones is dout.v - sum(dout * out).
    sums: dq over the scale, float32.
    """

    scaled: Tensor
    douts: Tensor
    sums: Tensor


@torch.no_grad()
def strip_backward(
    given: Strips,
    grads: tuple[Tensor, Tensor, Tensor],
    band: Band,
    scale: float,
    spaces: Spaces,
) -> None:
    """Fill dq, dk and dv, (batch, heads, seqlen, headdim) of these heads."""
    (dq, dk, dv), width, heads = grads, given.q.shape[-1], grads[1].shape[1]
    with torch.autocast("cpu", enabled=False):
        rows = _rows(given, scale, spaces)
        for cols in spans(0, band.seqlen_k, block(given, band)):
            part, first = slice(*cols), _first(band, cols[0])
            if first >= band.seqlen_q:
                dk[:, :, part], dv[:, :, part] = 0, 0
                continue
            strips = _strip(given, rows, spaces, (band, first, cols))
            seen = slice(first * given.group, None)
            douts, queries = rows.douts[:, seen, :width], given.q[:, seen]
            for one, (weights, dscores) in enumerate(zip(*strips, strict=True)):
                place = (*divmod(one, heads), part)
                dv[place] = weights.t() @ douts[one]
                dk[place] = dscores.t() @ queries[one]
        dk.mul_(scale)
        found = rows.sums.mul_(scale).unflatten(0, (-1, heads)).unflatten(2, (-1, given.group))
        dq.unflatten(1, (heads, -1)).copy_(found.transpose(2, 3))


def streams(x: Tensor, heads: int) -> Tensor:
    """(streams, rows, headdim) of (batch, nheads, seqlen, headdim), `heads` of which share them."""
    split: Tensor = x.unflatten(1, (heads, -1)).transpose(2, 3)
    return split.flatten(2, 3).flatten(0, 1)


def _rows(given: Strips, scale: float, spaces: Spaces) -> _Rows:
    (count, rows, width), narrow = given.q.shape, given.q.dtype
    scaled = spaces.of("scaled", (count, rows, width + 1))
    scaled[..., :width].copy_(given.q).mul_(scale * LOG2_E)
    torch.mul(given.lse, -LOG2_E, out=scaled[..., width])
    douts = spaces.of("douts", (count, rows, width + TERMS), narrow)
    douts[..., :width] = given.dout
    # dq is not yet added up there
    sums = spaces.of("sums", (count, rows, width))
    rest = sums.copy_(given.dout).mul_(given.out).sum(-1).neg_()
    for place in range(width, width + TERMS):
        douts[..., place] = rest
        rest -= douts[..., place]
    return _Rows(scaled, douts, sums.zero_())


def _with_ones(x: Tensor, wider: Tensor) -> Tensor:
    """x, with columns of ones behind it."""
    width = x.shape[-1]
    wider[..., :width] = x
    wider[..., width:] = 1
    return wider


def block(given: Strips, band: Band) -> int:
    """How many keys."""
    few = STRIP_BYTES // (2 * given.q.shape[:2].numel()) // SMALLEST_BLOCK * SMALLEST_BLOCK
    return max(SMALLEST_BLOCK, min(LARGEST_BLOCK, few))


def _first(band: Band, key: int) -> int:
    """The first query that sees this key, or one behind it."""
    if band.right is None:
        return band.blind
    return max(band.blind, key - band.offset - band.right)


def _strip(
    given: Strips, rows: _Rows, spaces: Spaces, place: tuple[Band, int, tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Probabilities of a block of keys and their gradients; its part of dq is added."""
    (band, first, cols), group, narrow = place, given.group, given.q.dtype
    part, keys, (count, _, width) = slice(*cols), cols[1] - cols[0], given.q.shape
    beside = _with_ones(given.k[:, part], spaces.of("keys", (count, keys, width + 1)))
    values = spaces.of("values", (count, keys, width + TERMS), narrow)
    values = _with_ones(given.v[:, part], values).transpose(1, 2)
    across, plain = beside.transpose(1, 2), beside[..., :width]
    shape = (count, (band.seqlen_q - first) * group, keys)
    strips = spaces.of("P", shape, narrow), spaces.of("dS", shape, narrow)
    positions = max(1, TILE_ELEMENTS // (keys * group * count))
    seen = (x[:, first * group :] for x in rows)
    cut = (x.split(positions * group, 1) for x in (*seen, *strips))
    ranges = spans(first, band.seqlen_q, positions)
    for span, scaled, douts, sums, weights, dscores in zip(ranges, *cut, strict=True):
        tile = weights.shape
        wide, found = spaces.of("wide", tile), spaces.of("found", tile, narrow)
        hides = any(band.hides(span, cols))
        torch.bmm(scaled, across, out=wide).exp2_()
        if hides:
            _clear(band, wide, group, span, cols)
        weights.copy_(wide)
        wide.mul_(torch.bmm(douts, values, out=found))
        if hides:
            _clear(band, wide, group, span, cols)
        dscores.copy_(wide)
        sums.baddbmm_(wide, plain)
    return strips


def _clear(
    band: Band, tile: Tensor, group: int, rows: tuple[int, int], cols: tuple[int, int]
) -> None:
    """Zeros where hidden, whatever stands there."""
    if group == 1:
        band.clear(tile, rows, cols)
        return
    hidden = band.hidden(rows, cols, tile)
    if hidden is not None:
        tile.unflatten(1, (-1, group)).masked_fill_(hidden[:, None], 0.0)
