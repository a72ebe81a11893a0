"""Attention over a padded source: transformers cuts the queries by the source's mask."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Module

import flash_attn_npu

transformers = pytest.importorskip("transformers")

from transformers import modeling_flash_attention_utils as flash  # noqa: E402

SOURCE = 12
SMALL: dict[str, Any] = {
    "vocab_size": 53,
    "d_model": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
for side in ("encoder", "decoder"):
    SMALL |= {f"{side}_layers": 2, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 48}
SMALL |= dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0)
MODELS = {
    "Bart": "BartForConditionalGeneration",
    "Marian": "MarianMTModel",
    "M2M100": "M2M100ForConditionalGeneration",
}


def pair(name: str, device: torch.device | str) -> tuple[Module, Module]:
    """The same weights with eager attention on the CPU, and with flash attention on `device`."""
    config = getattr(transformers, f"{name}Config")(**SMALL)
    torch.manual_seed(0)
    kind = getattr(transformers, MODELS[name])
    eager = kind._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    for parameter in eager.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.3)
    ours = kind._from_config(config, attn_implementation="flash_attention_2").eval()
    ours.load_state_dict(eager.state_dict())
    return eager, ours.to(device)


def batch(target: int, padding: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    source, decoder = (
        torch.randint(3, 53, (3, length), generator=generator) for length in (SOURCE, target)
    )
    mask = torch.ones(3, SOURCE, dtype=torch.long)
    for row, missing in enumerate((0, 4, 9) if padding != "none" else ()):
        start = SOURCE - missing if padding == "right" else 0
        mask[row, start : start + missing] = 0
    return {"input_ids": source, "attention_mask": mask, "decoder_input_ids": decoder}


def difference(models: tuple[Module, Module], inputs: dict[str, Tensor]) -> float:
    eager, ours = models
    with torch.no_grad():
        expected = eager(**inputs).logits
        there = {name: value.to(ours.device) for name, value in inputs.items()}
        got = ours(**there).logits.cpu()
    return ((got - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("flash_attn")
def test_every_query_is_kept(name: str, device: torch.device) -> None:
    models = pair(name, device)
    # as many as the source, fewer, more, one
    for target in (SOURCE, 7, 20, 1):
        for padding in ("right", "left", "none"):
            assert difference(models, batch(target, padding)) < 1e-5, (target, padding)


def test_without_us_queries_are_cut_by_the_sources_mask(npu: torch.device) -> None:
    assert not flash_attn_npu.installed()
    for name in ("_loaded_implementation", "_flash_fn", "_process_flash_kwargs_fn"):
        if hasattr(flash, name):
            setattr(flash, name, None)
    models = pair("Bart", npu)
    assert difference(models, batch(1, "right")) < 1e-5
    for target in (SOURCE, 7):
        assert difference(models, batch(target, "right")) > 0.01


@pytest.mark.usefixtures("flash_attn")
def test_a_training_step_has_eagers_gradients(device: torch.device) -> None:
    eager, ours = (model.train() for model in pair("Bart", device))
    inputs = batch(SOURCE, "right")
    inputs["labels"] = inputs["decoder_input_ids"]
    eager(**inputs).loss.backward()
    ours(**{name: value.to(device) for name, value in inputs.items()}).loss.backward()
    for (label, mine), other in zip(ours.named_parameters(), eager.parameters(), strict=True):
        largest = other.grad.abs().max()
        assert (mine.grad.cpu() - other.grad).abs().max() <= 1e-4 * largest + 1e-7, label


@pytest.mark.usefixtures("flash_attn")
def test_who_replaces_what_is_asked_is_asked(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packing recipes replace `_get_unpad_data`; others replace `_upad_input` itself."""
    models, inputs, asked = pair("Bart", device), batch(7, "right"), []
    theirs, upad = flash._get_unpad_data, flash._upad_input

    def get_unpad_data(mask: Tensor) -> Any:
        asked.append("_get_unpad_data")
        return theirs(mask)

    def upad_input(*args: Any) -> Any:
        asked.append("_upad_input")
        return upad(*args)

    monkeypatch.setattr(flash, "_get_unpad_data", get_unpad_data)
    assert difference(models, inputs) < 1e-5
    # two layers of the encoder, two of the decoder
    assert asked == ["_get_unpad_data"] * 4
    monkeypatch.setattr(flash, "_upad_input", upad_input)
    difference(models, inputs)
    assert asked.count("_upad_input") == 4


# the name that every version knows
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
@pytest.mark.usefixtures("flash_attn")
def test_a_causal_model_is_still_cut(device: torch.device) -> None:
    """A prompt in two pieces, padded at the left: its queries are the last ones of the mask."""
    config = transformers.LlamaConfig(
        vocab_size=53, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    kind = transformers.LlamaForCausalLM
    eager = kind._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    ours = kind._from_config(config, attn_implementation="flash_attention_2").eval()
    ours.load_state_dict(eager.state_dict())
    ids, mask = torch.randint(1, 53, (3, 20)), torch.ones(3, 20, dtype=torch.long)
    mask[1, :4] = mask[2, :9] = 0
    with torch.no_grad():
        expected = eager(ids, attention_mask=mask).logits[:, 12:]
        ours.to(device)
        start = ours(ids[:, :12].to(device), attention_mask=mask[:, :12].to(device), use_cache=True)
        got = ours(
            ids[:, 12:].to(device),
            attention_mask=mask.to(device),
            past_key_values=start.past_key_values,
        ).logits.cpu()
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
