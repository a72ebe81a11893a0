"""Dense layers under torch.compile: one graph, the numbers of eager, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from flash_attn_npu.modules.mlp import GatedMlp
from flash_attn_npu.ops.activations import bias_gelu_impl, fast_gelu_impl, swiglu
from flash_attn_npu.ops.fused_dense import FusedMLP, fused_dense_func, fused_mlp_func

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    # dynamo itself makes instances of every autograd.Function it traces
    pytest.mark.filterwarnings(
        "ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"
    ),
]


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def activated(x: Tensor, y: Tensor) -> Tensor:
    return swiglu(x, y) + fast_gelu_impl(x) + bias_gelu_impl(x, y[0])


def dense(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    out, residual = fused_dense_func(x, weight, bias, return_residual=True)
    return fused_dense_func(out, weight.t()) + residual


def mlp(level: int, activation: str) -> Callable[..., Any]:
    def run(x: Tensor, weight1: Tensor, weight2: Tensor, bias1: Tensor) -> Any:
        return fused_mlp_func(
            x, weight1, weight2, bias1, activation=activation, checkpoint_lvl=level
        )

    return run


FUNCTIONS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "activations": (activated, [(6,), (6,)]),
    "fused_dense_func": (dense, [(6,), (4, 6), (4,)]),
    "fused_mlp_func 0": (mlp(0, "gelu_approx"), [(6,), (8, 6), (3, 8), (8,)]),
    "fused_mlp_func 1": (mlp(1, "relu"), [(6,), (8, 6), (3, 8), (8,)]),
    "fused_mlp_func 2": (mlp(2, "sqrelu"), [(6,), (8, 6), (3, 8), (8,)]),
}


def pairs(shapes: list[tuple[int, ...]], seqlen: int, name: str) -> list[list[Tensor]]:
    """The same numbers twice; the first argument (two for activations) has tokens."""
    tokens = 2 if name == "activations" else 1
    sized = [(2, seqlen, *shape) if i < tokens else shape for i, shape in enumerate(shapes)]
    numbers = [torch.randn(shape) for shape in sized]
    return [[x.clone().requires_grad_() for x in numbers] for _ in range(2)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    function, shapes = FUNCTIONS[name]
    dynamic = name == "fused_dense_func"
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for seqlen in (3, 5) if dynamic else (3,):
        mine, theirs = pairs(shapes, seqlen, name)
        got, want = compiled(*mine), function(*theirs)
        torch.testing.assert_close(got, want)
        dout = torch.randn(want.shape)
        got.backward(dout)
        want.backward(dout)
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("name", ["fused_dense_func", "fused_mlp_func 0"])
def test_functions_in_autocast(name: str) -> None:
    function, shapes = FUNCTIONS[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    mine, theirs = pairs(shapes, 3, name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = compiled(*mine), function(*theirs)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want)
    got.float().sum().backward()
    want.float().sum().backward()
    for one, other in zip(mine, theirs, strict=True):
        assert one.grad is not None
        assert one.grad.dtype == torch.float32
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("activation", [F.silu, F.sigmoid])
def test_gated_mlp(activation: Callable[[Tensor], Tensor]) -> None:
    check(GatedMlp(6, 8, activation=activation, multiple_of=4))


def test_fused_mlp() -> None:
    check(FusedMLP(6, 8, checkpoint_lvl=1))


def check(module: nn.Module) -> None:
    x = torch.randn(3, 6)
    want = module(x)
    want.sum().backward()
    grads = [p.grad for p in module.parameters()]
    module.zero_grad()
    got = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, want)
    got.sum().backward()
    torch.testing.assert_close([p.grad for p in module.parameters()], grads)
