"""fused_dense_func and FusedDense on one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flash_attn_npu.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from flash_attn_npu.ops import fused_dense
from flash_attn_npu.ops.fused_dense import FusedDense, FusedDenseFunc, fused_dense_func
from tests.helpers import dense_reference as reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_bias = pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])


def operands(
    device: torch.device, dtype: torch.dtype, *rows: int, biased: bool = True
) -> list[Tensor]:
    """x (*rows, 12), weight (10, 12) and bias (10,), as parameters of a layer are scaled."""
    shapes = [(*rows, 12), (10, 12), (10,)][: 2 + biased]
    factors = [1.0, 0.3, 0.3]
    return [
        (factor * torch.randn(shape)).to(device, dtype)
        for shape, factor in zip(shapes, factors, strict=False)
    ]


def formula(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return reference.affine(x, weight, bias)


@each_dtype
@each_bias
@pytest.mark.parametrize("rows", [(), (33,), (2, 16)], ids=str)
def test_values_and_gradients(
    device: torch.device, dtype: torch.dtype, biased: bool, rows: tuple[int, ...]
) -> None:
    reference.compare(fused_dense_func, formula, operands(device, dtype, *rows, biased=biased))


@each_dtype
@each_bias
def test_the_residual_shares_the_gradient(
    device: torch.device, dtype: torch.dtype, biased: bool
) -> None:
    def both(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out, residual = fused_dense_func(x, weight, bias, return_residual=True)
        assert residual.dtype == x.dtype
        assert torch.equal(residual, x)
        return torch.cat((out, residual.sin()), dim=-1)

    def expected(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.cat((formula(x, weight, bias), x.sin()), dim=-1)

    reference.compare(both, expected, operands(device, dtype, 2, 16, biased=biased))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("outer", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
def test_autocast(
    device: torch.device, dtype: torch.dtype, outer: torch.dtype, inside: bool
) -> None:
    computed = torch.float64 if dtype == torch.float64 else outer
    inputs = [x.requires_grad_() for x in operands(device, dtype, 2, 16)]
    with torch.autocast(device.type, dtype=outer):
        out, residual = fused_dense_func(*inputs, return_residual=True)
        assert (out.dtype, residual.dtype) == (computed, computed)
        dout = torch.randn(out.shape).to(out)
        grads = torch.autograd.grad(out, inputs, dout) if inside else None
    grads = torch.autograd.grad(out, inputs, dout) if grads is None else grads
    exact = reference.derived(formula, inputs, dout, torch.float64)
    plain = reference.derived(formula, [x.to(computed) for x in inputs], dout, computed)
    assert [grad.dtype for grad in grads] == [dtype] * 3
    for got, want, computed_plainly in zip((out, *grads), exact, plain, strict=True):
        reference.assert_close_enough(got, want, computed_plainly.to(got.dtype))
    assert not torch.is_autocast_enabled(device.type)


def test_a_backward_in_autocast_does_not_round(device: torch.device) -> None:
    inputs = [x.requires_grad_() for x in operands(device, torch.float32, 5)]
    out = fused_dense_func(*inputs)
    outside = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        inside = torch.autograd.grad(out.sum(), inputs)
    for one, other in zip(inside, outside, strict=True):
        assert torch.equal(one, other)


def test_layouts(device: torch.device) -> None:
    x, weight, bias = operands(device, torch.float64, 4, 5)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    turned = weight.t().contiguous().t()
    wide = torch.stack((bias, bias), dim=1)[:, 0]
    reference.compare(fused_dense_func, formula, [strided, turned, wide])
    reference.compare(fused_dense_func, formula, [x[:1].expand_as(x), weight, bias])
    leaf = x.requires_grad_()
    out = fused_dense_func(leaf, weight, bias)
    (dx,) = torch.autograd.grad(out.sum(), leaf)  # a gradient of stride 0
    torch.testing.assert_close(dx, weight.sum(0).expand_as(dx))


@pytest.mark.parametrize("shape", [(0, 12), (2, 0, 12)], ids=str)
def test_empty_batches(device: torch.device, shape: tuple[int, ...]) -> None:
    x, weight, bias = operands(device, torch.float32, *shape[:-1])
    inputs = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    out, residual = fused_dense_func(*inputs, return_residual=True)
    assert out.shape == (*shape[:-1], 10)
    dx, dweight, dbias = torch.autograd.grad(out.sum() + residual.sum(), inputs)
    assert dx.shape == shape
    assert not dweight.any()
    assert not dbias.any()


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_is_frozen_gets_no_gradient(frozen: int) -> None:
    inputs = operands(torch.device("cpu"), torch.float32, 3)
    for i, tensor in enumerate(inputs):
        tensor.requires_grad_(i != frozen)
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (saved.append(tuple(t.shape)), t)[1], lambda t: t
    ):
        out = fused_dense_func(*inputs)
    out.sum().backward()
    assert [tensor.grad is None for tensor in inputs] == [i == frozen for i in range(3)]
    # x is kept for the gradient of the weight alone
    assert saved == ([(10, 12)] if frozen == 1 else [(3, 12), (10, 12)])


def test_second_derivatives() -> None:
    inputs = [x.requires_grad_() for x in operands(torch.device("cpu"), torch.float64, 2)]

    def curved(*inputs: Tensor) -> Tensor:
        out, residual = fused_dense_func(*inputs, return_residual=True)
        return out.sin().sum() + residual.cos().sum()

    assert torch.autograd.gradcheck(curved, inputs)
    assert torch.autograd.gradgradcheck(curved, inputs)


def test_second_derivatives_of_what_was_cast_are_refused() -> None:
    inputs = [x.requires_grad_() for x in operands(torch.device("cpu"), torch.float32, 2)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fused_dense_func(*inputs)
    with pytest.raises(UnsupportedError, match="create_graph: got True"):
        torch.autograd.grad(out.sum(), inputs, create_graph=True)


def test_the_module(device: torch.device) -> None:
    torch.manual_seed(3)
    plain = nn.Linear(12, 10, device=device)
    torch.manual_seed(3)
    layer = FusedDense(12, 10, device=device)
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert isinstance(layer, nn.Linear)
    for ours, theirs in zip(layer.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    x = torch.randn(4, 12, device=device)
    torch.testing.assert_close(layer(x), plain(x))
    assert list(FusedDense(12, 10, bias=False).state_dict()) == ["weight"]
    half = FusedDense(12, 10, return_residual=True, device=device, dtype=torch.bfloat16)
    out, residual = half(x.bfloat16())
    assert (out.dtype, out.device) == (torch.bfloat16, x.device)
    assert torch.equal(residual, x.bfloat16())


def test_the_module_calls_what_the_namespace_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_dense, "fused_dense_func", lambda *args, **options: "replaced")
    assert FusedDense(2, 2)(torch.ones(1, 2)) == "replaced"


def test_the_class_can_be_applied() -> None:
    x, weight, bias = operands(torch.device("cpu"), torch.float32, 3)
    out = FusedDenseFunc.apply(x, weight, bias, False, None, True)
    torch.testing.assert_close(out, x @ weight.t() + bias)
    assert torch.equal(FusedDenseFunc.apply(x, weight, None), fused_dense_func(x, weight))


def bad(argument: str, error: type[Exception], call: Callable[..., Any]) -> Any:
    return pytest.param(argument, error, call)


@pytest.mark.parametrize(
    ("argument", "error", "call"),
    [
        bad("x", ArgumentTypeError, lambda x, w, b: fused_dense_func(None, w, b)),
        bad("x", ArgumentError, lambda x, w, b: fused_dense_func(x.int(), w, b)),
        bad("x", ArgumentError, lambda x, w, b: fused_dense_func(x[0, 0], w, b)),
        bad("weight", ArgumentTypeError, lambda x, w, b: fused_dense_func(x, [1.0], b)),
        bad("weight", ArgumentError, lambda x, w, b: fused_dense_func(x, w[0], b)),
        bad("weight", ArgumentError, lambda x, w, b: fused_dense_func(x, w[:, :5], b)),
        bad("weight", ArgumentError, lambda x, w, b: fused_dense_func(x, w.half(), b)),
        bad("weight", ArgumentError, lambda x, w, b: fused_dense_func(x, w.to("meta"), b)),
        bad("bias", ArgumentError, lambda x, w, b: fused_dense_func(x, w, b[:3])),
        bad("bias", ArgumentError, lambda x, w, b: fused_dense_func(x, w, b.double())),
        bad("bias", ArgumentTypeError, lambda x, w, b: fused_dense_func(x, w, 1.0)),
    ],
)
def test_bad_input_is_named(
    argument: str, error: type[Exception], call: Callable[..., Any]
) -> None:
    with pytest.raises(error, match=f"^{argument}: got .*; allowed: .*; to fix it: "):
        call(*operands(torch.device("cpu"), torch.float32, 3))


def test_shapes_without_values() -> None:
    layer = FusedDense(12, 10, device="meta")
    assert layer(torch.empty(4, 12, device="meta")).shape == (4, 10)
