"""Packed sequences on a CPU: what none needs for itself is done for several, in little memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_attn_npu import flash_attn_varlen_func
from flash_attn_npu._core.kernels.host import attention, chunks
from flash_attn_npu._core.problems.attention import Problem as Described
from flash_attn_npu._core.problems.results import Inputs
from tests.helpers import reference
from tests.helpers.crossings import Crossings
from tests.helpers.old_torch import GROUP
from tests.helpers.peak_bytes import PeakBytes
from tests.helpers.property_harness import EFFORTS
from tests.helpers.strategies import Problem
from tests.helpers.tile_cases import Case, assert_case

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Runs of equally long sequences; most problems are causal squares, or not masked at all."""
    causal = draw(st.booleans())
    length = st.integers(0, 20)
    pair = length.map(lambda n: (n, n)) if causal else st.tuples(length, length)
    runs = draw(st.lists(st.tuples(pair, st.integers(1, 3)), min_size=1, max_size=5))
    problem = Problem(
        tuple(pair for pair, count in runs for _ in range(count)),
        nheads_k=draw(st.integers(1, 2)),
        group=draw(st.sampled_from((1, GROUP))),
        headdim=draw(st.sampled_from((8, 24))),
        dtype=draw(st.sampled_from((FP32, BF16, FP16))),
        causal=causal,
        softmax_scale=draw(st.sampled_from((None, 0.3))),
        tail_q=draw(st.integers(0, 2)),
        tail_k=draw(st.integers(0, 2)),
        layouts=draw(st.tuples(*[st.sampled_from(("contiguous", "sliced", "transposed"))] * 3)),
        seed=draw(st.integers(0, 99)),
    )
    return Case(problem, sink=draw(st.booleans()), loud=draw(st.sampled_from((1.0, 4.0, -4.0))))


@pytest.mark.parametrize("effort", EFFORTS)
def test_any_sequences_in_any_chunks(effort):
    @settings(max_examples=60 * effort)
    @given(case=cases(), numbers=st.sampled_from((640, 3000, 1 << 18)))
    def run(case: Case, numbers: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chunks, "TOGETHER_BYTES", 4 * numbers)
            assert_case(case, CPU)

    run()


def described(
    lengths: list[int], monkeypatch: pytest.MonkeyPatch, heads: int = 2, **options: Any
) -> tuple[Described, Inputs]:
    """A bfloat16 problem as the kernel is given it, and its tensors."""
    cu = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    q, k, v = torch.randn(3, cu[-1], heads, 64).to(BF16)
    asked: list[Described] = []
    with monkeypatch.context() as patch:
        original = attention.chunks

        def noted(problem: Described) -> Any:
            asked.append(problem)
            return original(problem)

        patch.setattr(attention, "chunks", noted)
        flash_attn_varlen_func(q, k, v, cu, cu, max(lengths), max(lengths), **options)
    return asked[0], Inputs(q, k, v)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_a_sequence_more_is_a_launch_and_two_copies(causal, monkeypatch):
    """Beside it nothing crosses the dispatcher for a sequence: not the views, not the inputs."""
    counts = []
    for lengths in (range(20, 30), range(20, 40)):
        problem, inputs = described(list(lengths), monkeypatch, causal=causal)
        with Crossings() as seen:
            attention.forward(problem, inputs)
        counts.append(seen.counts)
    more = counts[1] - counts[0]
    assert sum(more.values()) == 3 * 10, more
    assert more["aten::copy_"] == 2 * 10


@pytest.mark.parametrize("lengths", [[32] * 64, [512] * 4, [400, 500] * 2], ids=str)
def test_copies_of_few_sequences_are_held_at_once(lengths, monkeypatch):
    """In one block of memory, however many chunks there are."""
    problem, inputs = described(lengths, monkeypatch, heads=8)
    with PeakBytes() as peak, Crossings() as seen:
        answer = attention.forward(problem, inputs)
    found = answer.out.nbytes + answer.softmax_lse.nbytes
    # q, k, v and what the kernel answers
    assert peak.peak <= found + 4.2 * chunks.TOGETHER_BYTES
    assert seen.counts["aten::empty.memory_format"] <= 4
    assert len(chunks.chunks(problem) or ()) >= 4


def test_short_ones_apart_are_still_computed_together(monkeypatch):
    problem, _ = described([3, 5] * 8, monkeypatch)
    assert chunks.chunks(problem) is None
    problem, _ = described([3, 5] * 3, monkeypatch)
    (runs,) = chunks.chunks(problem) or ((),)
    assert [run.sequences for run in runs] == [1] * 6


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_what_is_no_number_stays_in_its_sequence(causal, dtype):
    """And behind what is hidden: a NaN that a query sees is its answer, and no other one's."""
    cu, rows = [0, 17, 40, 60], torch.arange(60)
    q, k, v = torch.randn(3, 60, 2, 16).to(dtype)
    k[30, 0], v[40:, 1] = NAN, INF
    out, lse, _ = flash_attn_varlen_func(
        q, k, v, cu, cu, 23, 23, causal=causal, return_attn_probs=True
    )
    seen = (rows >= (30 if causal else 17)) & (rows < 40)
    assert torch.equal(out[:, 0].isnan().all(-1), seen)
    assert torch.equal(lse[0].isnan(), seen)
    assert torch.equal(~out[:, 1].isfinite().any(-1), rows >= 40)
    assert out[~seen, 0].isfinite().all()
    assert lse[1].isfinite().all()


def test_rows_without_a_score_are_told_in_their_sequence():
    cu = [0, 20, 37, 60]
    q, k, v = torch.ones(60, 1, 8), torch.randn(60, 1, 8), torch.randn(60, 1, 8)
    k[20:37] = -INF
    out, lse, _ = flash_attn_varlen_func(q, k, v, cu, cu, 23, 23, return_attn_probs=True)
    assert (lse[:, 20:37] == INF).all()
    assert not out[20:37].any()
    for first, last in ((0, 20), (37, 60)):
        exact = reference.attention(*(x[first:last] for x in (q, k, v)))
        torch.testing.assert_close(out[first:last].double(), exact.out)
        reference.assert_lse_close(lse[:, first:last], exact.softmax_lse)
