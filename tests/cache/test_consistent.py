"""FLASH_ATTN_NPU_CONSISTENT=1: training, prefill and decode are served by one kernel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu import flash_attn_varlen_func, flash_attn_with_kvcache, reporting
from flash_attn_npu._core.ground import settings
from flash_attn_npu._core.ground.memory import forget_all
from flash_attn_npu.modules.mlp import GatedMlp

GELU = torch.nn.functional.gelu
FUSION, INFER = "npu_fusion_attention", "npu_fused_infer_attention_score"
LENGTHS = (70, 33, 5)


@pytest.fixture
def consistent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(settings, "_consistent", True)
    forget_all()
    yield
    forget_all()


def drawn(device: torch.device, heads: int, seed: int) -> list[torch.Tensor]:
    """(seqlen, heads, 64) of each sequence."""
    generator = torch.Generator().manual_seed(seed)
    made = (torch.randn(length, heads, 64, generator=generator) for length in LENGTHS)
    return [x.to(device, torch.bfloat16) for x in made]


def served(record: Any) -> list[str]:
    return [x.name for x in record.launches if x.name in (FUSION, INFER)]


@pytest.mark.parametrize("window", [(-1, -1), (20, 0)])
def test_decode_has_the_bits_of_training(
    window: tuple[int, int], npu: torch.device, consistent: None
) -> None:
    q, k, v = (drawn(npu, heads, seed) for heads, seed in ((4, 0), (2, 1), (2, 2)))
    ends = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32).to(npu)
    packed = [torch.cat(x).requires_grad_() for x in (q, k, v)]
    longest = max(LENGTHS)
    with virtual_ascend.record() as record:
        trained = flash_attn_varlen_func(
            *packed, ends, ends, longest, longest, causal=True, window_size=window
        )
    assert served(record) == [FUSION]
    caches = [torch.zeros(15, 16, 2, 64, dtype=torch.bfloat16, device=npu) for _ in range(2)]
    table = torch.randperm(15, generator=torch.Generator().manual_seed(3)).view(3, 5)
    for cache, rows in zip(caches, (k, v), strict=True):
        for blocks, row in zip(table, rows, strict=True):
            place = torch.arange(len(row))
            cache[blocks[place // 16].to(npu), (place % 16).to(npu)] = row
    with virtual_ascend.record() as record, reporting() as report:
        decoded = flash_attn_with_kvcache(
            torch.stack([x[-1:] for x in q]), *caches, causal=True, window_size=window,
            cache_seqlens=torch.tensor(LENGTHS, dtype=torch.int32).to(npu),
            block_table=table.to(npu, torch.int32),
        )  # fmt: skip
    assert served(record) == [FUSION]
    assert torch.equal(decoded[:, 0], trained[ends[1:].long() - 1])
    [entry] = report.tallies
    assert "keys are copied at each step" in "".join(entry.reasons)


def test_without_it_pages_are_read_where_they_lie(npu: torch.device) -> None:
    q = torch.ones(2, 1, 2, 64, dtype=torch.bfloat16, device=npu)
    cache = torch.ones(2, 32, 2, 64, dtype=torch.bfloat16, device=npu)
    with virtual_ascend.record() as record:
        flash_attn_with_kvcache(q, cache, cache, cache_seqlens=20)
    assert served(record) == [INFER]


def test_a_step_is_rotated_and_gated_as_in_training(npu: torch.device, consistent: None) -> None:
    """By operators that training has too, so that their last bits are the same."""
    q, k, v = (torch.randn(3, 1, n, 64).to(npu, torch.bfloat16) for n in (4, 2, 2))
    cos, sin = torch.randn(2, 20, 32).to(npu, torch.bfloat16)
    caches = [torch.zeros(3, 32, 2, 64, dtype=torch.bfloat16, device=npu) for _ in range(2)]
    at = torch.tensor([5, 0, 11], dtype=torch.int32).to(npu)
    module = GatedMlp(64, 32, activation=GELU, device=npu, dtype=torch.bfloat16)
    for _ in range(3):
        with virtual_ascend.record() as record, torch.no_grad():
            flash_attn_with_kvcache(q, *caches, k, v, cos, sin, cache_seqlens=at, causal=True)
            gated = module(q.flatten(0, 2))
        names = [launch.name for launch in record.launches]
        assert names.count("npu_rotary_mul") == 2
        assert not {"npu_mrope", "npu_geglu"} & set(names)
    assert torch.equal(gated, module(q.flatten(0, 2)))
