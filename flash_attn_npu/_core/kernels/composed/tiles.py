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
]

TILE_ELEMENTS = 1 << 22
TILE_ELEMENTS_ON_CPU = 1 << 20
"""Scores of one tile: a few MiB where launches cost, what caches hold where they do not."""

LARGEST_TILE = 512
SMALLEST_TILE = 32


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
        return (drawn >= self.dropout_p).to(like.dtype) / (1.0 - self.dropout_p)


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


def _tile_size(q: Tensor) -> int:
    streams = max(1, math.prod(q.shape[:3]))
    elements = TILE_ELEMENTS_ON_CPU if q.device.type == "cpu" else TILE_ELEMENTS
    size = math.isqrt(elements // streams)
    return max(SMALLEST_TILE, min(LARGEST_TILE, size))


def _scores(
    queries: Tensor,
    keys: Tensor,
    band: Band,
    scoring: Scoring,
    rows: tuple[int, int],
    cols: tuple[int, int],
) -> tuple[Tensor, Tensor | None]:
    """Scores of one tile, -inf where hidden, and tanh of the capped ones for the backward."""
    group, count = queries.shape[2:4]
    scores = queries.flatten(2, 3) @ keys.squeeze(2).transpose(-1, -2)
    scores = scores.unflatten(2, (group, count))
    bent = None
    if scoring.softcap:
        bent = torch.tanh(scores / scoring.softcap)
        scores = bent * scoring.softcap
    if scoring.slopes is not None:
        distance = band.distance(rows, cols, scores).abs().to(scores.dtype)
        scores = scores - scoring.slopes.to(scores.dtype) * distance
    hidden = band.hidden(rows, cols, scores)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    return scores, bent


def attend(streams: Streams, band: Band, scoring: Scoring) -> None:
    """Fill `streams.out` and `streams.lse`."""
    size = _tile_size(streams.q)
    for rows in spans(0, band.seqlen_q, size):
        _attend_rows(streams, band, scoring, rows, size)


def _attend_rows(
    streams: Streams, band: Band, scoring: Scoring, rows: tuple[int, int], size: int
) -> None:
    kept = accumulator(streams.q.dtype)
    queries = streams.q[..., rows[0] : rows[1], :].to(kept) * scoring.scale
    out = torch.zeros_like(queries)
    top = torch.full(queries.shape[:-1], -math.inf, dtype=kept, device=queries.device)
    total = torch.zeros_like(top)
    if scoring.sink is not None:
        top = top.copy_(scoring.sink)
        total += 1.0
    for cols in spans(*band.keys(*rows), size):
        keys, values = (x[..., cols[0] : cols[1], :].to(kept) for x in (streams.k, streams.v))
        scores, _ = _scores(queries, keys, band, scoring, rows, cols)
        new_top = torch.maximum(top, scores.amax(-1))
        # a row that has seen nothing yet has a top of -inf, and -inf - -inf is NaN
        safe = new_top.masked_fill(new_top == -math.inf, 0.0)
        weights = torch.exp(scores - safe[..., None])
        fade = torch.exp(top - safe)
        total = total * fade + weights.sum(-1)
        if scoring.dropout_p:
            place = (streams.place, rows[0], cols[0])
            weights = weights * scoring.keep(weights.shape, place, weights)
        gain = (weights.flatten(2, 3) @ values.squeeze(2)).unflatten(2, weights.shape[2:4])
        out = out * fade[..., None] + gain
        top = new_top
    blind = _blind(band, rows, total) | (total == 0)
    total = total.masked_fill(blind, 1.0)
    streams.out[..., rows[0] : rows[1], :] = (out / total[..., None]).to(streams.out.dtype)
    lse = (top + torch.log(total)).masked_fill(blind, math.inf)
    streams.lse[..., rows[0] : rows[1]] = lse.to(streams.lse.dtype)


def _blind(band: Band, rows: tuple[int, int], like: Tensor) -> Tensor:
    """True for the rows that see no key."""
    if band.seqlen_k == 0:
        return torch.ones_like(like, dtype=torch.bool)
    if band.right is None:
        return torch.zeros_like(like, dtype=torch.bool)
    last_key = torch.arange(*rows, device=like.device) + band.offset + band.right
    return (last_key < 0).expand(like.shape)


def probabilities(streams: Streams, band: Band, scoring: Scoring, square: Tensor) -> None:
    """Fill (batch, nheads_k, group, seqlen_q, seqlen_k) from `streams.lse`, negative where dropped.

    The tiles are those of `attend`, so the dropout mask is too.
    """
    size = _tile_size(streams.q)
    kept = accumulator(streams.q.dtype)
    for rows in spans(0, band.seqlen_q, size):
        queries = streams.q[..., slice(*rows), :].to(kept) * scoring.scale
        lse = streams.lse[..., slice(*rows), None].to(kept)
        for cols in spans(*band.keys(*rows), size):
            keys = streams.k[..., slice(*cols), :].to(kept)
            scores, _ = _scores(queries, keys, band, scoring, rows, cols)
            weights = torch.exp(scores - lse)
            kept_ones = scoring.keep(weights.shape, (streams.place, rows[0], cols[0]), weights)
            signed = torch.where(kept_ones > 0, weights, -weights)
            square[..., slice(*rows), slice(*cols)] = signed.to(square.dtype)


def attend_backward(
    streams: Streams, band: Band, scoring: Scoring, dout: Tensor, grads: tuple[Tensor, ...]
) -> None:
    """Fill the views `grads` = (dq, dk, dv).

    Only (q, k, v, out, lse) of the forward are needed, also when out and lse come from a merge
    over several blocks of keys or count a sink.
    """
    dq, dk, dv = grads
    kept = accumulator(streams.q.dtype)
    size = _tile_size(streams.q)
    dk_sum, dv_sum = (torch.zeros(x.shape, dtype=kept, device=x.device) for x in (dk, dv))
    for rows in spans(0, band.seqlen_q, size):
        douts = dout[..., slice(*rows), :].to(kept)
        delta = (douts * streams.out[..., slice(*rows), :].to(kept)).sum(-1)
        lse = streams.lse[..., slice(*rows)].to(kept)
        dq_sum = torch.zeros_like(douts)
        row_grads = _backward_rows(streams, band, scoring, rows, size, (douts, delta, lse))
        for cols, dq_part, dk_part, dv_part in row_grads:
            dq_sum += dq_part
            dk_sum[..., slice(*cols), :] += dk_part
            dv_sum[..., slice(*cols), :] += dv_part
        dq[..., slice(*rows), :] = dq_sum.to(dq.dtype)
    dk.copy_(dk_sum)
    dv.copy_(dv_sum)


def _backward_rows(
    streams: Streams,
    band: Band,
    scoring: Scoring,
    rows: tuple[int, int],
    size: int,
    saved: tuple[Tensor, Tensor, Tensor],
) -> Iterator[tuple[tuple[int, int], Tensor, Tensor, Tensor]]:
    """Yield, tile by tile, the key range and its parts of dq, dk and dv."""
    douts, delta, lse = saved
    queries = streams.q[..., slice(*rows), :].to(douts.dtype) * scoring.scale
    for cols in spans(*band.keys(*rows), size):
        keys, values = (x[..., slice(*cols), :].to(douts.dtype) for x in (streams.k, streams.v))
        scores, bent = _scores(queries, keys, band, scoring, rows, cols)
        weights = torch.exp(scores - lse[..., None])
        dweights = douts.flatten(2, 3) @ values.squeeze(2).transpose(-1, -2)
        dweights = dweights.unflatten(2, weights.shape[2:4])
        dropped = weights
        if scoring.dropout_p:
            keep = scoring.keep(weights.shape, (streams.place, rows[0], cols[0]), weights)
            dropped, dweights = weights * keep, dweights * keep
        dv = dropped.flatten(2, 3).transpose(-1, -2) @ douts.flatten(2, 3)
        dscores = weights * (dweights - delta[..., None])
        if bent is not None:
            dscores = dscores * (1.0 - bent * bent)
        dscores = dscores.flatten(2, 3)
        dq = (dscores @ keys.squeeze(2)).unflatten(2, weights.shape[2:4]) * scoring.scale
        # the queries already carry the scale
        dk = dscores.transpose(-1, -2) @ queries.flatten(2, 3)
        yield cols, dq, dk.unsqueeze(2), dv.unsqueeze(2)
