"""out and residual_out: results are written where they lie, and gradients survive that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from norm_cases import SHAPE, draw
from norm_reference import EPS, Options, judge
from torch import Tensor

from flash_attn_npu.errors import ArgumentError
from flash_attn_npu.ops.triton import layer_norm


def assert_same(got: Tensor, want: Tensor) -> None:
    """On an NPU a call with buffers is composed, and one without is fused."""
    if got.device.type == "cpu":
        assert torch.equal(got, want)
    else:
        torch.testing.assert_close(got, want)


ORDER = ("x", "weight", "bias", "residual", "x1", "weight1", "bias1")


def poisoned(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.full(SHAPE, torch.nan, device=device, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("wishes", ["bias", "bias residual:float32"])
@pytest.mark.parametrize("way", ["function", "class"])
def test_results_lie_in_the_buffers(
    device: torch.device, dtype: torch.dtype, wishes: str, way: str
) -> None:
    leaves = draw(wishes, device, dtype)
    total_dtype = leaves["residual"].dtype if "residual" in leaves else dtype
    out, residual_out = poisoned(device, dtype), poisoned(device, total_dtype)
    if way == "function":
        y, total = layer_norm.layer_norm_fn(
            **leaves, eps=EPS, prenorm=True, out=out, residual_out=residual_out
        )
    else:
        given = [leaves.get(name) for name in ORDER]
        options = (EPS, 0.0, None, True, False, False, False, False, None)
        y, total = layer_norm.LayerNormFn.apply(*given, *options, out, residual_out)
    for result, buffer in ((y, out), (total, residual_out)):
        assert result.data_ptr() == buffer.data_ptr()
        assert torch.equal(result, buffer)
        assert result.requires_grad
        assert not buffer.requires_grad
    judge({"y": y, "total": total}, leaves, Options(), total=total_dtype)


def test_a_buffer_may_be_part_of_a_larger_one(device: torch.device) -> None:
    leaves = draw("residual", device, torch.float32)
    whole = torch.full((3, 5, 64), torch.nan, device=device)
    y = layer_norm.rms_norm_fn(**leaves, bias=None, out=whole[..., 16:48])
    assert_same(whole[..., 16:48], layer_norm.rms_norm_fn(**leaves, bias=None))
    assert torch.equal(y, whole[..., 16:48])
    assert bool(whole[..., :16].isnan().all())
    assert bool(whole[..., 48:].isnan().all())


def test_residual_out_without_prenorm_is_written(device: torch.device) -> None:
    leaves = draw("residual:float32", device, torch.bfloat16)
    buffer = poisoned(device, torch.float32)
    y = layer_norm.rms_norm_fn(**leaves, bias=None, residual_out=buffer)
    assert_same(y, layer_norm.rms_norm_fn(**leaves, bias=None))
    assert torch.equal(buffer, leaves["x"].float() + leaves["residual"])


def test_buffers_serve_layer_after_layer(device: torch.device) -> None:
    out, residual_out = poisoned(device, torch.float32), poisoned(device, torch.float32)
    leaves = draw("", device, torch.float32)

    def two_layers(**buffers: Any) -> Tensor:
        y, total = layer_norm.rms_norm_fn(**leaves, bias=None, prenorm=True, **buffers)
        y, total = layer_norm.rms_norm_fn(
            torch.tanh(y), leaves["weight"], None, total * 2, prenorm=True, **buffers
        )
        return y + total

    expected = torch.autograd.grad(two_layers().square().sum(), list(leaves.values()))
    got = two_layers(out=out, residual_out=residual_out)
    found = torch.autograd.grad(got.square().sum(), list(leaves.values()))
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


def test_inputs_may_be_buffers_without_gradient(device: torch.device) -> None:
    leaves = {n: leaf.detach() for n, leaf in draw("residual", device, torch.bfloat16).items()}
    expected = layer_norm.rms_norm_fn(**leaves, bias=None, prenorm=True)
    x, residual = leaves["x"], leaves["residual"]
    layer_norm.rms_norm_fn(**leaves, bias=None, out=x, residual_out=residual)
    assert_same(x, expected[0])
    assert_same(residual, expected[1])


def test_an_overwritten_input_is_noticed() -> None:
    leaves = draw("", torch.device("cpu"), torch.float32)
    x = leaves["x"].detach()
    y = layer_norm.rms_norm_fn(x, leaves["weight"], None, out=x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_refused_buffers_are_not_written() -> None:
    leaves = draw("residual", torch.device("cpu"), torch.float32)
    out = poisoned(torch.device("cpu"), torch.float32)
    for other in (
        torch.empty(SHAPE, dtype=torch.float16),
        torch.empty(SHAPE[1:]),
        torch.empty(SHAPE, requires_grad=True),
        torch.empty(SHAPE[-1:]).expand(SHAPE),
        out,
    ):
        with pytest.raises(
            ArgumentError, match=r"^(residual_)?out: got .*; allowed: .*; to fix it: "
        ):
            layer_norm.rms_norm_fn(**leaves, bias=None, out=out, residual_out=other)
        with pytest.raises(
            ArgumentError, match=r"^(residual_)?out: got .*; allowed: .*; to fix it: "
        ):
            layer_norm.rms_norm_fn(**leaves, bias=None, out=other, residual_out=out)
    assert bool(out.isnan().all())
