"""How a band is cut for torch's own kernel, which knows causal from the top left, and a bias.

A step is one launch: queries against keys that they see between them. Of a window the rows are cut
into blocks, each against the keys it sees, and only what a block sees in part has a bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..bands import Band, spans

__all__ = ["Step", "backward_steps", "forward_steps", "left_of", "pieces", "whole_step"]

SMALLEST_BLOCK, LARGEST_BLOCK = 64, 256
"""Rows of a block: few waste little at the rim of a window, many waste little on launches."""

BIAS_ELEMENTS = 1 << 21
"""Of the bias of one step, unless one row of it holds more."""


class Step(NamedTuple):
    """One launch: rows of q against keys, as ranges.

    causal: the kernel hides keys by itself; biased: a bias says what is hidden, or what counts
        less.
    """

    rows: tuple[int, int]
    keys: tuple[int, int]
    causal: bool = False
    biased: bool = False


def forward_steps(band: Band, streams: int) -> list[Step]:
    """Every row that sees a key stands in one step.

    Args:
        streams: how many biases a step has (of ALiBi one for each head), 0 for none but the band.
    """
    if band.blind == band.seqlen_q:
        return []
    whole = None if streams else _whole(band, band.blind)
    return _blocks(band, streams) if whole is None else whole


def whole_step(band: Band) -> Step | None:
    """The one step in which all queries see a key, without a bias; None if there is none such."""
    if not band.seqlen_q:
        return Step((0, 0), (0, band.seqlen_k))
    whole = None if band.blind else _whole(band, 0)
    return whole[0] if whole and whole[0].keys == (0, band.seqlen_k) else None


def backward_steps(band: Band, streams: int) -> list[Step]:
    """As in the forward, but that a row may stand in two steps: gradients only add up."""
    if streams or left_of(band) is not None:
        return forward_steps(band, streams)
    rows, ahead = (band.blind, band.seqlen_q), _ahead(band)
    if not ahead or ahead >= band.seqlen_k - 1:
        return forward_steps(band, streams)
    last = min(band.seqlen_k, ahead + rows[1] - rows[0])
    return [Step(rows, (0, ahead)), Step(rows, (ahead, last), causal=True)]


def pieces(band: Band, streams: int, size: int) -> Iterator[tuple[tuple[int, int], list[Step]]]:
    """`size` rows after others, in steps that see as many keys at most: a row stands in several.

    What a step shows of a row may be nothing, where it has a bias.
    """
    for rows in spans(band.blind, band.seqlen_q, size):
        plain = not streams and left_of(band) is None
        found = _to_diagonal(band, rows, size) if plain else _biased(band, streams, rows, size)
        yield rows, list(found)


def left_of(band: Band) -> int | None:
    """The bound on the left; None if it hides nothing."""
    return None if band.left is None or band.left >= band.seqlen_k - 1 else band.left


def _ahead(band: Band) -> int:
    """How many keys the first query with a key sees behind the first key."""
    if band.right is None:
        return band.seqlen_k
    return band.blind + band.offset + band.right


def _whole(band: Band, blind: int) -> list[Step] | None:
    """The band without any bias, None if it needs one."""
    rows, keys = (blind, band.seqlen_q), band.keys(blind, band.seqlen_q)
    if not any(band.hides(rows, keys)):
        return [Step(rows, keys)]
    causal = left_of(band) is None and _ahead(band) == 0
    return [Step(rows, keys, causal=True)] if causal else None


def _blocks(band: Band, streams: int) -> list[Step]:
    steps = []
    for rows in spans(band.blind, band.seqlen_q, _block(band, streams)):
        keys = band.keys(*rows)
        steps.append(Step(rows, keys, biased=bool(streams) or any(band.hides(rows, keys))))
    return steps


def _to_diagonal(band: Band, rows: tuple[int, int], size: int) -> Iterator[Step]:
    low, high = band.keys(*rows)
    # the last key of the first row
    edge = band.keys(rows[0], rows[0] + 1)[1] - 1
    edge = edge if any(band.hides(rows, (low, high))) else high
    for keys in spans(low, edge, size):
        yield Step(rows, keys)
    if edge < high:
        yield Step(rows, (edge, high), causal=True)


def _biased(band: Band, streams: int, rows: tuple[int, int], size: int) -> Iterator[Step]:
    low, high = band.keys(*rows)
    block = _block(band, streams, size)
    wide = _seen(band) + block > size
    for cols in spans(low, high, size if wide else high - low):
        for part in spans(*rows, block):
            first, last = band.keys(*part)
            keys = max(first, cols[0]), min(last, cols[1])
            if keys[0] < keys[1]:
                yield Step(part, keys, biased=bool(streams) or any(band.hides(part, keys)))


def _seen(band: Band) -> int:
    """How many keys a query sees, at most."""
    if band.left is None or band.right is None:
        return band.seqlen_k
    return min(band.seqlen_k, band.left + band.right + 1)


def _block(band: Band, streams: int, most: int | None = None) -> int:
    """Rows of a block; its keys are `most` at most, if that is told."""
    seen = _seen(band)
    size = max(SMALLEST_BLOCK, min(LARGEST_BLOCK, seen // 4))
    keys = min(band.seqlen_k, seen + size)
    room = BIAS_ELEMENTS // (max(streams, 1) * (keys if most is None else min(keys, most)))
    return max(1, min(size, room))
