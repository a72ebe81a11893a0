"""flash_attn.ops.activations: values, gradients, dtypes, layouts, compiled, refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_npu.errors import ArgumentError, ArgumentTypeError
from flash_attn_npu.ops import activations
from tests.helpers import dense_reference as reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

SINGLE: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], reference.Formula]] = {
    "gelu": (activations.gelu_fwd, activations.gelu_bwd, reference.gelu_tanh),
    "sqrelu": (activations.sqrelu_fwd, activations.sqrelu_bwd, reference.squared_positive),
    "relu": (torch.relu, activations.relu_bwd, reference.not_negative),
}


def values(*shape: int) -> Tensor:
    """Zeros and both tails among ordinary numbers."""
    x = 2 * torch.randn(shape)
    x.view(-1)[:4] = torch.tensor([0.0, -0.0, 12.0, -12.0])
    return x


@each_dtype
@pytest.mark.parametrize("name", SINGLE)
def test_one_tensor(device: torch.device, dtype: torch.dtype, name: str) -> None:
    forward, backward, formula = SINGLE[name]
    x, g = (t.to(device, dtype) for t in (values(25, 24), torch.randn(25, 24)))
    exact = reference.derived(formula, [x], g, torch.float64)
    plain = reference.derived(formula, [x], g, dtype)
    for got, *others in zip((forward(x), backward(g, x)), exact, plain, strict=True):
        assert got.dtype == dtype
        reference.assert_close_enough(got, *others)


@each_dtype
def test_fast_gelu(device: torch.device, dtype: torch.dtype) -> None:
    reference.compare(
        activations.fast_gelu_impl, reference.gelu_tanh, [values(25, 24).to(device, dtype)]
    )


@each_dtype
@pytest.mark.parametrize("shape", [(24,), (5, 1, 24), (1,), (1, 13, 1)], ids=str)
def test_bias_gelu(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    inputs = [values(5, 13, 24).to(device, dtype), torch.randn(shape).to(device, dtype)]
    reference.compare(
        activations.bias_gelu_impl, lambda y, bias: reference.gelu_tanh(y + bias), inputs
    )


@each_dtype
def test_bias_gelu_back_is_the_gradient_of_the_sum(dtype: torch.dtype) -> None:
    y, bias, g = (t.to(dtype) for t in (values(25, 24), torch.randn(24), torch.randn(25, 24)))
    wide = dtype if dtype == torch.float64 else torch.float32
    total = y.to(wide) + bias.to(wide)
    _, exact = reference.derived(
        reference.gelu_tanh, [y.double() + bias.double()], g, torch.float64
    )
    _, plain = reference.derived(reference.gelu_tanh, [total], g, dtype)
    got = activations.bias_gelu_back(g, y, bias)
    assert got.dtype == dtype
    reference.assert_close_enough(got, exact, plain)


@each_dtype
def test_swiglu(device: torch.device, dtype: torch.dtype) -> None:
    inputs = [values(2, 15, 24).to(device, dtype), torch.randn(2, 15, 24).to(device, dtype)]
    reference.compare(activations.swiglu, reference.swish_times, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_swiglu_is_rounded_once(device: torch.device, dtype: torch.dtype) -> None:
    x, y, g = (torch.randn(64, 24).to(device, dtype) for _ in range(3))
    dx, dy = activations.swiglu_bwd(x, y, g)
    exact = reference.derived(reference.swish_times, [x, y], g, torch.float64)
    for got, want in zip((activations.swiglu_fwd(x, y), dx, dy), exact, strict=True):
        ulp = torch.finfo(dtype).eps * want.abs()
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert bool(((got.cpu().double() - want).abs() <= 0.51 * ulp + smallest + 1e-7).all())


def test_the_gate_is_the_first_argument() -> None:
    x, y = torch.tensor([100.0, -100.0]), torch.tensor([-2.0, 3.0])
    assert activations.swiglu(x, y).tolist() == pytest.approx([-200.0, 0.0], abs=1e-30)


def test_swiglu_of_two_dtypes() -> None:
    x = torch.randn(4, 6, dtype=torch.bfloat16, requires_grad=True)
    y = torch.randn(4, 6, requires_grad=True)
    out = activations.swiglu(x, y)
    assert out.dtype == torch.float32
    dx, dy = torch.autograd.grad(out, (x, y), torch.ones(4, 6))
    assert (dx.dtype, dy.dtype) == (torch.bfloat16, torch.float32)


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "halves":
        return torch.cat((x, x), dim=-1).chunk(2, dim=-1)[1]
    if layout == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    return x[:1].expand_as(x)


@pytest.mark.parametrize("layout", ["halves", "transposed", "expanded"])
def test_layouts(device: torch.device, layout: str) -> None:
    x, y, g = (laid_out(torch.randn(3, 4, 6).to(device), layout) for _ in range(3))
    pairs = [
        (activations.swiglu_fwd, (x, y)),
        (activations.swiglu_bwd, (x, y, g)),
        (activations.gelu_fwd, (x,)),
        (activations.gelu_bwd, (g, x)),
        (activations.bias_gelu, (x, y[0])),
        (activations.bias_gelu_back, (g, x, y[0])),
        (activations.relu_bwd, (g, x)),
        (activations.sqrelu_fwd, (x,)),
        (activations.sqrelu_bwd, (g, x)),
    ]
    for function, inputs in pairs:
        got, want = function(*inputs), function(*(tensor.contiguous() for tensor in inputs))
        torch.testing.assert_close(got, want)
        assert all(t.is_contiguous() for t in (got if isinstance(got, tuple) else [got]))


def test_empty_batches(device: torch.device) -> None:
    x = torch.empty(0, 6, device=device, requires_grad=True)
    bias = torch.ones(6, device=device, requires_grad=True)
    for out in (
        activations.swiglu(x, x),
        activations.fast_gelu_impl(x),
        activations.bias_gelu_impl(x, bias),
    ):
        assert out.shape == (0, 6)
        out.sum().backward()
    assert bias.grad is not None
    assert bias.grad.tolist() == [0.0] * 6


def test_first_and_second_derivatives() -> None:
    x, y = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    cases: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (activations.swiglu, (x, y)),
        (activations.fast_gelu_impl, (x,)),
        (activations.bias_gelu_impl, (x, bias)),
        (activations.swiglu_fwd, (x, y)),
    ]
    for function, inputs in cases:
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_the_gradient_of_relu_passes_at_zero() -> None:
    x = torch.tensor([-1.0, -0.0, 0.0, 1.0, float("nan")])
    assert activations.relu_bwd(torch.full((5,), 7.0), x).tolist() == [0.0, 7.0, 7.0, 7.0, 0.0]


def test_large_values_do_not_overflow_before_they_are_rounded() -> None:
    """Squares and products that float16 cannot hold in between."""
    x = torch.tensor([200.0], dtype=torch.float16)
    assert activations.sqrelu_fwd(x).item() == 40000.0
    small = torch.tensor([0.01], dtype=torch.float16)
    assert activations.sqrelu_bwd(small, torch.tensor([60000.0], dtype=torch.float16)).item() == (
        pytest.approx(1200.0, rel=1e-3)
    )


@pytest.mark.parametrize("outer", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(device: torch.device, outer: torch.dtype) -> None:
    for dtype in DTYPES:
        x, y = (torch.randn(4, 6).to(device, dtype).requires_grad_() for _ in range(2))

        def run(x: Tensor = x, y: Tensor = y) -> list[Tensor]:
            outs = (
                activations.swiglu(x, y),
                activations.fast_gelu_impl(x),
                activations.bias_gelu_impl(x, y[0]),
            )
            return [*outs, *torch.autograd.grad([out.sum() for out in outs], (x, y))]

        outside = run()
        with torch.autocast(device.type, dtype=outer):
            inside = run()
        for one, other in zip(inside, outside, strict=True):
            assert one.dtype == dtype
            assert torch.equal(one, other)


def bad(argument: str, error: type[Exception], call: Callable[[Tensor], Any]) -> Any:
    return pytest.param(argument, error, call)


@pytest.mark.parametrize(
    ("argument", "error", "call"),
    [
        bad("y", ArgumentError, lambda x: activations.swiglu(x, x[:1])),
        bad("y", ArgumentTypeError, lambda x: activations.swiglu(x, 1.0)),
        bad("x", ArgumentError, lambda x: activations.swiglu(x.int(), x)),
        bad("g", ArgumentError, lambda x: activations.swiglu_bwd(x, x, x[0])),
        bad("x", ArgumentTypeError, lambda x: activations.gelu_fwd(None)),
        bad("x", ArgumentError, lambda x: activations.sqrelu_fwd(x.int())),
        bad("g", ArgumentError, lambda x: activations.gelu_bwd(x[0], x)),
        bad("g", ArgumentError, lambda x: activations.relu_bwd(x[0], x)),
        bad("g", ArgumentError, lambda x: activations.sqrelu_bwd(x[0], x)),
        bad("bias", ArgumentError, lambda x: activations.bias_gelu(x, x[0, :2])),
        bad("bias", ArgumentError, lambda x: activations.bias_gelu(x[0], x)),
        bad("bias", ArgumentError, lambda x: activations.bias_gelu_impl(x, x[:, 0])),
        bad("y", ArgumentTypeError, lambda x: activations.bias_gelu([1.0], x)),
        bad("g", ArgumentError, lambda x: activations.bias_gelu_back(x[0], x, x[0])),
    ],
)
def test_bad_input_is_named(
    argument: str, error: type[Exception], call: Callable[[Tensor], Any]
) -> None:
    with pytest.raises(error, match=f"^{argument}: got .*; allowed: .*; to fix it: "):
        call(torch.ones(3, 4))
