"""On a CPU: keys of a cache are read where they lie, and one query of many keys is right."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_npu import flash_attn_with_kvcache
from flash_attn_npu._core.kernels.host import attention, decoding
from flash_attn_npu._core.kernels.host.decoding import one_query
from flash_attn_npu._core.problems.cache import Cache
from tests.helpers import reference
from tests.helpers.crossings import Crossings
from tests.helpers.frames import frames
from tests.helpers.old_torch import NEEDS_SHARED_HEADS
from tests.helpers.peak_bytes import PeakBytes

NAN, INF = float("nan"), float("inf")
USED, CAPACITY, HEADDIM = 700, 1024, 64


def expected(
    q: Tensor, k: Tensor, v: Tensor, used: list[int], rows: list[int], **options
) -> Tensor:
    """Sequence by sequence, exact or in the precision of the tensors."""
    attend = options.pop("attend", reference.attention)
    found = [
        attend(q[i], k[row, :length], v[row, :length], causal=True, **options).out
        for i, (row, length) in enumerate(zip(rows, used, strict=True))
    ]
    return torch.stack(found)


@pytest.mark.parametrize("seqlen_q", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("used", "rows"),
    [([USED] * 3, [0, 1, 2]), ([USED, 3, 0], [2, 0, 1]), ([USED, 5, 5], [1, 2, 3])],
    ids=["alike", "scattered", "run"],
)
def test_keys_in_rows_of_a_cache(used, rows, dtype, seqlen_q):
    q = torch.randn(3, seqlen_q, 8, HEADDIM).to(dtype)
    k, v = torch.full((2, 4, CAPACITY, 2, HEADDIM), NAN)
    for row, length in zip(rows, used, strict=True):
        k[row, :length], v[row, :length] = torch.randn(2, length, 2, HEADDIM)
    k, v = k.to(dtype), v.to(dtype)
    index = None if rows == [0, 1, 2] else torch.tensor(rows, dtype=torch.int32)
    lengths = torch.tensor(used, dtype=torch.int32)
    out = flash_attn_with_kvcache(
        q, k, v, cache_seqlens=lengths, cache_batch_idx=index, causal=True
    )
    exact = expected(q, k, v, used, rows)
    plain = expected(q, k, v, used, rows, attend=reference.same_precision)
    reference.assert_close_to_reference(out, exact, plain, "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_decode_step_copies_no_keys(dtype):
    q = torch.randn(2, 1, 8, HEADDIM).to(dtype)
    k, v = torch.randn(2, 4, CAPACITY, 2, HEADDIM).to(dtype)
    index = torch.tensor([3, 1], dtype=torch.int32)
    with PeakBytes() as peak:
        flash_attn_with_kvcache(
            q, k, v, cache_seqlens=[USED, 900], cache_batch_idx=index, causal=True
        )
    # scores of 8 heads, and some outputs
    assert peak.peak < k.nbytes // 8


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_query_of_many_keys(group, dtype):
    q, k, v = torch.randn(2, 2 * group, 1, HEADDIM), *torch.randn(2, 2, 2, USED, HEADDIM)
    q, k, v = q.to(dtype), k.to(dtype) * 20, v.to(dtype)
    out, lse = one_query(q, k, v, 0.2)
    for i in range(2):
        laid = [x[i].transpose(0, 1) for x in (q, k, v)]
        exact = reference.attention(*laid, softmax_scale=0.2)
        plain = reference.same_precision(*laid, softmax_scale=0.2)
        found = out[i].transpose(0, 1)
        reference.assert_close_to_reference(found, exact.out, plain.out, "out")
        reference.assert_lse_close(lse[i].float(), exact.softmax_lse)


def test_a_sequence_more_is_two_products_and_one_softmax():
    """What is left of it, the sum and the logarithm, is done for all at once."""
    counts = []
    for batch in (2, 4):
        q, k = torch.randn(batch, 8, 1, HEADDIM), torch.randn(batch, 2, USED, HEADDIM)
        with Crossings() as seen:
            one_query(q, k, k, 0.2)
        counts.append(seen.counts)
    more = counts[1] - counts[0]
    assert more["aten::bmm.out"] == 2 * 2
    assert sum(more.values()) == 2 * 8, more


@NEEDS_SHARED_HEADS
def test_a_decode_step_is_looked_through_for_nothing(monkeypatch):
    """No bias, no copy: neither is NaN looked for, nor what the biased launches need made."""
    counts = crossings_of("_at_once", monkeypatch)
    q, k = torch.randn(1, 1, 8, HEADDIM), torch.randn(1, 2 * CAPACITY, 2, HEADDIM)
    flash_attn_with_kvcache(q, k, k, cache_seqlens=2 * CAPACITY, causal=True)
    (seen,) = counts
    assert seen["aten::bmm.out"] == 2
    assert not seen["aten::isnan"]
    assert not seen["aten::copy_"]
    assert sum(seen.values()) <= 42, seen


def crossings_of(name: str, monkeypatch, owner: Any = attention) -> list[Counter[str]]:
    """What each call of a function of the host's attention crosses the dispatcher for."""
    original, counts = getattr(owner, name), []

    def counted(*args):
        with Crossings() as seen:
            answer = original(*args)
        counts.append(seen.counts)
        return answer

    monkeypatch.setattr(owner, name, counted)
    return counts


@NEEDS_SHARED_HEADS
@pytest.mark.parametrize("rows", [1, 3])
def test_rows_side_by_side_are_one_launch_whose_answer_is_not_copied(rows, monkeypatch):
    counts = crossings_of("_at_once", monkeypatch)
    q, k = torch.randn(rows, 1, 8, HEADDIM), torch.randn(rows, 64, 2, HEADDIM)
    flash_attn_with_kvcache(q, k, k, cache_seqlens=40, causal=True)
    (seen,) = counts
    assert seen["aten::_scaled_dot_product_flash_attention_for_cpu"] == 1
    # that of the answer, whose heads lie apart
    assert (seen["aten::copy_"], seen["aten::clone"]) == (0, 1)
    assert sum(seen.values()) <= 16, seen


@pytest.mark.parametrize("seqlen_q", [1, 3])
@pytest.mark.parametrize("rows", [1, 2])
def test_the_answer_may_be_written_where_gradients_are_kept(rows, seqlen_q):
    q, k = torch.randn(rows, seqlen_q, 8, HEADDIM), torch.randn(rows, 64, 2, HEADDIM)
    weight = torch.ones(1, requires_grad=True)
    for answer in flash_attn_with_kvcache(q, k, k, cache_seqlens=40, return_softmax_lse=True):
        assert answer.mul_(weight).requires_grad


@pytest.mark.parametrize(("rows", "block"), [([1, 2], True), ([2, 1], False)])
def test_new_keys_of_rows_side_by_side_are_copied_as_a_block(rows, block, monkeypatch):
    counts = crossings_of("write", monkeypatch, Cache)
    k, v = torch.zeros(2, 4, 64, 2, HEADDIM)
    q, *new = torch.randn(3, 2, 3, 2, HEADDIM)
    index = torch.tensor(rows, dtype=torch.int32)
    flash_attn_with_kvcache(q, k, v, *new, cache_seqlens=5, cache_batch_idx=index)
    for cache, values in zip((k, v), new, strict=True):
        expected = torch.zeros_like(cache)
        for row, value in zip(rows, values, strict=True):
            expected[row, 5:8] = value
        assert torch.equal(cache, expected)
    (seen,) = counts
    assert (seen["aten::copy_"], seen["aten::index_put_"]) == ((2, 0) if block else (0, 2))


@NEEDS_SHARED_HEADS
@pytest.mark.parametrize(("appends", "most"), [(False, 90), (True, 146)])
def test_little_stands_around_the_launches_of_a_decode_step(appends, most):
    q, cache = torch.randn(1, 1, 8, HEADDIM), torch.randn(2, 1, 64, 2, HEADDIM).unbind()
    new = torch.randn(2, 1, 1, 2, HEADDIM).unbind() if appends else ()
    lengths = torch.tensor([40], dtype=torch.int32)

    def step() -> Tensor:
        return flash_attn_with_kvcache(q, *cache, *new, cache_seqlens=lengths, causal=True)

    step()
    seen = frames(step)
    assert len(seen) <= most, Counter(seen)


def test_numbers_that_are_none_in_one_query():
    """As the kernel: NaN where a score is, and nothing where all scores are -inf."""
    q, k, v = torch.ones(3, 2, 1, HEADDIM), *torch.randn(2, 3, 1, USED, HEADDIM)
    q[0, 1] = NAN
    k[1] = -INF
    k[2, 0, :-1] = -INF
    out, lse = one_query(q, k, v, 1.0)
    assert out[0, 0].isfinite().all()
    assert out[0, 1].isnan().all()
    assert lse[0].isnan().tolist() == [[False], [True]]
    assert not out[1].any()
    assert lse[1].tolist() == [[0.0], [0.0]]
    torch.testing.assert_close(out[2, 0, 0], v[2, 0, -1])


def test_softmax_lse_of_a_cache_without_a_score(monkeypatch):
    monkeypatch.setattr(decoding, "MANY_KEYS", 1)
    q, k = torch.ones(1, 1, 2, 8), torch.full((1, 20, 1, 8), -INF)
    out, lse = flash_attn_with_kvcache(
        q, k, torch.ones_like(k), cache_seqlens=20, return_softmax_lse=True
    )
    assert not out.any()
    assert (lse == math.inf).all()
