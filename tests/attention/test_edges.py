"""Rows without keys, rows without a sequence, and calls with nothing in them."""

import pytest
import torch
from hypothesis import strategies as st

from flash_attn_npu import flash_attn_func, flash_attn_varlen_func
from tests.helpers import reference
from tests.helpers.property_harness import call, for_all, lengths_on, solve_varlen
from tests.helpers.strategies import Problem, problems, ragged, varlen_problems

INF = float("inf")


@for_all(40, problem=problems(ragged(st.tuples(st.integers(1, 20), st.integers(0, 6)))))
def test_rows_without_keys_are_zeros_and_infinite_and_get_no_gradient(device, problem):
    answer = solve_varlen(device, problem)
    empty = rows_without_keys(problem)
    lse = answer.softmax_lse.cpu()
    assert (answer.out.cpu()[empty] == 0).all()
    assert (lse[:, empty] == INF).all()
    assert lse[:, ~empty].isfinite().all()
    assert (answer.gradients[0].cpu()[empty] == 0).all()


def rows_without_keys(problem: Problem) -> torch.Tensor:
    window = reference.normalise_window(problem.window_size, problem.causal, problem.max_seqlen_k)
    return torch.cat(
        [~reference.visible_keys(q, k, window).any(dim=-1) for q, k in problem.seqlens]
    )


@for_all(40, problem=varlen_problems(tail_q=st.integers(1, 7), tail_k=st.integers(0, 7)))
def test_tails_hold_zeros_and_get_no_gradient(device, problem):
    # the tails of q, k and v are NaN: one that is read shows in the answer
    answer = solve_varlen(device, problem)
    used_q, used_k = problem.cu_seqlens_q[-1], problem.cu_seqlens_k[-1]
    dq, dk, dv = (x.cpu() for x in answer.gradients)
    assert (answer.out.cpu()[used_q:] == 0).all()
    assert (answer.softmax_lse.cpu()[:, used_q:] == INF).all()
    assert (dq[used_q:] == 0).all()
    assert (dk[used_k:] == 0).all()
    assert (dv[used_k:] == 0).all()
    assert not any(x.isnan().any() for x in (answer.out, dq, dk, dv))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("rows", "keys"), [(0, 0), (3, 0), (0, 3), (3, 2)])
def test_no_sequences(device, rows, keys, causal):
    shapes = ((rows, 4, 8), (keys, 2, 8), (keys, 2, 8))
    inputs = [torch.full(s, float("nan"), dtype=torch.float16, device=device) for s in shapes]
    none = lengths_on(device, [0])
    dout = torch.ones(shapes[0], dtype=torch.float16, device=device)
    answer = call(flash_attn_varlen_func, inputs, dout, none, none, 0, 0, causal=causal)
    assert torch.equal(answer.out.cpu(), torch.zeros(shapes[0], dtype=torch.float16))
    assert torch.equal(answer.softmax_lse.cpu(), torch.full((4, rows), INF))
    assert all((x == 0).all() for x in answer.gradients)


@pytest.mark.parametrize("causal", [False, True])
def test_no_batch(device, causal):
    q = torch.empty(0, 5, 4, 8, dtype=torch.bfloat16, device=device)
    k = torch.empty(0, 6, 2, 8, dtype=torch.bfloat16, device=device)
    answer = call(flash_attn_func, (q, k, k), torch.empty_like(q), causal=causal)
    assert answer.out.shape == q.shape
    assert answer.out.dtype == q.dtype
    assert answer.softmax_lse.shape == (0, 4, 5)
    assert [x.shape for x in answer.gradients] == [q.shape, k.shape, k.shape]
