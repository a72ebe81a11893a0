"""Wrong arguments of flash_attn_with_kvcache are refused by name before anything happens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu import flash_attn_varlen_func, flash_attn_with_kvcache, reporting
from flash_attn_npu.errors import ArgumentError, ArgumentTypeError
from tests.helpers.cache_calls import CacheProblem, bits, place

ROWS = CacheProblem(
    (9, 12), 16, seqlen_q=2, seqlen_new=2, nheads_k=2, rows=(1, 0), rotary_dim=64,
    options={"causal": True},
)  # fmt: skip
PAGED = replace(ROWS, max_blocks=2, rows=None)

Change = dict[str, Any] | Callable[[dict[str, Any]], dict[str, Any]]


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def table(column: int, block: int) -> Change:
    """Another block id for the second sequence."""

    def change(given: dict[str, Any]) -> dict[str, Any]:
        blocks = given["block_table"].clone()
        blocks[1, column] = block
        return {"block_table": blocks}

    return change


def but(name: str, change: Callable[[Tensor], Any]) -> Change:
    return lambda given: {name: change(given[name])}


def only(name: str) -> Change:
    """The argument as it is, and nothing that goes with it."""
    partners = {"k": "v", "v": "k", "rotary_cos": "rotary_sin", "rotary_sin": "rotary_cos"}
    return {partners[name]: None}


OF_PAGES: dict[str, tuple[str, Change]] = {
    "a negative block": ("block_table", table(0, -1)),
    "a block behind the last": ("block_table", table(0, 5)),
    "a table too short": ("cache_seqlens", but("block_table", lambda x: x[:, :0])),
    "new keys behind the last page": ("cache_seqlens", {"cache_seqlens": int32(31, 3)}),
    "a table of int64": ("block_table", but("block_table", Tensor.long)),
    "a table of one dimension": ("block_table", but("block_table", lambda x: x[:, 0])),
    "a table for fewer sequences": ("block_table", but("block_table", lambda x: x[:1])),
    "a table that is a list": ("block_table", but("block_table", Tensor.tolist)),
    "rows beside pages": ("cache_batch_idx", {"cache_batch_idx": int32(0, 1)}),
}
OF_LENGTHS: dict[str, tuple[str, Change]] = {
    "new keys behind the end": ("cache_seqlens", {"cache_seqlens": int32(15, 3)}),
    "an int behind the end": ("cache_seqlens", {"cache_seqlens": 15}),
    "more keys than the cache holds": (
        "cache_seqlens",
        {"cache_seqlens": 17, "k": None, "v": None, "rotary_cos": None, "rotary_sin": None},
    ),
    "negative": ("cache_seqlens", {"cache_seqlens": int32(3, -1)}),
    "a negative int": ("cache_seqlens", {"cache_seqlens": -1}),
    "int64": ("cache_seqlens", {"cache_seqlens": int32(3, 4).long()}),
    "float": ("cache_seqlens", {"cache_seqlens": torch.tensor([3.0, 4.0])}),
    "too many lengths": ("cache_seqlens", {"cache_seqlens": int32(3, 4, 5)}),
    "too few lengths": ("cache_seqlens", {"cache_seqlens": int32(3)}),
    "a string": ("cache_seqlens", {"cache_seqlens": "3"}),
    "a float": ("cache_seqlens", {"cache_seqlens": 3.5}),
    "new keys at no position": ("cache_seqlens", {"cache_seqlens": None}),
    "a row behind the last": ("cache_batch_idx", {"cache_batch_idx": int32(0, 3)}),
    "a negative row": ("cache_batch_idx", {"cache_batch_idx": int32(0, -1)}),
    "rows of int64": ("cache_batch_idx", {"cache_batch_idx": int32(0, 1).long()}),
    "too many rows": ("cache_batch_idx", {"cache_batch_idx": int32(0, 1, 2)}),
    "rows that are a list": ("cache_batch_idx", {"cache_batch_idx": [0, 1]}),
    "a negative padding": ("cache_leftpad", {"cache_leftpad": int32(0, -1)}),
    "padding of int64": ("cache_leftpad", {"cache_leftpad": int32(0, 1).long()}),
    "too much padding": ("cache_leftpad", {"cache_leftpad": int32(0, 1, 2)}),
    "padding that is a list": ("cache_leftpad", {"cache_leftpad": [0.0, 1]}),
}
OF_KEYS: dict[str, tuple[str, Change]] = {
    "k alone": ("v", only("k")),
    "v alone": ("k", only("v")),
    "k of another head count": ("k", but("k", lambda x: x[:, :, :1])),
    "v of another head count": ("v", but("v", lambda x: x[:, :, :1])),
    "k of another headdim": ("k", but("k", lambda x: x[..., :32])),
    "k of another batch": ("k", but("k", lambda x: x[:1])),
    "k of three dimensions": ("k", but("k", lambda x: x[0])),
    "k of another dtype": ("k", but("k", Tensor.float)),
    "v of another dtype": ("v", but("v", Tensor.bfloat16)),
    "v shorter than k": ("v", but("v", lambda x: x[:, :1])),
    "k that is a list": ("k", but("k", Tensor.tolist)),
    "caches of other shapes": ("k_cache, v_cache", but("v_cache", lambda x: x[:, :8])),
    "caches of other dtypes": ("k_cache, v_cache", but("v_cache", Tensor.float)),
    "caches of three dimensions": (
        "k_cache, v_cache",
        lambda given: {name: given[name][0] for name in ("k_cache", "v_cache")},
    ),
    "a cache with fewer rows than q": (
        "k_cache",
        lambda given: {
            **{name: given[name][:1] for name in ("k_cache", "v_cache")},
            "cache_batch_idx": None,
        },
    ),
    "a cache that is a list": ("k_cache", but("k_cache", Tensor.tolist)),
    "q of three dimensions": ("q", but("q", lambda x: x[0])),
    "q that is a list": ("q", but("q", Tensor.tolist)),
    "q of another dtype": ("k_cache", but("q", Tensor.float)),
    "q of another headdim": ("rotary_cos, rotary_sin|k_cache|k", but("q", lambda x: x[..., :32])),
    "q with heads that do not divide": (
        "k_cache",
        but("q", lambda x: torch.cat((x, x[:, :, :1]), 2)),
    ),
    "integers": (
        "q",
        lambda given: {name: given[name].int() for name in ("q", "k", "v", "k_cache", "v_cache")},
    ),
}
OF_OPTIONS: dict[str, tuple[str, Change]] = {
    "cos alone": ("rotary_sin", only("rotary_cos")),
    "sin alone": ("rotary_cos", only("rotary_sin")),
    "tables without new keys": ("k and v", {"k": None, "v": None}),
    "tables too short": (
        "rotary_cos",
        lambda given: {name: given[name][:13] for name in ("rotary_cos", "rotary_sin")},
    ),
    "tables of other shapes": ("rotary_cos, rotary_sin", but("rotary_sin", lambda x: x[:15])),
    "tables of three dimensions": (
        "rotary_cos, rotary_sin",
        lambda given: {name: given[name][None] for name in ("rotary_cos", "rotary_sin")},
    ),
    "tables wider than a head": (
        "rotary_cos, rotary_sin",
        lambda given: {n: given[n].repeat(1, 2) for n in ("rotary_cos", "rotary_sin")},
    ),
    "tables of integers": (
        "rotary_cos",
        lambda given: {name: given[name].int() for name in ("rotary_cos", "rotary_sin")},
    ),
    "a table that is a list": ("rotary_cos", but("rotary_cos", Tensor.tolist)),
    "rotary_interleaved": ("rotary_interleaved", {"rotary_interleaved": "yes"}),
    "return_softmax_lse": ("return_softmax_lse", {"return_softmax_lse": "yes"}),
    "causal": ("causal", {"causal": "yes"}),
    "window_size": ("window_size", {"window_size": 3}),
    "softmax_scale": ("softmax_scale", {"softmax_scale": float("nan")}),
    "softcap": ("softcap", {"softcap": "much"}),
    "slopes of another length": ("alibi_slopes", {"alibi_slopes": torch.ones(3)}),
    "slopes of another dtype": ("alibi_slopes", {"alibi_slopes": torch.ones(2).half()}),
}


def assert_refused(
    problem: CacheProblem,
    device: torch.device,
    argument: str,
    change: Change,
    keep_on_host: bool = False,
) -> None:
    """By name, with a remedy, and without a trace in the caches or the report."""
    placed, buffers = place(problem, problem.arguments(), device)
    changes = change if isinstance(change, dict) else change(placed)
    if not keep_on_host:
        changes = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in changes.items()}
    before = [bits(buffer) for buffer in buffers]
    with (
        virtual_ascend.record() as seen,
        reporting() as region,
        pytest.raises(
            (ArgumentError, ArgumentTypeError), match=rf"(?s)^({argument}): got .*; to fix it: "
        ),
    ):
        flash_attn_with_kvcache(**placed | changes)
    assert not seen.launches
    assert not region.tallies
    assert all(torch.equal(bits(x), y) for x, y in zip(buffers, before, strict=True))


@pytest.mark.parametrize(("argument", "change"), OF_PAGES.values(), ids=OF_PAGES.keys())
def test_pages(device, argument, change):
    assert_refused(PAGED, device, argument, change)


@pytest.mark.parametrize(("argument", "change"), OF_LENGTHS.values(), ids=OF_LENGTHS.keys())
def test_lengths(device, argument, change):
    assert_refused(ROWS, device, argument, change)


@pytest.mark.parametrize(("argument", "change"), OF_KEYS.values(), ids=OF_KEYS.keys())
def test_keys(device, argument, change):
    assert_refused(ROWS, device, argument, change)


@pytest.mark.parametrize(("argument", "change"), OF_OPTIONS.values(), ids=OF_OPTIONS.keys())
def test_options(device, argument, change):
    assert_refused(ROWS, device, argument, change)


@pytest.mark.parametrize("block", [-1, 5])
def test_a_wrong_block_for_the_new_keys_alone(device, block):
    """The old keys of the second sequence fill its first page."""
    problem = replace(PAGED, lengths=(9, 16))
    assert_refused(problem, device, "block_table", table(1, block))


@pytest.mark.parametrize(
    ("moved", "argument"),
    [
        ("q", "k_cache"),
        ("k", "k"),
        ("v", "v"),
        ("v_cache", "k_cache, v_cache"),
        ("rotary_cos", "rotary_cos"),
        ("rotary_sin", "rotary_sin"),
    ],
)
def test_tensors_on_another_device(npu, moved, argument):
    assert_refused(ROWS, npu, argument, but(moved, Tensor.cpu), keep_on_host=True)


@pytest.mark.parametrize("options", [{"causal": True}, {"window_size": (5, 0)}], ids=repr)
def test_tables_too_short_for_the_queries_alone(device, options):
    """Queries move with causal or a window: the fourth of the longest row stands at 12 + 3."""
    problem = replace(ROWS, seqlen_q=4, seqlen_new=1, options=options)
    names = ("rotary_cos", "rotary_sin")
    assert_refused(
        problem, device, "rotary_cos", lambda given: {name: given[name][:15] for name in names}
    )
    placed, _ = place(problem, problem.arguments(), device)
    flash_attn_with_kvcache(**placed | {name: placed[name][:16] for name in names})


def test_tables_for_queries_at_one_position(device):
    problem = replace(ROWS, seqlen_q=4, seqlen_new=1, options={})
    placed, _ = place(problem, problem.arguments(), device)
    names = ("rotary_cos", "rotary_sin")
    flash_attn_with_kvcache(**placed | {name: placed[name][:13] for name in names})
    assert_refused(
        problem, device, "rotary_cos", lambda given: {name: given[name][:12] for name in names}
    )


@pytest.mark.parametrize(
    ("table", "argument", "said"),
    [
        (torch.zeros(3, dtype=torch.int32), "block_table", r"got a torch\.int32 .* shape \(3,\)"),
        (torch.zeros(2, 1), "block_table", r"torch\.float32 tensor of shape \(2, 1\); .*int32"),
        (torch.zeros(2, 1, dtype=torch.int32), "k, v", r"shape \(10, 2, 8\) on cpu each; .*no blo"),
    ],
)
def test_a_table_beside_packed_keys(table: Tensor, argument: str, said: str) -> None:
    x = torch.zeros(10, 2, 8)
    with pytest.raises(ArgumentError, match=rf"^{argument}: .*{said}"):
        flash_attn_varlen_func(x, x, x, [0, 4, 10], [0, 4, 10], 6, 6, block_table=table)
