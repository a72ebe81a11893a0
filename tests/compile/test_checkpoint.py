"""Activation checkpointing recomputes the same attention, or keeps it where asked to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import flash_attn_npu as fa
from tests.helpers.compiled_cases import importing_inductor

KEPT = {
    torch.ops.flash_attn_npu_shim._flash_attn_forward.default,
    torch.ops.flash_attn_npu_shim._flash_attn_varlen_forward.default,
}
NAMES = {False: "flash_attn_func", True: "flash_attn_varlen_func"}

Body = Callable[[Tensor, Tensor, Tensor], Tensor]


def keep_attention(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


selective = partial(
    checkpoint,
    use_reentrant=False,
    context_fn=partial(create_selective_checkpoint_contexts, keep_attention),
)
# function that checkpoints, how often it runs the forward kernel
KINDS = {
    "selective": (selective, 1),
    "plain": (partial(checkpoint, use_reentrant=False), 2),
    "reentrant": (partial(checkpoint, use_reentrant=True), 2),
}


def body(device: torch.device, varlen: bool, dropout_p: float) -> Body:
    cu = torch.tensor([0, 5, 10], dtype=torch.int32).to(device)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if varlen:
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            out = fa.flash_attn_varlen_func(q * 2, k, v, cu, cu, 5, 5, dropout_p, causal=True)
        else:
            out = fa.flash_attn_func(q * 2, k, v, dropout_p, causal=True)
        return (out * 3).square().sum()

    return run


def make_inputs(device: torch.device) -> list[Tensor]:
    return [torch.randn(2, 5, heads, 8).to(device).requires_grad_() for heads in (4, 2, 2)]


def gradients(function: Body, inputs: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(3)
    for x in inputs:
        x.grad = None
    # the reentrant kind refuses torch.autograd.grad
    function(*inputs).backward()
    return [x.grad.cpu() for x in inputs]


def forward_calls(report: Any, name: str) -> int:
    return sum(tally.calls for tally in report.tallies if tally.function == name)


@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_without(
    device: torch.device, kind: str, dropout_p: float, varlen: bool
) -> None:
    save, expected_calls = KINDS[kind]
    run, inputs = body(device, varlen, dropout_p), make_inputs(device)
    want = gradients(run, inputs)
    with fa.reporting() as report:
        got = gradients(partial(save, run), inputs)
    torch.testing.assert_close(got, want)
    assert forward_calls(report, NAMES[varlen]) == expected_calls


@importing_inductor
@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("kind", ["selective", "plain"])
def test_under_compile(kind: str, varlen: bool) -> None:
    save, _ = KINDS[kind]
    run, inputs = body(torch.device("cpu"), varlen, 0.0), make_inputs(torch.device("cpu"))

    @partial(torch.compile, fullgraph=True, backend="aot_eager_decomp_partition")
    def compiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return save(run, q, k, v)

    want = gradients(run, inputs)
    gradients(compiled, inputs)
    with fa.reporting() as report:
        got = gradients(compiled, inputs)
    torch.testing.assert_close(got, want)
    # a partitioner may keep what plain checkpointing would recompute
    assert forward_calls(report, NAMES[varlen]) <= KINDS[kind][1]


def test_a_mask_is_dropped_once_and_repeated(device: torch.device) -> None:
    """The recomputed forward draws the same dropout mask only under the preserved generator."""
    run, inputs = body(device, False, 0.5), make_inputs(device)
    first = gradients(partial(KINDS["plain"][0], run), inputs)
    second = gradients(partial(KINDS["selective"][0], run), inputs)
    torch.testing.assert_close(first, second)
