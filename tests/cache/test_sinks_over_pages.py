"""A sink over a cache in the same launch as the attention, and what is served otherwise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu import reporting
from flash_attn_npu._core.attention import cache_operators
from flash_attn_npu._core.attention.decode import CacheCall
from flash_attn_npu._core.ground.settings import verifying
from tests.helpers import cache_reference
from tests.helpers.cache_calls import CacheProblem, assert_answer, assert_buffers, place
from tests.helpers.old_torch import needs
from tests.helpers.wheel import pretended

FIRST, SECOND = "npu_fused_infer_attention_score", "npu_fused_infer_attention_score_v2"
HALF = torch.bfloat16
CAUSAL = {"causal": True}
ROWS = CacheProblem((60, 17, 0), 64, seqlen_new=1, group=2, dtype=HALF, options=CAUSAL)
PAGED = CacheProblem((60, 130, 0), 128, 2, seqlen_new=1, group=2, dtype=HALF, options=CAUSAL)


def sinks(problem: CacheProblem, dtype: torch.dtype = HALF) -> Tensor:
    """Of about the sizes that matter: GPT-OSS has some of them above every score."""
    return torch.linspace(-2.0, 5.0, problem.nheads_k * problem.group).to(dtype)


def launched(
    problem: CacheProblem, device: torch.device, sink: Tensor, **options: Any
) -> tuple[str, dict[str, Any]]:
    """The operator of the one launch of a call whose answer is right, and what it was given."""
    arguments = problem.arguments() | options
    expected = cache_reference.solve(**arguments, sink=sink.cpu())
    placed, buffers = place(problem, arguments, device)
    with virtual_ascend.record() as seen, reporting() as report:
        call = CacheCall(**placed, sink=sink.to(device))
        out, lse = cache_operators.attend(call)
    assert_answer(out if lse is None else (out, lse), expected)
    assert_buffers(problem, buffers, expected.k_cache, expected.v_cache)
    (launch,) = [one for one in seen.launches if "attention" in one.name]
    assert [(one.kernel, one.reasons) for one in report.tallies] == [(launch.name, ())]
    return launch.name, launch.arguments


@needs(SECOND)
@pytest.mark.parametrize("headdim", [64, 128])
@pytest.mark.parametrize(
    "problem",
    [
        ROWS,
        PAGED,
        # the cache as it is, and a sequence of no keys
        replace(PAGED, seqlen_new=None),
        replace(PAGED, group=1, nheads_k=3),
        replace(PAGED, group=8, nheads_k=2),
        replace(PAGED, lengths=(60, 130, 4), seqlen_q=3),
        replace(PAGED, lengths=(1, 250, 4), seqlen_q=2, seqlen_new=2, options={}),
        replace(PAGED, options={"causal": True, "softmax_scale": 0.5}),
    ],
    ids=["rows", "pages", "no new keys", "MHA", "GQA", "queries", "not causal", "scale"],
)
def test_one_launch(npu: torch.device, problem: CacheProblem, headdim: int) -> None:
    problem = replace(problem, headdim=headdim, seed=headdim)
    sink = sinks(problem)
    name, given = launched(problem, npu, sink)
    assert name == SECOND
    assert torch.equal(given["learnable_sink"].cpu(), sink)
    assert given["input_layout"] == "TND"
    assert not given["return_softmax_lse"]
    assert given["inner_precise"] == 0


@needs(SECOND)
@pytest.mark.parametrize("seqlen_q", [1, 3])
@pytest.mark.parametrize("window", [(5, 0), (0, 0), (127, 0), (20, 7)], ids=str)
def test_windows(npu: torch.device, window: tuple[int, int], seqlen_q: int) -> None:
    """Every other layer of GPT-OSS has one; packed queries keep it where there is one of them."""
    problem = replace(
        PAGED, lengths=(60, 130, 2), seqlen_q=seqlen_q, options={"window_size": window}
    )
    name, given = launched(problem, npu, sinks(problem))
    assert name == SECOND
    assert (given["sparse_mode"], given["pre_tokens"]) == (4, window[0])


@needs(SECOND)
@needs("npu_scatter_pa_kv_cache", "cache_mode")
def test_a_step_of_gpt_oss_is_two_launches(npu: torch.device) -> None:
    """One for the new keys and one for attention, of layers with a window and of those without."""
    problem = replace(
        PAGED, lengths=(1000, 37, 1200), max_blocks=10, nheads_k=8, group=8, options={}
    )
    used = []
    for window in ((-1, -1), (127, 0)):
        options = {"causal": True, "window_size": window}
        placed, _ = place(problem, problem.arguments(), npu)
        call = CacheCall(**placed, **options, sink=sinks(problem).to(npu))
        cache_operators.attend(call)
        with virtual_ascend.record() as seen:
            cache_operators.attend(call)
        assert [one.name for one in seen.launches] == ["npu_scatter_pa_kv_cache", SECOND]
        assert len(seen.operators) == 2
        used.append(seen.allocated_bytes)
    assert max(used) < placed["k_cache"].nbytes / 20


OTHERWISE: dict[str, tuple[CacheProblem, torch.dtype, dict[str, Any]]] = {
    "softmax_lse": (PAGED, HALF, {"return_softmax_lse": True}),
    "a sink that bfloat16 would round": (PAGED, torch.float32, {}),
    "float16": (replace(PAGED, dtype=torch.float16), torch.float16, {}),
    "another half precision": (replace(PAGED, dtype=torch.float16), HALF, {}),
    "another headdim": (replace(PAGED, headdim=96), HALF, {}),
    "rows that are no pages": (replace(ROWS, seqlen_cache=77), HALF, {}),
    "queries without keys": (replace(PAGED, lengths=(60, 130, 2), seqlen_q=5), HALF, {}),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_the_first_version_and_arithmetic(npu: torch.device, case: str) -> None:
    problem, dtype, options = OTHERWISE[case]
    sink = sinks(problem, dtype) + 0.001
    name, _ = launched(problem, npu, sink, **options)
    assert name == FIRST


@pytest.mark.parametrize(
    ("case", "launches"),
    [
        # attention, lse - sink, its sigmoid, out times that
        ("a sink that bfloat16 would round", 4),
        ("another half precision", 4),
        ("another headdim", 4),
        # softmax_lse by heads, with the sink, and as it is returned
        ("softmax_lse", 7),
    ],
)
def test_the_arithmetic_is_a_few_launches(npu: torch.device, case: str, launches: int) -> None:
    problem, dtype, options = OTHERWISE[case]
    problem = replace(problem, seqlen_new=None)
    placed, _ = place(problem, problem.arguments() | options, npu)
    call = CacheCall(**placed, sink=sinks(problem, dtype).to(npu))
    cache_operators.attend(call)
    with virtual_ascend.record() as seen:
        cache_operators.attend(call)
    assert len(seen.operators) == launches, seen.operators


def test_a_torch_npu_without_the_second_version(npu: torch.device) -> None:
    with pretended("2.6.0"):
        assert launched(PAGED, npu, sinks(PAGED))[0] == FIRST


@needs(SECOND)
def test_a_sink_as_a_parameter_and_strided(npu: torch.device) -> None:
    sink = torch.nn.Parameter(sinks(PAGED).to(npu))
    assert launched(PAGED, npu, sink)[0] == SECOND
    strided = sinks(PAGED).repeat_interleave(2).to(npu)[::2]
    name, given = launched(PAGED, npu, strided)
    assert name == SECOND
    assert given["learnable_sink"].is_contiguous()


@needs(SECOND)
def test_where_it_is_found_wrong_the_first_version_serves(npu: torch.device) -> None:
    with verifying("compose"), virtual_ascend.lying("sink ignored"):
        problem = replace(PAGED, headdim=64, seed=7)
        arguments = problem.arguments()
        expected = cache_reference.solve(**arguments, sink=sinks(problem))
        names = []
        for _ in range(2):
            placed, _ = place(problem, arguments, npu)
            with virtual_ascend.record() as seen:
                out, _ = cache_operators.attend(CacheCall(**placed, sink=sinks(problem).to(npu)))
            assert_answer(out, expected)
            names.append([one.name for one in seen.launches if "attention" in one.name])
    assert names[0][0] == SECOND
    assert names[1] == [FIRST]
