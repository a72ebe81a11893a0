"""Ascend's fused training kernel, `torch_npu.npu_fusion_attention`, under flash-attn's rules.

The kernel's contract is in torch_npu's operator documentation. It refuses packed sequences with
queries that see no key, rows past the last sequence, and keys of length 0 under a mask; here
those rows are left out before the call and answered with zeros and +inf after it. Gradients go
through torch_npu's own autograd formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..attention.problem import Problem
from ..attention.result import Result

__all__ = ["NAME", "UNLIMITED", "causal_mask", "prepare"]

NAME = "npu_fusion_attention"

UNLIMITED = 2147483647
"""The kernel's default for pre_tockens and next_tockens."""

MASK_SIZE = 2048
"""Side of the compressed mask that sparse modes 2, 3 and 4 demand."""


@cache
def causal_mask(device: torch.device) -> Tensor:
    """The compressed mask, True above the diagonal; one per device, 4 MiB."""
    ones = torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.bool, device=device)
    return torch.triu(ones, diagonal=1)


class Call(NamedTuple):
    """The arguments of npu_fusion_attention behind q, k and v, in its order."""

    head_num: int
    input_layout: str
    pse: Tensor | None
    padding_mask: None
    atten_mask: Tensor | None
    scale: float
    keep_prob: float
    pre_tockens: int
    next_tockens: int
    inner_precise: int
    prefix: None
    actual_seq_qlen: list[int] | None
    actual_seq_kvlen: list[int] | None
    sparse_mode: int


def prepare(problem: Problem) -> tuple[Callable[..., Any], bool]:
    """A function (q, k, v, ...) differentiable in q, k and v, and whether it returns a bare output.

    Otherwise it returns a Result.
    """
    from torch_npu import npu_fusion_attention

    rows = Rows(problem)
    call = _call(problem, rows)
    if rows.untouched and not problem.return_attn_probs:

        def run(q: Tensor, k: Tensor, v: Tensor, *_: None) -> Tensor:
            return npu_fusion_attention(q, k, v, *call)[0]  # type: ignore[no-any-return]

        return run, True

    # the default layout of packed statistics is a sequence of (nheads, seqlen) blocks
    layout = {"softmax_layout": "TND"} if problem.varlen and problem.return_attn_probs else {}

    def run_rows(q: Tensor, k: Tensor, v: Tensor, *_: None) -> Result:
        seen_q, seen_k, seen_v = rows.take(q, k, v)
        out, top, total, *_rest = npu_fusion_attention(seen_q, seen_k, seen_v, *call, **layout)
        lse = None
        if problem.return_attn_probs:
            stats = top[..., 0] + torch.log(total[..., 0])
            lse = rows.restore_lse(stats.transpose(0, 1).contiguous() if problem.varlen else stats)
        return Result(rows.restore(out), lse, None)

    return run_rows, False


def _call(problem: Problem, rows: Rows) -> Call:
    mode, mask = 0, None
    if problem.causal:
        mode = 3
    elif problem.windowed:
        mode = 4
    if mode:
        mask = causal_mask(problem.device)
    return Call(
        head_num=problem.nheads,
        input_layout="TND" if problem.varlen else "BSND",
        pse=None,
        padding_mask=None,
        atten_mask=mask,
        scale=problem.softmax_scale,
        keep_prob=1.0 - problem.dropout_p,
        pre_tockens=UNLIMITED if problem.left is None else problem.left,
        next_tockens=UNLIMITED if problem.right is None else problem.right,
        inner_precise=0,
        prefix=None,
        actual_seq_qlen=rows.ends_q,
        actual_seq_kvlen=rows.ends_k,
        sparse_mode=mode,
    )


class Rows:
    """Which rows of q, k and v the kernel is given, and how its answer is put back.

    A dense problem loses the first rows of every sequence; a packed one loses the blind rows of
    each sequence, the sequences that are empty then, and whatever lies past the last sequence.
    """

    def __init__(self, problem: Problem) -> None:
        self.varlen = problem.varlen
        self.rows_q = problem.rows_q
        self.blind = problem.blind_rows[0] if not problem.varlen else 0
        self.total_q, self.total_k = problem.seeing_rows, sum(problem.seqlens_k)
        self.index: Tensor | None = None
        self.ends_q: list[int] | None = None
        self.ends_k: list[int] | None = None
        if not problem.varlen:
            self.untouched = self.blind == 0
            return
        self.ends_q, self.ends_k = _ends(problem)
        if any(problem.blind_rows):
            self.index = _seeing_index(problem)
        self.untouched = self.total_q == problem.rows_q and self.total_k == problem.rows_k

    def take(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self.varlen:
            return q[:, self.blind :], k, v
        kept = q[: self.total_q] if self.index is None else q.index_select(0, self.index)
        return kept, k[: self.total_k], v[: self.total_k]

    def restore(self, out: Tensor) -> Tensor:
        if not self.varlen:
            return pad(out, (0, 0, 0, 0, self.blind, 0)) if self.blind else out
        if self.index is not None:
            return out.new_zeros(self.rows_q, *out.shape[1:]).index_copy(0, self.index, out)
        tail = self.rows_q - self.total_q
        return pad(out, (0, 0, 0, 0, 0, tail)) if tail else out

    def restore_lse(self, lse: Tensor) -> Tensor:
        if not self.varlen:
            return pad(lse, (self.blind, 0), value=math.inf) if self.blind else lse
        if self.index is not None:
            whole = lse.new_full((lse.shape[0], self.rows_q), math.inf)
            return whole.index_copy(1, self.index, lse)
        tail = self.rows_q - self.total_q
        return pad(lse, (0, tail), value=math.inf) if tail else lse


def _ends(problem: Problem) -> tuple[list[int], list[int]]:
    """Cumulative lengths of the rows that are left, without sequences empty on both sides."""
    ends_q, ends_k, end_q, end_k = [], [], 0, 0
    for seqlen_q, blind, seqlen_k in zip(
        problem.seqlens_q, problem.blind_rows, problem.seqlens_k, strict=True
    ):
        end_q += seqlen_q - blind
        end_k += seqlen_k
        if seqlen_q > blind or seqlen_k:
            ends_q.append(end_q)
            ends_k.append(end_k)
    return ends_q, ends_k


def _seeing_index(problem: Problem) -> Tensor:
    """Positions in q of the queries that see a key, made on the host and copied once."""
    starts = problem.lengths_q.cumulative if problem.lengths_q else ()
    kept = [
        torch.arange(start + blind, start + seqlen)
        for start, seqlen, blind in zip(starts, problem.seqlens_q, problem.blind_rows, strict=False)
    ]
    return torch.cat(kept).to(problem.device)
