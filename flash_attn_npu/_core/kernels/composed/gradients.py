"""The backward over tiles: each is recomputed from softmax_lse."""

from __future__ import annotations

import torch
from torch import Tensor

from ..bands import Band
from .tiles import Scoring, Streams, Tiles

__all__ = ["attend_backward"]


@torch.no_grad()
def attend_backward(
    streams: Streams, band: Band, scoring: Scoring, dout: Tensor, grads: tuple[Tensor, ...]
) -> None:
    """Fill the views `grads` = (dq, dk, dv).

    Only (q, k, v, out, lse) of the forward are needed, also when out and lse come from a merge
    over several blocks of keys or count a sink.
    """
    dq, dk, dv = grads
    tiles = Tiles(streams, band, scoring, backward=True)
    dq[..., : band.blind, :] = 0
    batch, heads, _, seqlen_k, headdim = streams.k.shape
    sums = streams.k.new_zeros(2, batch * heads, seqlen_k, headdim, dtype=tiles.kept)
    for rows in tiles.rows():
        douts = tiles.flat(dout[..., slice(*rows), :])
        outs = tiles.flat(streams.out[..., slice(*rows), :])
        delta = (douts * outs).sum(-1, keepdim=True)
        found = _of_rows(tiles, rows, (douts, delta), (sums[0], sums[1]))
        dq[..., slice(*rows), :].copy_(tiles.split(found.mul_(scoring.scale)))
    for grad, total in zip((dk, dv), sums, strict=True):
        grad.copy_(total.view_as(grad))


def _of_rows(
    tiles: Tiles,
    rows: tuple[int, int],
    saved: tuple[Tensor, Tensor],
    sums: tuple[Tensor, Tensor],
) -> Tensor:
    """dq of a block of rows over the scale; what it gives to dk and dv is added to `sums`."""
    (douts, delta), scoring = saved, tiles.scoring
    queries, lse = tiles.queries(rows), tiles.statistics(rows)
    scaled = tiles.scaled(queries)
    dq = torch.zeros_like(queries)
    for cols in tiles.cols(rows):
        keys = tiles.keys(cols)
        products = tiles.products(scaled, keys)
        weights = tiles.weights(products, lse, rows, cols)
        dscores = tiles.product("dscores", douts, tiles.values(cols).transpose(1, 2))
        dropped = weights
        if scoring.dropout_p:
            keep = tiles.drop(torch.ones_like(weights), rows, cols)
            dropped = weights * keep
            dscores.mul_(keep)
            del keep
        part = slice(*cols)
        # in float32: torch rounds a product of 16 bits to 16, and what tiles add up to may cancel
        sums[1][:, part].baddbmm_(dropped.transpose(1, 2), douts)
        dscores.sub_(delta).mul_(weights)
        if scoring.softcap:
            # by 1 - tanh^2
            torch.ops.aten.tanh_backward.grad_input(dscores, products, grad_input=dscores)
        dscores = tiles.cleared(dscores, rows, cols)
        dq.baddbmm_(dscores, keys)
        sums[0][:, part].baddbmm_(dscores.transpose(1, 2), queries, alpha=scoring.scale)
        del products, weights, dropped, dscores  # before the next tile is made
    return dq
