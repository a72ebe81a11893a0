"""In place means in place: a work space of fixed size, and no write that would be wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from flash_attn_npu._core.rowwise import rotation
from flash_attn_npu._core.table import choice
from flash_attn_npu.errors import ArgumentError
from flash_attn_npu.layers import rotary
from flash_attn_npu.ops.triton.rotary import apply_rotary
from tests.helpers.peak_bytes import PeakBytes
from tests.helpers.rotation_reference import assert_rounded_once, batch_positions, rotated, tables


def test_the_count_of_bytes_sees_what_is_held_and_what_is_dropped() -> None:
    x = torch.ones(1 << 10)
    with PeakBytes() as bytes_of:
        for _ in range(3):
            y = x * 2
            z = y.view(-1) + 1
            del y, z
    assert bytes_of.peak == 2 * x.nbytes


LARGE: dict[str, tuple[tuple[int, ...], Callable[..., Any]]] = {
    "x": ((2, 2048, 16, 256), lambda x, c, s: rotary.apply_rotary_emb(x, c, s, inplace=True)),
    "back": (
        (2, 2048, 16, 256),
        lambda x, c, s: apply_rotary(x.detach(), c, s, inplace=True, conjugate=True),
    ),
    "one head": (
        (16, 16384, 1, 64),
        lambda x, c, s: rotary.apply_rotary_emb(x, c, s, inplace=True),
    ),
    "offsets": (
        (16, 16384, 1, 64),
        lambda x, c, s: rotary.apply_rotary_emb(
            x, c, s, seqlen_offsets=torch.arange(16), inplace=True
        ),
    ),
    "packed": (
        (1 << 18, 1, 64),
        lambda x, c, s: rotary.apply_rotary_emb(
            x, c, s, cu_seqlens=torch.arange(0, (1 << 18) + 1, 1 << 12), inplace=True
        ),
    ),
    "qkv": ((2, 2048, 3, 8, 176), rotary.apply_rotary_emb_qkv_),
    "kv": ((2, 2048, 2, 12, 176), rotary.apply_rotary_emb_kv_),
    "module": ((2, 2048, 3, 8, 176), lambda x, c, s: rotary.RotaryEmbedding(64)(x)),
}


def at_once(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    """Let no kernel be given more elements than these at a time."""

    def choose(problem: Any, _: Any) -> Any:
        found = choice.choose(problem)
        return replace(found, kernel=found.kernel._replace(at_once=elements))

    monkeypatch.setattr(rotation, "choose", choose)
    monkeypatch.setattr(rotation, "recall", lambda key: None)


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("leaf", [False, True])
def test_in_place_takes_a_work_space_of_fixed_size(name: str, leaf: bool) -> None:
    shape, rotate = LARGE[name]
    x = torch.ones(shape, dtype=torch.bfloat16).requires_grad_(leaf)
    assert x.nbytes > 30 << 20
    cos, sin = tables(1 << 15, 32, torch.bfloat16)
    # a chunk of 2**17 elements: its float32 parts, several times over, and its part of the tables
    with pytest.MonkeyPatch.context() as patched, PeakBytes() as bytes_of:
        at_once(patched, 1 << 17)
        out = rotate(x, cos, sin)
    assert out.data_ptr() == x.data_ptr()
    assert bytes_of.peak < 6 << 20


def test_on_a_card_too(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once(monkeypatch, 1 << 14)
    x = torch.ones(2, 256, 8, 64, dtype=torch.bfloat16, device=npu)
    cos, sin = (t.to(npu) for t in tables(256, 32, torch.bfloat16))
    with PeakBytes() as bytes_of:
        apply_rotary(x, cos, sin, inplace=True)
    assert bytes_of.peak < x.nbytes


@pytest.mark.parametrize("limit", [1, 40, 100, 1000])
@pytest.mark.parametrize(("inplace", "back"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("kind", ["dense", "offsets", "packed"])
def test_blocks_of_tokens_make_no_difference(
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
    inplace: bool,
    back: bool,
    kind: str,
) -> None:
    at_once(monkeypatch, limit)
    cos, sin = tables(16, 4, torch.float32)
    x = torch.randn(3, 5, 2, 10)
    options: dict[str, Any] = {"seqlen_offsets": 4}
    positions = batch_positions(3, 5, 4)
    if kind == "offsets":
        options = {"seqlen_offsets": torch.tensor([2, 0, 7])}
        positions = [start + i for start in (2, 0, 7) for i in range(5)]
    elif kind == "packed":
        lengths, starts = (0, 6, 0, 8, 1), torch.tensor([9, 1, 3, 2, 5])
        x = x.flatten(0, 1)
        cumulative = torch.tensor([0, *lengths]).cumsum(0)
        options = {"seqlen_offsets": starts, "cu_seqlens": cumulative.to(device)}
        sequences = zip(starts.tolist(), lengths, strict=True)
        positions = [start + i for start, length in sequences for i in range(length)]
    on_device = x.clone().to(device)
    out = apply_rotary(
        on_device, cos.to(device), sin.to(device), inplace=inplace, conjugate=back, **options
    )
    want = rotated(x.double().view(15, 2, 10), cos, sin, positions, False, back)
    assert_rounded_once(out.view(15, 2, 10), want, 5.0)
    assert (out is on_device) == inplace


OVERLAPPING = {
    "expanded": torch.ones(1, 4, 3, 8).expand(2, 4, 3, 8),
    "windows": torch.ones(100).as_strided((2, 4, 3, 8), (24, 8, 8, 1)),
}


@pytest.mark.parametrize("layout", OVERLAPPING)
def test_overlapping_elements_are_refused(layout: str) -> None:
    cos, sin = tables(8, 4)
    x = OVERLAPPING[layout]
    qkv = x[:, :, None].expand(2, 4, 3, 3, 8)
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("x", lambda: apply_rotary(x, cos, sin, inplace=True)),
        ("x", lambda: rotary.apply_rotary_emb(x, cos, sin, inplace=True)),
        ("qkv", lambda: rotary.apply_rotary_emb_qkv_(qkv, cos, sin)),
        ("kv", lambda: rotary.apply_rotary_emb_kv_(qkv[:, :, :2], cos, sin)),
    ]
    for name, call in calls:
        with pytest.raises(ArgumentError, match=f"^{name}: got shape .* with strides .*; to fix"):
            call()
    assert x.eq(1).all()


def test_places_that_interleave_without_meeting_are_written() -> None:
    cos, sin = tables(8, 1)
    x = torch.zeros(16).as_strided((2, 3, 1, 2), (6, 4, 1, 1))
    x.copy_(torch.randn(2, 3, 1, 2))
    want = apply_rotary(x, cos, sin)
    assert torch.equal(apply_rotary(x, cos, sin, inplace=True), want)


def test_nothing_is_written_before_all_is_checked() -> None:
    module = rotary.RotaryEmbedding(8)
    with torch.inference_mode():
        made_in_inference = torch.ones(2, 4, 2, 3, 8)
    for kv in (
        made_in_inference,
        torch.ones(1, 4, 2, 3, 8).expand(2, 4, 2, 3, 8),
        torch.ones(2, 4, 2, 3, 8).to_sparse(),
    ):
        q = torch.ones(2, 4, 3, 8)
        with pytest.raises(ArgumentError, match=r"^kv: got "):
            module(q, kv)
        assert torch.equal(q, torch.ones_like(q))
