"""flash_attn.utils.torch and flash_attn.utils.library: decorators, without CUDA and Triton."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_npu.utils.library import triton_op
from flash_attn_npu.utils.torch import custom_amp_decorator, custom_bwd, custom_fwd, deprecated


class Product(torch.autograd.Function):
    """x @ w, which notes the dtypes that it computes in."""

    seen: list[torch.dtype]

    @staticmethod
    @custom_fwd
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    @custom_bwd
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        grads = dout @ w.t(), x.t() @ dout
        Product.seen = [grad.dtype for grad in grads]
        return grads


class Converted(torch.autograd.Function):
    """x as forward sees it, and whether autocast is on there."""

    autocast: bool

    @staticmethod
    @custom_fwd(cast_inputs=torch.float16)
    def forward(ctx: Any, x: Tensor, integers: Tensor) -> Tensor:
        assert integers.dtype == torch.int64
        Converted.autocast = torch.is_autocast_enabled(x.device.type)
        return x.clone()

    @staticmethod
    @custom_bwd
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        return dout, None


def test_forward_and_backward_share_autocast(device: torch.device) -> None:
    x = torch.randn(2, 3).to(device).requires_grad_()
    w = torch.randn(3, 4).to(device).requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        inside = Product.apply(x, w)
    outside = Product.apply(x, w)
    assert (inside.dtype, outside.dtype) == (torch.bfloat16, torch.float32)
    inside.sum().backward()
    assert Product.seen == [torch.bfloat16, torch.bfloat16]
    with torch.autocast(device.type, torch.bfloat16):
        outside.sum().backward()
    assert Product.seen == [torch.float32, torch.float32]


def test_cast_inputs(device: torch.device) -> None:
    x, integers = torch.randn(3).to(device), torch.arange(3).to(device)
    assert Converted.apply(x, integers).dtype == torch.float32
    with torch.autocast(device.type, torch.bfloat16):
        assert Converted.apply(x, integers).dtype == torch.float16
    assert not Converted.autocast


def test_the_device_is_that_of_the_call(npu: torch.device) -> None:
    x, integers = torch.randn(3), torch.arange(3)
    with torch.autocast("cpu", torch.bfloat16):
        assert Converted.apply(x, integers).dtype == torch.float16
        assert Converted.apply(x.to(npu), integers).dtype == torch.float32
    with torch.autocast("npu", torch.bfloat16):
        assert Converted.apply(x.to(npu), integers).dtype == torch.float16


def test_a_decorator_without_device_type_stays_itself() -> None:
    def decorate(function: Any) -> Any:
        return function

    assert custom_amp_decorator(decorate, False) is decorate


@pytest.mark.filterwarnings(
    "ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"
)
@pytest.mark.usefixtures("fresh_dynamo")
def test_decorated_functions_are_traced() -> None:
    class Scaled(torch.autograd.Function):
        @staticmethod
        @custom_fwd(cast_inputs=torch.bfloat16)
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 3

        @staticmethod
        @custom_bwd
        def backward(ctx: Any, dout: Tensor) -> Tensor:
            return dout * 3

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            scaled: Tensor = Scaled.apply(x)
        return scaled

    x = torch.ones(2, requires_grad=True)
    y = run(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [3, 3]


def test_deprecated_warns_when_called() -> None:
    @deprecated("use another", category=FutureWarning)
    def old() -> int:
        return 1

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert old() == 1
    assert [(str(w.message), w.category) for w in caught] == [("use another", FutureWarning)]


def twice(x: Tensor) -> Tensor:
    return x * 2


def add_one_(x: Tensor) -> None:
    x.add_(1)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("allow_decomposition", [True, False])
def test_operators(allow_decomposition: bool) -> None:
    name = f"flash_attn_npu_test::twice_{allow_decomposition}".lower()
    options = {"mutates_args": (), "allow_decomposition": allow_decomposition}
    operator = triton_op(name, twice, **options)
    decorated = triton_op(f"{name}_decorated", **options)(twice)
    assert isinstance(operator, torch.library.CustomOpDef)
    x = torch.ones(3)
    assert torch.equal(operator(x), x * 2)
    assert torch.equal(decorated(x), x * 2)
    assert operator(x.to("meta")).shape == x.shape
    operators: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        from torch._dynamo.backends.common import aot_autograd

        def note(traced: torch.fx.GraphModule, _: Any) -> Any:
            operators.extend(str(n.target) for n in traced.graph.nodes if n.op == "call_function")
            return traced.forward

        return aot_autograd(fw_compiler=note)(graph, inputs)

    assert torch.equal(torch.compile(operator, backend=backend, fullgraph=True)(x), x * 2)
    kept = any("twice" in target for target in operators)
    assert kept is not allow_decomposition
    # a torch that is built for CUDA loads it itself
    assert "triton" not in sys.modules or torch.version.cuda


def test_an_operator_that_writes() -> None:
    operator = triton_op(
        "flash_attn_npu_test::add_one_",
        add_one_,
        mutates_args={"x"},
        schema="(Tensor(a!) x) -> ()",
        allow_decomposition=False,
    )
    x = torch.zeros(2)
    operator(x)
    assert x.tolist() == [1, 1]
