"""What the property tests share: running a function with its gradients, and comparing answers."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from flash_attn_npu import flash_attn_func, flash_attn_varlen_func
from tests.helpers import reference
from tests.helpers.strategies import Problem

EFFORTS = [pytest.param(1, id="quick"), pytest.param(10, id="sweep", marks=pytest.mark.sweep)]


class Answer(NamedTuple):
    """What a call returned, and the gradients of its tensors."""

    out: Tensor
    softmax_lse: Tensor
    gradients: tuple[Tensor, ...]


def for_all(examples: int, **strategies: SearchStrategy) -> Callable[[Callable], Callable]:
    """Turn `check(device, **drawn)` into a test on each device; its sweep draws ten times more.

    hypothesis runs inside the test, so the device is set up once for all examples.
    """

    def decorate(check: Callable) -> Callable:
        @pytest.mark.parametrize("effort", EFFORTS)
        def test(device: torch.device, effort: int) -> None:
            @settings(max_examples=examples * effort)
            @given(**strategies)
            def run(**drawn) -> None:
                check(device, **drawn)

            run()

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return decorate


def call(function: Callable, inputs: Sequence[Tensor], dout: Tensor, *args, **options) -> Answer:
    """`function(*inputs, *args, **options)` and the gradients of the inputs, strides untouched."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, softmax_lse, _ = function(*leaves, *args, return_attn_probs=True, **options)
    return Answer(out, softmax_lse, torch.autograd.grad(out, leaves, dout))


def lengths_on(device: torch.device, cu_seqlens: Sequence[int]) -> Tensor:
    return torch.tensor(cu_seqlens, dtype=torch.int32, device=device)


def solve_varlen(device: torch.device, problem: Problem) -> Answer:
    *inputs, dout = problem.packed(device)
    return call(
        flash_attn_varlen_func,
        inputs,
        dout,
        lengths_on(device, problem.cu_seqlens_q),
        lengths_on(device, problem.cu_seqlens_k),
        problem.max_seqlen_q,
        problem.max_seqlen_k,
        **problem.options,
    )


def solve_dense(device: torch.device, problem: Problem) -> Answer:
    *inputs, dout = problem.dense(device)
    return call(flash_attn_func, inputs, dout, **problem.options)


def assert_varlen_is_right(answer: Answer, problem: Problem) -> None:
    """The answer of a varlen call against the reference, gradients too."""

    def solve(q: Tensor, k: Tensor, v: Tensor, **options) -> reference.Result:
        lengths = (problem.cu_seqlens_q, problem.cu_seqlens_k)
        return reference.varlen(q, k, v, *lengths, max_seqlen_k=problem.max_seqlen_k, **options)

    _assert_right(answer, problem, solve, problem.packed())


def assert_dense_is_right(answer: Answer, problem: Problem) -> None:
    """The answer of a dense call against the reference, gradients too."""
    _assert_right(answer, problem, reference.dense, problem.dense())


def _assert_right(
    answer: Answer, problem: Problem, solve: Callable, inputs: Sequence[Tensor]
) -> None:
    doubles = [x.double() for x in inputs]
    exact, exact_gradients = reference.with_gradients(solve, *doubles, **problem.options)
    plain, plain_gradients = reference.with_gradients(
        solve, *inputs, attend=reference.same_precision, **problem.options
    )
    # upstream's backward starts from the out that forward returned, and clients pass their own
    _, from_stored_out = reference.with_gradients(
        solve, *doubles, out_dtype=problem.dtype, **problem.options
    )
    assert answer.out.dtype == problem.dtype
    assert answer.out.is_contiguous()
    assert answer.softmax_lse.is_contiguous()
    reference.assert_close_to_reference(answer.out, exact.out, plain.out, "out")
    reference.assert_lse_close(answer.softmax_lse, exact.softmax_lse)
    for index, name in enumerate(("dq", "dk", "dv")):
        reference.assert_close_to_reference(
            answer.gradients[index],
            exact_gradients[index],
            plain_gradients[index],
            name,
            from_stored_out[index],
        )


def assert_same(actual: Tensor, expected: Tensor, name: str) -> None:
    """Two roads to one result: each rounds once, at the largest value, and sums in float32."""
    assert actual.shape == expected.shape, name
    if actual.numel() == 0:
        return
    eps = torch.finfo(actual.dtype).eps
    actual, expected = (x.detach().cpu().double() for x in (actual, expected))
    finite = expected.isfinite()
    assert torch.equal(actual[~finite], expected[~finite]), f"{name}: infinite in other places"
    difference = (actual - expected)[finite]
    if difference.numel():
        allowed = 2 * eps * expected[finite].abs().max().item() + reference.FLOAT32_NOISE
        worst = difference.abs().max().item()
        assert worst <= allowed, f"{name}: {worst:.3g} apart, allowed {allowed:.3g}"


def assert_same_answer(actual: Answer, expected: Answer) -> None:
    assert_same(actual.out, expected.out, "out")
    assert_same(actual.softmax_lse, expected.softmax_lse, "softmax_lse")
    for index, pair in enumerate(zip(actual.gradients, expected.gradients, strict=True)):
        assert_same(*pair, f"gradient of input {index}")
