"""Packed queries over keys in pages, or over parts of packed keys, against the reference."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu import fallback, flash_attn_interface, flash_attn_varlen_func, reporting
from flash_attn_npu.errors import ArgumentError, UnsupportedError
from tests.helpers import reference
from tests.helpers.paged_keys import block_table, hide, only, to_pages
from tests.helpers.property_harness import for_all, lengths_on
from tests.helpers.strategies import Problem, varlen_problems

INFER = "npu_fused_infer_attention_score"
FP16, BF16 = torch.float16, torch.bfloat16
SIZES = st.sampled_from((5, 16, 48, 128))
PROBLEMS = varlen_problems(headdim=st.sampled_from((64, 128, 64, 16, 40)))
# what the oracle allows float32 gradients is measured for dot products of up to 64 terms
PROBLEMS_FOR_GRADIENTS = varlen_problems(headdim=st.sampled_from((64, 16, 40)))
NATIVE = Problem(((3, 40), (1, 17), (5, 5)), 2, 2, 64, FP16, causal=True)


def key_lengths(problem: Problem) -> list[int]:
    return [length for _, length in problem.seqlens]


def paged(problem: Problem, size: int, device: torch.device) -> dict[str, Any]:
    """The arguments of flash_attn_varlen_func over pages, NaN where there is no key."""
    _, k, v, _ = problem.packed()
    lengths = key_lengths(problem)
    table = block_table(lengths, size)
    pages = [to_pages(x, lengths, table, size, torch.nan).to(device) for x in (k, v)]
    return {
        "q": problem.packed(device)[0],
        "k": pages[0],
        "v": pages[1],
        "cu_seqlens_q": lengths_on(device, problem.cu_seqlens_q),
        "cu_seqlens_k": lengths_on(device, problem.cu_seqlens_k),
        "max_seqlen_q": problem.max_seqlen_q,
        "max_seqlen_k": problem.max_seqlen_k,
        "block_table": table.to(device),
        **problem.options,
    }


def solve(problem: Problem, attend=reference.attention, **changes: Any) -> reference.Result:
    q, k, v, _ = problem.packed()
    cumulative = (problem.cu_seqlens_q, problem.cu_seqlens_k)
    options = problem.options | {"max_seqlen_k": problem.max_seqlen_k} | changes
    return reference.varlen(q, k, v, *cumulative, attend=attend, **options)


def assert_right(out: Tensor, lse: Tensor, problem: Problem, **changes: Any) -> None:
    exact = solve(problem, **changes)
    plain = solve(problem, reference.same_precision, **changes)
    assert out.dtype == problem.dtype
    assert out.is_contiguous()
    assert lse.is_contiguous()
    reference.assert_close_to_reference(out, exact.out, plain.out, "out")
    reference.assert_lse_close(lse, exact.softmax_lse)


@for_all(80, problem=PROBLEMS, size=SIZES)
def test_pages(device, problem, size):
    out, lse, s_dmask = flash_attn_varlen_func(
        **paged(problem, size, device), return_attn_probs=True
    )
    assert s_dmask.numel() == 0
    assert_right(out, lse, problem)


def forward(given: dict[str, Any], **more: Any) -> tuple[Tensor, Tensor]:
    """_flash_attn_varlen_forward, which names its arguments differently."""
    left, right = given["window_size"]
    scale = given["softmax_scale"] or given["q"].shape[-1] ** -0.5
    changed = {"dropout_p": 0.0, "softmax_scale": scale}
    changed |= {"window_size_left": left, "window_size_right": right}
    kept = {name: x for name, x in given.items() if name != "window_size"}
    out, lse, *_ = flash_attn_interface._flash_attn_varlen_forward(**kept | changed, **more)
    return out, lse


def partial(
    problem: Problem, shares: list[tuple[float, float]]
) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """(used keys, left padding, spans) of every sequence; shares are fractions of its length."""
    used = [round(n * part) for n, (part, _) in zip(key_lengths(problem), shares, strict=False)]
    pads = [round(n * part) for n, (_, part) in zip(used, shares, strict=False)]
    return used, pads, list(zip(pads, used, strict=True))


SHARES = st.lists(
    st.tuples(st.floats(0, 1) | st.just(1.0), st.floats(0, 1) | st.just(0.0)),
    min_size=4,
    max_size=4,
)


@for_all(80, problem=PROBLEMS, size=st.none() | SIZES, shares=SHARES, padded=st.booleans())
def test_parts_of_the_keys(device, problem, size, shares, padded):
    """seqused_k and leftpad_k, over pages and over packed keys; other keys are NaN."""
    if not padded:
        shares = [(part, 0.0) for part, _ in shares]
    used, pads, spans = partial(problem, shares)
    q, k, v, _ = problem.packed()
    given = paged(problem, size or 16, device)
    hidden = [hide(x, problem.cu_seqlens_k, spans) for x in (k, v)]
    if size is None:
        del given["block_table"]
    else:
        lengths, table = key_lengths(problem), given["block_table"].cpu()
        hidden = [to_pages(x, lengths, table, size, torch.nan) for x in hidden]
    given["k"], given["v"] = (x.to(device) for x in hidden)
    more = {"seqused_k": lengths_on(device, used)}
    if padded:
        more["leftpad_k"] = lengths_on(device, pads)
    out, lse = forward(given, **more)
    keys, values = (only(x, problem.cu_seqlens_k, spans) for x in (k, v))
    ends = list(accumulate((end - start for start, end in spans), initial=0))
    options = problem.options | {"max_seqlen_k": problem.max_seqlen_k}
    answers = [
        reference.varlen(q, keys, values, problem.cu_seqlens_q, ends, attend=attend, **options)
        for attend in (reference.attention, reference.same_precision)
    ]
    reference.assert_close_to_reference(out, answers[0].out, answers[1].out, "out")
    reference.assert_lse_close(lse, answers[0].softmax_lse)


@for_all(40, problem=PROBLEMS_FOR_GRADIENTS, size=SIZES)
def test_gradients(device, problem, size):
    """Gradients of the pages are those of the keys that lie there, and 0 elsewhere."""
    given = paged(problem, size, device)
    leaves = [given[name].requires_grad_() for name in "qkv"]
    out, lse, _ = flash_attn_varlen_func(**given, return_attn_probs=True)
    assert_right(out.detach(), lse.detach(), problem)
    *inputs, dout = problem.packed()
    gradients = torch.autograd.grad(out, leaves, dout.to(device))
    doubles = [x.double() for x in inputs]

    def run(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> reference.Result:
        cumulative = (problem.cu_seqlens_q, problem.cu_seqlens_k)
        return reference.varlen(q, k, v, *cumulative, **options)

    options = problem.options | {"max_seqlen_k": problem.max_seqlen_k}
    _, exact = reference.with_gradients(run, *doubles, dout, **options)
    _, plain = reference.with_gradients(
        run, *inputs, dout, attend=reference.same_precision, **options
    )
    _, stored = reference.with_gradients(run, *doubles, dout, out_dtype=problem.dtype, **options)
    lengths, table = key_lengths(problem), given["block_table"].cpu()
    for index, name in enumerate(("dq", "dk", "dv")):
        truth = [one[index] for one in (exact, plain, stored)]
        if name != "dq":
            truth = [to_pages(x, lengths, table, size, 0.0) for x in truth]
        reference.assert_close_to_reference(gradients[index], *truth[:2], name, truth[2])


def test_gradients_of_a_page_that_two_sequences_share(device):
    """They add up."""
    problem = Problem(((16, 16), (16, 16)), headdim=16, causal=True)
    given = paged(problem, 16, device)
    given["block_table"][1] = given["block_table"][0]
    leaves = [given[name].requires_grad_() for name in "qkv"]
    out = flash_attn_varlen_func(**given)
    gradients = torch.autograd.grad(out.sum(), leaves)
    page = int(given["block_table"][0, 0])
    q = leaves[0].detach().cpu().double().requires_grad_()
    k, v = (x[page].detach().cpu().double().requires_grad_() for x in leaves[1:])
    halves = [reference.attention(half, k, v, causal=True).out for half in q.split(16)]
    expected = torch.autograd.grad(torch.cat(halves).sum(), (q, k, v))
    actual = (gradients[0], gradients[1][page], gradients[2][page])
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("alibi", ["head", "sequence"])
@pytest.mark.parametrize("dtype", [FP16, torch.float32])
def test_softcap_and_alibi(device, dtype, alibi):
    problem = Problem(NATIVE.seqlens, 2, 2, 64, dtype, causal=True)
    shape = (4,) if alibi == "head" else (3, 4)
    slopes = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    given = paged(problem, 16, device) | {"softcap": 3.0, "alibi_slopes": slopes.to(device)}
    out, lse, _ = flash_attn_varlen_func(**given, return_attn_probs=True)
    assert_right(out, lse, problem, softcap=3.0, alibi_slopes=slopes)


@pytest.mark.parametrize("tail", [0, 4])
@pytest.mark.parametrize("headdim", [64, 128])
@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_one_launch_over_the_pages(npu, dtype, headdim, tail):
    """Rows of q past the last sequence stay out of the kernel, and come back as zeros."""
    problem = Problem(NATIVE.seqlens, 2, 2, headdim, dtype, causal=True, tail_q=tail)
    given = paged(problem, 16, npu)
    with virtual_ascend.record() as seen, reporting() as region:
        out, lse, _ = flash_attn_varlen_func(**given, return_attn_probs=True)
    assert_right(out, lse, problem)
    (launch,) = seen.launches
    assert launch.name == INFER
    (tally,) = region.tallies
    assert (tally.function, tally.reasons) == ("flash_attn_varlen_func", ())
    found = launch.arguments
    assert found["key"].data_ptr() == given["k"].data_ptr()
    assert found["value"].data_ptr() == given["v"].data_ptr()
    assert found["query"].shape[0] == problem.cu_seqlens_q[-1]
    assert list(found["actual_seq_lengths"]) == problem.cu_seqlens_q[1:]
    assert list(found["actual_seq_lengths_kv"]) == key_lengths(problem)
    assert (found["block_size"], found["num_key_value_heads"]) == (16, problem.nheads_k)
    assert (found["input_layout"], found["sparse_mode"]) == ("TND", 3)


def test_used_lengths_are_native_too(npu):
    given = paged(NATIVE, 16, npu)
    with virtual_ascend.record() as seen:
        forward(given, seqused_k=lengths_on(npu, [33, 2, 0]))
    (launch,) = seen.launches
    assert launch.name == INFER
    assert list(launch.arguments["actual_seq_lengths_kv"]) == [33, 2, 0]
    # two more queries than keys, which mode 3 would align to the top left
    assert launch.arguments["sparse_mode"] == 4


def test_the_second_call_copies_nothing(npu):
    given = paged(NATIVE, 16, npu)
    with virtual_ascend.record() as first:
        flash_attn_varlen_func(**given)
    with virtual_ascend.record() as second:
        flash_attn_varlen_func(**given)
    assert len(first.device_to_host) == 3
    assert not second.device_to_host
    assert not second.host_to_device


def test_error_refuses_what_is_composed(npu):
    given = paged(NATIVE, 16, npu) | {"softcap": 3.0}
    with (
        virtual_ascend.record() as seen,
        fallback("error"),
        pytest.raises(UnsupportedError, match=r"flash_attn_varlen_func: .*softcap"),
    ):
        flash_attn_varlen_func(**given)
    assert not seen.launches


def table_with(given: dict[str, Any], column: int, block: int) -> dict[str, Any]:
    table = given["block_table"].clone()
    table[0, column] = block
    return {"block_table": table}


REFUSED = {
    "a block behind the last": ("block_table", lambda x: table_with(x, 1, len(x["k"]))),
    "a negative block": ("block_table", lambda x: table_with(x, 1, -1)),
    "too few pages": (
        "cu_seqlens_k|block_table",
        lambda x: {"block_table": x["block_table"][:, :2]},
    ),
    "a table of int64": ("block_table", lambda x: {"block_table": x["block_table"].long()}),
    "a table for fewer sequences": ("block_table", lambda x: {"block_table": x["block_table"][:2]}),
    "a table of one dimension": ("block_table", lambda x: {"block_table": x["block_table"][0]}),
    "packed keys": ("k|k, v", lambda x: {"k": x["k"].flatten(0, 1), "v": x["v"].flatten(0, 1)}),
    "values of another shape": ("v|k, v", lambda x: {"v": x["v"][:, :8]}),
    "values of another dtype": ("v|k, v", lambda x: {"v": x["v"].float()}),
    "max_seqlen_k": ("max_seqlen_k", lambda x: {"max_seqlen_k": 39}),
    "max_seqlen_q": ("max_seqlen_q", lambda x: {"max_seqlen_q": 4}),
    "q of another dtype": ("k", lambda x: {"q": x["q"].float()}),
}


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize(("argument", "change"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals(device, argument, change, with_gradient):
    given = paged(NATIVE, 16, device)
    given |= change(given)
    given["q"].requires_grad_(with_gradient)
    with (
        virtual_ascend.record() as seen,
        pytest.raises(ArgumentError, match=rf"(?s)^({argument}): got .*; to fix it: "),
    ):
        flash_attn_varlen_func(**given)
    assert not seen.launches


@pytest.mark.parametrize("pages", [True, False])
@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("seqused_k", torch.tensor([3, 4], dtype=torch.int32)),
        ("seqused_k", torch.tensor([3, 4, -1], dtype=torch.int32)),
        ("seqused_k", torch.tensor([3, 4, 5])),
        ("seqused_k", torch.tensor([200, 4, 5], dtype=torch.int32)),
        ("leftpad_k", torch.tensor([0, 1], dtype=torch.int32)),
        ("leftpad_k", torch.tensor([0, 1, -1], dtype=torch.int32)),
        ("leftpad_k", torch.tensor([0, 1, 1])),
    ],
)
def test_refused_parts(device, argument, values, pages):
    given = paged(NATIVE, 16, device)
    if not pages:
        del given["block_table"]
        _, given["k"], given["v"], _ = NATIVE.packed(device)
    with (
        virtual_ascend.record() as seen,
        pytest.raises(ArgumentError, match=rf"(?s)^{argument}: got .*; to fix it: "),
    ):
        forward(given, **{argument: values.to(device)})
    assert not seen.launches


def test_padding_behind_the_used_keys_leaves_none(device):
    q, k, v = (torch.randn(6, 1, 8).to(device) for _ in "qkv")
    cu, used, pads = (
        torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 3, 6], [1, 3], [2, 1])
    )
    out, lse, _, _ = flash_attn_interface._flash_attn_varlen_forward(
        q, k, v, cu, cu, 3, 3, 0.0, 0.5, False, leftpad_k=pads, seqused_k=used
    )
    two = torch.tensor([0, 2], dtype=torch.int32, device=device)
    seen, seen_lse, _, _ = flash_attn_interface._flash_attn_varlen_forward(
        q[3:], k[4:], v[4:], cu[:2], two, 3, 2, 0.0, 0.5, False
    )
    assert not out[:3].any()
    assert torch.isposinf(lse[:, :3]).all()
    torch.testing.assert_close(out[3:], seen)
    torch.testing.assert_close(lse[:, 3:], seen_lse)


def test_softmax_lse_of_single_queries_is_contiguous(device: torch.device) -> None:
    q = torch.randn(3, 4, 16).to(device, torch.float16)
    k, v = (torch.randn(3, 16, 2, 16).to(device, torch.float16) for _ in range(2))
    table = torch.arange(3, dtype=torch.int32).view(3, 1).to(device)
    ends = torch.arange(4, dtype=torch.int32).to(device)
    _, lse, _ = flash_attn_varlen_func(
        q, k, v, ends, ends, 1, 1, block_table=table, return_attn_probs=True
    )
    assert lse.shape == (4, 3)
    assert lse.is_contiguous()
