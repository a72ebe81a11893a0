"""layer_norm_linear_fn: a linear layer of a norm, whose gradient computes the norm again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from flash_attn_npu.errors import UnsupportedError
from flash_attn_npu.ops.triton import layer_norm
from tests.helpers.norm_cases import SHAPE, draw, each_place
from tests.helpers.norm_reference import EPS, Options, assert_close, gradients, solve

OUT = 24


def drawn(wishes: str, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    leaves = draw(wishes, device, dtype)
    leaves["linear_weight"] = (torch.randn(OUT, SHAPE[-1]) / 6).to(device, dtype).requires_grad_()
    leaves["linear_bias"] = torch.randn(OUT).to(device, dtype).requires_grad_()
    return leaves


def call(leaves: dict[str, Tensor], rms: bool, prenorm: bool) -> dict[str, Tensor]:
    names = ("x", "weight", "bias", "linear_weight", "linear_bias", "residual")
    out = layer_norm.layer_norm_linear_fn(
        *(leaves.get(name) for name in names), EPS, prenorm, is_rms_norm=rms
    )
    return {"out": out[0], "total": out[1]} if prenorm else {"out": out}


def plain(
    leaves: dict[str, Tensor], rms: bool, amp: torch.dtype | None = None
) -> dict[str, Tensor]:
    solved = solve(leaves, Options(rms))
    y, weight, bias = solved["y"], leaves["linear_weight"], leaves["linear_bias"]
    if amp is not None:
        y, weight, bias = y.to(amp), weight.to(amp), bias.to(amp)
    return {"out": linear(y, weight, bias), "total": solved["total"]}


def compare(
    leaves: dict[str, Tensor], got: dict[str, Tensor], rms: bool, amp: torch.dtype | None = None
) -> None:
    directions = {name: torch.randn(r.shape).to(r) for name, r in got.items()}
    grads = gradients(got, leaves, directions)
    answers = []
    for dtype in (torch.float64, None):
        copies = {
            name: leaf.detach().cpu().to(dtype or leaf.dtype).requires_grad_()
            for name, leaf in leaves.items()
        }
        solved = plain(copies, rms, None if dtype else amp)
        ends = {name: d.cpu().to(dtype or d.dtype) for name, d in directions.items()}
        answers.append((solved, gradients({n: solved[n] for n in ends}, copies, ends)))
    (exact, exact_grads), (simple, simple_grads) = answers
    for name, result in got.items():
        assert result.is_contiguous()
        assert_close(name, result.detach(), exact[name].detach(), simple[name].detach())
    for name, leaf in leaves.items():
        assert grads[name].dtype == leaf.dtype
        assert_close(name, grads[name], exact_grads[name], simple_grads[name])


@each_place
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize(
    ("wishes", "prenorm"), [("", False), ("bias", True), ("bias residual", True)]
)
def test_values_and_gradients(
    device: torch.device, dtype: torch.dtype, rms: bool, wishes: str, prenorm: bool
) -> None:
    leaves = drawn(wishes, device, dtype)
    got = call(leaves, rms, prenorm)
    assert all(result.dtype == dtype for result in got.values())
    compare(leaves, got, rms)


@pytest.mark.parametrize("amp", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_decides_the_dtype(
    device: torch.device, amp: torch.dtype, dtype: torch.dtype
) -> None:
    leaves = drawn("bias residual", device, dtype)
    with torch.autocast(device.type, amp):
        got = call(leaves, False, True)
    assert (got["out"].dtype, got["total"].dtype) == (amp, dtype)
    compare(leaves, got, False, amp)


def test_parameters_of_another_dtype(device: torch.device) -> None:
    leaves = drawn("bias:float32 weight:float32 residual:float32", device, torch.bfloat16)
    for name in ("linear_weight", "linear_bias"):
        leaves[name] = leaves[name].detach().float().requires_grad_()
    got = call(leaves, False, True)
    assert (got["out"].dtype, got["total"].dtype) == (torch.bfloat16, torch.float32)
    compare(leaves, got, False, torch.bfloat16)


@pytest.mark.parametrize("shape", [(0, 32), (32,), (2, 3, 4, 32)], ids=str)
def test_any_number_of_rows(device: torch.device, shape: tuple[int, ...]) -> None:
    leaves = drawn("bias residual", device, torch.float32)
    for name in ("x", "residual"):
        leaves[name] = torch.randn(shape).to(device).requires_grad_()
    got = call(leaves, True, True)
    assert got["out"].shape == (*shape[:-1], OUT)
    compare(leaves, got, True)


@pytest.mark.parametrize("wishes", ["", "bias residual"])
def test_gradients_by_finite_differences(wishes: str) -> None:
    leaves = draw(wishes, torch.device("cpu"), torch.float64, (3, 4))
    matrix = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, weight: Tensor, linear_weight: Tensor, *others: Tensor) -> Tensor:
        bias, residual = others or (None, None)
        out: Tensor = layer_norm.layer_norm_linear_fn(
            x, weight, bias, linear_weight, None, residual, EPS
        )
        return out

    order = [leaves["x"], leaves["weight"], matrix]
    order += [leaves[name] for name in ("bias", "residual") if name in leaves]
    assert torch.autograd.gradcheck(function, tuple(order))


def test_the_norm_is_not_kept_for_the_gradient() -> None:
    leaves = drawn("bias residual", torch.device("cpu"), torch.bfloat16)
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(leaves, False, False)
    of_size_of_x = [tensor for tensor in kept if tensor.numel() == leaves["x"].numel()]
    assert [tensor.dtype for tensor in of_size_of_x] == [torch.bfloat16]
    assert torch.equal(of_size_of_x[0], leaves["x"] + leaves["residual"])


def test_checkpointed(device: torch.device) -> None:
    leaves = drawn("bias residual", device, torch.float32)
    expected = call(leaves, True, False)["out"]
    wanted = torch.autograd.grad(expected.square().sum(), list(leaves.values()))
    out = checkpoint(lambda: call(leaves, True, False)["out"], use_reentrant=False)
    got = torch.autograd.grad(out.square().sum(), list(leaves.values()))
    assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))


def test_second_derivatives_are_refused() -> None:
    leaves = drawn("bias", torch.device("cpu"), torch.float32)
    out = call(leaves, False, False)["out"]
    grads = torch.autograd.grad(out.square().sum(), list(leaves.values()), create_graph=True)
    for grad in grads:
        with pytest.raises(UnsupportedError, match=r"^create_graph: got a second derivative of "):
            torch.autograd.grad(grad.sum(), leaves["x"], retain_graph=True)


def test_the_result_may_be_changed_in_place() -> None:
    leaves = drawn("", torch.device("cpu"), torch.float32)
    out = call(leaves, False, False)["out"]
    untouched = out.detach().clone()
    out += 1
    assert torch.equal(out, untouched + 1)
    got = torch.autograd.grad(out.sum(), list(leaves.values()))
    again = call(leaves, False, False)["out"].sum()
    wanted = torch.autograd.grad(again, list(leaves.values()))
    assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))
    assert all(grad.ne(0).any() for grad in got)
