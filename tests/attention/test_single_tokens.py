"""Sequences of one token by the hundreds, as clients describe padding: the kernel never sees them.

They crash it on a card, so they are answered beside it, and where there are few nothing changes.
"""

import pytest
import torch

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu import flash_attn_interface as interface
from flash_attn_npu import flash_attn_varlen_func
from flash_attn_npu._core.attention import call as core
from flash_attn_npu._core.problems.ask import Options
from flash_attn_npu._core.problems.attention import FEW_SINGLES
from tests.helpers import argument_harness as harness
from tests.helpers import reference
from tests.helpers.strategies import Problem

MANY = FEW_SINGLES + 14
TAIL = ((7, 7), (5, 5), *((1, 1),) * MANY)
AMONG = (*((1, 1),) * 9, (7, 9), *((1, 1),) * (MANY - 9), (5, 3), (0, 4), (0, 2), (1, 6), (2, 0))
ALONE = ((1, 1),) * MANY
CASES = {"tail": TAIL, "among others": AMONG, "alone": ALONE}

cases = pytest.mark.parametrize("seqlens", CASES.values(), ids=CASES)
KERNELS = ("npu_fusion_attention", "npu_fusion_attention_v2")


def problem_of(seqlens, **fields) -> Problem:
    fields = {"headdim": 16, "dtype": torch.bfloat16, "tail_q": 3, "tail_k": 2, **fields}
    return Problem(tuple(seqlens), nheads_k=2, group=2, **fields)


def given_lengths(record) -> list[tuple[list[int], list[int]]]:
    """The lengths that kernels were given, forward and backward."""
    found = []
    for launch in record.launches:
        if launch.name.startswith("npu_fusion_attention"):
            ends = [launch.arguments[f"actual_seq_{x}len"] for x in ("q", "kv")]
            found.append(tuple(harness.int32([0, *x]).diff().tolist() for x in ends))
    return found


@cases
@pytest.mark.parametrize(
    "fields", [{}, {"causal": True}, {"window_size": (2, 1)}, {"softmax_scale": 0.7}], ids=str
)
def test_values_and_gradients(npu, seqlens, fields):
    call = harness.arguments_for(flash_attn_varlen_func, problem_of(seqlens, **fields))
    for probs in (False, True):
        call["return_attn_probs"] = probs
        with virtual_ascend.record() as record:
            answer = harness.run(flash_attn_varlen_func, call, npu)
        harness.assert_right(answer, harness.truth(flash_attn_varlen_func, call))
        assert answer["out"].is_contiguous()
        lengths = given_lengths(record)
        assert len(lengths) == (0 if seqlens is ALONE else 2)
        assert not any((1, 1) in zip(*both, strict=True) for both in lengths)


def test_sequences_without_queries_are_one(npu):
    call = harness.arguments_for(flash_attn_varlen_func, problem_of(AMONG))
    with virtual_ascend.record() as record:
        harness.run(flash_attn_varlen_func, call, npu)
    for q, k in given_lengths(record):
        assert (q, k) == ([7, 5, 0, 1], [9, 3, 6, 6])


@cases
@pytest.mark.parametrize("causal", [False, True])
def test_backward_from_a_merged_lse(npu, seqlens, causal):
    function = interface._flash_attn_varlen_backward
    call = harness.arguments_for(function, problem_of(seqlens, causal=causal))
    # a block of a longer context: other keys have the other half of the weight
    call["softmax_lse"] = call["softmax_lse"] + 0.7
    call["out"] = call["out"] * 0.4
    answer = harness.run(function, call, npu)
    harness.assert_right(answer, harness.truth(function, call))
    seen = sum(k for _, k in seqlens)
    for name in ("dk", "dv"):
        assert not answer[name][seen:].any()


@cases
def test_slopes_of_each_sequence(npu, seqlens):
    equal = [(q, q) for q, k in seqlens if q]
    problem = problem_of(equal, causal=True)
    call = harness.arguments_for(flash_attn_varlen_func, problem)
    call["alibi_slopes"] = torch.rand(len(equal), problem.nheads)
    with virtual_ascend.record() as record:
        answer = harness.run(flash_attn_varlen_func, call, npu)
    harness.assert_right(answer, harness.truth(flash_attn_varlen_func, call))
    assert sum(launch.name in KERNELS for launch in record.launches) == (seqlens is not ALONE)


@pytest.mark.parametrize("probs", [False, True])
@cases
def test_a_sink_takes_its_share(npu, seqlens, probs):
    problem = problem_of(seqlens)
    q, k, v, dout = (x.nan_to_num() for x in problem.packed())
    sink = torch.linspace(-1, 2, problem.nheads)
    leaves = [x.detach().to(npu).requires_grad_() for x in (q, k, v, sink)]
    lengths = (problem.cu_seqlens_q, problem.cu_seqlens_k, 9, 9)
    options = Options(return_attn_probs=probs)
    out = core.attend("sunk", tuple(leaves[:3]), lengths, options, None, leaves[3])
    out = out[0] if probs else out
    grads = torch.autograd.grad(out, leaves, dout.to(npu))
    exact, plain = (
        solve([x.detach().requires_grad_() for x in given], problem, how, dout)
        for given, how in (
            ([x.double() for x in (q, k, v, sink)], reference.attention),
            ([q, k, v, sink], reference.same_precision),
        )
    )
    names = ("out", "dq", "dk", "dv", "dsink")
    for name, actual, one, other in zip(names, (out, *grads), exact, plain, strict=True):
        reference.assert_close_to_reference(actual, one, other, name)


def solve(leaves, problem, attend, dout):
    q, k, v, sink = leaves
    ends = (problem.cu_seqlens_q, problem.cu_seqlens_k)
    out = reference.varlen(q, k, v, *ends, max_seqlen_k=9, attend=attend, sink=sink).out
    return out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))


def test_dropout_is_composed(npu):
    """Its mask for them would be one of ours, which rng_state of the kernel does not hold."""
    call = harness.arguments_for(flash_attn_varlen_func, problem_of(TAIL))
    with virtual_ascend.record() as record:
        harness.run(flash_attn_varlen_func, call | {"dropout_p": 0.5}, npu)
    assert not given_lengths(record)


def test_where_there_are_few_nothing_changes(npu):
    """The same launches, and not one copy or allocation more than for longer sequences."""

    def counted(lengths):
        call = harness.arguments_for(flash_attn_varlen_func, problem_of([(x, x) for x in lengths]))
        there = [call[x].to(npu) for x in "qkv"]
        rest = (call["cu_seqlens_q"], call["cu_seqlens_k"], 40, 40)
        flash_attn_varlen_func(*there, *rest)
        with virtual_ascend.record() as record:
            flash_attn_varlen_func(*there, *rest)
        return len(record.launches), record.allocated_bytes, record.host_to_device

    few = [1] * FEW_SINGLES
    assert counted([*few, 40 - FEW_SINGLES]) == counted([2] * FEW_SINGLES + [40 - 2 * FEW_SINGLES])


def test_a_tail_costs_no_index(npu):
    """Padding lies behind everything: it is sliced off, and nothing of q, k and v is copied."""
    call = harness.arguments_for(flash_attn_varlen_func, problem_of(TAIL, tail_q=0, tail_k=0))
    there = [call[x].to(npu) for x in "qkv"]
    rest = (call["cu_seqlens_q"], call["cu_seqlens_k"], 7, 7)
    flash_attn_varlen_func(*there, *rest)
    with virtual_ascend.record() as record:
        out = flash_attn_varlen_func(*there, *rest)
    # the kernel's out and statistics, the values of the single ones, and all of it together
    rows = out.nbytes + sum(q for q, _ in TAIL) * 4 * 2 * 32
    assert not record.host_to_device
    assert record.allocated_bytes < 3 * rows
