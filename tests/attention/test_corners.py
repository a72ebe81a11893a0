"""Corners that once gave a wrong number, or an error after something had been written."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import flash_attn_npu
from flash_attn_npu import attention_forward_varlen, flash_attn_func, flash_attn_varlen_func
from flash_attn_npu import flash_attn_interface as interface
from flash_attn_npu._core.ground.memory import forget_all
from flash_attn_npu.errors import ArgumentError, UnsupportedError
from tests.helpers import reference


def tensor(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device)


def test_the_fused_alibi_starts_at_the_first_query_that_sees_a_key(
    npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flash_attn_npu._core.ground.settings._alibi_offset", True)
    forget_all()
    cu_q, cu_k = ([0, *accumulate(lengths)] for lengths in ([5, 6], [3, 4]))
    q, k, slopes = tensor(npu, 11, 2, 8), tensor(npu, 7, 2, 8), torch.tensor([0.3, 0.9]).to(npu)
    out = flash_attn_varlen_func(q, k, k, cu_q, cu_k, 6, 4, causal=True, alibi_slopes=slopes)
    exact = reference.varlen(
        q.cpu(), k.cpu(), k.cpu(), cu_q, cu_k, max_seqlen_k=4, causal=True,
        alibi_slopes=slopes.cpu(),
    )  # fmt: skip
    forget_all()
    assert (out.cpu() - exact.out).abs().max() < 1e-6


# torch's own, when it loads its forward-mode rules
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_forward_mode_derivatives_are_refused(device: torch.device) -> None:
    q = tensor(device, 1, 4, 2, 8)
    with pytest.raises(UnsupportedError, match="q: got a tensor with a forward-mode tangent"):
        torch.func.jvp(lambda x: flash_attn_func(x, q, q), (q,), (torch.ones_like(q),))


@pytest.mark.parametrize("part", ["leftpad_k", "seqused_k"])
def test_the_low_level_operator_has_no_gradient_for_parts_of_the_keys(
    device: torch.device, part: str
) -> None:
    q = tensor(device, 6, 2, 8).requires_grad_()
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)
    parts: dict[str, Any] = {part: torch.tensor([1, 2], dtype=torch.int32)}
    out, *_ = interface._flash_attn_varlen_forward(q, q, q, cu, cu, 4, 4, 0.0, 0.3, False, **parts)
    with pytest.raises(UnsupportedError, match=f"{part}: got a backward"):
        out.sum().backward()


def test_a_traced_call_leaves_no_fake_mask_behind(npu: torch.device) -> None:
    forget_all()
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(tensor(npu, 6, 2, 8))
        attention_forward_varlen(fake, fake, fake, [0, 6], [0, 6], causal=True)
    q = tensor(npu, 6, 2, 8)
    assert attention_forward_varlen(q, q, q, [0, 6], [0, 6], causal=True).isfinite().all()


def test_keys_without_query_heads_get_zero_gradients(device: torch.device) -> None:
    q = torch.empty(1, 4, 0, 8, device=device)
    k = tensor(device, 1, 4, 2, 8).requires_grad_()
    flash_attn_func(q, k, k).sum().backward()
    assert torch.equal(k.grad, torch.zeros_like(k))


def test_a_wrong_out_is_refused_before_the_cache_is_written(device: torch.device) -> None:
    q, new = tensor(device, 1, 1, 2, 16), tensor(device, 1, 1, 2, 16)
    cache = torch.zeros(1, 32, 2, 16, device=device)
    lengths = torch.tensor([3], dtype=torch.int32)
    with pytest.raises(ArgumentError, match=r"^out: got .*to fix it"):
        interface.flash_attn_gpu.fwd_kvcache(
            q, cache, cache.clone(), new, new, lengths, None, None, None, None, None, None,
            torch.empty(1, 1, 2, 8, device=device), 0.3, False, -1, -1, 0.0, True,
        )  # fmt: skip
    assert not cache.any()


def test_a_backward_checks_devices_before_it_writes(npu: torch.device) -> None:
    q = tensor(npu, 1, 4, 2, 8)
    lse = torch.zeros(1, 2, 4, device=npu)
    grads = [torch.ones_like(q) for _ in range(3)]
    with pytest.raises(ArgumentError, match=r"^dout: got .* on cpu"):
        interface._flash_attn_backward(
            q.cpu(), q, q, q, q, lse, *grads, 0.0, 0.3, False, -1, -1, 5.0, None, False
        )
    assert all(bool((grad == 1).all()) for grad in grads)


def test_scores_that_are_all_minus_infinity_count_as_no_key() -> None:
    q = torch.ones(1, 2, 1, 8)
    k = torch.full((1, 3, 1, 8), -torch.inf)
    out, lse, _ = flash_attn_func(q, k, torch.ones(1, 3, 1, 8), return_attn_probs=True)
    assert not out.any()
    assert torch.equal(lse, torch.full((1, 1, 2), torch.inf))


def test_lengths_on_the_host_are_read_at_every_call() -> None:
    x = torch.randn(2, 4, 8)
    packed, _, cu, longest, _ = flash_attn_npu.bert_padding.unpad_input(
        x, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    )
    q = packed.unsqueeze(1)
    before = flash_attn_varlen_func(q, q, q, cu, cu, longest, longest)
    cu.numpy()[1] = 2  # a write that PyTorch does not see
    after = flash_attn_varlen_func(q, q, q, cu, cu, longest, longest)
    assert not torch.equal(before, after)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"dropout_p": 0.5}], ids=str)
@pytest.mark.parametrize(("heads", "headdim"), [((4, 2), 0), ((0, 0), 8)])
def test_heads_without_numbers(
    device: torch.device, heads: tuple[int, int], headdim: int, options: dict[str, float]
) -> None:
    q, k = (torch.ones(2, 6, count, headdim).to(device).requires_grad_() for count in heads)
    out = flash_attn_func(q, k, k, causal=True, **options)
    out.sum().backward()
    assert out.shape == q.shape
    assert q.grad is not None
