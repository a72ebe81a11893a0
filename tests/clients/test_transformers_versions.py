"""The models people run, on whichever transformers is installed: eager's numbers, or refused.

tox runs this file with each version that is supported.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Module

import flash_attn_npu

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("flash_attn")

VOCABULARY, LENGTH = 53, 40
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    **dict.fromkeys(("bos_token_id", "eos_token_id")),
    "pad_token_id": 0,
}
WINDOW = {"sliding_window": 8}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": WINDOW,
    # logits of a size that the cap bends
    "Gemma2": WINDOW | {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "Qwen3": WINDOW | {"use_sliding_window": True, "max_window_layers": 1},
    "GptOss": WINDOW | {"num_local_experts": 2, "num_experts_per_tok": 1},
}
WITHOUT_US = {"Mistral": 0.1, "Gemma2": 0.05, "Qwen3": 0.05, "GptOss": 0.1}
"""How far off transformers' own functions for Ascend are at least, where they do not refuse."""


def build(name: str, attention: str, device: torch.device | str) -> Module:
    """The same random weights whatever the attention and the device."""
    config = getattr(transformers, f"{name}Config")(
        **SMALL, **MODELS[name], attn_implementation=attention
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    # wide enough for the attention to have preferences
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2 if parameter.dim() > 1 else 1.0)
    return model.to(device).eval()


def batch(padding: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (3, LENGTH), generator=generator)
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    for row, missing in enumerate((0, 9, 25)):
        if padding == "left":
            mask[row, :missing] = 0
        elif padding == "right":
            mask[row, LENGTH - missing :] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def logits(model: Module, inputs: dict[str, Tensor]) -> Tensor:
    """Those of the positions that are not padding."""
    with torch.no_grad():
        there = {name: value.to(model.device) for name, value in inputs.items()}
        found = model(**there).logits.cpu()
    return found[inputs["attention_mask"].bool()]


def difference(name: str, padding: str, device: torch.device | str) -> float:
    """From eager attention's logits, against their largest."""
    inputs = batch(padding)
    expected = logits(build(name, "eager", "cpu"), inputs)
    got = logits(build(name, "flash_attention_2", device), inputs)
    return ((got - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture
def stock(flash_attn: ModuleType) -> Iterator[None]:
    """transformers as it is without us."""
    flash = importlib.import_module("transformers.modeling_flash_attention_utils")

    def forget() -> None:
        # it keeps the first functions it found; without this it would keep others' too
        for name in ("_loaded_implementation", "_flash_fn", "_process_flash_kwargs_fn"):
            if hasattr(flash, name):
                setattr(flash, name, None)

    flash_attn_npu.uninstall()
    forget()
    yield
    forget()


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_eagers(name: str, padding: str, device: torch.device) -> None:
    with flash_attn_npu.reporting() as report:
        assert difference(name, padding, device) < 1e-4
    # one of each layer, or more where a call is served in parts
    assert sum(tally.calls for tally in report.tallies) >= 2


@pytest.mark.parametrize("name", WITHOUT_US)
@pytest.mark.usefixtures("stock")
def test_without_us_the_test_above_fails(name: str, npu: torch.device) -> None:
    try:
        off = difference(name, "none", npu)
    except (ValueError, KeyError) as refused:
        # 5.x refuses a softcap, and looks for a kernel of the hub for sinks
        told = str(refused)
        assert ("softcap" in told) if name == "Gemma2" else ("kernels-community" in told)
        assert name in ("Gemma2", "GptOss")
    else:
        assert off > WITHOUT_US[name]


def test_llama_is_right_without_us(stock: None, npu: torch.device) -> None:
    """The two tests above tell arguments that are dropped from a model that is built wrongly."""
    assert difference("Llama", "none", npu) < 1e-4


# test_generate.py does this with the newest one; tox asks for these with the others
@pytest.mark.sweep
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", ["Mistral", "GptOss"])
def test_generation_picks_eagers_tokens(
    name: str, padding: str, cache: str, device: torch.device
) -> None:
    inputs = batch(padding)
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    if cache == "static":
        options["disable_compile"] = True
    expected = build(name, "eager", "cpu").generate(**inputs, **options)
    there = {name: value.to(device) for name, value in inputs.items()}
    got = build(name, "flash_attention_2", device).generate(**there, **options)
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("name", ["Mistral", "Gemma2"])
def test_a_model_that_is_there_can_be_switched_over(name: str, device: torch.device) -> None:
    model, inputs = build(name, "eager", device), batch("left")
    expected = logits(model, inputs)
    model.set_attn_implementation("flash_attention_2")
    with flash_attn_npu.reporting() as report:
        got = logits(model, inputs)
    assert sum(tally.calls for tally in report.tallies) >= 2
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
