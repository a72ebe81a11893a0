"""Clients of FlashAttention 3, imitated: how they find it, and with which arguments they call."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import flash_attn_npu
from tests.helpers.fa3_reference import attention, dense, varlen

H, HK, D = 4, 2, 16


@pytest.fixture(autouse=True)
def asked_for() -> Iterator[None]:
    with flash_attn_npu.install(fa3=True):
        yield


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Pool:
    """A pool of one-position pages with two requests in it, as sglang keeps it."""

    def __init__(self) -> None:
        self.k, self.v = normal(32, HK, D), normal(32, HK, D)
        self.lengths = torch.tensor([9, 5], dtype=torch.int32)
        self.table = torch.randperm(32, dtype=torch.int32)[:18].view(2, 9)
        self.cu_k = torch.tensor([0, 9, 14], dtype=torch.int32)

    def expected(self, q: Tensor, cu_q: list[int], **options: object) -> tuple[Tensor, Tensor]:
        rows = [self.table[i, : self.lengths[i]].long() for i in range(2)]
        found = [
            attention(q[cu_q[i] : cu_q[i + 1]], self.k[rows[i]], self.v[rows[i]], **options)
            for i in range(2)
        ]
        return torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found], -1)


@pytest.mark.parametrize("cu_q", [[0, 4, 7], [0, 1, 2]], ids=["extend", "decode"])
@pytest.mark.parametrize("window", [(-1, -1), (3, 0)])
def test_sglang(cu_q: list[int], window: tuple[int, int]) -> None:
    from flash_attn_interface import flash_attn_with_kvcache

    pool, q = Pool(), normal(cu_q[-1], H, D)
    out, lse, *rest = flash_attn_with_kvcache(
        q=q.contiguous().view(-1, H, D),
        k_cache=pool.k.view(-1, 1, HK, D),
        v_cache=pool.v.view(-1, 1, HK, D),
        page_table=pool.table,
        cache_seqlens=pool.lengths,
        cu_seqlens_q=torch.tensor(cu_q, dtype=torch.int32),
        cu_seqlens_k_new=pool.cu_k,
        max_seqlen_q=max(cu_q[1], cu_q[2] - cu_q[1]),
        softmax_scale=0.3,
        causal=True,
        window_size=window,
        softcap=0.0,
        k_descale=None,
        v_descale=None,
        return_softmax_lse=True,
        num_splits=0,
    )
    expected = pool.expected(q, cu_q, softmax_scale=0.3, causal=True, window_size=window)
    torch.testing.assert_close((out, lse), expected)
    assert len(rest) == 2


def test_vllm_with_metadata_made_before() -> None:
    from flash_attn_3.flash_attn_interface import flash_attn_with_kvcache, get_scheduler_metadata

    pool, cu_q = Pool(), [0, 4, 7]
    q, starts = normal(7, H, D), torch.tensor(cu_q, dtype=torch.int32)
    metadata = get_scheduler_metadata(
        batch_size=2,
        max_seqlen_q=4,
        max_seqlen_k=9,
        num_heads_q=H,
        num_heads_kv=HK,
        headdim=D,
        cache_seqlens=pool.lengths,
        qkv_dtype=torch.bfloat16,
        cu_seqlens_q=starts,
        page_size=1,
        causal=True,
        window_size=(-1, -1),
        num_splits=0,
    )
    # copied into a buffer that a graph reads
    buffer = torch.zeros(3, dtype=torch.int32)
    buffer[: metadata.shape[0]] = metadata
    out = flash_attn_with_kvcache(
        q,
        pool.k.view(-1, 1, HK, D),
        pool.v.view(-1, 1, HK, D),
        cache_seqlens=pool.lengths,
        page_table=pool.table,
        cu_seqlens_q=starts,
        max_seqlen_q=4,
        causal=True,
        scheduler_metadata=buffer[: metadata.shape[0]],
    )
    torch.testing.assert_close(out, pool.expected(q, cu_q, causal=True)[0])


def test_diffusers() -> None:
    assert importlib.util.find_spec("flash_attn_interface") is not None
    from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

    q, k, v = normal(2, 6, H, D), normal(2, 6, H, D), normal(2, 6, H, D)
    out, lse, *_ = flash_attn_func(
        q=q,
        k=k,
        v=v,
        softmax_scale=None,
        causal=False,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        return_attn_probs=True,
    )
    expected = dense(q, k, v)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(lse.permute(0, 2, 1), expected[1].permute(0, 2, 1))
    cu = torch.tensor([0, 6, 12], dtype=torch.int32)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    out = flash_attn_varlen_func(
        *flat, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=6, max_seqlen_k=6
    )
    torch.testing.assert_close(out.unflatten(0, (2, -1)), expected[0])


def test_transformers_builds_its_arguments_from_our_signatures() -> None:
    flash = pytest.importorskip("transformers.modeling_flash_attention_utils")
    from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

    process = flash._lazy_define_process_function(flash_attn_varlen_func)
    arguments = process(
        query_length=9,
        key_length=9,
        is_causal=True,
        dropout=0.0,
        softmax_scale=0.25,
        sliding_window=3,
        softcap=0.9,
        deterministic=True,
    )
    assert {"causal", "window_size", "softcap", "deterministic"} <= set(arguments)
    assert "dropout_p" not in arguments
    q, k, v = normal(9, H, D), normal(9, HK, D), normal(9, HK, D)
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    expected = varlen(
        q, k, v, cu, cu, softmax_scale=0.25, causal=True, window_size=(2, 2), softcap=0.9
    )[0]
    found = flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=5, max_seqlen_k=5, **arguments
    )
    torch.testing.assert_close(found, expected)
    out = flash_attn_func(q[None], k[None], v[None], **arguments)
    torch.testing.assert_close(
        out[0],
        attention(q, k, v, softmax_scale=0.25, causal=True, window_size=(2, 2), softcap=0.9)[0],
    )
