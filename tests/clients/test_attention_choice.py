"""Which attention transformers gives a model that asks for flash_attention_2, or for a kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Module

import flash_attn_npu
from flash_attn_npu.errors import UnsupportedError

transformers = pytest.importorskip("transformers", minversion="5.20")

pytestmark = pytest.mark.usefixtures("flash_attn")

VOCABULARY = 53
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 8,
    **dict.fromkeys(("bos_token_id", "eos_token_id")),
    "pad_token_id": 0,
}
WITH_SINKS: dict[str, dict[str, Any]] = {
    "GptOss": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "MiMoV2Flash": {
        "v_head_dim": 8,
        "n_routed_experts": 2,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
    },
}


def build(name: str, attention: str, device: torch.device | str) -> Module:
    config = getattr(transformers, f"{name}Config")(**SMALL, **WITH_SINKS.get(name, {}))
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")._from_config(
        config, attn_implementation=attention
    )
    for label, parameter in model.named_parameters():
        parameter.data.normal_(std=1.0 if "sink" in label else 0.2)
    return model.to(device).eval()


def ids() -> Tensor:
    return torch.randint(1, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", WITH_SINKS)
def test_models_with_sinks_keep_flash_attention_2(name: str, device: torch.device) -> None:
    with torch.no_grad():
        expected = build(name, "eager", "cpu")(ids()).logits
        model = build(name, "flash_attention_2", device)
        with flash_attn_npu.reporting() as report:
            got = model(ids().to(device)).logits.cpu()
    assert model.config._attn_implementation == "flash_attention_2"
    assert sum(tally.calls for tally in report.tallies) >= 2
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.filterwarnings("ignore:The `paged|` prefix:FutureWarning")
def test_gpt_oss_takes_the_paged_name(device: torch.device) -> None:
    model = build("GptOss", "eager", device)
    model.set_attn_implementation("paged|flash_attention_2")
    assert model.config._attn_implementation.removeprefix("paged|") == "flash_attention_2"


@pytest.mark.parametrize("name", ["GptOss", "Mistral"])
def test_a_kernel_of_the_hub_is_refused_when_it_is_set(name: str, npu: torch.device) -> None:
    model = build(name, "eager", npu)
    with pytest.raises(UnsupportedError, match="flash_attention_2"):
        model.set_attn_implementation("kernels-community/flash-attn2")
    assert model.config._attn_implementation == "eager"
    with torch.no_grad():
        model(ids().to(npu))
    with pytest.raises(UnsupportedError, match="flash_attention_2"):
        build(name, "kernels-community/vllm-flash-attn3", npu)


def test_gpt_oss_is_batched_continuously(device: torch.device) -> None:
    from transformers.generation import ContinuousBatchingConfig

    greedy = {"max_new_tokens": 12, "do_sample": False}
    prompts = [ids()[0, :length].tolist() for length in (20, 5)]
    eager = build("GptOss", "eager", "cpu")
    expected = [eager.generate(torch.tensor([row]), **greedy)[0, len(row) :] for row in prompts]
    results = build("GptOss", "flash_attention_2", device).generate_batch(
        prompts,
        generation_config=transformers.GenerationConfig(**greedy, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=64, max_batch_tokens=128, page_size=16
        ),
        progress_bar=False,
    )
    got = [result.generated_tokens for result in results.values()]
    assert got == [row.tolist() for row in expected]


def test_what_transformers_loses_on_the_way_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flash_attn_npu._integrations import models

    monkeypatch.setattr(models, "_told", set())
    config = transformers.GPTNeoConfig(
        vocab_size=53, hidden_size=32, num_layers=2, attention_types=[[["global", "local"], 1]]
    )
    for _ in range(2):
        transformers.GPTNeoModel._from_config(config, attn_implementation="flash_attention_2")
    build("Mistral", "flash_attention_2", "cpu")
    told = [record.getMessage() for record in caplog.records if record.name == "flash_attn_npu"]
    assert len([line for line in told if "the window of its local layers" in line]) == 1
    assert not [line for line in told if "mistral" in line]
