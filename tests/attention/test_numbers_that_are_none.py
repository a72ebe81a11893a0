"""NaN and infinity in q, k and v: where a query sees them, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flash_attn_npu._flash_attn_3.flash_attn_interface as flash_attn_3
from flash_attn_npu import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from tests.helpers.one_thread import one_thread

NAN = float("nan")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("keys", [3, 15, 16, 40])
@pytest.mark.parametrize("heads_k", [2, 1])
def test_a_row_of_nan_is_nan(dtype: torch.dtype, keys: int, heads_k: int) -> None:
    q = torch.randn(1, keys, 2, 64, dtype=dtype)
    q[0, -1] = NAN
    k, v = torch.randn(2, 1, keys, heads_k, 64, dtype=dtype)
    for options in ({}, {"causal": True}, {"window_size": (2, 0)}):
        out = flash_attn_func(q, k, v, **options)
        assert out[0, -1].isnan().all()
        assert out[0, :-1].isfinite().all()
    out = flash_attn_func(q.requires_grad_(), k, v)
    assert out[0, -1].isnan().all()
    assert flash_attn_with_kvcache(q[:, -1:].detach(), k, v, cache_seqlens=keys).isnan().all()


@pytest.mark.parametrize("bad", [NAN, float("inf")])
@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 20.0},
        {"dropout_p": 1e-3},
        {"softcap": 20.0, "alibi_slopes": torch.ones(1)},
        {},
        {"alibi_slopes": torch.ones(1)},
        {"window_size": (5, 0)},
    ],
    ids=["softcap", "dropout", "softcap-ALiBi", "plain", "ALiBi", "window"],
)
@pytest.mark.parametrize("keys", [4, 40])
@pytest.mark.parametrize("more", [0, 2])
def test_a_key_that_is_not_seen_spoils_nothing(
    options: dict[str, Any], bad: float, keys: int, more: int
) -> None:
    q, k, v = torch.randn(3, 1, keys + more, 1, 8)
    k[0, -1, 0, 0] = bad
    out = flash_attn_func(q[:, more:], k, v, causal=True, **options)
    assert out[0, :-1].isfinite().all()


@pytest.mark.parametrize("bad", [NAN, float("inf")])
@pytest.mark.parametrize("seqlen", [4, 300])
def test_a_key_behind_the_window_spoils_nothing(bad: float, seqlen: int) -> None:
    q, k, v = torch.randn(3, seqlen, 2, 16)
    k[0, 0, 0] = bad
    out = flash_attn_varlen_func(
        q, k, v, [0, seqlen], [0, seqlen], seqlen, seqlen, window_size=(2, 0)
    )
    assert out[3:].isfinite().all()
    assert out[:3, 1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"causal": True, "window_size": (9, 0)}, {"softcap": 5.0}],
    ids=["full", "causal", "window", "softcap"],
)
@pytest.mark.parametrize("seqlen", [40, 1100])
def test_what_no_query_sees_spoils_no_gradient(
    seqlen: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Rows that seqused says do not count, rows past the last sequence, and their dout."""
    used = seqlen - 7
    q, k, v, dout = (torch.randn(seqlen + 3, 2, 16).to(dtype) for _ in range(4))
    for x in (q, k, v, dout):
        x[used:] = NAN
    leaves, lengths = [x.requires_grad_() for x in (q, k, v)], torch.tensor([used])
    with one_thread():
        out = flash_attn_3.flash_attn_varlen_func(
            *leaves,
            *(torch.tensor([0, seqlen], dtype=torch.int32),) * 2,
            *(seqlen,) * 2,
            seqused_q=lengths.int(),
            seqused_k=lengths.int(),
            **options,
        )
        found = torch.autograd.grad(out, leaves, dout)
    assert out[:used].isfinite().all()
    assert all(x[:used].isfinite().all() and not x[used:].any() for x in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("seqlen", [40, 1100])
def test_keys_and_queries_that_the_band_hides_spoil_no_gradient(
    seqlen: int, dtype: torch.dtype
) -> None:
    """Keys before the window of the first query, and queries before the first key."""
    rows = seqlen // 2
    for queries, keys, options in (
        (rows, seqlen, {"window_size": (9, 0)}),
        (seqlen, rows, {"causal": True}),
    ):
        q, dout = (torch.randn(1, queries, 2, 16).to(dtype) for _ in range(2))
        k, v = (torch.randn(1, keys, 2, 16).to(dtype) for _ in range(2))
        for x in (k, v) if keys > queries else (q, dout):
            x[:, : seqlen - rows - 9 * (keys > queries)] = NAN
        leaves = [x.requires_grad_() for x in (q, k, v)]
        with one_thread():
            out = flash_attn_func(*leaves, **options)
            found = torch.autograd.grad(out, leaves, dout)
        assert all(x.isfinite().all() for x in (out, *found))


@pytest.mark.parametrize("scale", [0.0, -0.5, -4.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("options", [{"causal": True}, {"window_size": (3, 0)}, {"softcap": 4.0}])
def test_a_scale_that_is_not_positive(
    options: dict[str, Any], dtype: torch.dtype, scale: float
) -> None:
    """As a function of q, exactly: the kernel multiplies what hides a key by the scale."""
    q, k, v = (torch.randn(1, 33, 2, 16).to(dtype).requires_grad_() for _ in range(3))
    turned = (q * 0.0, 1.0) if scale == 0 else (-q, -scale)
    for needs_grad in (True, False):
        leaves = [x.detach().requires_grad_(needs_grad) for x in (q, k, v)]
        out = flash_attn_func(*leaves, softmax_scale=scale, **options)
        expected = flash_attn_func(turned[0], k, v, softmax_scale=turned[1], **options)
        torch.testing.assert_close(out, expected)
        if needs_grad:
            found = torch.autograd.grad(out.sum(), leaves)
            torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), (q, k, v)))


@pytest.mark.parametrize("heads", [(1, 1), (4, 2)])
def test_rows_that_reach_into_each_other(heads: tuple[int, int]) -> None:
    memory = torch.randn(300)
    q = memory.as_strided((9, heads[0], 64), (1, 5, 1))
    k = torch.randn(9, heads[1], 64)
    for ends_q, rows in (([0, 9], 9), ([0, 1], 1)):
        ours = flash_attn_varlen_func(q[:rows], k, k, ends_q, [0, 9], rows, 9)
        plain = flash_attn_varlen_func(q[:rows].contiguous(), k, k, ends_q, [0, 9], rows, 9)
        torch.testing.assert_close(ours, plain)
