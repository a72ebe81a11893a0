"""How a band is cut for torch's own kernel, which knows causal from the top left, and a bias.

A step is one launch: queries against keys that they see between them. Of a window the rows are cut
into blocks, each against the keys it sees, and only what a block sees in part has a bias.
"""

from __future__ import annotations

from typing import NamedTuple

from ..bands import Band, spans

__all__ = ["Step", "backward_steps", "forward_steps", "left_of"]

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
    whole = None if streams else _whole(band)
    return _blocks(band, streams) if whole is None else whole


def backward_steps(band: Band, streams: int) -> list[Step]:
    """As in the forward, but that a row may stand in two steps: gradients only add up."""
    if streams or left_of(band) is not None:
        return forward_steps(band, streams)
    rows, ahead = (band.blind, band.seqlen_q), _ahead(band)
    if not ahead or ahead >= band.seqlen_k - 1:
        return forward_steps(band, streams)
    last = min(band.seqlen_k, ahead + rows[1] - rows[0])
    return [Step(rows, (0, ahead)), Step(rows, (ahead, last), causal=True)]


def left_of(band: Band) -> int | None:
    """The bound on the left; None if it hides nothing."""
    return None if band.left is None or band.left >= band.seqlen_k - 1 else band.left


def _ahead(band: Band) -> int:
    """How many keys the first query with a key sees behind the first key."""
    if band.right is None:
        return band.seqlen_k
    return band.blind + band.offset + band.right


def _whole(band: Band) -> list[Step] | None:
    """The band without any bias, None if it needs one."""
    rows, keys = (band.blind, band.seqlen_q), band.keys(band.blind, band.seqlen_q)
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


def _block(band: Band, streams: int) -> int:
    seen = band.seqlen_k
    if band.left is not None and band.right is not None:
        seen = min(seen, band.left + band.right + 1)
    size = max(SMALLEST_BLOCK, min(LARGEST_BLOCK, seen // 4))
    room = BIAS_ELEMENTS // (max(streams, 1) * min(band.seqlen_k, seen + size))
    return max(1, min(size, room))
