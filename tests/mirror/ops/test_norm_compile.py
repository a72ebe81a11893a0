"""torch.compile of the norms, without graph breaks: values and gradients equal eager's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_npu.ops import layer_norm, rms_norm
from flash_attn_npu.ops.triton import layer_norm as of_triton
from tests.helpers.norm_cases import SHAPE, as_tuple, draw

# dynamo itself makes instances of every autograd.Function it traces
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"
    ),
    pytest.mark.usefixtures("fresh_dynamo"),
]
CASES: dict[str, tuple[str, Callable[..., Any]]] = {
    "layer_norm_fn": (
        "bias residual:float32",
        lambda **given: of_triton.layer_norm_fn(**given, prenorm=True),
    ),
    "layer_norm_fn, all": (
        "bias residual x1 weight1 bias1",
        lambda **given: of_triton.layer_norm_fn(
            **given, prenorm=True, zero_centered_weight=True, return_dropout_mask=True
        ),
    ),
    "layer_norm_fn, nothing to add": (
        "bias",
        lambda **given: of_triton.layer_norm_fn(**given, prenorm=True),
    ),
    "rms_norm_fn": ("", lambda x, weight: of_triton.rms_norm_fn(x, weight, None)),
    "RMSNorm": (
        "residual",
        lambda x, weight, residual: torch.func.functional_call(
            MODULE, {"weight": weight}, (x,), {"residual": residual, "prenorm": True}
        ),
    ),
    "layer_norm_linear_fn": (
        "bias residual",
        lambda x, weight, bias, residual: autocast_linear(x, weight, bias, residual),
    ),
    "dropout_add_layer_norm": (
        "bias residual layerscale rowscale",
        lambda x, weight, bias, residual, layerscale, rowscale: layer_norm.dropout_add_layer_norm(
            x, residual, weight, bias, 0.0, 1e-5, rowscale, layerscale, True, False, True
        ),
    ),
    "dropout_add_rms_norm_parallel_residual": (
        "residual x1",
        lambda x, weight, residual, x1: rms_norm.dropout_add_rms_norm_parallel_residual(
            x, x1, residual, weight, None, None, None, 0.0, 1e-5, True
        ),
    ),
}
OFTEN = ["layer_norm_fn, all", "RMSNorm", "layer_norm_linear_fn", "dropout_add_layer_norm"]
MODULE = of_triton.RMSNorm(SHAPE[-1])
MATRIX = torch.randn(7, SHAPE[-1])


def autocast_linear(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return of_triton.layer_norm_linear_fn(x, weight, bias, MATRIX, None, residual, 1e-5, True)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    made: Callable[..., Any] = torch.compile(function, fullgraph=True, backend="aot_eager")
    return made


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in OFTEN else pytest.mark.sweep) for n in CASES]
)
def test_compiled_is_eager(no_small: None, name: str) -> None:
    wishes, function = CASES[name]
    leaves = draw(wishes, torch.device("cpu"), torch.bfloat16)
    run = compiled(function)
    if name not in OFTEN[1:]:
        # without gradients dynamo traces another way
        with torch.no_grad():
            got, expected = as_tuple(run(**leaves)), as_tuple(function(**leaves))
        for one, other in zip(got, expected, strict=True):
            assert (one is None and other is None) or torch.equal(one, other)
    answers = []
    for call in (run, function):
        results = [r for r in as_tuple(call(**leaves)) if r is not None and r.requires_grad]
        torch.manual_seed(1)
        ends = [torch.randn(r.shape).to(r.dtype) for r in results]
        of = [leaf for leaf in leaves.values() if leaf.requires_grad]
        answers.append((results, torch.autograd.grad(results, of, ends)))
    for one, other in zip(
        answers[0][0] + [*answers[0][1]], answers[1][0] + [*answers[1][1]], strict=True
    ):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_compiled_buffers_are_written_and_keep_the_gradient() -> None:
    leaves = draw("residual", torch.device("cpu"), torch.float32)
    buffers = [torch.full(SHAPE, torch.nan) for _ in range(2)]

    @compiled
    def run(x: Tensor, weight: Tensor, residual: Tensor, out: Tensor, residual_out: Tensor) -> Any:
        return of_triton.rms_norm_fn(
            x, weight, None, residual, prenorm=True, out=out, residual_out=residual_out
        )

    results = run(**leaves, out=buffers[0], residual_out=buffers[1])
    expected = of_triton.rms_norm_fn(**leaves, bias=None, prenorm=True)
    for result, buffer, other in zip(results, buffers, expected, strict=True):
        assert torch.equal(result, other)
        assert torch.equal(buffer, other)
        assert not buffer.requires_grad
    got = torch.autograd.grad([r.sum() for r in results], list(leaves.values()))
    right = torch.autograd.grad([r.sum() for r in expected], list(leaves.values()))
    assert all(torch.equal(one, other) for one, other in zip(got, right, strict=True))


def test_compiled_dropout_applies_the_mask_it_returns() -> None:
    leaves = draw("", torch.device("cpu"), torch.float32)

    @compiled
    def run(x: Tensor, weight: Tensor) -> Any:
        return of_triton.rms_norm_fn(
            x, weight, None, dropout_p=0.5, prenorm=True, return_dropout_mask=True
        )

    _, total, mask, _ = run(**leaves)
    assert 0.3 < float(mask.float().mean()) < 0.7
    torch.testing.assert_close(total, leaves["x"] * mask * 2)
    (dx,) = torch.autograd.grad(total.sum(), leaves["x"])
    assert torch.equal(dx, mask * 2.0)


@pytest.mark.sweep
def test_compiled_for_many_numbers_of_rows_and_eps() -> None:
    function = torch.compile(
        lambda x, weight, eps: of_triton.rms_norm_fn(x, weight, None, eps=eps, prenorm=True),
        fullgraph=True,
        backend="aot_eager",
    )
    weight = torch.randn(8)
    for rows, eps in ((2, 1e-5), (3, 1e-6), (7, 1e-3)):
        x = torch.randn(rows, 8)
        expected = of_triton.rms_norm_fn(x, weight, None, eps=eps, prenorm=True)
        for one, other in zip(function(x, weight, eps), expected, strict=True):
            torch.testing.assert_close(one, other)
