"""Rotations while torch_npu compiles operators just in time, which its older ones then serve."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import flash_attn_npu
from flash_attn_npu.layers.rotary import apply_rotary_emb
from tests.helpers.rotation_reference import batch_positions, rotated

COLUMNS = {"pairs of 128": (128, True), "halves of 64": (64, False)}


@pytest.fixture(autouse=True)
def just_in_time(npu: torch.device) -> Iterator[None]:
    torch.npu.set_compile_mode(jit_compile=True)
    yield
    torch.npu.set_compile_mode(jit_compile=False)


def draw(rotary_dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    angles = torch.rand(5, rotary_dim // 2) * 6.3
    return torch.randn(2, 5, 3, rotary_dim), angles.cos(), angles.sin()


def turned(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, back: bool = False
) -> torch.Tensor:
    positions = batch_positions(*x.shape[:2], 0)
    return rotated(x.flatten(0, 1), cos, sin, positions, interleaved, back).view(x.shape)


@pytest.mark.parametrize("name", COLUMNS)
def test_what_they_do_not_take_is_composed_and_says_why(name: str, npu: torch.device) -> None:
    rotary_dim, interleaved = COLUMNS[name]
    given = draw(rotary_dim)
    with flash_attn_npu.reporting() as report:
        x = given[0].to(npu).requires_grad_()
        out = apply_rotary_emb(x, *(t.to(npu) for t in given[1:]), interleaved=interleaved)
        out.backward(torch.ones_like(out))
    kernels = {entry.kernel for entry in report.tallies}
    assert kernels == {"torch"}
    assert all("jit_compile=True" in "".join(entry.reasons) for entry in report.tallies)
    torch.testing.assert_close(out.cpu().double(), turned(*given, interleaved), rtol=0, atol=1e-5)
    back = turned(torch.ones_like(given[0]), *given[1:], interleaved, back=True)
    torch.testing.assert_close(x.grad.cpu().double(), back, rtol=0, atol=1e-5)


def test_what_they_take_is_fused_and_the_mode_is_asked_at_every_call(npu: torch.device) -> None:
    halves, whole = (tuple(t.to(npu) for t in draw(width)) for width in (128, 64))
    found = []
    for mode in (True, False, True):
        torch.npu.set_compile_mode(jit_compile=mode)
        with flash_attn_npu.reporting() as report:
            apply_rotary_emb(*halves)
            apply_rotary_emb(*whole)
        found.append(sorted(entry.kernel for entry in report.tallies))
    assert found == [["npu_rotary_mul", "torch"], ["npu_rotary_mul"], ["npu_rotary_mul", "torch"]]


def test_the_operator_itself_refuses_pairs(npu: torch.device) -> None:
    """The test of the test."""
    import torch_npu

    x = torch.randn(1, 5, 2, 128).to(npu)
    with pytest.raises(RuntimeError, match="half"):
        torch_npu.npu_rotary_mul(x, x[:, :, :1], x[:, :, :1], rotary_mode="interleave")
