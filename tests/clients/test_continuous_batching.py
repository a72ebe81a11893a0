"""Continuous batching of unmodified transformers models over its paged cache.

transformers sends decoding steps through block tables on CUDA and XPU only. Elsewhere, an NPU and
a CPU among them, it gathers the keys of all requests itself and packs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Module

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu._core.table.attention import HOST

pytest.importorskip("transformers", minversion="5.23")

import transformers
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching import cache as cb_cache
from transformers.generation.continuous_batching import initialization as cb_initialization
from transformers.generation.continuous_batching import utils as cb_utils

import flash_attn_npu
from tests.helpers.generation_models import (
    GREEDY,
    LAYERS,
    NAMES,
    NEW_TOKENS,
    PROMPT_LENGTHS,
    build,
    calls_of,
    check_tokens,
    counting,
    prompts,
)

FULL, HALF = torch.float32, torch.bfloat16
DTYPES = pytest.mark.parametrize(
    "dtype", [FULL, pytest.param(HALF, marks=pytest.mark.sweep)], ids=["float32", "bfloat16"]
)
PACKED = "flash_attn_varlen_func"
PAGED = "flash_attn_with_kvcache"
STEPS = LAYERS * (NEW_TOKENS - 1)


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers measures the host; without psutil it can find no memory at all."""
    breakdown = (torch.device("cpu"), 2**33, 0, 0)
    monkeypatch.setattr(cb_cache, "get_device_and_memory_breakdown", lambda: breakdown)


@pytest.fixture
def installed() -> Iterator[None]:
    with flash_attn_npu.install():
        yield


@pytest.fixture
def block_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers as it is once it knows that this device can do block tables."""
    monkeypatch.setattr(cb_initialization, "is_torch_xpu_available", lambda: True)


def settings(**options: Any) -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(
        **({"num_blocks": 64, "max_batch_tokens": 128, "page_size": 16} | options)
    )


def batched_tokens(model: Module, steps: int = NEW_TOKENS, **options: Any) -> Tensor:
    greedy = GREEDY | {"max_new_tokens": steps}
    generation = transformers.GenerationConfig(**greedy, eos_token_id=-1)
    results = model.generate_batch(
        prompts(),
        generation_config=generation,
        continuous_batching_config=settings(**options),
        progress_bar=False,
    )
    assert [result.error for result in results.values()] == [None] * len(PROMPT_LENGTHS)
    return torch.tensor([result.generated_tokens for result in results.values()])


@DTYPES
@pytest.mark.parametrize("name", NAMES)
def test_requests_get_eagers_tokens(
    name: str, dtype: torch.dtype, device: torch.device, installed: None
) -> None:
    model = build(name, "flash_attention_2", device.type, dtype)
    with counting(device.type) as served:
        tokens = batched_tokens(model)
    check_tokens(name, dtype, tokens)
    kernel = "npu_fusion_attention" if device.type == "npu" else HOST
    assert served == {(PACKED, kernel): LAYERS * NEW_TOKENS}


@pytest.mark.parametrize("name", ["llama", "qwen2_mixed"])
def test_prompts_in_pieces_beside_requests_that_decode(
    name: str, npu: torch.device, installed: None
) -> None:
    """17 tokens a step: the long prompt comes in three pieces, the other ones wait or decode."""
    model = build(name, "flash_attention_2", "npu", FULL)
    with counting("npu") as served:
        tokens = batched_tokens(model, max_batch_tokens=17)
    check_tokens(name, FULL, tokens)
    assert set(served) == {(PACKED, "npu_fusion_attention")}
    assert calls_of(served, "npu_fusion_attention") > LAYERS * NEW_TOKENS


def test_a_model_with_eager_attention_is_switched_to_ours(
    npu: torch.device, installed: None
) -> None:
    model = build("mistral", "eager", "npu", FULL)
    with counting("npu") as served:
        tokens = batched_tokens(model)
    check_tokens("mistral", FULL, tokens)
    assert served == {(PACKED, "npu_fusion_attention"): LAYERS * NEW_TOKENS}
    assert model.config._attn_implementation == "eager"


def test_more_layers_copy_no_more_to_the_host(npu: torch.device, installed: None) -> None:
    copies = []
    for layers in (1, 3):
        model = build("mistral", "flash_attention_2", "npu", FULL, num_hidden_layers=layers)
        with virtual_ascend.record() as rec:
            batched_tokens(model, steps=4)
        copies.append(len(rec.device_to_host))
    assert copies[0] == copies[1]


@DTYPES
@pytest.mark.parametrize(("name", "page_size"), [("llama", 16), ("qwen2", 256)])
def test_block_tables_give_eagers_tokens(
    name: str,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
    installed: None,
    block_tables: None,
) -> None:
    """In bfloat16 the fused kernel reads the pages themselves; it takes no float32."""
    model = build(name, "flash_attention_2", device.type, dtype)
    with counting(device.type) as served:
        tokens = batched_tokens(model, page_size=page_size)
    check_tokens(name, dtype, tokens)
    packed = "npu_fusion_attention" if device.type == "npu" else HOST
    fused = device.type == "npu" and dtype == HALF
    paged = "npu_fused_infer_attention_score" if fused else packed
    assert served == {(PACKED, packed): LAYERS, (PAGED, paged): STEPS}


def test_layers_with_a_window_never_use_block_tables(
    npu: torch.device, installed: None, block_tables: None
) -> None:
    with counting("npu") as served:
        tokens = batched_tokens(build("qwen2_mixed", "flash_attention_2", "npu", FULL))
    check_tokens("qwen2_mixed", FULL, tokens)
    assert served == {(PACKED, "npu_fusion_attention"): LAYERS * NEW_TOKENS}


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="transformers opens block tables for `fa_cuda or fa_xpu` only: `fa_cuda = "
    "is_flash_attention_requested(config, version=[2, 3]) and cuda_available`, where "
    "`cuda_available = torch.cuda.is_available()`",
)
def test_transformers_decodes_through_block_tables(npu: torch.device, installed: None) -> None:
    with counting("npu") as served:
        batched_tokens(build("llama", "flash_attention_2", "npu", HALF), steps=4)
    assert (PAGED, "npu_fused_infer_attention_score") in served


def test_the_default_configuration_takes_what_the_card_has(
    npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers measures the host instead, and takes 0.9 of that: the process is killed."""
    torch.npu.empty_cache()
    free, total = torch.npu.mem_get_info()
    card, theirs = 2**28 + total - free, "get_device_and_memory_breakdown"
    monkeypatch.setenv("VIRTUAL_ASCEND_MEMORY", str(card))
    monkeypatch.setattr(cb_cache, theirs, getattr(cb_utils, theirs))
    empty, sizes = torch.empty, []

    def noted(*size: Any, **options: Any) -> Tensor:
        made = empty(*size, **options)
        sizes.append(made.nbytes)
        return made

    with flash_attn_npu.install():
        model = build("llama", "flash_attention_2", "npu", FULL)
        device, total, _, taken = cb_utils.get_device_and_memory_breakdown()
        assert (device.type, total) == ("npu", card)
        assert taken < card
        monkeypatch.setattr(torch, "empty", noted)
        results = model.generate_batch(
            prompts(),
            generation_config=transformers.GenerationConfig(**GREEDY, eos_token_id=-1),
            progress_bar=False,
        )
    check_tokens("llama", FULL, torch.tensor([r.generated_tokens for r in results.values()]))
    # the cache has taken a good part of it, and no more than there is
    assert card / 4 < sum(size for size in sizes if size > card / 100) < card


def test_without_us_the_host_is_measured(npu: torch.device) -> None:
    assert cb_utils.get_device_and_memory_breakdown()[0].type == "cpu"
