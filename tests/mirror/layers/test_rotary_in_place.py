"""Rotary embedding in place where autograd has rules of its own: leaves, and views made at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_npu.layers import rotary
from tests.helpers.rotation_reference import assert_rounded_once, batch_positions, rotated, tables

ROTATIONS: dict[str, tuple[tuple[int, ...], int, Callable[..., Tensor]]] = {
    "qkv": ((2, 4, 3, 3, 8), 2, rotary.apply_rotary_emb_qkv_),
    "kv": ((2, 4, 2, 3, 8), 1, rotary.apply_rotary_emb_kv_),
    "module": ((2, 4, 3, 3, 8), 2, lambda x, c, s: rotary.RotaryEmbedding(8, device=x.device)(x)),
}


def turned(x: Tensor, cos: Tensor, sin: Tensor, conjugate: bool = False) -> Tensor:
    """x (batch, seqlen, ...) in float64, all of it rotated."""
    x = x.detach().cpu().double()
    positions = batch_positions(*x.shape[:2], 0)
    return rotated(x.flatten(0, 1), cos, sin, positions, False, conjugate).view_as(x)


@pytest.mark.parametrize("name", ROTATIONS)
def test_a_packed_leaf_is_rotated_where_it_lies(device: torch.device, name: str) -> None:
    shape, heads, rotate = ROTATIONS[name]
    cos, sin = tables(8, 4)
    if name == "module":
        made = rotary.RotaryEmbedding(8)
        made._update_cos_sin_cache(4)
        cos, sin = made._cos_cached, made._sin_cached
    leaf = torch.randn(shape, device=device, requires_grad=True)
    before = leaf.detach().clone()
    out = rotate(leaf, cos.to(device), sin.to(device))
    assert out.data_ptr() == leaf.data_ptr()
    assert_rounded_once(leaf[:, :, :heads], turned(before[:, :, :heads], cos, sin), 5.0)
    assert torch.equal(leaf[:, :, heads:], before[:, :, heads:])
    dout = torch.randn(shape).to(device)
    out.backward(dout)
    assert leaf.grad is not None
    assert_rounded_once(leaf.grad[:, :, :heads], turned(dout[:, :, :heads], cos, sin, True), 5.0)
    assert torch.equal(leaf.grad[:, :, heads:], dout[:, :, heads:])


def test_a_leaf_is_rotated_where_it_lies(device: torch.device) -> None:
    cos, sin = tables(8, 4)
    leaf = torch.randn(2, 4, 3, 8, device=device, requires_grad=True)
    before = leaf.detach().clone()
    out = rotary.apply_rotary_emb(leaf, cos.to(device), sin.to(device), inplace=True)
    assert out.data_ptr() == leaf.data_ptr()
    assert_rounded_once(leaf, turned(before, cos, sin), 5.0)
    dout = torch.randn(out.shape).to(device)
    out.backward(dout)
    assert leaf.grad is not None
    assert_rounded_once(leaf.grad, turned(dout, cos, sin, True), 5.0)


@pytest.mark.parametrize("parts", ["unbind", "chunk"])
def test_one_of_several_views(device: torch.device, parts: str) -> None:
    """q, k, v = qkv.unbind(2), then q and k in place: so do many models."""
    cos, sin = tables(8, 4)
    on_device = cos.to(device), sin.to(device)
    x = torch.randn(2, 4, 3, 2, 8, device=device, requires_grad=True)
    qkv = x * 1
    if parts == "unbind":
        q, k, v = qkv.unbind(2)
    else:
        q, k, v = (part.squeeze(2) for part in qkv.chunk(3, dim=2))
    q2 = rotary.apply_rotary_emb(q, *on_device, inplace=True)
    k2 = rotary.apply_rotary_emb(k, *on_device, inplace=True)
    assert q2.data_ptr() == q.data_ptr()
    assert_rounded_once(q2, turned(x[:, :, 0], cos, sin), 5.0)
    assert_rounded_once(k2, turned(x[:, :, 1], cos, sin), 5.0)
    douts = [torch.randn(2, 4, 2, 8).to(device) for _ in range(3)]
    torch.autograd.backward([q2, k2, v], douts)
    assert x.grad is not None
    for part, dout in enumerate(douts[:2]):
        assert_rounded_once(x.grad[:, :, part], turned(dout, cos, sin, True), 5.0)
    assert torch.equal(x.grad[:, :, 2], douts[2])


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.unflatten(-1, (2, 8))

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        return dout.flatten(-2)


def test_a_view_that_a_function_has_made(device: torch.device) -> None:
    cos, sin = tables(8, 4)
    x = torch.randn(2, 4, 16, device=device, requires_grad=True)
    heads = _Heads.apply(x * 1)
    out = rotary.apply_rotary_emb(heads, cos.to(device), sin.to(device), inplace=True)
    assert out.data_ptr() == heads.data_ptr()
    assert_rounded_once(out, turned(x.unflatten(-1, (2, 8)), cos, sin), 5.0)
    dout = torch.randn(out.shape).to(device)
    out.backward(dout)
    assert x.grad is not None
    assert_rounded_once(x.grad.unflatten(-1, (2, 8)), turned(dout, cos, sin, True), 5.0)


@pytest.mark.parametrize("rotary_dim", [8, 4])
def test_who_gets_a_new_tensor_may_write_to_it(device: torch.device, rotary_dim: int) -> None:
    cos, sin = tables(8, rotary_dim // 2)
    x = torch.randn(2, 4, 3, 8, device=device, requires_grad=True)
    out = rotary.apply_rotary_emb(x, cos.to(device), sin.to(device))
    out.mul_(2)
    assert_rounded_once(out.detach() / 2, turned(x, cos, sin), 5.0)
    out.sum().backward()
    assert x.grad is not None
    assert_rounded_once(x.grad / 2, turned(torch.ones_like(x), cos, sin, True), 5.0)


def test_a_view_of_a_leaf_is_rotated_where_it_lies(device: torch.device) -> None:
    cos, sin = tables(8, 4)
    leaf = torch.randn(2, 4, 24, device=device, requires_grad=True)
    before = leaf.detach().clone().unflatten(-1, (3, 8))
    heads = leaf.unflatten(-1, (3, 8))
    out = rotary.apply_rotary_emb(heads, cos.to(device), sin.to(device), inplace=True)
    assert out.data_ptr() == leaf.data_ptr()
    assert_rounded_once(out, turned(before, cos, sin), 5.0)
    dout = torch.randn(out.shape).to(device)
    out.backward(dout)
    assert leaf.grad is not None
    assert_rounded_once(leaf.grad.unflatten(-1, (3, 8)), turned(dout, cos, sin, True), 5.0)


IN_PLACE: dict[str, tuple[tuple[int, ...], int, Callable[..., Tensor]]] = {
    **{name: given for name, given in ROTATIONS.items() if name != "module"},
    "x": ((2, 4, 3, 8), 3, lambda x, c, s: rotary.apply_rotary_emb(x, c, s, inplace=True)),
}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("view", [False, True])
def test_compiled_a_leaf_is_rotated_where_it_lies(name: str, view: bool) -> None:
    shape, heads, rotate = IN_PLACE[name]
    cos, sin = tables(8, 4)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: rotate(x.view(shape), cos, sin), fullgraph=True, backend="aot_eager"
    )
    flat = torch.randn(2, 4, -(-torch.Size(shape).numel() // 8) if view else 1)
    leaf = (flat if view else torch.randn(shape)).requires_grad_()
    before = leaf.detach().clone().view(shape)
    out = compiled(leaf)
    turning = (slice(None), slice(None), slice(heads))
    staying = (slice(None), slice(None), slice(heads, None))
    for result in (out.detach(), leaf.detach().view(shape)):
        assert_rounded_once(result[turning], turned(before[turning], cos, sin), 5.0)
        assert torch.equal(result[staying], before[staying])
    dout = torch.randn(shape)
    out.backward(dout)
    assert leaf.grad is not None
    grad = leaf.grad.view(shape)
    assert_rounded_once(grad[turning], turned(dout[turning], cos, sin, True), 5.0)
    assert torch.equal(grad[staying], dout[staying])
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_a_view_of_what_was_computed_is_rotated_where_it_lies(
    name: str, backend: str
) -> None:
    """Whatever else reads the memory sees it, and what was there before gets its gradient."""
    shape, _, rotate = IN_PLACE[name]
    cos, sin = tables(8, 4)
    torch._dynamo.reset()

    def step(leaf: Tensor) -> tuple[Tensor, Tensor]:
        both = leaf * 2.0
        out = rotate(both[1], cos, sin)
        return both, out

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    start, weights = torch.randn(2, *shape), torch.randn(3, *shape)

    def answered(run: Callable[[Tensor], tuple[Tensor, Tensor]]) -> list[Tensor]:
        leaf = start.clone().requires_grad_()
        both, out = run(leaf)
        ((both * weights[:2]).sum() + (out * weights[2]).sum()).backward()
        assert leaf.grad is not None
        return [both.detach(), out.detach(), leaf.grad]

    got, want = answered(compiled), answered(step)
    torch.testing.assert_close(got, want)
    assert not torch.equal(got[0][1], 2.0 * start[1])
    torch._dynamo.reset()
