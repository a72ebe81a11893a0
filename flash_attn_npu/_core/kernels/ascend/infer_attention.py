"""Ascend's fused inference kernel, `torch_npu.npu_fused_infer_attention_score`, over a cache.

Contract: torch_npu's operator documentation. Queries are packed (TND), keys are read where they
lie: flash-attention's cache (num_blocks, page, nheads_k, headdim) is a view of the kernel's
(num_blocks, page, nheads_k * headdim). Forward only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...ground.memory import Memo
from ...problems.attention import Problem
from ...problems.cache import Cache
from ...problems.results import Forward, Inputs
from ..kernel import Kernel
from .fusion_attention import UNLIMITED, causal_mask

__all__ = ["KERNEL"]

_row_tables: Memo[tuple[tuple[int, ...], int, torch.device], Tensor] = Memo(
    "page tables of unpaged caches", 16, nbytes=1 << 24
)


def forward(problem: Problem, inputs: Inputs) -> Forward:
    """Attention over the pages of `inputs.cache`; rows of no sequence give 0 and +inf."""
    import torch_npu

    cache = inputs.cache
    assert cache is not None
    assert problem.lengths_q is not None
    assert problem.pages is not None
    size = problem.pages.size
    assert size is not None
    width = problem.nheads_k * problem.headdim
    mode, before, after = _sparsity(problem)
    rows = problem.rows_q - problem.tail_q
    out, lse = torch_npu.npu_fused_infer_attention_score(
        inputs.q[:rows].contiguous(),
        cache.k.view(-1, size, width),
        cache.v.view(-1, size, width),
        atten_mask=causal_mask(problem.device),
        actual_seq_lengths=problem.lengths_q.ends,
        actual_seq_lengths_kv=[span.end for span in inputs.spans],
        block_table=_table(cache, size),
        num_heads=problem.nheads,
        # with pages the host divides by it, and its default is 0
        num_key_value_heads=problem.nheads_k,
        scale=problem.softmax_scale,
        pre_tokens=before,
        next_tokens=after,
        input_layout="TND",
        sparse_mode=mode,
        block_size=size,
        softmax_lse_flag=problem.uses_lse,
    )
    lse = lse.squeeze(-1).t().contiguous() if problem.uses_lse else lse.new_empty(0)
    if problem.tail_q:
        out = pad(out, (0, 0, 0, 0, 0, problem.tail_q))
        lse = pad(lse, (0, problem.tail_q), value=math.inf)
    rng_state = torch.zeros(2, dtype=torch.int64, device="cpu")
    return Forward(out, lse, inputs.q.new_empty(0), rng_state)


def _sparsity(problem: Problem) -> tuple[int, int, int]:
    """(sparse_mode, tokens before, tokens after), always one that takes the compressed mask.

    Mode 3 aligns to the top left where there are more queries than keys, and without a mask
    some CANN versions return averages, so a band as wide as need be serves those cases.
    """
    fits = all(q <= k for q, k in problem.sequences)
    if problem.causal and fits:
        return 3, UNLIMITED, UNLIMITED
    return (
        4,
        UNLIMITED if problem.left is None else problem.left,
        UNLIMITED if problem.right is None else problem.right,
    )


def _table(cache: Cache, size: int) -> Tensor:
    if cache.block_table is not None:
        return cache.block_table.to(cache.k.device).contiguous()
    assert cache.rows is not None
    return _row_pages(cache.rows, cache.capacity // size, cache.k.device)


def _row_pages(rows: tuple[int, ...], pages: int, device: torch.device) -> Tensor:
    """The pages of whole rows of an unpaged cache."""
    key = rows, pages, device
    table = _row_tables.recall(key)
    if table is None:
        first = torch.tensor(rows, dtype=torch.int32, device="cpu")[:, None] * pages
        table = (first + torch.arange(pages, dtype=torch.int32, device="cpu")).to(device)
        _row_tables.put(key, table)
    return table


KERNEL = Kernel(forward, reads_pages=True)
