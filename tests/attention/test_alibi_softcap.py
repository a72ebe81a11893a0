"""softcap and alibi_slopes, alone and with everything they may meet, and who serves them."""

import pytest
import torch

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu import flash_attn_func, flash_attn_varlen_func, reporting
from flash_attn_npu._core.ground import settings
from flash_attn_npu._core.ground.memory import forget_all
from flash_attn_npu._core.table import attention
from tests.helpers import argument_harness as harness
from tests.helpers.argument_harness import Arguments
from tests.helpers.strategies import Problem

FP16, BF16 = torch.float16, torch.bfloat16
EQUAL = ((9, 9), (9, 9))
OFFSET = ((9, 13), (9, 13))
RAGGED = ((5, 5), (9, 9), (4, 4))
RAGGED_OFFSET = ((5, 8), (9, 12), (4, 7))
MIXED = ((5, 8), (9, 9), (4, 12))
WITH_EMPTY = ((5, 5), (0, 0), (4, 4))
SHAPES = {"dense": EQUAL, "dense-offset": OFFSET, "varlen": RAGGED, "varlen-mixed": MIXED}
FORWARDS = ("npu_fusion_attention", "npu_fusion_attention_v2")
GRADIENTS = ("npu_fusion_attention_grad", "npu_fusion_attention_grad_v2")

shapes = pytest.mark.parametrize("shape", SHAPES)
slopes_kinds = pytest.mark.parametrize("per_sequence", [False, True], ids=["heads", "batch-heads"])


def function_for(shape: str):
    return flash_attn_varlen_func if shape.startswith("varlen") else flash_attn_func


def slopes(problem: Problem, per_sequence: bool) -> torch.Tensor:
    shape = (len(problem.seqlens), problem.nheads) if per_sequence else (problem.nheads,)
    count = torch.Size(shape).numel()
    return torch.linspace(0.1, 1.0, count).reshape(shape)


def case(seqlens, per_sequence: bool | None, dtype=FP16, **fields) -> tuple[Problem, Arguments]:
    """A problem, and the arguments to add to its call."""
    problem = Problem(seqlens, nheads_k=2, group=2, headdim=16, dtype=dtype, **fields)
    more = {} if per_sequence is None else {"alibi_slopes": slopes(problem, per_sequence)}
    return problem, more


def check(function, problem: Problem, more: Arguments, device: torch.device) -> list:
    """The answer and its gradients are the reference's; returns the fused launches."""
    call = harness.arguments_for(function, problem) | more
    with virtual_ascend.record() as seen:
        answer = harness.run(function, call, device)
    harness.assert_right(answer, harness.truth(function, call))
    return [x for x in seen.launches if x.name in (*FORWARDS, *GRADIENTS)]


def reasons_of(function, problem: Problem, more: Arguments, device: torch.device) -> str:
    """Why the call was not fused; empty if it was. The answer is checked as well."""
    with reporting() as region:
        launches = check(function, problem, more, device)
    text = "; ".join(reason for entry in region.tallies for reason in entry.reasons)
    assert bool(text) != bool(launches)
    return text


@shapes
@pytest.mark.parametrize("dtype", [FP16, torch.float32])
@pytest.mark.parametrize("softcap", [0.5, 30.0])
@pytest.mark.parametrize("causal", [False, True])
def test_softcap(device, shape, dtype, softcap, causal):
    problem, _ = case(SHAPES[shape], None, dtype, causal=causal)
    launches = check(function_for(shape), problem, {"softcap": softcap}, device)
    assert not launches


def test_softcap_is_composed_for_a_reason(npu):
    problem, _ = case(EQUAL, None)
    assert "no Ascend kernel has softcap" in reasons_of(
        flash_attn_func, problem, {"softcap": 5.0}, npu
    )


@pytest.mark.parametrize("softcap", [0.0, -1.0])
def test_a_softcap_that_is_not_positive_is_none(npu, softcap):
    problem, _ = case(EQUAL, None)
    launches = check(flash_attn_func, problem, {}, npu)
    again = check(flash_attn_func, problem, {"softcap": softcap}, npu)
    assert [x.name for x in launches] == [x.name for x in again]


@shapes
@slopes_kinds
@pytest.mark.parametrize("dtype", [FP16, BF16, torch.float32])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (3, 2)}], ids=str)
def test_alibi(device, shape, per_sequence, dtype, options):
    problem, more = case(SHAPES[shape], per_sequence, dtype, **options)
    check(function_for(shape), problem, more, device)


@shapes
@slopes_kinds
def test_alibi_with_softcap_and_lse(device, shape, per_sequence):
    problem, more = case(SHAPES[shape], per_sequence, causal=True)
    more |= {"softcap": 0.7, "return_attn_probs": True}
    check(function_for(shape), problem, more, device)


@slopes_kinds
@pytest.mark.parametrize("shape", ["dense", "varlen"])
@pytest.mark.parametrize("strided", [False, True])
def test_alibi_of_equal_lengths_is_fused(npu, shape, per_sequence, strided):
    problem, more = case(SHAPES[shape], per_sequence, BF16, causal=True)
    if strided:
        more["alibi_slopes"] = more["alibi_slopes"].repeat_interleave(2, -1)[..., ::2]
    launches = check(function_for(shape), problem, more, npu)
    assert [x.name for x in launches] == [FORWARDS[1], GRADIENTS[1]]
    for launch in launches:
        assert launch.arguments["pse_type"] == 2
        assert launch.arguments["pse"].dtype == torch.float32
        assert torch.equal(launch.arguments["pse"].cpu(), more["alibi_slopes"])


ONE_LAUNCH = {
    "rows alone": {},
    "softmax_lse": {"return_attn_probs": True},
    "deterministic": {"deterministic": True},
    "both": {"return_attn_probs": True, "deterministic": True},
}


@slopes_kinds
@pytest.mark.parametrize("asked", ONE_LAUNCH)
@pytest.mark.parametrize(
    ("seqlens", "options"),
    [
        (RAGGED, {}),
        # the first queries of two sequences see no key; without them there are as many of both
        (((8, 5), (9, 9), (7, 2)), {"causal": True}),
    ],
    ids=["packed", "more queries"],
)
def test_packed_alibi_is_one_launch_whatever_is_asked(npu, seqlens, options, asked, per_sequence):
    """Its statistics come in one block for each sequence."""
    problem, more = case(seqlens, per_sequence, BF16, **options)
    launches = check(flash_attn_varlen_func, problem, more | ONE_LAUNCH[asked], npu)
    assert [x.name for x in launches] == [FORWARDS[1], GRADIENTS[1]]


FEWER = {
    "dense": (flash_attn_func, OFFSET, {"causal": True}),
    "common offset": (flash_attn_varlen_func, RAGGED_OFFSET, {"window_size": (3, 2)}),
    "mixed": (flash_attn_varlen_func, MIXED, {}),
    "mixed, causal": (flash_attn_varlen_func, (*MIXED, (8, 5)), {"causal": True}),
    "one query": (flash_attn_varlen_func, ((1, 7), (1, 12)), {"causal": True}),
}


@slopes_kinds
@pytest.mark.parametrize("asked", ["rows alone", "both"])
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("name", FEWER)
def test_alibi_of_fewer_queries_than_keys_is_one_launch(npu, name, dtype, asked, per_sequence):
    """Each sequence gets as many queries as keys, as the kernel's documents demand."""
    function, seqlens, options = FEWER[name]
    problem, more = case(seqlens, per_sequence, dtype, **options)
    launches = check(function, problem, more | ONE_LAUNCH[asked], npu)
    assert [x.name for x in launches] == [FORWARDS[1], GRADIENTS[1]]
    for launch in launches:
        given = launch.arguments
        assert given["query"].shape[:-2] == given["key"].shape[:-2]
        assert given["actual_seq_qlen"] == given["actual_seq_kvlen"]
        assert given["q_start_idx"] is None


def test_slopes_that_grow_leave_no_infinity(npu):
    """Of rows of zeros a backward makes nothing, however far the keys, whatever the slope."""
    problem, _ = case(((2, 800),), None, torch.float32)
    more = {"alibi_slopes": torch.tensor([-1.0, -0.5, 0.5, 1.0]), "deterministic": True}
    launches = check(flash_attn_varlen_func, problem, more, npu)
    assert [x.name for x in launches] == [FORWARDS[1], GRADIENTS[1]]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", ["dense", "mixed, causal"])
def test_their_backward_drops_what_the_forward_dropped(npu, name, deterministic):
    """out is linear in v, so that <out, dout> = <v, dv> with one mask, and with no other."""
    function, seqlens, options = FEWER[name]
    problem, more = case(seqlens, False, torch.float32, **options)
    more |= {"dropout_p": 0.5, "deterministic": deterministic}
    torch.manual_seed(0)
    call = harness.arguments_for(function, problem) | more
    answer = harness.run(function, call, npu)
    out, dv = answer["out"].double(), answer["dv"].double()
    left, right = (out * call["dout"].to(npu)).sum(), (call["v"].to(npu) * dv).sum()
    assert (
        answer["out"].cpu() - harness.truth(function, call | {"dropout_p": 0.0})["out"].exact
    ).abs().max() > 0.1
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


OFF_DIAGONAL = "documented for seqlen_q = seqlen_k only"


@pytest.mark.parametrize(
    ("function", "seqlens", "reason"),
    [
        (flash_attn_func, ((13, 9), (13, 9)), OFF_DIAGONAL),
        (flash_attn_varlen_func, (*MIXED, (8, 5)), OFF_DIAGONAL),
        (flash_attn_varlen_func, WITH_EMPTY, "no sequence of length 0"),
        (flash_attn_func, ((1, 40), (1, 40)), OFF_DIAGONAL),
    ],
    ids=["dense, more queries", "varlen, more queries", "length 0", "one query of many keys"],
)
@slopes_kinds
def test_other_alibi_is_composed_for_a_reason(
    npu, monkeypatch, function, seqlens, reason, per_sequence
):
    monkeypatch.setattr(attention, "MAX_FILLED_PAIRS", 4 * 2 * 40 * 40 - 1)
    problem, biased = case(seqlens, per_sequence)
    assert reason in reasons_of(function, problem, biased, npu)


def test_as_many_queries_as_keys_are_served_up_to_the_limit(npu, monkeypatch):
    monkeypatch.setattr(attention, "MAX_FILLED_PAIRS", 4 * 2 * 40 * 40)
    problem, biased = case(((1, 40), (1, 40)), False)
    assert not reasons_of(flash_attn_func, problem, biased, npu)
    # and beyond, where it is little more than what is asked
    monkeypatch.setattr(attention, "MAX_FILLED_PAIRS", 0)
    problem, biased = case(((10, 40), (10, 40)), False)
    assert not reasons_of(flash_attn_func, problem, biased, npu)


@pytest.fixture(autouse=True)
def nothing_remembered():
    forget_all()
    yield
    forget_all()


@pytest.fixture
def alibi_offset(monkeypatch):
    """The setting FLASH_ATTN_NPU_ALIBI_OFFSET=1, for one test."""
    monkeypatch.setattr(settings, "_alibi_offset", True)
    forget_all()
    yield
    forget_all()


@slopes_kinds
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (3, 2)}], ids=str)
def test_a_common_offset_is_fused_where_the_setting_allows_it(
    npu, alibi_offset, per_sequence, options
):
    problem, more = case(RAGGED_OFFSET, per_sequence, BF16, **options)
    launches = check(flash_attn_varlen_func, problem, more, npu)
    assert [x.name for x in launches] == [FORWARDS[1], GRADIENTS[1]]
    for launch in launches:
        assert (launch.arguments["q_start_idx"], launch.arguments["kv_start_idx"]) == ([3], [0])


@slopes_kinds
@pytest.mark.parametrize(
    ("options", "start"),
    # distances count from the first query that sees a key: its position after that of key 0
    [({"causal": True}, None), ({"window_size": (3, 2)}, [-2])],
    ids=str,
)
def test_a_common_offset_of_more_queries_is_fused_there_too(
    npu, alibi_offset, per_sequence, options, start
):
    problem, more = case(((8, 5), (12, 9), (7, 4)), per_sequence, BF16, **options)
    launches = check(flash_attn_varlen_func, problem, more, npu)
    assert [x.name for x in launches] == [FORWARDS[1], GRADIENTS[1]]
    assert all(launch.arguments["q_start_idx"] == start for launch in launches)


@pytest.mark.parametrize(
    ("function", "seqlens"),
    [(flash_attn_func, OFFSET), (flash_attn_varlen_func, MIXED)],
    ids=["dense", "varlen-mixed"],
)
def test_the_setting_changes_nothing_else(npu, alibi_offset, function, seqlens):
    problem, more = case(seqlens, False, causal=True)
    launches = check(function, problem, more, npu)
    assert all(launch.arguments["q_start_idx"] is None for launch in launches)
    assert len(launches) == 2
