"""Clients that serve models: vLLM, xformers, unsloth."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import pytest
import torch
from packaging.version import Version

from tests.helpers.client_references import (
    assert_gives,
    assert_gradients,
    assert_lse,
    attention,
    packed,
    rotated,
    tables,
)
from tests.helpers.probes import cumulative, randn

pytestmark = pytest.mark.usefixtures("flash_attn")

SCALE = 0.25


def test_vllm(device: torch.device) -> None:
    """vllm/model_executor/layers/rotary_embedding/common.py: apply_rotary, imported because
    find_spec finds flash_attn; in float32, and for packed tokens as a batch of one."""
    assert importlib.util.find_spec("flash_attn") is not None
    assert importlib.util.find_spec("flash_attn.ops.triton.rotary") is not None
    from flash_attn.ops.triton.rotary import apply_rotary

    t = randn(device, 2, 5, 2, 16)
    cos, sin = (x.to(device) for x in tables(5, 16))
    output = apply_rotary(t.float(), cos, sin)
    assert output.dtype == torch.float32
    assert_gives(output, rotated, t.float(), cos, sin)
    for neox in (True, False):
        turned = apply_rotary(t[0].unsqueeze(0), cos, sin, interleaved=not neox).squeeze(0)
        assert_gives(turned, rotated, t[0], cos, sin, interleaved=not neox)


def test_xformers(device: torch.device, flash_attn: ModuleType) -> None:
    """xformers/ops/fmha/flash.py: a range of versions, then the extension by position."""
    assert Version("2.7.1") <= Version(flash_attn.__version__) <= Version("2.8.4")
    from flash_attn import flash_attn_interface

    if hasattr(flash_attn_interface, "flash_attn_cuda"):
        pytest.fail("the name of older versions, which would be taken")
    extension = flash_attn_interface.flash_attn_gpu

    q, k, v, dout = (randn(device, 2, 4, 2, 16) for _ in "qkvd")
    out, lse, _, rng_state = extension.fwd(
        q, k, v, None, None, 0.0, SCALE, True, -1, -1, 0.0, False, None
    )
    assert_gives(out, attention, q, k, v, causal=True)
    assert_lse(lse, q, k, v, causal=True)
    grads = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    extension.bwd(
        dout, q, k, v, out, lse, *grads, None, 0.0, SCALE, True, -1, -1, 0.0, False, None, rng_state
    )
    assert_gradients(grads, dout, attention, q, k, v, causal=True)

    lengths, cu_seqlens = [5, 3], cumulative([5, 3], device)
    q, k, v, dout = (x.flatten(0, 1) for x in (q, k, v, dout))
    out, lse, _, rng_state = extension.varlen_fwd(
        q, k, v, None, cu_seqlens, cu_seqlens, None, None, None, None, 5, 5, 0.0, SCALE, False,
        True, -1, -1, 0.0, False, None,
    )  # fmt: skip
    assert_gives(out, packed, q, k, v, lengths_q=lengths, causal=True)
    assert_lse(lse, q, k, v, lengths=lengths, causal=True)
    # the gradients of what was one tensor go into one tensor
    chunk = torch.full((8, 3, 2, 16), torch.nan, device=device, dtype=q.dtype)
    extension.varlen_bwd(
        dout, q, k, v, out, lse, *chunk.unbind(1), cu_seqlens, cu_seqlens, None, 5, 5, 0.0, SCALE,
        False, True, -1, -1, 0.0, False, None, rng_state,
    )  # fmt: skip
    assert_gradients(chunk.unbind(1), dout, packed, q, k, v, lengths_q=lengths, causal=True)


def test_unsloth(device: torch.device, flash_attn: ModuleType) -> None:
    """unsloth/models/_utils.py: whether the extension imports, and whether softcap is there by the
    version; Gemma 2 with both a softcap and a window."""
    try:
        from flash_attn.flash_attn_interface import flash_attn_gpu

        has_flash_attention = hasattr(flash_attn_gpu, "fwd")
    except ImportError:
        has_flash_attention = False
    assert has_flash_attention
    assert Version(flash_attn.__version__) >= Version("2.6.3")
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    q, k, v = (randn(device, 2, heads, 6, 16).transpose(1, 2) for heads in (4, 2, 2))
    options: dict[str, Any] = {"causal": True, "softmax_scale": SCALE}
    options |= {"softcap": 5.0, "window_size": (3, 3)}
    out = flash_attn_func(q, k, v, **options)
    assert_gives(out.reshape(2, 6, 64).view(q.shape), attention, q, k, v, **options)
    rows = [x.flatten(0, 1) for x in (q, k, v)]
    cu_seqlens = cumulative([6, 6], device)
    out = flash_attn_varlen_func(*rows, cu_seqlens, cu_seqlens, 6, 6, causal=True)
    assert_gives(out, packed, *rows, lengths_q=[6, 6], causal=True)
