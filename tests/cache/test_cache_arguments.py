"""Every argument of `flash_attn_with_kvcache` does what the float64 reference says it does.

As in test_every_argument, each argument stands in exactly one table, and one that nobody thought
of fails here.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu import flash_attn_with_kvcache
from flash_attn_npu.errors import ArgumentError
from tests.helpers import argument_harness as harness
from tests.helpers import cache_harness as cache
from tests.helpers.argument_harness import Arguments, int32

FP16, FP32 = torch.float16, torch.float32
Change = Callable[[Arguments], Arguments]


def replaced(name: str, value: Any) -> Change:
    return lambda call: {name: value}


def other_values(name: str) -> Change:
    return lambda call: {name: call[name].roll(1, 0).flip(-1) + 0.5}


CHANGES: dict[str, Change] = {
    **{name: other_values(name) for name in ("q", "k_cache", "v_cache", "k", "v")},
    **{
        f"rotary_{x}": lambda call, x=x: {f"rotary_{x}": call[f"rotary_{x}"].flip(0)}
        for x in ("cos", "sin")
    },
    "cache_seqlens": replaced("cache_seqlens", int32((4, 7))),
    "cache_batch_idx": replaced("cache_batch_idx", int32((2, 0))),
    "cache_leftpad": replaced("cache_leftpad", int32((2, 1))),
    "block_table": lambda call: {"block_table": call["block_table"].flip(0).contiguous()},
    "softmax_scale": replaced("softmax_scale", 0.7),
    "causal": replaced("causal", True),
    "window_size": replaced("window_size", (1, 1)),
    "softcap": replaced("softcap", 0.8),
    "rotary_interleaved": replaced("rotary_interleaved", False),
    "alibi_slopes": replaced("alibi_slopes", torch.linspace(0.25, 1.0, cache.NHEADS)),
}
NO_EFFECT = {"num_splits": (3, "how upstream divides its work")}
FORM = ("return_softmax_lse",)
UNSERVED: tuple[str, ...] = ()
TABLES = (CHANGES, NO_EFFECT, FORM, UNSERVED)

layouts = pytest.mark.parametrize("layout", cache.SEQUENCE)
dtypes = pytest.mark.parametrize("dtype", [FP16, FP32])
WHERE = {
    "rows": {},
    "rows by index": {"cache_batch_idx": int32((2, 0))},
    "odd rows": {},
    "pages": {},
    "odd pages": {},
}


def right(call: Arguments, device: torch.device) -> harness.Answer:
    """The answer, found right."""
    answer = cache.run(call, device)
    cache.assert_right(answer, call)
    return answer


def test_every_argument_stands_in_one_table():
    names = harness.parameters(flash_attn_with_kvcache)
    assert set().union(*TABLES) == set(names)
    for name in names:
        assert sum(name in table for table in TABLES) == 1, f"{name} is not accounted for"


@dtypes
@pytest.mark.parametrize(
    ("argument", "layout"),
    [
        (argument, layout)
        for argument in CHANGES
        for layout in cache.SEQUENCE
        # a cache is paged or not
        if argument != ("cache_batch_idx" if "pages" in layout else "block_table")
    ],
)
def test_changing_it_changes_the_answer_as_the_reference_says(device, argument, layout, dtype):
    before = cache.arguments(layout, dtype)
    before |= cache.tables(dtype) if argument.startswith("rotary") else {}
    after = before | CHANGES[argument](before)
    answer = right(after, device)
    with pytest.raises(AssertionError, match=r"off by|infinite where"):
        cache.assert_right(answer, before)


@layouts
def test_who_serves_the_layouts(npu, layout):
    """So that every way is tried here: over pages, over rows, and over gathered keys."""
    with virtual_ascend.record() as seen:
        right(cache.arguments(layout, FP16, causal=True), npu)
    name = "npu_fusion_attention" if layout == "odd pages" else "npu_fused_infer_attention_score"
    assert [x.name for x in seen.launches if "attention" in x.name] == [name]


@layouts
@pytest.mark.parametrize("argument", NO_EFFECT)
def test_changing_it_leaves_the_answer_alone(device, argument, layout):
    value, reason = NO_EFFECT[argument]
    assert reason
    before = cache.arguments(layout, FP16)
    plain, other = right(before, device), right(before | {argument: value}, device)
    assert all(torch.equal(plain[name], other[name]) for name in plain)


@layouts
def test_return_softmax_lse_changes_what_is_returned(device, layout):
    call = cache.arguments(layout, FP16, causal=True)
    more = right(call, device)
    plain = right(call | {"return_softmax_lse": False}, device)
    assert more.keys() - plain.keys() == {"softmax_lse"}
    assert more["softmax_lse"].shape == (cache.BATCH, cache.NHEADS, cache.SEQLEN_Q)
    assert more["softmax_lse"].dtype == torch.float32


@dtypes
@pytest.mark.parametrize("leftpad", [None, (2, 1)], ids=["from-0", "leftpad"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "mask", [{}, {"causal": True}, {"window_size": (4, 1)}, {"window_size": (40, 40)}], ids=str
)
@pytest.mark.parametrize("where", WHERE)
def test_rotary_turns_what_is_appended_and_asked(device, where, mask, interleaved, leftpad, dtype):
    """Also beside leftpad, from which positions are not counted."""
    call = cache.arguments(where.replace(" by index", ""), dtype, **WHERE[where])
    call |= cache.tables(dtype) | mask | {"rotary_interleaved": interleaved}
    call["cache_leftpad"] = None if leftpad is None else int32(leftpad)
    right(call, device)


@layouts
def test_rotary_of_whole_heads(device, layout):
    angles = torch.arange(16)[:, None] * torch.linspace(1.0, 0.1, cache.HEADDIM // 2)
    whole = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
    right(cache.arguments(layout, FP32, causal=True) | whole, device)


@dtypes
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"window_size": (3, 0)}, {"softcap": 0.8, "causal": True}],
    ids=str,
)
@pytest.mark.parametrize("where", WHERE)
def test_without_new_keys_nothing_is_written(device, where, options, dtype):
    call = cache.arguments(where.replace(" by index", ""), dtype, **WHERE[where], k=None, v=None)
    right(call | options, device)


@layouts
@pytest.mark.parametrize("causal", [False, True])
def test_one_query(device, layout, causal):
    call = cache.arguments(layout, FP16, causal=causal)
    first = {name: call[name][:, :1] for name in ("q", "k", "v")}
    right(call | first | cache.tables(FP16), device)


@layouts
def test_forms_of_cache_seqlens(device, layout):
    call = cache.arguments(layout, FP16)
    number = right(call | {"cache_seqlens": 5}, device)
    tensor = right(call | {"cache_seqlens": int32((5, 5))}, device)
    assert all(torch.equal(number[name], tensor[name]) for name in number)
    right(call | {"cache_seqlens": None, "k": None, "v": None}, device)
    with pytest.raises(ArgumentError, match=r"^cache_seqlens: "):
        cache.run(call | {"cache_seqlens": None}, device)


@layouts
def test_slopes_for_each_sequence(device, layout):
    slopes = torch.linspace(0.1, 1.0, cache.BATCH * cache.NHEADS).view(cache.BATCH, cache.NHEADS)
    right(cache.arguments(layout, FP16, causal=True, alibi_slopes=slopes), device)


@layouts
def test_lengths_that_change_on_the_device_are_read_again(device, layout):
    """As a decoding loop does it: one tensor, counted up in place."""
    call = cache.arguments(layout, FP16, causal=True)
    there = {x: y.to(device) if isinstance(y, torch.Tensor) else y for x, y in call.items()}
    for step in range(2):
        call["cache_seqlens"] = int32(cache.LENGTHS) + step
        before = {name: there[name].cpu().clone() for name in ("k_cache", "v_cache")}
        out, lse = flash_attn_with_kvcache(**there)
        answer = {"out": out, "softmax_lse": lse, **{name: there[name] for name in before}}
        cache.assert_right(answer, call | before)
        there["cache_seqlens"] += 1
