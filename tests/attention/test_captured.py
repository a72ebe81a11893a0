"""What is remembered while a graph of the device is captured: nothing made for it outlives it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flash_attn_npu import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn_npu._core.ground.memory import held, memos, snapshot

HALF = torch.float16


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch, npu: torch.device) -> Callable[[bool], None]:
    """Say whether a capture is on: the simulated card has none of its own."""

    def capture(on: bool) -> None:
        monkeypatch.setattr(torch.npu, "is_current_stream_capturing", lambda: on, raising=False)

    return capture


def drawn(device: torch.device, *shape: int) -> list[Tensor]:
    return [torch.randn(3, *shape).to(device, HALF)[i] for i in range(3)]


def dense(device: torch.device) -> Tensor:
    q, k, v = drawn(device, 2, 20, 4, 64)
    return flash_attn_func(q[:, :7], k, v, causal=True, window_size=(3, 1))


def blind(device: torch.device) -> Tensor:
    q, k, v = drawn(device, 2, 20, 4, 64)
    return flash_attn_func(q, k[:, :7], v[:, :7], causal=True)


def packed(device: torch.device) -> Tensor:
    q, k, v = drawn(device, 20, 4, 64)
    cu = torch.tensor([0, 9, 20], dtype=torch.int32)
    return flash_attn_varlen_func(q, k, v, cu, cu, 11, 11, causal=True)


def unpaged(device: torch.device) -> Tensor:
    q, k, v = drawn(device, 2, 32, 4, 64)
    return flash_attn_with_kvcache(q[:, :1], k, v, k[:, :1], v[:, :1], cache_seqlens=9)


@pytest.mark.parametrize("call", [dense, blind, packed, unpaged])
def test_no_tensor_that_is_made_in_a_capture_is_kept(
    call: Callable[[torch.device], Tensor], capture: Callable[[bool], None], npu: torch.device
) -> None:
    """Its values come with the first replay, and its memory goes with the graph."""
    capture(True)
    call(npu)
    assert not {memo.name for memo in memos() if memo.nbytes is not None and len(memo)}
    capture(False)
    torch.manual_seed(0)
    call(npu)
    assert any(held(value) for memo in memos() for _, value in snapshot(memo._known))


def test_a_capture_that_holds_lengths_says_so_once(
    capture: Callable[[bool], None], npu: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    q, k, v = drawn(npu, 2, 32, 4, 64)
    lengths = torch.tensor([9, 5], dtype=torch.int32, device=npu)

    def decoded() -> Tensor:
        return flash_attn_with_kvcache(q[:, :1], k, v, cache_seqlens=lengths)

    def told() -> list[str]:
        return [m for m in caplog.messages if "a graph is captured" in m]

    want = decoded()
    assert not told()
    capture(True)
    for _ in range(2):
        assert torch.equal(decoded(), want)
    (message,) = told()
    assert "lengths and block tables of a cache" in message
