"""Answers that are small beside what they are the sums of: a partial sum must not be rounded.

Random inputs never show it. A dout that is a trend over positions, a v of two halves, or biased
keys do, and trained models have them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from flash_attn_npu import flash_attn_func
from flash_attn_npu._core.kernels.host import strips
from tests.helpers.one_thread import one_thread

HEADDIM = 64
Made = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def few_threads() -> Iterator[None]:
    with one_thread():
        yield


def trend(seqlen: int) -> Made:
    """dout from 1 to -1 along the sequence: dv cancels."""
    q, k, v, dout = (torch.randn(1, seqlen, 2, HEADDIM) for _ in range(4))
    falling = torch.linspace(1, -1, seqlen)[:, None, None]
    return 0.3 * q, k, v, falling * torch.randn(HEADDIM) + 0.01 * dout


def halves(seqlen: int) -> Made:
    """v of one sign, then of the other, beside keys with a mean: dq cancels."""
    q, k, v, dout = (torch.randn(1, seqlen, 2, HEADDIM) for _ in range(4))
    sign = torch.where(torch.arange(seqlen) < seqlen // 2, 1.0, -1.0)[:, None, None]
    direction = torch.randn(HEADDIM)
    keys = 0.3 * k + 5 * torch.randn(HEADDIM)
    return q, keys, sign * direction + 0.1 * v, direction + 0.1 * dout


def answers(
    made: Made, dtype: torch.dtype, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> list[Tensor]:
    q, k, v, dout = (x.to(dtype) for x in made)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize(
    ("causal", "softcap", "kept"),
    [(False, 0.0, 0), (False, 0.0, 12 << 20), (True, 0.0, 0), (False, 20.0, 0), (True, 20.0, 0)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [trend, halves])
def test_what_cancels(
    make: Callable[[int], Made],
    dtype: torch.dtype,
    causal: bool,
    softcap: float,
    kept: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(strips, "KEPT_BYTES", kept)
    # as long as what a CPU computes by strips
    seqlen = 640
    made = make(seqlen)
    rounded = tuple(x.to(dtype) for x in made)
    hidden = torch.ones(seqlen, seqlen, dtype=torch.bool).triu(1) & causal

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bthd,bshd->bhts", q, k) * HEADDIM**-0.5
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return torch.einsum("bhts,bshd->bthd", weights, v)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(q, k, v, causal=causal, softcap=softcap)
        assert isinstance(out, Tensor)
        return out

    exact = answers(rounded, torch.float64, eager)  # type: ignore[arg-type]
    plain, found = answers(made, dtype, eager), answers(made, dtype, ours)
    for name, true, theirs, got in zip(("out", "dq", "dk", "dv"), exact, plain, found, strict=True):
        allowed = 2 * (theirs.double() - true).abs().max()
        assert (got.double() - true).abs().max() <= allowed, name
