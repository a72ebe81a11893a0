"""torch.compile takes the public functions in one graph for all sizes, and changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import flash_attn_npu as fa
from tests.helpers.compiled_cases import (
    CASES,
    Case,
    each_case,
    gradients,
    importing_inductor,
    leaves,
    outputs,
    packed,
)

STEPS = 4


def check_step(case: Case, compiled: Any, step: int) -> None:
    inputs = case.inputs(step)
    mine, theirs = leaves(inputs), leaves(inputs)
    answer, expected = compiled(*mine), case.run(*theirs)
    for got, want in zip(outputs(answer), outputs(expected), strict=True):
        torch.testing.assert_close(got, want)
    dout = torch.randn_like(outputs(expected)[0])
    for got, want in zip(
        gradients(mine, answer, dout), gradients(theirs, expected, dout), strict=True
    ):
        torch.testing.assert_close(got, want)


@each_case
@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_one_graph_serves_every_size(case: Case, dynamic: bool | None) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(case.run, fullgraph=True, dynamic=dynamic, backend=counter)
    compilations = []
    for step in range(STEPS):
        check_step(case, compiled, step)
        compilations.append(counter.frame_count)
    # without `dynamic` the first sizes are taken for constants, once
    settled = 0 if dynamic else 1
    assert compilations[settled] == compilations[-1] <= 2
    nodes = counter.graphs[-1].graph.nodes
    called = [str(node.target) for node in nodes if node.op == "call_function"]
    assert sum(case.operator in target for target in called) == 1, called


@pytest.mark.sweep
@importing_inductor
@pytest.mark.filterwarnings("ignore:triton-ascend is not installed")
@pytest.mark.parametrize("case", [CASES[0], CASES[7]], ids=["dense", "packed"])
def test_inductor_agrees(case: Case) -> None:
    compiled = torch.compile(case.run, fullgraph=True, backend="inductor")
    for step in range(2):
        check_step(case, compiled, step)


@pytest.mark.parametrize("case", [CASES[1], CASES[7]], ids=["dense", "packed"])
def test_inference_compiles_too(case: Case) -> None:
    compiled = torch.compile(case.run, fullgraph=True, backend="aot_eager")
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            inputs = case.inputs(1)
            torch.testing.assert_close(compiled(*inputs), case.run(*inputs))


def test_dropout_repeats_under_a_seed() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return fa.flash_attn_func(q, k, v, dropout_p=0.3, return_attn_probs=True)

    case = Case("dropout", "", CASES[0].inputs, run)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    answers = []
    for function in (compiled, run):
        torch.manual_seed(7)
        inputs = leaves(case.inputs(0))
        answer = function(*inputs)
        dout = torch.ones_like(answer[0])
        answers.append([*answer, *gradients(inputs, answer, dout)])
    assert (answers[1][2] < 0).any()
    torch.testing.assert_close(answers[0], answers[1])


class Block(nn.Module):
    """Grouped-query self-attention with its projections, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(32, 32)

    def forward(self, x: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        heads = self.qkv(self.norm(x)).unflatten(-1, (8, 8))
        q, k, v = heads.split([4, 2, 2], dim=-2)
        out = fa.flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True, softcap=20.0
        )
        return x + self.out(out.flatten(-2))


def test_a_module_trains_the_same() -> None:
    layers = nn.ModuleList([Block(), Block()])

    def model(x: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        for layer in layers:
            x = layer(x, cu_seqlens, longest)
        return x.square().mean()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    parameters = list(layers.parameters())
    for step in range(STEPS):
        *_, cu_seqlens, longest = packed(step)
        inputs = torch.randn(int(cu_seqlens[-1]), 32), cu_seqlens, longest
        got, want = (
            torch.autograd.grad(function(*inputs), parameters) for function in (compiled, model)
        )
        torch.testing.assert_close(got, want)
    assert counter.frame_count == 2


def packed_0d(step: int) -> tuple[Any, ...]:
    *tensors, longest = packed(step)
    return *tensors, torch.tensor(longest)


@pytest.mark.parametrize("window", [(-1, -1), (3, 3)], ids=["causal", "window"])
@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_lengths_read_inside_the_graph(window: tuple[int, int]) -> None:
    """transformers calls .item() on 0-d maximum lengths while it is traced."""

    def run(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: Tensor) -> Any:
        length = longest.item()
        return fa.flash_attn_varlen_func(
            q, k, v, cu, cu, length, length, causal=True, window_size=window
        )

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for step in range(STEPS):
        check_step(Case("", "", packed_0d, run), compiled, step)
    assert counter.frame_count == 2


@pytest.mark.parametrize("fullgraph", [False, True], ids=["breaks", "fullgraph"])
@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_lengths_given_as_tensors(fullgraph: bool) -> None:
    case = Case("", "", packed_0d, CASES[7].run)
    check_step(case, torch.compile(case.run, fullgraph=fullgraph, backend="aot_eager"), 0)


def test_compiled_calls_on_an_npu_stay_fused(npu: torch.device) -> None:
    from flash_attn_npu import _virtual_ascend as virtual_ascend

    def run(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Any:
        return fa.flash_attn_varlen_func(q, k, v, cu, cu, 7, 7, causal=True)

    *tensors, cu_seqlens, _ = packed(0)
    inputs = leaves(tuple(x.to(npu) for x in tensors))
    cu_seqlens = cu_seqlens.to(npu)
    dout = torch.randn(inputs[0].shape).to(npu)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with virtual_ascend.record() as record:
        for _ in range(2):
            got = torch.autograd.grad(compiled(*inputs, cu_seqlens), inputs, dout)
    assert [launch.name for launch in record.launches] == [
        "npu_fusion_attention",
        "npu_fusion_attention_grad",
    ] * 2
    assert len(record.device_to_host) == 1
    want = torch.autograd.grad(run(*inputs, cu_seqlens), inputs, dout)
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine.cpu(), other.cpu())
