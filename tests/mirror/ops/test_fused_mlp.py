"""fused_mlp_func and FusedMLP on one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_npu.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from flash_attn_npu.ops import fused_dense
from flash_attn_npu.ops.fused_dense import FusedMLP, FusedMLPFunc, ParallelFusedMLP, fused_mlp_func
from tests.helpers import dense_reference as reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
CPU = torch.device("cpu")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_activation = pytest.mark.parametrize("activation", reference.ACTIVATIONS)
each_level = pytest.mark.parametrize("level", [0, 1, 2])


def operands(
    device: torch.device, dtype: torch.dtype, *rows: int, biased: bool = True
) -> list[Tensor]:
    """x (*rows, 24), weight1 (40, 24), weight2 (16, 40), bias1, bias2."""
    shapes = [(*rows, 24), (40, 24), (16, 40), (40,), (16,)]
    factors = [1.0, 0.3, 0.2, 0.3, 0.2]
    made = [
        (f * torch.randn(shape)).to(device, dtype) for f, shape in zip(factors, shapes, strict=True)
    ]
    return made if biased else made[:3]


def formula(activation: str) -> reference.Formula:
    def mlp(
        x: Tensor,
        weight1: Tensor,
        weight2: Tensor,
        bias1: Tensor | None = None,
        bias2: Tensor | None = None,
    ) -> Tensor:
        hidden = reference.ACTIVATIONS[activation](reference.affine(x, weight1, bias1))
        return reference.affine(hidden, weight2, bias2)

    return mlp


@each_dtype
@each_activation
def test_values_and_gradients(device: torch.device, dtype: torch.dtype, activation: str) -> None:
    def call(*inputs: Tensor) -> Tensor:
        return fused_mlp_func(*inputs, activation=activation)

    reference.compare(call, formula(activation), operands(device, dtype, 2, 16))


@each_activation
@pytest.mark.parametrize("rows", [(), (5,), (2, 1, 3)], ids=str)
def test_without_biases(activation: str, rows: tuple[int, ...]) -> None:
    def call(*inputs: Tensor) -> Tensor:
        return fused_mlp_func(*inputs, activation=activation)

    inputs = operands(CPU, torch.float64, *rows, biased=False)
    reference.compare(call, formula(activation), inputs)
    only_second = [*inputs, torch.randn(16, dtype=torch.float64)]
    reference.compare(
        lambda x, w1, w2, b2: call(x, w1, w2, None, b2),
        lambda x, w1, w2, b2: formula(activation)(x, w1, w2, None, b2),
        only_second,
    )


@each_activation
@each_dtype
def test_what_is_computed_again_is_the_same(
    device: torch.device, dtype: torch.dtype, activation: str
) -> None:
    inputs = [x.requires_grad_() for x in operands(device, dtype, 4)]
    dout = torch.randn(4, 16).to(device, dtype)
    answers = []
    for options in (
        {},
        {"checkpoint_lvl": 1},
        {"checkpoint_lvl": 2},
        {"save_pre_act": False},
        {"heuristic": -1},
        {"heuristic": 4, "checkpoint_lvl": 1},
    ):
        out = fused_mlp_func(*inputs, activation=activation, **options)
        answers.append([out, *torch.autograd.grad(out, inputs, dout)])
    for answer in answers[1:]:
        for one, other in zip(answer, answers[0], strict=True):
            assert torch.equal(one, other)


def kept(activation: str, frozen: bool = False, **options: Any) -> list[tuple[int, ...]]:
    """The shapes of what the backward keeps of a call with 3 rows, parameters aside."""
    inputs = operands(CPU, torch.float32, 3)
    for i, tensor in enumerate(inputs):
        tensor.requires_grad_(i == 0 or not frozen)
    pointers: dict[int, tuple[int, ...]] = {}

    def keep(tensor: Tensor) -> Tensor:
        pointers[tensor.data_ptr()] = tuple(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fused_mlp_func(*inputs, activation=activation, **options)
    return sorted(shape for shape in pointers.values() if shape[0] == 3)


def test_what_is_kept() -> None:
    x, hidden = (3, 24), (3, 40)
    assert kept("gelu_approx") == [x, hidden, hidden]
    assert kept("relu") == [x, hidden]
    assert kept("gelu_approx", checkpoint_lvl=1) == [x, hidden]
    assert kept("relu", checkpoint_lvl=1) == [x, hidden]
    assert kept("gelu_approx", checkpoint_lvl=2) == [x]
    assert kept("sqrelu", save_pre_act=False) == [x]
    assert kept("gelu_approx", frozen=True) == [hidden]
    assert kept("gelu_approx", frozen=True, checkpoint_lvl=2) == [x]


@each_dtype
@pytest.mark.parametrize("level", [0, 2])
def test_the_residual_shares_the_gradient(
    device: torch.device, dtype: torch.dtype, level: int
) -> None:
    def both(*inputs: Tensor) -> Tensor:
        out, residual = fused_mlp_func(*inputs, checkpoint_lvl=level, return_residual=True)
        assert torch.equal(residual, inputs[0])
        return torch.cat((out, residual.sin()), dim=-1)

    def expected(*inputs: Tensor) -> Tensor:
        return torch.cat((formula("gelu_approx")(*inputs), inputs[0].sin()), dim=-1)

    reference.compare(both, expected, operands(device, dtype, 2, 16))


# not relu, whose gradient jumps where rounding changes a sign
@pytest.mark.parametrize("activation", ["gelu_approx", "sqrelu"])
@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize("outer", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(device: torch.device, activation: str, level: int, outer: torch.dtype) -> None:
    inputs = [x.requires_grad_() for x in operands(device, torch.float32, 2, 16)]
    with torch.autocast(device.type, dtype=outer):
        out = fused_mlp_func(*inputs, activation=activation, checkpoint_lvl=level)
    assert out.dtype == outer
    dout = torch.randn(out.shape).to(out)
    grads = torch.autograd.grad(out, inputs, dout)
    assert all(grad.dtype == torch.float32 for grad in grads)
    exact = reference.derived(formula(activation), inputs, dout, torch.float64)
    plain = reference.derived(formula(activation), inputs, dout, outer)
    for triple in zip((out, *grads), exact, plain, strict=True):
        reference.assert_close_enough(*triple)


def test_a_backward_in_autocast_does_not_round(device: torch.device) -> None:
    inputs = [x.requires_grad_() for x in operands(device, torch.float32, 5)]
    for level in (0, 2):
        out = fused_mlp_func(*inputs, checkpoint_lvl=level)
        outside = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            inside = torch.autograd.grad(out.sum(), inputs)
        for one, other in zip(inside, outside, strict=True):
            assert torch.equal(one, other)


@each_level
@pytest.mark.parametrize("trained", [[0], [1], [2], [3], [4], [0, 3], [2, 4]], ids=str)
def test_what_is_frozen_gets_no_gradient(level: int, trained: list[int]) -> None:
    inputs = operands(CPU, torch.float64, 3)
    for i, tensor in enumerate(inputs):
        tensor.requires_grad_(i in trained)
    out = fused_mlp_func(*inputs, checkpoint_lvl=level)
    dout = torch.randn_like(out)
    out.backward(dout)
    _, *want = reference.derived(formula("gelu_approx"), inputs, dout, torch.float64)
    for i, (tensor, grad) in enumerate(zip(inputs, want, strict=True)):
        assert (tensor.grad is not None) == (i in trained)
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad, grad)


@pytest.mark.parametrize("activation", ["gelu_approx", "sqrelu"])
@each_level
def test_second_derivatives(activation: str, level: int) -> None:
    shapes = [(2, 3), (4, 3), (2, 4), (4,), (2,)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def curved(*inputs: Tensor) -> Tensor:
        return fused_mlp_func(*inputs, activation=activation, checkpoint_lvl=level).sin().sum()

    assert torch.autograd.gradcheck(curved, inputs)
    assert torch.autograd.gradgradcheck(curved, inputs)


def test_second_derivatives_that_would_be_wrong_are_refused() -> None:
    inputs = [x.requires_grad_() for x in operands(CPU, torch.float32, 2)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = fused_mlp_func(*inputs)
    inputs[1].requires_grad_(False)
    for out in (cast, fused_mlp_func(*inputs)):
        with pytest.raises(UnsupportedError, match="create_graph: got True"):
            torch.autograd.grad(out.sum(), inputs[0], create_graph=True)


def test_layouts_and_empty_batches(device: torch.device) -> None:
    x, *parameters = operands(device, torch.float64, 4, 5)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    for level in (0, 2):

        def call(*inputs: Tensor, level: int = level) -> Tensor:
            return fused_mlp_func(*inputs, checkpoint_lvl=level)

        reference.compare(call, formula("gelu_approx"), [strided, *parameters])
        empty = [x[:0].detach().requires_grad_(), *parameters]
        out = call(*empty)
        assert out.shape == (0, 5, 16)
        out.sum().backward()
        assert empty[0].grad is not None
        assert empty[0].grad.shape == (0, 5, 24)


@each_activation
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_module(device: torch.device, activation: str, training: bool) -> None:
    mlp = FusedMLP(
        8, 20, 6, activation=activation, checkpoint_lvl=1, heuristic=0, device=device,
        dtype=torch.float64,
    ).train(training)  # fmt: skip
    assert list(mlp.state_dict()) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    fc1, fc2 = mlp.fc1, mlp.fc2
    x = torch.randn(2, 3, 8, dtype=torch.float64, device=device, requires_grad=True)
    inputs = [x, fc1.weight, fc2.weight, fc1.bias, fc2.bias]
    out = mlp(x)
    dout = torch.randn_like(out)
    want = reference.derived(formula(activation), inputs, dout, torch.float64)
    for got, exact in zip((out, *torch.autograd.grad(out, inputs, dout)), want, strict=True):
        reference.assert_close_enough(got, exact, exact)


def test_the_sizes_and_kinds_of_the_modules() -> None:
    for make in (FusedMLP, ParallelFusedMLP):
        mlp = make(6)
        assert list(mlp.state_dict()) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
        assert (mlp.fc1.weight.shape, mlp.fc2.weight.shape) == ((24, 6), (6, 24))
        bare = make(6, 5, 3, bias1=False, bias2=False, device="meta", dtype=torch.bfloat16)
        assert list(bare.state_dict()) == ["fc1.weight", "fc2.weight"]
        assert (bare.fc1.weight.shape, bare.fc2.weight.shape) == ((5, 6), (3, 5))
        assert {(p.device.type, p.dtype) for p in bare.parameters()} == {("meta", torch.bfloat16)}
        assert bare(torch.empty(2, 6, device="meta", dtype=torch.bfloat16)).shape == (2, 3)
        torch.manual_seed(0)
        seeded = make(6)
        torch.manual_seed(0)
        plain = [torch.nn.Linear(6, 24), torch.nn.Linear(24, 6)]
        for ours, theirs in zip(
            seeded.parameters(), torch.nn.ModuleList(plain).parameters(), strict=True
        ):
            assert torch.equal(ours, theirs)
    out, residual = FusedMLP(6, return_residual=True)(torch.ones(2, 6))
    assert out.shape == (2, 6)
    assert torch.equal(residual, torch.ones(2, 6))


def test_the_modules_call_what_the_namespace_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_dense, "fused_mlp_func", lambda *args, **options: "replaced")
    for make in (FusedMLP, ParallelFusedMLP):
        assert make(2)(torch.ones(1, 2)) == "replaced"


def test_the_class_takes_weights_with_their_biases() -> None:
    x, weight1, weight2, bias1, bias2 = operands(CPU, torch.float32, 3)
    out = FusedMLPFunc.apply(x, weight1, bias1, weight2, bias2, "relu")
    assert torch.equal(out, fused_mlp_func(x, weight1, weight2, bias1, bias2, "relu"))


def bad(argument: str, error: type[Exception], call: Callable[..., Any]) -> Any:
    return pytest.param(argument, error, call)


@pytest.mark.parametrize(
    ("argument", "error", "call"),
    [
        bad("activation", ArgumentError, lambda x, *o: fused_mlp_func(x, *o, activation="silu")),
        bad("activation", ArgumentError, lambda x, *o: fused_mlp_func(x, *o, activation=None)),
        bad("activation", ArgumentError, lambda *_: FusedMLP(4, activation="gelu")),
        bad("activation", ArgumentError, lambda *_: ParallelFusedMLP(4, activation="tanh")),
        bad("checkpoint_lvl", ArgumentError, lambda x, *o: fused_mlp_func(x, *o, checkpoint_lvl=3)),
        bad("checkpoint_lvl", ArgumentError, lambda *_: FusedMLP(4, checkpoint_lvl=-1)),
        bad("heuristic", ArgumentError, lambda *_: FusedMLP(4, heuristic="fast")),
        bad("heuristic", ArgumentError, lambda x, *o: fused_mlp_func(x, *o, heuristic=None)),
        bad("x", ArgumentTypeError, lambda x, *o: fused_mlp_func(None, *o)),
        bad("x", ArgumentError, lambda x, *o: fused_mlp_func(x[0, 0], *o)),
        bad("weight1", ArgumentError, lambda x, w, *o: fused_mlp_func(x, w.t(), *o)),
        bad("weight1", ArgumentTypeError, lambda x, w, *o: fused_mlp_func(x, None, *o)),
        bad("weight2", ArgumentError, lambda x, w, v, *o: fused_mlp_func(x, w, v.t(), *o)),
        bad("weight2", ArgumentError, lambda x, w, v, *o: fused_mlp_func(x, w, v.half(), *o)),
        bad("bias1", ArgumentError, lambda x, w, v, b, c: fused_mlp_func(x, w, v, c, c)),
        bad("bias2", ArgumentError, lambda x, w, v, b, c: fused_mlp_func(x, w, v, b, b)),
        bad("bias2", ArgumentTypeError, lambda x, w, v, b, c: fused_mlp_func(x, w, v, b, 0.0)),
    ],
)
def test_bad_input_is_named(
    argument: str, error: type[Exception], call: Callable[..., Any]
) -> None:
    with pytest.raises(error, match=f"^{argument}: got .*; allowed: .*; to fix it: "):
        call(*operands(CPU, torch.float32, 3))
