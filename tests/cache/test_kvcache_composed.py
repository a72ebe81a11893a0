"""Calls that the cache kernel cannot serve: the same answer, with the reason logged and counted."""

from __future__ import annotations

import logging

import pytest
import torch

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu import fallback, flash_attn_with_kvcache, reporting
from flash_attn_npu._core.ground.memory import forget_all
from flash_attn_npu.errors import UnsupportedError
from tests.helpers.cache_calls import CacheProblem, bits, check, place

INFER, FUSION, BLOCKWISE = "npu_fused_infer_attention_score", "npu_fusion_attention", "blockwise"
NEW = {"seqlen_q": 2, "seqlen_new": 2}
LENGTHS = (9, 12)
CAUSAL = {"causal": True, "return_softmax_lse": True}
# description, the kernel that serves it after all, and the reason
PASSED_OVER = {
    "softcap": (
        CacheProblem(LENGTHS, 16, **NEW, options=CAUSAL | {"softcap": 5.0}),
        BLOCKWISE,
        "softcap",
    ),
    "alibi": (CacheProblem(LENGTHS, 16, **NEW, alibi="head", options=CAUSAL), FUSION, "bias"),
    "float32": (
        CacheProblem(LENGTHS, 16, **NEW, dtype=torch.float32, options=CAUSAL),
        FUSION,
        "float16 and bfloat16",
    ),
    "headdim": (
        CacheProblem(LENGTHS, 16, 2, **NEW, headdim=80, options=CAUSAL),
        FUSION,
        "multiple of 128",
    ),
    "odd-pages": (CacheProblem(LENGTHS, 5, 3, **NEW, options=CAUSAL), FUSION, "multiple of 16"),
    "large-pages": (CacheProblem(LENGTHS, 528, 1, **NEW, options=CAUSAL), FUSION, "up to 512"),
    "odd-rows": (
        CacheProblem(LENGTHS, 20, **NEW, rows=(1, 0), options=CAUSAL),
        FUSION,
        "multiple of 16",
    ),
    "strided": (
        CacheProblem(LENGTHS, 16, **NEW, layout="interleaved", options=CAUSAL),
        FUSION,
        "contiguous",
    ),
    "leftpad": (
        CacheProblem(LENGTHS, 16, **NEW, leftpad=(2, 0), options=CAUSAL),
        FUSION,
        "first position",
    ),
}
COMPOSED = {name: row for name, row in PASSED_OVER.items() if row[1] == BLOCKWISE}
GATHERED = {name: row for name, row in PASSED_OVER.items() if row[1] == FUSION}


@pytest.fixture(autouse=True)
def nothing_said_yet() -> None:
    forget_all()


@pytest.mark.parametrize(
    ("problem", "kernel", "reason"), PASSED_OVER.values(), ids=PASSED_OVER.keys()
)
def test_the_reason_is_counted_and_said_once(npu, caplog, problem, kernel, reason):
    with (
        caplog.at_level(logging.INFO, logger="flash_attn_npu"),
        reporting() as region,
        virtual_ascend.record() as seen,
    ):
        check(problem, npu)
        check(problem, npu)
    # ALiBi is an argument of the second operator only
    operator = FUSION if problem.alibi == "none" else f"{FUSION}_v2"
    launched = [one.name for one in seen.launches if "attention" in one.name]
    assert launched == ([operator] * 2 if kernel == FUSION else [])
    (tally,) = region.tallies
    assert (tally.function, tally.kernel, tally.calls) == ("flash_attn_with_kvcache", kernel, 2)
    assert tally.reasons[0].startswith(f"{INFER}: ")
    assert reason in tally.reasons[0]
    (said,) = caplog.records
    assert (said.name, said.levelno) == ("flash_attn_npu", logging.WARNING)
    assert reason in said.getMessage()


@pytest.mark.parametrize(("problem", "kernel", "reason"), COMPOSED.values(), ids=COMPOSED.keys())
def test_error_refuses_what_is_composed_before_it_writes(npu, problem, kernel, reason):
    placed, buffers = place(problem, problem.arguments(), npu)
    before = [bits(buffer) for buffer in buffers]
    with (
        virtual_ascend.record() as seen,
        reporting() as region,
        fallback("error"),
        pytest.raises(UnsupportedError, match=f"flash_attn_with_kvcache: .*{reason}"),
    ):
        flash_attn_with_kvcache(**placed)
    assert not seen.launches
    assert not region.tallies
    assert all(torch.equal(bits(x), y) for x, y in zip(buffers, before, strict=True))


@pytest.mark.parametrize(("problem", "kernel", "reason"), GATHERED.values(), ids=GATHERED.keys())
def test_error_lets_gathered_keys_pass(npu, problem, kernel, reason):
    with fallback("error"):
        check(problem, npu)


def test_error_refuses_off_an_npu():
    problem = CacheProblem(LENGTHS, 16, **NEW, options=CAUSAL)
    placed, buffers = place(problem, problem.arguments(), torch.device("cpu"))
    before = [bits(buffer) for buffer in buffers]
    with fallback("error"), pytest.raises(UnsupportedError, match="Ascend NPUs only"):
        flash_attn_with_kvcache(**placed)
    assert all(torch.equal(bits(x), y) for x, y in zip(buffers, before, strict=True))


def test_a_call_without_keys_is_never_refused(device):
    problem = CacheProblem((0, 0), 16, seqlen_q=2, options=CAUSAL)
    with fallback("error"):
        check(problem, device)


@pytest.mark.parametrize(
    "problem",
    [
        CacheProblem((20, 20), 32, 1, leftpad=(0, 3)),
        CacheProblem((20, 20), 32, 1, leftpad=(3, 0)),
        CacheProblem((40, 40), 32, 2, shared=True),
        CacheProblem((32, 7), 32, 1),
        CacheProblem((64, 64), 32, 2, shared=True, options={"causal": True}, seqlen_q=3),
    ],
    ids=["leftpad of the later", "leftpad of the first", "shared", "full", "shared and full"],
)
def test_a_sequence_that_is_not_the_first_has_its_own_keys(device, problem):
    check(problem, device)


def test_new_keys_of_which_the_first_lie_before_the_padding(device):
    """Positions 2 to 4 are new, and the sequence starts at 4: only the last key is anybody's."""
    k_cache, v_cache = (torch.full((1, 8, 1, 8), torch.nan).to(device) for _ in "kv")
    q, k, v = (torch.randn(1, 3, 1, 8).to(device) for _ in "qkv")
    leftpad = torch.tensor([4], dtype=torch.int32, device=device)
    out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=2, cache_leftpad=leftpad)
    assert torch.equal(k_cache[0, 4], k[0, 2])
    assert torch.equal(v_cache[0, 4], v[0, 2])
    assert torch.equal(out, v[:, 2:].expand_as(out))
    rest = [0, 1, 2, 3, 5, 6, 7]
    assert k_cache.cpu()[0, rest].isnan().all()
    assert v_cache.cpu()[0, rest].isnan().all()
