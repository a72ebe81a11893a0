"""One call of an attention kernel, compared on a sample with exact arithmetic on the host.

Nothing of the call is disturbed: no random number is drawn, nothing is written, no graph is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from typing import NamedTuple

import torch
from torch import Tensor

from ..problems.attention import Problem
from ..problems.results import Inputs
from . import truth
from .dropped import judge_dropped
from .judging import Finding, judge, judge_lse, rms
from .reading import Drawn, Reader, dropout_bits
from .samples import Spot, edges, spots

__all__ = ["Lse", "Taken", "compare_forward", "compare_gradients", "compare_sink"]

Lse = Callable[[Spot, Tensor, tuple[int, ...]], Tensor | None]
"""(heads, rows) of softmax_lse, on the host; None where the kernel was not given the sequence."""

SMALLEST_SPREAD = 1e-3
MOST_COLUMNS = 16
LEAST_COLUMN_SPOTS = 2
MOST_COLUMN_QUERIES = 1 << 15


class Taken(NamedTuple):
    """The gradients of a call, and what they were computed from.

    shifts: how far from its place in q and in k a sequence lies in them, as a kernel may have been
        given fewer rows; None if it was not given this sequence.
    """

    dout: Tensor
    out: Tensor
    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    shifts: Callable[[int], tuple[int, int] | None]


def compare_forward(
    problem: Problem, inputs: Inputs, out: Tensor, lse: Lse | None, drawn: Drawn | None
) -> list[Finding]:
    """What was found of out and softmax_lse; empty if they agree, and the values tell nothing."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        mask = None if drawn is None else dropout_bits(problem, inputs.q, drawn)
        reader = Reader(problem, inputs, mask)
        found: list[Finding] = []
        telling = False
        for spot in spots(problem):
            rows, columns = _index(spot.rows), _range(spot.seqlen_k)
            piece = reader.piece(spot, rows, columns, spot.heads)
            telling = telling or (
                tells(piece, _key_heads(reader, spot.heads))
                and not _repeated(inputs.sink, spot.heads, reader.group)
            )
            actual = reader.rows(out, spot, rows, spot.heads)
            if drawn is None or mask is not None:
                found.append(_judge_out(piece, actual, spot))
            known = None if lse is None else lse(spot, rows, spot.heads)
            if known is not None:
                found.append(_judge_lse(piece, known, spot))
        if drawn is not None and mask is None:
            found.append(judge_dropped(reader, out))
        return found if telling or not all(finding.agrees for finding in found) else []


def tells(piece: truth.Piece, key_heads: set[int]) -> bool:
    """Whether the values of a piece would show a mistake.

    They do not where all scores are alike, nor where heads are, whatever differs between heads, or
    keys and values: what was taken from the wrong one would not be seen.
    """
    scores = piece.scores(torch.float64)
    seen = scores.isfinite()
    if not seen.any() or scores.isnan().any() or not piece.v.isfinite().all():
        return False
    of_heads: list[Tensor | None] = [piece.q.transpose(0, 1), piece.band.slopes, piece.sink]
    if len(key_heads) > 1:
        of_heads += [x.transpose(0, 1) for x in (piece.k, piece.v)]
    if any(_alike(x) for x in of_heads if x is not None) or torch.equal(piece.k, piece.v):
        return False
    spread = scores[seen].max() - scores[seen].min()
    alone = int(seen.sum()) == 1
    return bool(spread > SMALLEST_SPREAD or alone) and bool((piece.v != 0).any())


def _alike(of_heads: Tensor) -> bool:
    return of_heads.shape[0] > 1 and torch.equal(of_heads[0], of_heads[-1])


def _repeated(sink: Tensor | None, heads: tuple[int, ...], group: int) -> bool:
    """Whether the sinks of all these heads are those of the first key head's."""
    others = [head for head in heads if head >= group]
    if sink is None or not others:
        return False
    sinks = sink.detach().cpu()
    return all(bool(sinks[head] == sinks[head % group]) for head in others)


def _key_heads(reader: Reader, heads: tuple[int, ...]) -> set[int]:
    return {head // reader.group for head in heads}


def _judge_out(piece: truth.Piece, actual: Tensor, spot: Spot) -> Finding:
    exact, _ = truth.attention(piece, torch.float64)
    plain, _ = truth.attention(piece, actual.dtype)
    return judge("out", actual, exact, plain, rms(piece.v), _where(spot, "row", "head", "dim"))


def _judge_lse(piece: truth.Piece, actual: Tensor, spot: Spot) -> Finding:
    _, exact = truth.attention(piece, torch.float64)
    _, plain = truth.attention(piece, torch.float32)
    return judge_lse(actual, exact, plain, _where(spot, "head", "row"))


def compare_gradients(
    problem: Problem, inputs: Inputs, taken: Taken, lse: Lse, drawn: Drawn | None
) -> list[Finding]:
    """What was found of dq, dk and dv, against what out and softmax_lse as given make of them."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        mask = None if drawn is None else dropout_bits(problem, inputs.q, drawn)
        if drawn is not None and mask is None:
            return []
        reader = Reader(problem, inputs, mask)
        found: list[Finding] = []
        telling = False
        given = [spot for spot in spots(problem) if taken.shifts(spot.sequence) is not None]
        if taken.dq is not None:
            found += [_judge_rows(reader, taken, lse, spot) for spot in given]
        for spot, key_head in _column_spots(problem, given):
            columns = _columns(spot.seqlen_k)
            heads = tuple(range(key_head * reader.group, (key_head + 1) * reader.group))
            rows = _range(spot.seqlen_q)[problem.blind(spot.seqlen_q, spot.seqlen_k) :]
            piece = reader.piece(spot, rows, columns, heads)
            telling = telling or tells(piece, _key_heads(reader, heads))
            found += _judge_columns(reader, taken, lse, spot, (piece, heads))
        return found if telling or not all(finding.agrees for finding in found) else []


def compare_sink(sink: Tensor, dsink: Tensor, taken: Taken, lse: Tensor) -> Finding:
    """The gradient of a sink, which every row has a share in: of the first heads, and the last.

    Args:
        lse: (batch, nheads, seqlen_q) or (nheads, total_q), of the rows of out.
    """
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        nheads = sink.shape[0]
        heads = _index(tuple(sorted({0, min(1, nheads - 1), nheads - 1})))
        some = heads.to(lse.device)
        # summed up there: what is copied is a number for each row
        dout, out = (x.detach().index_select(-2, some).float() for x in (taken.dout, taken.out))
        deltas = (dout * out).sum(-1).transpose(-1, -2).cpu()
        known = lse.detach().index_select(-2, some).cpu()
        sinks = sink.detach().cpu()[heads]
        exact, plain = (
            truth.sink_terms(sinks.to(dtype), deltas.to(dtype), known.to(dtype))
            for dtype in (torch.float64, torch.float32)
        )
        others = [axis for axis in range(exact.dim()) if axis != exact.dim() - 2]
        actual = dsink.detach().cpu()[heads]
        unit = exact.abs().sum(others).max().item()
        return judge(
            "the gradient of the sink",
            actual[:, None],
            exact.sum(others)[:, None],
            plain.sum(others)[:, None],
            unit,
            "(head, ) of the sample",
        )


def _judge_rows(reader: Reader, taken: Taken, lse: Lse, spot: Spot) -> Finding:
    assert taken.dq is not None
    first = reader.problem.blind(spot.seqlen_q, spot.seqlen_k)
    rows = _index(tuple(row for row in spot.rows if row >= first))
    piece = reader.piece(spot, rows, _range(spot.seqlen_k), spot.heads)
    actual, dout, out = (
        reader.rows(x, _shifted(spot, taken), rows, spot.heads)
        for x in (taken.dq, taken.dout, taken.out)
    )
    known = lse(spot, rows, spot.heads)
    assert known is not None
    given = (dout, out, known)
    exact = truth.row_gradients(piece, *given, torch.float64)
    plain = truth.row_gradients(piece, *given, actual.dtype)
    unit = rms(dout) * rms(piece.v) * rms(piece.k)
    return judge("dq", actual, exact, plain, unit, _where(spot, "row", "head", "dim"))


def _shifted(spot: Spot, taken: Taken) -> Spot:
    shift_q, shift_k = taken.shifts(spot.sequence) or (0, 0)
    return spot._replace(start_q=spot.start_q + shift_q, start_k=spot.start_k + shift_k)


def _judge_columns(
    reader: Reader,
    taken: Taken,
    lse: Lse,
    spot: Spot,
    looked: tuple[truth.Piece, tuple[int, ...]],
) -> Iterator[Finding]:
    piece, heads = looked
    there = _shifted(spot, taken)
    douts, outs = (reader.rows(x, there, piece.rows, heads) for x in (taken.dout, taken.out))
    known = lse(spot, piece.rows, heads)
    assert known is not None
    given = (douts, outs, known)
    key_head = (heads[0] // reader.group,)
    dtype = taken.dout.dtype
    exact = truth.column_gradients(piece, *given, torch.float64)
    plain = truth.column_gradients(piece, *given, dtype)
    units = (rms(douts) * rms(piece.v) * rms(piece.q), rms(douts))
    for index, (name, grad) in enumerate((("dk", taken.dk), ("dv", taken.dv))):
        if grad is not None:
            actual = reader.keys(grad, there, piece.columns, key_head)[:, 0]
            where = _where(spot, "column", "dim", head=key_head[0])
            yield judge(name, actual, exact[index], plain[index], units[index], where)


def _column_spots(problem: Problem, given: list[Spot]) -> list[tuple[Spot, int]]:
    """The sequences, and the key head in each, whose keys are looked at.

    The last sequence and the last head are among them; as every query of the head's group is read,
    few are looked at where they are long.
    """
    seen = [spot for spot in given if spot.seqlen_k]
    if not seen:
        return []
    last = problem.nheads_k - 1
    chosen = dict.fromkeys((max(seen, key=lambda spot: spot.sequence), *seen[:2]))
    pairs = zip(cycle(chosen), (last, 0, min(1, last)), strict=False)
    group = problem.nheads // problem.nheads_k
    found: dict[tuple[Spot, int], None] = {}
    read = 0
    for spot, head in pairs:
        read += spot.seqlen_q * group
        if len(found) < LEAST_COLUMN_SPOTS or read <= MOST_COLUMN_QUERIES:
            found[spot, head] = None
    return list(found)


def _columns(seqlen_k: int) -> Tensor:
    wanted = [seqlen_k - 1, 0, seqlen_k - 2, 1, seqlen_k // 2, *edges(seqlen_k)]
    inside = list(dict.fromkeys(column for column in wanted if 0 <= column < seqlen_k))
    return _index(tuple(sorted(inside[:MOST_COLUMNS])))


def _index(places: tuple[int, ...]) -> Tensor:
    return torch.tensor(places, dtype=torch.int64, device="cpu")


def _range(length: int) -> Tensor:
    return torch.arange(length, device="cpu")


def _where(spot: Spot, *axes: str, head: int | None = None) -> str:
    which = "" if head is None else f"key head {head} of "
    lengths = f"{spot.seqlen_q} queries and {spot.seqlen_k} keys"
    return f"({', '.join(axes)}) in the sample of {which}sequence {spot.sequence}, {lengths}"
