"""Answers that must agree with each other, whatever the numbers are."""

from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from hypothesis import strategies as st

from flash_attn_npu import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from tests.helpers import reference
from tests.helpers.property_harness import (
    Answer,
    assert_same,
    assert_same_answer,
    call,
    for_all,
    lengths_on,
    solve_dense,
    solve_varlen,
)
from tests.helpers.strategies import (
    alike,
    dense_problems,
    equal_pairs,
    problems,
    ragged,
    varlen_problems,
)

ONE_GROUP = st.just(1)
UNBOUNDED = (-1, -1)


@for_all(40, problem=varlen_problems())
def test_varlen_is_dense_on_each_sequence(device, problem):
    *inputs, dout = problem.packed(device)
    packed = solve_varlen(device, problem)
    bounds = zip(pairwise(problem.cu_seqlens_q), pairwise(problem.cu_seqlens_k), strict=True)
    for (q0, q1), (k0, k1) in bounds:
        if not same_window_alone(problem, q1 - q0, k1 - k0):
            continue
        spans = (slice(q0, q1), slice(k0, k1), slice(k0, k1))
        single = [x[span][None] for x, span in zip(inputs, spans, strict=True)]
        alone = call(flash_attn_func, single, dout[None, q0:q1], **problem.options)
        gradients = (x[span][None] for x, span in zip(packed.gradients, spans, strict=True))
        part = Answer(packed.out[None, q0:q1], packed.softmax_lse[None, :, q0:q1], tuple(gradients))
        assert_same_answer(part, alone)


def same_window_alone(problem, seqlen_q: int, seqlen_k: int) -> bool:
    """Whether upstream's window means the same against this sequence's length as the call's."""
    masks = [
        reference.visible_keys(
            seqlen_q,
            seqlen_k,
            reference.normalise_window(problem.window_size, problem.causal, longest),
        )
        for longest in (problem.max_seqlen_k, seqlen_k)
    ]
    return torch.equal(*masks)


@for_all(40, problem=dense_problems())
def test_dense_is_varlen_of_equal_lengths(device, problem):
    dense, packed = solve_dense(device, problem), solve_varlen(device, problem)
    batch, nheads, seqlen_q = dense.softmax_lse.shape
    lse = packed.softmax_lse.reshape(nheads, batch, seqlen_q).transpose(0, 1)
    gradients = (
        x.reshape(like.shape) for x, like in zip(packed.gradients, dense.gradients, strict=True)
    )
    reshaped = Answer(packed.out.reshape(dense.out.shape), lse, tuple(gradients))
    assert_same_answer(reshaped, dense)


@for_all(40, problem=problems(alike(equal_pairs()), group=ONE_GROUP))
def test_dense_qkvpacked_is_separate(device, problem):
    q, k, v, dout = problem.dense(device)
    packed = call(flash_attn_qkvpacked_func, [torch.stack((q, k, v), 2)], dout, **problem.options)
    separate = solve_dense(device, problem)
    assert_same_answer(packed, separate._replace(gradients=(torch.stack(separate.gradients, 2),)))


@for_all(40, problem=dense_problems())
def test_dense_kvpacked_is_separate(device, problem):
    q, k, v, dout = problem.dense(device)
    packed = call(flash_attn_kvpacked_func, [q, torch.stack((k, v), 2)], dout, **problem.options)
    separate = solve_dense(device, problem)
    dq, dk, dv = separate.gradients
    assert_same_answer(packed, separate._replace(gradients=(dq, torch.stack((dk, dv), 2))))


@for_all(40, problem=problems(ragged(equal_pairs()), group=ONE_GROUP))
def test_varlen_qkvpacked_is_separate(device, problem):
    q, k, v, dout = problem.packed(device)
    packed = call(
        flash_attn_varlen_qkvpacked_func,
        [torch.stack((q, k, v), 1)],
        dout,
        lengths_on(device, problem.cu_seqlens_q),
        problem.max_seqlen_q,
        **problem.options,
    )
    separate = solve_varlen(device, problem)
    assert_same_answer(packed, separate._replace(gradients=(torch.stack(separate.gradients, 1),)))


@for_all(40, problem=varlen_problems())
def test_varlen_kvpacked_is_separate(device, problem):
    q, k, v, dout = problem.packed(device)
    packed = call(
        flash_attn_varlen_kvpacked_func,
        [q, torch.stack((k, v), 1)],
        dout,
        lengths_on(device, problem.cu_seqlens_q),
        lengths_on(device, problem.cu_seqlens_k),
        problem.max_seqlen_q,
        problem.max_seqlen_k,
        **problem.options,
    )
    separate = solve_varlen(device, problem)
    dq, dk, dv = separate.gradients
    assert_same_answer(packed, separate._replace(gradients=(dq, torch.stack((dk, dv), 1))))


@for_all(40, problem=problems(ragged()), order=st.permutations(range(4)))
def test_the_order_of_sequences_does_not_matter(device, problem, order):
    order = [index for index in order if index < len(problem.seqlens)]
    *inputs, dout = problem.packed(device)
    seqlens_q, seqlens_k = (list(side) for side in zip(*problem.seqlens, strict=True))

    def reorder(x: torch.Tensor, seqlens: list[int], dim: int = 0) -> torch.Tensor:
        pieces = x.split(seqlens, dim)
        return torch.cat([pieces[index] for index in order], dim)

    sides = (seqlens_q, seqlens_k, seqlens_k)
    straight = solve_varlen(device, problem)
    expected = Answer(
        reorder(straight.out, seqlens_q),
        reorder(straight.softmax_lse, seqlens_q, 1),
        tuple(reorder(x, side) for x, side in zip(straight.gradients, sides, strict=True)),
    )
    reordered = call(
        flash_attn_varlen_func,
        [reorder(x, side) for x, side in zip(inputs, sides, strict=True)],
        reorder(dout, seqlens_q),
        *(
            lengths_on(device, list(accumulate((side[i] for i in order), initial=0)))
            for side in (seqlens_q, seqlens_k)
        ),
        problem.max_seqlen_q,
        problem.max_seqlen_k,
        **problem.options,
    )
    assert_same_answer(reordered, expected)


@for_all(
    40,
    problem=problems(alike(equal_pairs(1)), window_size=st.just(UNBOUNDED)),
    beyond=st.tuples(st.integers(-1, 3), st.integers(-1, 3)),
)
def test_a_window_over_the_whole_sequence_changes_nothing(device, problem, beyond):
    # the last query still sees the first key at left = length - 1, and the reverse for right
    wide = tuple(problem.max_seqlen_k + extra for extra in beyond)
    assert_same_answer(
        solve_dense(device, replace(problem, window_size=wide)), solve_dense(device, problem)
    )


@for_all(40, problem=dense_problems())
def test_grouped_heads_are_repeated_heads(device, problem):
    q, k, v, dout = problem.dense(device)
    grouped = solve_dense(device, problem)
    repeated = call(
        flash_attn_func,
        [q, *(x.repeat_interleave(problem.group, dim=2) for x in (k, v))],
        dout,
        **problem.options,
    )
    assert_same(grouped.out, repeated.out, "out")
    assert_same(grouped.softmax_lse, repeated.softmax_lse, "softmax_lse")
    assert_same(grouped.gradients[0], repeated.gradients[0], "dq")
    if problem.dtype == torch.float32:
        # each head's share is rounded on its own, so in half precision the sums differ more
        heads = (problem.nheads_k, problem.group)
        for index, name in ((1, "dk"), (2, "dv")):
            summed = repeated.gradients[index].unflatten(2, heads).sum(dim=3)
            assert_same(grouped.gradients[index], summed, name)


@for_all(40, problem=varlen_problems(), scale=st.sampled_from((0.25, 0.5, 2.0)))
def test_the_scale_can_be_folded_into_q(device, problem, scale):
    # by powers of two, which scale q and dq exactly
    q, k, v, dout = problem.packed(device)
    scaled = solve_varlen(device, replace(problem, softmax_scale=scale))
    folded = call(
        flash_attn_varlen_func,
        [q * scale, k, v],
        dout,
        lengths_on(device, problem.cu_seqlens_q),
        lengths_on(device, problem.cu_seqlens_k),
        problem.max_seqlen_q,
        problem.max_seqlen_k,
        **(problem.options | {"softmax_scale": 1.0}),
    )
    dq, dk, dv = folded.gradients
    assert_same_answer(scaled, folded._replace(gradients=(dq * scale, dk, dv)))


@for_all(
    40,
    problem=problems(alike(equal_pairs(1)), causal=st.just(True)),
    cut=st.floats(0, 1),
)
def test_causal_attention_does_not_see_the_future(device, problem, cut):
    q, k, v, dout = problem.dense(device)
    cut = round(cut * problem.max_seqlen_k)
    others = replace(problem, seed=problem.seed + 1).dense(device)
    changed = [
        torch.cat((x[:, :cut], other[:, cut:]), dim=1)
        for x, other in zip((q, k, v), others[:3], strict=True)
    ]
    # only the past is asked for gradients, so that the future has none
    dout[:, cut:] = 0
    before = call(flash_attn_func, (q, k, v), dout, **problem.options)
    after = call(flash_attn_func, changed, dout, **problem.options)
    assert_same(after.out[:, :cut], before.out[:, :cut], "out")
    assert_same(after.softmax_lse[..., :cut], before.softmax_lse[..., :cut], "softmax_lse")
    for ours, theirs in zip(after.gradients, before.gradients, strict=True):
        assert_same(ours[:, :cut], theirs[:, :cut], "gradient")
        assert (ours[:, cut:] == 0).all()
