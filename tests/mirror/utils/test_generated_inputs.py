"""`generate_qkv` and `generate_random_padding_mask`: what they pack, pad and promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flash_attn_npu as fa
from flash_attn_npu.errors import ArgumentError
from flash_attn_npu.utils.testing import generate_qkv, generate_random_padding_mask

BATCH, SEQLEN, HEADS, HEADDIM = 3, 6, 2, 4
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]]) > 0
UNUSED = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]) > 0
LENGTHS = [6, 2, 3]


def qkv() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(BATCH, SEQLEN, HEADS, HEADDIM) for _ in range(3)]


def cut(x: Tensor, lengths: list[int]) -> Tensor:
    return torch.cat([row[:length] for row, length in zip(x, lengths, strict=True)])


def test_plain() -> None:
    q, k, v = qkv()
    q_lengths = [6, 3, 3]
    out = generate_qkv(q, k, v, MASK, MASK, qv=v * 2, query_unused_mask=UNUSED)
    q_unpad, k_unpad, v_unpad, qv_unpad, cu_q, cu_k, used_q, used_k, longest_q, longest_k = out[:10]
    assert torch.equal(q_unpad, cut(q, q_lengths))
    assert torch.equal(qv_unpad, cut(v * 2, q_lengths))
    assert torch.equal(k_unpad, cut(k, LENGTHS))
    assert torch.equal(v_unpad, cut(v, LENGTHS))
    assert (cu_q.tolist(), cu_k.tolist()) == ([0, 6, 9, 12], [0, 6, 8, 11])
    assert (cu_q.dtype, cu_k.dtype) == (torch.int32, torch.int32)
    assert used_q.tolist() == used_k.tolist() == LENGTHS
    assert (longest_q, longest_k) == (6, 6)
    for given, returned in zip((q, k, v, v * 2), out[10:14], strict=True):
        assert torch.equal(given, returned)
    leaves = [q_unpad, k_unpad, v_unpad, *out[10:13]]
    assert all(x.requires_grad and x.is_leaf for x in leaves)
    assert not any(x.requires_grad for x in (qv_unpad, out[13]))
    pad_out, pad_dq, pad_dk = out[14:]
    assert torch.equal(pad_out(q_unpad), pad_dq(q_unpad))
    assert torch.equal(pad_dq(q_unpad), q * (MASK | UNUSED)[..., None, None])
    assert torch.equal(pad_dk(k_unpad[..., 0]), k[..., 0] * MASK[..., None])


def test_without_masks_every_row_is_a_token() -> None:
    q, k, v = qkv()
    out = generate_qkv(q, k[:, :4], v[:, :4])
    assert torch.equal(out[0], q.flatten(0, 1))
    assert (out[4].tolist(), out[5].tolist()) == ([0, 6, 12, 18], [0, 4, 8, 12])
    assert out[3] is out[6] is out[7] is out[13] is None
    assert out[8:10] == (6, 4)
    assert torch.equal(out[14](out[0]), q)


@pytest.mark.parametrize("kvpacked", [False, True])
def test_packed(kvpacked: bool) -> None:
    q, k, v = qkv()
    out = generate_qkv(q, k, v, MASK, MASK, kvpacked=kvpacked, qkvpacked=not kvpacked)
    if kvpacked:
        q_unpad, kv_unpad, cu_q, cu_k, longest_q, longest_k, q_out, kv, *pads = out
        assert torch.equal(q_unpad, cut(q, LENGTHS))
        assert torch.equal(q_out, q)
        assert (longest_q, longest_k, cu_q.tolist()) == (6, 6, cu_k.tolist())
        packed, whole, stacked = kv_unpad, kv, torch.stack((k, v), 2)
        assert torch.equal(pads[1](q_unpad), q * MASK[..., None, None])
    else:
        packed, cu_seqlens, longest, whole, *pads = out
        assert (longest, cu_seqlens.tolist()) == (6, [0, 6, 8, 11])
        stacked = torch.stack((q, k, v), 2)
    assert torch.equal(packed, cut(stacked, LENGTHS))
    assert torch.equal(whole, stacked)
    assert torch.equal(pads[-1](packed), stacked * MASK[..., None, None, None])
    assert packed.is_leaf
    assert packed.requires_grad


def test_serves_the_functions_it_is_made_for(device: torch.device) -> None:
    q, k, v = (x.to(device) for x in qkv())
    mask = MASK.to(device)
    packed, cu_seqlens, longest, whole, pad_out, pad_grad = generate_qkv(
        q, k, v, mask, mask, qkvpacked=True
    )
    out = fa.flash_attn_varlen_qkvpacked_func(packed, cu_seqlens, longest, causal=True)
    (grad,) = torch.autograd.grad(out.sum(), packed)
    assert pad_out(out).shape == (BATCH, SEQLEN, HEADS, HEADDIM)
    # with causal alone, tokens at the front never see the padding behind them
    dense = fa.flash_attn_qkvpacked_func(whole, causal=True)
    kept = mask[..., None, None]
    torch.testing.assert_close(pad_out(out), dense * kept)
    (dense_grad,) = torch.autograd.grad((dense * kept).sum(), whole)
    torch.testing.assert_close(pad_grad(grad), dense_grad)


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("kvpacked", {"kvpacked": True, "qkvpacked": True}),
        ("key_padding_mask", {"qkvpacked": True, "query_padding_mask": MASK}),
        ("v", {"kvpacked": True}),
    ],
)
def test_bad_packing_is_named(argument: str, options: dict[str, Any]) -> None:
    q, k, v = qkv()
    with pytest.raises(ArgumentError, match=f"^{argument}: got .*; allowed: .*; to fix it: "):
        generate_qkv(q, k, v[..., :2] if argument == "v" else v, **options)


@pytest.mark.parametrize(("mode", "least"), [("full", 40), ("random", 20), ("third", 13)])
@pytest.mark.parametrize("zero_lengths", [False, True])
def test_random_masks(mode: str, least: int, zero_lengths: bool, device: torch.device) -> None:
    torch.manual_seed(0)
    mask = generate_random_padding_mask(40, 64, device, mode, zero_lengths)
    assert (mask.shape, mask.dtype, mask.device) == ((64, 40), torch.bool, device)
    mask = mask.cpu()
    lengths = mask.sum(-1)
    assert torch.equal(mask, torch.arange(40) < lengths[:, None])
    empty = torch.arange(64) % 5 == 0
    empty[-1] = True
    assert (lengths == 0).tolist() == (empty if zero_lengths else empty & False).tolist()
    drawn = lengths[lengths > 0]
    assert least <= drawn.min() <= least + 3
    assert 37 <= drawn.max() <= 40


def test_short_sequences_keep_a_token() -> None:
    assert generate_random_padding_mask(2, 50, "cpu").any(-1).all()
    with pytest.raises(ArgumentError, match=r"^mode: got 'half'; allowed: full, random, third"):
        generate_random_padding_mask(2, 2, "cpu", "half")
