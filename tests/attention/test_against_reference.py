"""Whatever the problem, the answer and its gradients are the reference's."""

import pytest
import torch
from hypothesis import given, settings

from tests.helpers.composed_only import composed_only
from tests.helpers.property_harness import (
    EFFORTS,
    assert_dense_is_right,
    assert_varlen_is_right,
    for_all,
    solve_dense,
    solve_varlen,
)
from tests.helpers.strategies import Problem, dense_problems, varlen_problems

FP16 = torch.float16
BF16 = torch.bfloat16

# what random draws reach too rarely, or must not stop reaching
VARLEN = {
    "diagonal": Problem(((9, 9), (3, 7)), dtype=FP16, window_size=(0, 0)),
    "causal-diagonal": Problem(((9, 9), (3, 7)), dtype=BF16, causal=True, window_size=(0, -1)),
    "more-queries-than-keys": Problem(((9, 4), (5, 5)), group=2, dtype=FP16, causal=True),
    "window-with-more-queries": Problem(((9, 4), (5, 5)), dtype=FP16, window_size=(2, 1)),
    "no-keys": Problem(((4, 0), (0, 4), (3, 3)), dtype=BF16, causal=True),
    "no-keys-at-all": Problem(((4, 0), (2, 0)), dtype=FP16),
    "no-queries-at-all": Problem(((0, 4), (0, 2)), dtype=FP16),
    "all-empty": Problem(((0, 0), (0, 0)), dtype=BF16, causal=True),
    "all-empty-with-tails": Problem(((0, 0), (0, 0)), dtype=BF16, tail_q=3, tail_k=2),
    "tails": Problem(((5, 6), (3, 3)), dtype=FP16, causal=True, tail_q=4, tail_k=2),
    "tail-of-queries": Problem(((5, 6), (3, 3)), dtype=FP16, tail_q=4),
    "tail-of-keys": Problem(((5, 6), (3, 3)), dtype=BF16, causal=True, tail_k=4),
    "one-token-each": Problem(((1, 1),) * 4, dtype=FP16, causal=True),
    "decoding": Problem(((1, 30), (1, 17)), group=4, dtype=BF16, causal=True),
    "window-open-to-the-right": Problem(((30, 4), (30, 9)), dtype=FP16, window_size=(3, -1)),
    "window-of-the-longest": Problem(((9, 2), (4, 12)), dtype=FP16, window_size=(12, 12)),
    "max-seqlen-larger-than-real": Problem(((9, 2),), dtype=FP16, window_size=(1, 4), slack_k=9),
}
DENSE = {
    "diagonal": Problem(((9, 9),) * 2, dtype=FP16, window_size=(0, 0)),
    "more-queries-than-keys": Problem(((9, 4),) * 2, group=2, dtype=BF16, causal=True),
    "no-row-has-a-key": Problem(((9, 2),) * 2, dtype=FP16, window_size=(0, 0)),
    "no-keys": Problem(((4, 0),) * 2, dtype=FP16, causal=True),
    "no-queries": Problem(((0, 4),) * 2, dtype=FP16),
    "decoding": Problem(((1, 30),) * 3, group=4, dtype=BF16, causal=True),
    "window-open-to-the-right": Problem(((30, 4),), dtype=FP16, window_size=(3, -1)),
    "window-of-the-length": Problem(((9, 4),), dtype=FP16, window_size=(4, 4)),
}


@for_all(150, problem=varlen_problems())
def test_varlen(device, problem):
    assert_varlen_is_right(solve_varlen(device, problem), problem)


@for_all(120, problem=dense_problems())
def test_dense(device, problem):
    assert_dense_is_right(solve_dense(device, problem), problem)


@pytest.mark.parametrize("effort", EFFORTS)
def test_composed_on_a_cpu(effort):
    """Where torch's own kernel would serve."""

    @settings(max_examples=40 * effort)
    @given(packed=varlen_problems(), dense=dense_problems())
    def run(packed, dense):
        assert_varlen_is_right(solve_varlen(torch.device("cpu"), packed), packed)
        assert_dense_is_right(solve_dense(torch.device("cpu"), dense), dense)

    with composed_only():
        run()
        for problem in VARLEN.values():
            assert_varlen_is_right(solve_varlen(torch.device("cpu"), problem), problem)
        for problem in DENSE.values():
            assert_dense_is_right(solve_dense(torch.device("cpu"), problem), problem)


@pytest.mark.parametrize("problem", VARLEN.values(), ids=VARLEN.keys())
def test_varlen_by_example(device, problem):
    assert_varlen_is_right(solve_varlen(device, problem), problem)


@pytest.mark.parametrize("problem", DENSE.values(), ids=DENSE.keys())
def test_dense_by_example(device, problem):
    assert_dense_is_right(solve_dense(device, problem), problem)
