"""`generate` of unmodified transformers models: eager attention's tokens, dynamic and static cache.

The prompts have different lengths and are padded on the left; windows are shorter than what is
generated, and longer than the shortest prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import flash_attn_npu
from flash_attn_npu._core.table.attention import HOST
from tests.helpers.generation_models import (
    GREEDY,
    LAYERS,
    NAMES,
    NEW_TOKENS,
    build,
    calls_of,
    check_tokens,
    counting,
    left_padded,
    logits_along,
    new_tokens,
    prompts,
)

CACHES = [None, "static"]
KERNELS = {"npu": "npu_fusion_attention", "cpu": HOST}
HALF = torch.bfloat16
FULL = torch.float32


@pytest.fixture
def installed() -> Iterator[None]:
    with flash_attn_npu.install():
        yield


@pytest.mark.parametrize("dtype", [FULL, HALF], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("cache", CACHES, ids=["dynamic", "static"])
@pytest.mark.parametrize("name", NAMES)
def test_generate_picks_eagers_tokens(
    name: str, cache: str | None, dtype: torch.dtype, device: torch.device, installed: None
) -> None:
    model = build(name, "flash_attention_2", device.type, dtype)
    with counting(device.type) as served:
        tokens = new_tokens(model, cache_implementation=cache)
    check_tokens(name, dtype, tokens)
    assert model.config._attn_implementation == "flash_attention_2"
    assert {kernel for _, kernel in served} == {KERNELS[device.type]}
    assert calls_of(served, KERNELS[device.type]) == LAYERS * NEW_TOKENS


@pytest.mark.parametrize("cache", CACHES, ids=["dynamic", "static"])
def test_the_logits_of_every_step_are_eagers(
    cache: str | None, npu: torch.device, installed: None
) -> None:
    model = build("qwen2_mixed", "flash_attention_2", "npu", FULL)
    inputs = left_padded(prompts(), "npu")
    found = model.generate(
        **inputs,
        **GREEDY,
        cache_implementation=cache,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = found.sequences[:, inputs["input_ids"].shape[1] :].cpu()
    got = torch.stack(found.logits, 1).cpu()
    expected = logits_along(build("qwen2_mixed", "eager", "cpu", FULL), tokens)
    assert (got - expected).abs().max() < 5e-5


@pytest.mark.parametrize("name", ["llama", "qwen2_mixed"])
def test_a_static_cache_without_padding(name: str, device: torch.device, installed: None) -> None:
    """Nothing is masked then, so only its width tells what of the cache is filled."""
    ids = torch.tensor([row[:5] for row in prompts()])

    def generated(model: Any) -> list[list[int]]:
        found = model.generate(
            input_ids=ids.to(model.device), **GREEDY, cache_implementation="static"
        )
        return found[:, 5:].tolist()

    flash = build(name, "flash_attention_2", device.type, FULL)
    assert generated(flash) == generated(build(name, "eager", "cpu", FULL))


@pytest.mark.parametrize("name", ["mistral", "qwen2_mixed"])
def test_the_tokens_depend_on_the_window(name: str) -> None:
    """Without this the tests above would pass with windows that are ignored."""
    tokens = new_tokens(build(name, "eager", "cpu", FULL))
    without = new_tokens(build(name, "eager", "cpu", FULL, sliding_window=4096))
    assert all((tokens != without).any(-1))


@pytest.mark.parametrize("name", NAMES)
def test_the_tokens_depend_on_the_padding_being_hidden(name: str) -> None:
    eager = build(name, "eager", "cpu", FULL)
    hidden = new_tokens(eager)
    inputs = left_padded(prompts())
    inputs["attention_mask"].fill_(1)
    seen = eager.generate(**inputs, **GREEDY)[:, -NEW_TOKENS:]
    assert hidden[0].tolist() == seen[0].tolist()
    assert hidden[-1].tolist() != seen[-1].tolist()
