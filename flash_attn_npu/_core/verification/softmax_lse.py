"""softmax_lse of the rows that are looked at, from where a call has left it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..problems.attention import Problem
from .comparing import Lse
from .samples import Spot

__all__ = ["by_rows", "statistics"]


def by_rows(problem: Problem, lse: Tensor) -> Lse:
    """Of (batch, nheads, seqlen_q) or (nheads, total_q)."""

    def read(spot: Spot, rows: Tensor, heads: tuple[int, ...]) -> Tensor:
        source = lse.detach() if problem.varlen else lse.detach()[spot.sequence]
        some = torch.tensor(heads, device=lse.device)
        return source[some[:, None], (rows + spot.start_q).to(lse.device)[None]].cpu()

    return read


def statistics(problem: Problem, seen: Any) -> Lse:
    """Of what the kernel returned besides out; +inf of the rows without keys."""

    def read(spot: Spot, rows: Tensor, heads: tuple[int, ...]) -> Tensor | None:
        shifts = seen.shifts(spot.sequence)
        if shifts is None:
            return None
        blind = problem.blind(spot.seqlen_q, spot.seqlen_k)
        given = rows >= blind
        source = seen.softmax_lse if problem.varlen else seen.softmax_lse[spot.sequence]
        places = (rows[given] + spot.start_q + shifts[0]).to(source.device)
        some = torch.tensor(heads, device=source.device)
        lse = torch.full((len(heads), len(rows)), torch.inf, dtype=source.dtype, device="cpu")
        lse[:, given] = source.detach()[some[:, None], places[None]].cpu()
        return lse

    return read
