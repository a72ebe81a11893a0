"""On the simulated Ascend: one launch over the cache itself, few copies, no stale lengths."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu import flash_attn_with_kvcache, reporting
from tests.helpers import cache_reference
from tests.helpers.cache_calls import (
    CacheProblem,
    assert_answer,
    assert_buffers,
    only_launch,
    place,
)

INFER = "npu_fused_infer_attention_score"
UNLIMITED = 2147483647
CAUSAL = {"causal": True, "return_softmax_lse": True}
PAGED = CacheProblem((200, 17, 0), 128, 2, seqlen_new=1, group=4, headdim=128, options=CAUSAL)
ROWS = CacheProblem(
    (200, 17, 0), 240, seqlen_q=2, seqlen_new=2, nheads_k=2, rows=(3, 0, 1), options=CAUSAL
)


@pytest.mark.parametrize("headdim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("problem", [PAGED, ROWS], ids=["paged", "rows"])
def test_one_launch(npu, problem, dtype, headdim):
    problem = replace(problem, dtype=dtype, headdim=headdim, rotary_dim=headdim)
    launch = only_launch(problem, npu)
    assert launch["input_layout"] == "TND"
    assert launch["num_heads"] == problem.nheads_k * problem.group
    assert launch["num_key_value_heads"] == problem.nheads_k
    rows = [problem.seqlen_q] * problem.batch
    assert list(launch["actual_seq_lengths"]) == list(accumulate(rows))
    assert list(launch["actual_seq_lengths_kv"]) == list(problem.ends)
    assert launch["softmax_lse_flag"]
    assert launch["query"].shape == (sum(rows), problem.nheads_k * problem.group, headdim)
    assert launch["key"].shape[1:] == (launch["block_size"], problem.nheads_k * headdim)


@pytest.mark.parametrize("page", [16, 48, 128, 256, 512])
def test_pages_are_the_caches_own(npu, page):
    problem = CacheProblem((page, 3), page, 2, seqlen_new=1, options=CAUSAL)
    assert only_launch(problem, npu)["block_size"] == page


@pytest.mark.parametrize("seqlen_cache", [16, 48, 240, 1040, 2048])
def test_rows_are_seen_as_pages(npu, seqlen_cache):
    """Whole rows in legal pages, so that cache_batch_idx is a table of pages."""
    problem = CacheProblem((seqlen_cache - 1, 3), seqlen_cache, seqlen_new=1, rows=(2, 0))
    launch = only_launch(problem, npu)
    size = launch["block_size"]
    assert size % 16 == 0
    assert 0 < size <= 512
    assert seqlen_cache % size == 0
    pages = seqlen_cache // size
    expected = [[row * pages + page for page in range(pages)] for row in (2, 0)]
    assert launch["block_table"].cpu().tolist() == expected


@pytest.mark.parametrize(
    ("options", "band"),
    [
        ({"causal": True}, (3, UNLIMITED, UNLIMITED)),
        ({}, (4, UNLIMITED, UNLIMITED)),
        ({"window_size": (3, 1)}, (4, 3, 1)),
        ({"window_size": (3, 1), "causal": True}, (4, 3, 0)),
        ({"window_size": (-1, 1)}, (4, UNLIMITED, 1)),
        ({"window_size": (0, 0)}, (4, 0, 0)),
        ({"window_size": (1000, 1000), "causal": True}, (3, UNLIMITED, UNLIMITED)),
    ],
)
def test_mode_and_band(npu, options, band):
    problem = CacheProblem((40, 9), 48, seqlen_q=2, options=options)
    launch = only_launch(problem, npu)
    assert (launch["sparse_mode"], launch["pre_tokens"], launch["next_tokens"]) == band
    assert launch["atten_mask"].shape == (2048, 2048)
    assert not launch["softmax_lse_flag"]


def test_more_queries_than_keys(npu):
    """Mode 3 would count from the top left there."""
    problem = CacheProblem((2, 9, 0), 16, seqlen_q=5, options=CAUSAL)
    launch = only_launch(problem, npu)
    assert (launch["sparse_mode"], launch["next_tokens"]) == (4, 0)
    placed, _ = place(problem, problem.arguments(), npu)
    out, lse = flash_attn_with_kvcache(**placed)
    assert lse.cpu().isposinf().any(dim=1).tolist() == [
        [True, True, True, False, False],
        [False] * 5,
        [True] * 5,
    ]
    assert not out.cpu()[0, :3].any()
    assert not out.cpu()[2].any()


@pytest.mark.parametrize("paged", [True, False])
def test_the_cache_is_read_and_written_where_it_lies(npu, paged):
    problem = CacheProblem(
        (1500, 3, 900),
        128 if paged else 2048,
        16 if paged else None,
        seqlen_new=1,
        rows=None if paged else (3, 0, 2),
        rotary_dim=64,
        options=CAUSAL,
    )
    placed, _ = place(problem, problem.arguments(), npu)
    # the first two make what is kept: masks, and tables that have come before
    for _ in range(2):
        flash_attn_with_kvcache(**placed)
    with virtual_ascend.record() as seen:
        flash_attn_with_kvcache(**placed)
    (launch,) = [one for one in seen.launches if one.name == INFER]
    for name in ("key", "value"):
        cache = placed[f"{name[0]}_cache"]
        assert launch.arguments[name].data_ptr() == cache.data_ptr()
        assert launch.arguments[name].numel() == cache.numel()
    assert seen.allocated_bytes < cache.nbytes / 20


def copies(placed: dict[str, Any]) -> int:
    with virtual_ascend.record() as seen:
        flash_attn_with_kvcache(**placed)
    return len(seen.device_to_host)


@pytest.mark.parametrize("problem", [PAGED, ROWS], ids=["paged", "rows"])
def test_lengths_cost_at_most_one_copy(npu, problem):
    placed, _ = place(problem, problem.arguments(), npu)
    flash_attn_with_kvcache(**placed)
    assert copies(placed) == 0
    placed["cache_seqlens"] = placed["cache_seqlens"].clone()
    assert copies(placed) == 1
    for lengths in (17, placed["cache_seqlens"].cpu()):
        assert copies(placed | {"cache_seqlens": lengths}) == 0


@pytest.mark.parametrize("kind", ["cpu", "sliced", "transposed"])
def test_tables_as_clients_hold_them(npu, kind):
    """Pages of a bigger table, or a table on the host."""
    arguments = PAGED.arguments()
    expected = cache_reference.solve(**arguments)
    placed, _ = place(PAGED, arguments, npu)
    table = placed["block_table"]
    if kind == "cpu":
        placed["block_table"] = table.cpu()
    elif kind == "sliced":
        placed["block_table"] = torch.cat((table, table), 1)[:, : table.shape[1]]
    else:
        placed["block_table"] = table.t().contiguous().t()
    with virtual_ascend.record() as seen:
        answer = flash_attn_with_kvcache(**placed)
    assert [launch.name for launch in seen.launches if "attention" in launch.name] == [INFER]
    assert_answer(answer, expected)


def test_an_int_costs_no_copy_at_all(npu):
    problem = CacheProblem((9, 9), 16, seqlen_new=1, given="int", options=CAUSAL)
    placed, _ = place(problem, problem.arguments(), npu)
    with virtual_ascend.record() as seen:
        flash_attn_with_kvcache(**placed)
    assert not seen.device_to_host


LAYERS = 3


def decode(problem: CacheProblem, device: torch.device, steps: int) -> list[int]:
    """Decode with one tensor of lengths for all layers; copies to the host at each step.

    Every answer is held to the reference, and so is every cache after the last step.
    """
    layers = [replace(problem, seed=seed) for seed in range(LAYERS)]
    host = [layer.arguments() for layer in layers]
    placed = [place(layer, one, device) for layer, one in zip(layers, host, strict=True)]
    # views of one tensor that the client advances: a slice shares its version counter
    counter = torch.tensor((*problem.lengths, 0), dtype=torch.int32).to(device)
    lengths = counter[: problem.batch]
    # the tables too are one tensor for all layers
    shared = {"cache_seqlens": lengths}
    if "block_table" in host[0]:
        shared["block_table"] = placed[0][0]["block_table"]
    counted = []
    for step in range(steps):
        tokens = [replace(layer, seed=100 * step + layer.seed).arguments() for layer in layers]
        fresh = [{name: one[name] for name in ("q", "k", "v")} for one in tokens]
        on_device = [{name: x.to(device) for name, x in one.items()} for one in fresh]
        with virtual_ascend.record() as seen:
            answers = [
                flash_attn_with_kvcache(**one | new | shared)
                for (one, _), new in zip(placed, on_device, strict=True)
            ]
        counted.append(len(seen.device_to_host))
        for layer, new, answer in zip(host, fresh, answers, strict=True):
            _advance(layer, new, answer, [n + step for n in problem.lengths], host[0])
        counter += 1
    for layer, (_, buffers) in zip(host, placed, strict=True):
        assert_buffers(problem, buffers, layer["k_cache"], layer["v_cache"])
    return counted


def _advance(
    layer: dict[str, Any],
    new: dict[str, Tensor],
    answer: tuple[Tensor, Tensor],
    lengths: list[int],
    first: dict[str, Any],
) -> None:
    """The reference's step: judge the answer, and keep the caches that it leaves."""
    now = {"cache_seqlens": torch.tensor(lengths, dtype=torch.int32)}
    if "block_table" in first:
        now["block_table"] = first["block_table"]
    expected = cache_reference.solve(**layer | new | now)
    assert_answer(answer, expected)
    layer["k_cache"], layer["v_cache"] = expected.k_cache, expected.v_cache


# three spare positions on the last page of every sequence, so that the table stays as it is
LOOPS = {
    "paged": CacheProblem((28, 44, 0), 16, 4, seqlen_new=1, group=2, options=CAUSAL),
    "rows": CacheProblem((28, 41, 0), 48, seqlen_new=1, rotary_dim=64, options=CAUSAL),
}


@pytest.mark.parametrize("problem", LOOPS.values(), ids=LOOPS.keys())
def test_a_decode_loop_is_never_stale(npu, problem):
    """One copy a step however many layers, and one more for a table that is new."""
    counted = decode(problem, npu, steps=4)
    assert counted == [1 + (problem.max_blocks is not None), 1, 1, 1]


@pytest.mark.parametrize("problem", LOOPS.values(), ids=LOOPS.keys())
def test_a_decode_loop_without_version_counters(npu, problem):
    """Inference mode hides changes, so nothing may be remembered there."""
    with torch.inference_mode():
        counted = decode(problem, npu, steps=3)
    assert max(counted) <= LAYERS * (1 + (problem.max_blocks is not None))


def test_a_table_that_changes_in_place(npu):
    problem = replace(LOOPS["paged"], options={"causal": True})
    arguments = problem.arguments()
    placed, _ = place(problem, arguments, npu)
    flash_attn_with_kvcache(**placed)
    k, v = arguments["k_cache"], arguments["v_cache"]
    arguments["k_cache"], arguments["v_cache"] = placed["k_cache"].cpu(), placed["v_cache"].cpu()
    for table in (arguments["block_table"], placed["block_table"]):
        table[:2, :2] = table[:2, :2].flip(0)
    # the pages of the first two sequences change owners, and hold keys enough for both
    arguments["cache_seqlens"].copy_(torch.tensor([20, 20, 0]))
    placed["cache_seqlens"].copy_(arguments["cache_seqlens"])
    del arguments["k"], arguments["v"], placed["k"], placed["v"]
    expected = cache_reference.solve(**arguments)
    assert_answer(flash_attn_with_kvcache(**placed), expected)
    assert not torch.equal(k, v)


def served(call: dict[str, Any], device: torch.device) -> str:
    """The kernel behind a call whose answer is the reference's."""
    expected = cache_reference.solve(**call)
    given = {x: y.to(device) if isinstance(y, Tensor) else y for x, y in call.items()}
    if not call["v_cache"].is_contiguous():
        wide = torch.cat((given["v_cache"], given["v_cache"]), 1)
        given["v_cache"] = wide[:, : call["v_cache"].shape[1]]
    with reporting() as region:
        assert_answer(flash_attn_with_kvcache(**given), expected)
    (tally,) = region.tallies
    return tally.kernel


@pytest.mark.parametrize(("blocks", "fused"), [(4, True), (3, False)])
def test_shared_pages_in_a_full_cache(npu, blocks, fused):
    """Two sequences of two pages each, all the same: 4 are used together, however few there are."""
    k, v = (torch.randn(blocks, 128, 1, 64).half() for _ in "kv")
    call = {"q": torch.randn(2, 1, 1, 64).half(), "k_cache": k, "v_cache": v}
    call |= {"block_table": torch.tensor([[2, 0], [2, 0]], dtype=torch.int32)}
    call |= {"cache_seqlens": torch.tensor([200, 150], dtype=torch.int32)}
    assert (served(call, npu) == INFER) == fused


@pytest.mark.parametrize("strided", [(), ("v_cache",)], ids=repr)
def test_values_alone_that_are_strided(npu, strided):
    k, v = (torch.randn(2, 128, 1, 64).half() for _ in "kv")
    if strided:
        v = v.repeat(1, 2, 1, 1)[:, :128]
    call = {"q": torch.randn(2, 1, 1, 64).half(), "k_cache": k, "v_cache": v}
    call |= {"cache_seqlens": torch.tensor([100, 50], dtype=torch.int32)}
    assert (served(call, npu) == INFER) == (not strided)
