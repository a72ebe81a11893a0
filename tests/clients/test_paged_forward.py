"""transformers' `_flash_attention_forward` with block tables, as its paged decoding calls it.

One query for each request, packed in one row: (1, requests, heads, headdim). The caches are views
of one tensor in which pages of keys and of values alternate, so a request's pages are every other
one of them; unused entries of the table are -1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from transformers.modeling_flash_attention_utils import _flash_attention_forward

import flash_attn_npu
from flash_attn_npu._core.table.attention import HOST
from tests.helpers.generation_models import counting
from tests.helpers.old_torch import lacks

HEADS, HEADS_K, HEADDIM = 4, 2, 64
PAGE = 16
# before the new token; page borders, an empty cache and several pages among them
LENGTHS = (0, 1, 7, 8, 15, 16, 17, 31, 40)
PAGES_EACH = 3
SUNK = "npu_fused_infer_attention_score_v2"
FULL, HALF = torch.float32, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [FULL, HALF], ids=["float32", "bfloat16"])


@pytest.fixture
def installed() -> Iterator[None]:
    with flash_attn_npu.install():
        yield


class Step(NamedTuple):
    """One decoding step; `pages` is (2 * pages, PAGE, heads_k, headdim), k and v alternating."""

    q: Tensor
    k: Tensor
    v: Tensor
    pages: Tensor
    block_table: Tensor

    def to(self, device: str) -> Step:
        return Step(*(tensor.to(device) for tensor in self))

    @property
    def caches(self) -> tuple[Tensor, Tensor]:
        return self.pages[:-1], self.pages[1:]


def decoding_step(dtype: torch.dtype) -> Step:
    torch.manual_seed(0)
    requests = len(LENGTHS)
    q = torch.randn(1, HEADS, requests, HEADDIM).to(dtype)
    k, v = torch.randn(2, 1, HEADS_K, requests, HEADDIM).to(dtype)
    pages = torch.randn(2 * PAGES_EACH * requests, PAGE, HEADS_K, HEADDIM).to(dtype)
    numbers = 2 * torch.randperm(PAGES_EACH * requests).view(requests, PAGES_EACH)
    table = numbers.to(torch.int32)
    for row, length in enumerate(LENGTHS):
        table[row, length // PAGE + 1 :] = -1
    # (1, heads, requests, headdim) before the transpose, as in the models
    return Step(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), pages, table)


def forward(step: Step, sliding_window: int | None = None, **options: Any) -> Tensor:
    lengths = torch.tensor([length + 1 for length in LENGTHS], device=step.q.device)
    cu_seqlens_k = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    k_cache, v_cache = step.caches
    return _flash_attention_forward(
        step.q,
        step.k,
        step.v,
        None,
        query_length=len(LENGTHS),
        is_causal=True,
        softmax_scale=HEADDIM**-0.5,
        sliding_window=sliding_window,
        cu_seq_lens_q=torch.arange(len(LENGTHS) + 1, dtype=torch.int32, device=step.q.device),
        cu_seq_lens_k=cu_seqlens_k,
        max_length_q=1,
        max_length_k=1,
        attn_implementation="flash_attention_2",
        block_table=step.block_table,
        k_cache=k_cache,
        v_cache=v_cache,
        **options,
    )


def keys_of(step: Step, request: int, cache: Tensor, new: Tensor) -> Tensor:
    """(length + 1, heads, headdim) in float64, heads repeated as eager attention does."""
    length = LENGTHS[request]
    pages = [int(page) for page in step.block_table[request] if page >= 0]
    old = torch.cat([cache[page] for page in pages])[:length]
    keys = torch.cat((old, new[0, request][None])).double()
    return keys.repeat_interleave(HEADS // HEADS_K, dim=1)


def eager(
    step: Step, window: int | None, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """What `forward` has to give, from the pages as they were before it."""
    rows = []
    for request in range(len(LENGTHS)):
        k, v = (
            keys_of(step, request, cache, new)[-(window or 10**6) :]
            for cache, new in zip(step.caches, (step.k, step.v), strict=True)
        )
        scores = torch.einsum("hd,khd->hk", step.q[0, request].double(), k) / math.sqrt(HEADDIM)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if sinks is not None:
            scores = torch.cat((scores, sinks.double()[:, None]), 1)
        rows.append(torch.einsum("hk,khd->hd", scores.softmax(-1)[:, : len(k)], v))
    return torch.stack(rows)[None]


def written(step: Step) -> Tensor:
    """The pages after the step: the new keys and values behind the old ones, nothing else."""
    pages = step.pages.clone()
    for request, length in enumerate(LENGTHS):
        page = int(step.block_table[request, length // PAGE])
        pages[page, length % PAGE] = step.k[0, request]
        pages[page + 1, length % PAGE] = step.v[0, request]
    return pages


def tolerance(dtype: torch.dtype) -> float:
    return 2e-6 if dtype == FULL else 1e-2


@DTYPES
@pytest.mark.parametrize("window", [None, 3, 8])
def test_a_decoding_step_is_eager_attention_over_the_pages(
    window: int | None, dtype: torch.dtype, device: torch.device, installed: None
) -> None:
    step = decoding_step(dtype)
    moved = step.to(device.type)
    with counting(device.type) as served:
        out = forward(moved, window)
    assert out.shape == step.q.shape
    assert out.dtype == dtype
    assert (out.cpu() - eager(step, window)).abs().max() < tolerance(dtype)
    assert torch.equal(moved.pages.cpu(), written(step))
    kernel = HOST
    if device.type == "npu":
        kernel = "npu_fusion_attention" if dtype == FULL else "npu_fused_infer_attention_score"
    assert served == {("flash_attn_with_kvcache", kernel): 1}


@DTYPES
def test_capped_scores(dtype: torch.dtype, device: torch.device, installed: None) -> None:
    step = decoding_step(dtype)
    out = forward(step.to(device.type), softcap=0.5).cpu()
    expected = eager(step, None, softcap=0.5)
    assert (out - expected).abs().max() < tolerance(dtype)
    assert (expected - eager(step, None)).abs().max() > 0.1


def test_the_window_changes_the_answer() -> None:
    step = decoding_step(FULL)
    for window in (3, 8):
        assert (eager(step, window) - eager(step, None)).abs().max() > 0.1


@DTYPES
@pytest.mark.parametrize("window", [None, 3])
def test_sinks(
    window: int | None, dtype: torch.dtype, device: torch.device, installed: None
) -> None:
    step = decoding_step(dtype)
    sinks = torch.linspace(-1.0, 2.0, HEADS)
    with flash_attn_npu.reporting() as report:
        out = forward(step.to(device.type), window, s_aux=sinks.to(device, dtype)).cpu()
    expected = eager(step, window, sinks=sinks)
    assert (out - expected).abs().max() < tolerance(dtype)
    assert (expected - eager(step, window)).abs().max() > 0.1
    if device.type == "npu" and dtype == HALF and not lacks(SUNK):
        assert [tally.kernel for tally in report.tallies] == [SUNK]


def test_without_us_transformers_has_no_such_function_on_an_npu(npu: torch.device) -> None:
    from transformers import modeling_flash_attention_utils as flash

    assert not flash_attn_npu.installed()
    flash._loaded_implementation = None
    try:
        with pytest.raises(TypeError, match="npu_flash_attn_with_kvcache"):
            forward(decoding_step(HALF).to("npu"))
    finally:
        flash._loaded_implementation = None
