"""Caches that the inference kernel reads as rows, or in BSND: other headdims, any length, sinks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu import flash_attn_with_kvcache, reporting
from flash_attn_npu._core.attention import cache_operators
from flash_attn_npu._core.attention.decode import CacheCall
from tests.helpers import cache_reference
from tests.helpers.cache_calls import CacheProblem, assert_answer, only_launch, place

INFER = "npu_fused_infer_attention_score"
CAUSAL = {"causal": True, "return_softmax_lse": True}
STEP = CacheProblem((60, 17, 0), 77, seqlen_new=1, group=2, options=CAUSAL)
PAGED = CacheProblem((60, 130, 0), 128, 2, seqlen_new=1, group=2, options=CAUSAL)


@pytest.mark.parametrize("headdim", [40, 64, 80, 96, 128, 192, 256, 320, 512])
def test_one_query_over_a_row_of_any_length(npu: torch.device, headdim: int) -> None:
    launch = only_launch(replace(STEP, headdim=headdim, seed=headdim), npu)
    assert launch["input_layout"] == "BSND"
    assert launch["block_table"] is None
    assert list(launch["actual_seq_lengths_kv"]) == list(STEP.ends)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("headdim", [80, 256])
def test_several_queries(npu: torch.device, headdim: int, dtype: torch.dtype) -> None:
    """Also more queries than keys, which bottom-right alignment leaves without any."""
    problem = replace(STEP, seqlen_q=4, seqlen_new=2, headdim=headdim, dtype=dtype)
    launch = only_launch(problem, npu)
    assert (launch["sparse_mode"], launch["next_tokens"]) == (4, 0)
    problem = replace(problem, lengths=(60, 17, 2))
    assert only_launch(problem, npu)["sparse_mode"] == 3


@pytest.mark.parametrize("window", [(5, 0), (0, 0), (30, -1), (59, 0), (60, 0), (100, 3)], ids=str)
@pytest.mark.parametrize("problem", [STEP, PAGED], ids=["rows", "pages"])
def test_a_window_of_one_query(
    npu: torch.device, problem: CacheProblem, window: tuple[int, int]
) -> None:
    """The kernel ignores a window there, so a second row makes it heed it."""
    problem = replace(
        problem, headdim=96, options={"window_size": window, "return_softmax_lse": True}
    )
    launch = only_launch(problem, npu)
    longest = max(problem.ends)
    assert launch["query"].shape[1] == (2 if window[0] + 1 < longest else 1)


@pytest.mark.parametrize("seqlen_q", [1, 3])
@pytest.mark.parametrize("headdim", [96, 256])
def test_pages_of_other_headdims(npu: torch.device, headdim: int, seqlen_q: int) -> None:
    launch = only_launch(replace(PAGED, headdim=headdim, seqlen_q=seqlen_q), npu)
    assert launch["input_layout"] == "BSND"
    assert launch["block_size"] == 128


def test_rows_in_another_order_are_pages(npu: torch.device) -> None:
    problem = replace(STEP, seqlen_cache=80, rows=(3, 0, 1), headdim=96)
    assert only_launch(problem, npu)["block_table"] is not None


@pytest.mark.parametrize("headdim", [64, 96, 128, 256])
@pytest.mark.parametrize("paged", [False, True], ids=["rows", "pages"])
def test_a_decoding_step_copies_no_cache(npu: torch.device, headdim: int, paged: bool) -> None:
    """Bytes that a step allocates do not grow with the cache."""
    used = []
    for blocks in (2, 16):
        length = blocks * 128 - 1 if paged else blocks * 128 - 3
        problem = CacheProblem(
            (length - 1, 3), 128 if paged else length, blocks if paged else None,
            seqlen_new=1, headdim=headdim, options={"causal": True},
        )  # fmt: skip
        placed, _ = place(problem, problem.arguments(), npu)
        flash_attn_with_kvcache(**placed)
        with virtual_ascend.record() as seen:
            flash_attn_with_kvcache(**placed)
        used.append(seen.allocated_bytes)
        assert used[-1] < placed["k_cache"].nbytes / 4
    assert used[1] < used[0] + 4096


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize(
    "problem",
    [
        replace(STEP, headdim=96),
        replace(PAGED, headdim=64),
        replace(PAGED, headdim=128, seqlen_q=3),
    ],
    ids=["rows", "packed", "several queries"],
)
def test_a_sink_over_a_cache(device: torch.device, problem: CacheProblem, with_lse: bool) -> None:
    problem = replace(problem, options={"causal": True, "return_softmax_lse": with_lse})
    arguments = problem.arguments()
    sink = torch.linspace(-2.0, 3.0, problem.nheads_k * problem.group)
    expected = cache_reference.solve(**arguments, sink=sink)
    placed, _ = place(problem, arguments, device)
    with reporting() as report:
        out, lse = cache_operators.attend(CacheCall(**placed, sink=sink.to(device)))
    assert_answer(out, expected)
    if with_lse:
        assert isinstance(lse, Tensor)
        assert_answer((out, lse), expected)
    without = cache_reference.solve(**arguments)
    assert (without.out - expected.out).abs().max() > 0.05
    if device.type == "npu":
        assert [(one.kernel, one.reasons) for one in report.tallies] == [(INFER, ())]
