"""Whatever the call over a cache: the answer is the reference's, and so is the cache afterwards."""

from __future__ import annotations

import pytest
import torch

from flash_attn_npu import flash_attn_with_kvcache
from tests.helpers.cache_calls import CacheProblem, check
from tests.helpers.cache_strategies import cache_problems
from tests.helpers.property_harness import for_all

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
MOVING = {"causal": True, "return_softmax_lse": True}
STILL = {"return_softmax_lse": True}

# what random draws reach too rarely, or must not stop reaching
EXAMPLES = {
    "one-step-of-decoding": CacheProblem(
        (15, 0, 31), 16, 2, seqlen_new=1, group=4, headdim=128, rotary_dim=128, options=MOVING
    ),
    "a-cache-that-is-full-after-the-call": CacheProblem(
        (13, 13), 16, seqlen_q=3, seqlen_new=3, given="int", options=MOVING
    ),
    "nothing-cached-yet": CacheProblem((0, 0), 16, seqlen_q=2, seqlen_new=2, options=MOVING),
    "nothing-at-all": CacheProblem((0, 0), 16, seqlen_q=2, options=STILL),
    "no-new-keys-given-as-empty": CacheProblem((3, 9), 16, seqlen_new=0, options=MOVING),
    "the-whole-cache": CacheProblem((48, 48), 48, seqlen_q=2, given="none", options=MOVING),
    "all-pages": CacheProblem((48, 48), 16, 3, seqlen_q=2, given="none", options=STILL),
    "more-queries-than-keys": CacheProblem((2, 4, 0), 16, seqlen_q=5, options=MOVING),
    "one-page-more-for-the-new-keys": CacheProblem(
        (15, 16, 14), 16, 2, seqlen_q=3, seqlen_new=3, dtype=BF16, options=MOVING
    ),
    "more-queries-than-new-keys": CacheProblem(
        (7, 20), 32, seqlen_q=4, seqlen_new=1, rotary_dim=32, options=MOVING
    ),
    "fewer-queries-than-new-keys": CacheProblem(
        (7, 20), 32, seqlen_q=1, seqlen_new=3, rotary_dim=64, options=MOVING
    ),
    "queries-all-at-one-position": CacheProblem(
        (7, 20), 32, seqlen_q=3, seqlen_new=3, rotary_dim=64, dtype=FP32, options=STILL
    ),
    "a-window-moves-the-queries": CacheProblem(
        (7, 20), 32, seqlen_q=3, seqlen_new=3, rotary_dim=64,
        options=STILL | {"window_size": (4, 2)},
    ),
    "a-window-as-long-as-the-cache-does-not": CacheProblem(
        (7, 20), 32, seqlen_q=3, seqlen_new=3, rotary_dim=64,
        options=STILL | {"window_size": (32, 32)},
    ),
    "a-window-between-the-keys-and-the-cache": CacheProblem(
        (2, 4), 16, 2, seqlen_q=5, options=STILL | {"window_size": (20, -1)}
    ),
    "tables-no-longer-than-the-cache": CacheProblem(
        (31, 3), 32, seqlen_q=4, seqlen_new=1, rotary_dim=64, options=STILL
    ),
    "left-padding": CacheProblem(
        (9, 12), 16, seqlen_q=2, seqlen_new=2, leftpad=(3, 12), rotary_dim=64, options=MOVING
    ),
    "left-padding-into-the-new-keys": CacheProblem(
        (2, 5), 16, seqlen_q=2, seqlen_new=3, leftpad=(4, 8), layout="sliced", options=MOVING
    ),
    "half-of-one-buffer": CacheProblem(
        (9, 12), 16, seqlen_q=2, seqlen_new=2, layout="interleaved", rows=(2, 0), options=MOVING
    ),
    "rows-of-the-cache": CacheProblem((9, 12), 48, rows=(3, 1), seqlen_new=1, options=MOVING),
    "one-row-for-all": CacheProblem((48, 47, 48), 48, rows=(1, 1, 1), options=MOVING),
    "one-row-of-a-small-cache-for-all": CacheProblem((16,) * 6, 16, rows=(0,) * 6, options=STILL),
    "one-prefix-for-all": CacheProblem((48, 47, 48), 16, 3, shared=True, options=MOVING),
    "one-page-for-all": CacheProblem((16,) * 3, 16, 1, shared=True, given="int", options=STILL),
    "float64": CacheProblem((9, 12), 16, seqlen_new=1, dtype=torch.float64),
}  # fmt: skip


@for_all(150, problem=cache_problems())
def test_kvcache(device, problem):
    check(problem, device)


@pytest.mark.parametrize("problem", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_kvcache_by_example(device, problem):
    check(problem, device)


@pytest.mark.parametrize("paged", [True, False])
def test_no_sequences(device, paged):
    """An empty batch is answered, and leaves the cache alone."""
    cache = torch.zeros(3, 16, 2, 64).to(device)
    q = torch.zeros(0, 1, 2, 64).to(device)
    new = torch.zeros(0, 1, 2, 64).to(device)
    lengths = torch.zeros(0, dtype=torch.int32).to(device)
    table = torch.zeros(0, 2, dtype=torch.int32).to(device) if paged else None
    out, lse = flash_attn_with_kvcache(
        *(q, cache, cache.clone(), new, new),
        cache_seqlens=lengths,
        block_table=table,
        return_softmax_lse=True,
    )
    assert out.shape == q.shape
    assert lse.shape == (0, 2, 1)
    assert not cache.cpu().any()
