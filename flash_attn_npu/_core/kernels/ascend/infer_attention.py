"""Ascend's fused inference kernel, `torch_npu.npu_fused_infer_attention_score`, over a cache.

Contract: torch_npu's operator documentation. Keys are read where they lie: the pages of a cache, or
the rows of an unpaged one. Forward only.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...ground.memory import Memo
from ...problems.attention import Problem
from ...problems.cache import Cache
from ...problems.results import Forward, Inputs
from ..kernel import Kernel
from ..sinks import counting, take_share
from .fusion_attention import UNLIMITED, causal_mask

__all__ = ["KERNEL", "PACKED_HEADDIMS", "finished", "forward", "over_pages", "packs_queries"]
__all__ += ["page_table", "rows_for"]

PACKED_HEADDIMS = (64, 128)
"""What every CANN takes for packed queries. Newer ones take more; from when is not documented."""

_row_tables: Memo[tuple[tuple[int, ...], int, torch.device], Tensor] = Memo(
    "page tables of unpaged caches", 16, nbytes=1 << 24
)


def packs_queries(problem: Problem) -> bool:
    """Whether the queries go packed (TND); else as (batch, seqlen_q, nheads, headdim) (BSND).

    Packed queries may have any lengths and a window for a single one, and want pages and a headdim
    that every CANN takes; BSND takes the other headdims, and a cache without pages as it lies.
    """
    assert problem.pages is not None
    return problem.headdim in PACKED_HEADDIMS and problem.pages.size is not None


def rows_for(problem: Problem) -> int:
    """The rows of each sequence in BSND: a window is ignored for a single one, so it gets two."""
    rows = problem.max_seqlen_q
    return 2 if rows == 1 and problem.windowed and _binds(problem) else rows


def forward(problem: Problem, inputs: Inputs) -> Forward:
    """Attention over the keys of `inputs.cache`; rows of no sequence give 0 and +inf."""
    serve = _packed if packs_queries(problem) else _dense
    out, lse = serve(problem, inputs, inputs.q[: problem.total_q])
    if problem.sink:
        assert inputs.sink is not None
        take_share(out, lse, inputs.sink)
        lse = counting(lse, inputs.sink) if problem.uses_lse else lse
    return finished(problem, out, lse)


def finished(problem: Problem, out: Tensor, lse: Tensor) -> Forward:
    """The answer, from those of the rows that belong to sequences."""
    if problem.tail_q:
        out = pad(out, (0, 0, 0, 0, 0, problem.tail_q))
        lse = pad(lse, (0, problem.tail_q), value=math.inf) if problem.uses_lse else lse
    rng_state, empty = torch.zeros(2, dtype=torch.int64, device="cpu"), out.new_empty(0)
    return Forward(out, lse if problem.uses_lse else empty, empty, rng_state)


def _packed(problem: Problem, inputs: Inputs, q: Tensor) -> tuple[Tensor, Tensor]:
    """(out, softmax_lse (nheads, total_q)) of packed queries over pages."""
    assert problem.lengths_q is not None
    shared = {
        "input_layout": "TND",
        "actual_seq_lengths": problem.lengths_q.ends,
        **_sparsity(problem),
        **_pages(problem, inputs),
    }
    out, lse = _launch(problem, inputs, q.contiguous(), shared)
    if _with_lse(problem):
        lse = lse.squeeze(-1).t()
    return out, lse.contiguous() if problem.uses_lse else lse


def _dense(problem: Problem, inputs: Inputs, q: Tensor) -> tuple[Tensor, Tensor]:
    """The same of queries of one length, over pages or over the rows of the cache."""
    assert problem.pages is not None
    asked, rows = problem.max_seqlen_q, rows_for(problem)
    q = q.reshape(problem.batch, asked, problem.nheads, problem.headdim)
    if rows > asked:
        q = q.expand(-1, rows, -1, -1)
    shared: dict[str, Any] = {"input_layout": "BSND"}
    if rows > 1:
        shared |= _sparsity(problem)
    if not problem.pages.in_order:
        shared |= _pages(problem, inputs)
    out, lse = _launch(problem, inputs, q.contiguous(), shared)
    out = out[:, rows - asked :].contiguous().view(-1, problem.nheads, problem.headdim)
    if _with_lse(problem):
        lse = lse[:, :, rows - asked :, 0].transpose(0, 1).reshape(problem.nheads, -1)
    # of one query for each sequence that was a view
    return out, lse.contiguous() if problem.uses_lse else lse


def _launch(
    problem: Problem, inputs: Inputs, q: Tensor, shared: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    import torch_npu

    cache = inputs.cache
    assert cache is not None
    if "block_table" in shared:
        k, v = _in_pages(problem, cache, shared["block_size"])
    else:
        k, v = cache.k[: problem.batch], cache.v[: problem.batch]
    out, lse = torch_npu.npu_fused_infer_attention_score(
        q,
        k,
        v,
        actual_seq_lengths_kv=[span.end for span in inputs.spans],
        num_heads=problem.nheads,
        # with pages the host divides by it, and its default is 0
        num_key_value_heads=problem.nheads_k,
        scale=problem.softmax_scale,
        softmax_lse_flag=_with_lse(problem),
        **shared,
    )
    return out, lse


def over_pages(problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """k, v, and what both versions of the operator are told alike of packed queries over pages."""
    assert inputs.cache is not None
    found = _pages(problem, inputs)
    k, v = _in_pages(problem, inputs.cache, found["block_size"])
    heads = {"num_key_value_heads": problem.nheads_k}
    return k, v, {"input_layout": "TND", **heads, **_sparsity(problem), **found}


def _in_pages(problem: Problem, cache: Cache, size: int) -> tuple[Tensor, Tensor]:
    # a cache (num_blocks, page, nheads_k, headdim) is one of (num_blocks, page, H) seen so
    shape = (-1, size, problem.nheads_k * problem.headdim)
    return cache.k.view(shape), cache.v.view(shape)


def _with_lse(problem: Problem) -> bool:
    return problem.uses_lse or problem.sink


def _binds(problem: Problem) -> bool:
    """Whether the window hides a key from the last query of some sequence."""
    return problem.left is not None and any(k > problem.left + 1 for _, k in problem.sequences)


def _pages(problem: Problem, inputs: Inputs) -> dict[str, Any]:
    assert problem.pages is not None
    assert problem.pages.size is not None
    assert inputs.cache is not None
    size = problem.pages.size
    return {"block_table": page_table(inputs.cache, size), "block_size": size}


def _sparsity(problem: Problem) -> dict[str, Any]:
    """Always a mode that takes the compressed mask.

    Mode 3 aligns packed queries to the top left where there are more of them than keys, and without
    a mask some CANN versions return averages, so a band as wide as need be serves those cases.
    """
    mask = {"atten_mask": causal_mask(problem.device)}
    if problem.causal and all(q <= k for q, k in problem.sequences):
        return {"sparse_mode": 3, **mask}
    return {
        "sparse_mode": 4,
        "pre_tokens": UNLIMITED if problem.left is None else problem.left,
        "next_tokens": UNLIMITED if problem.right is None else problem.right,
        **mask,
    }


def page_table(cache: Cache, size: int) -> Tensor:
    """The pages of each sequence, int32 on the device; rows of an unpaged cache are cut into them.

    Args:
        size: positions of a page.
    """
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
