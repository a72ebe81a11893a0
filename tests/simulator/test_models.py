"""Unmodified transformers models on the simulated Ascend, against the same models on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("npu")

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
MODELS = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, {"num_key_value_heads": 2}),
    "mistral": (
        transformers.MistralForCausalLM,
        transformers.MistralConfig,
        {"num_key_value_heads": 2, "sliding_window": 4},
    ),
    "bert": (transformers.BertForMaskedLM, transformers.BertConfig, {}),
}


def step(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    output = model(input_ids=ids, attention_mask=mask, labels=ids)
    output.loss.backward()
    return [output.logits, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_the_cpus(name: str, attention: str, npu: torch.device) -> None:
    model_type, config_type, extra = MODELS[name]
    config: Any = config_type(**SIZES, **extra, attn_implementation=attention)
    torch.manual_seed(0)
    host, device = model_type(config).eval(), model_type(config).eval()
    device.load_state_dict(host.state_dict())
    device.to(npu)
    ids, mask = torch.randint(0, 99, (2, 11)), torch.ones(2, 11, dtype=torch.long)
    mask[0, 7:] = 0
    expected = step(host, ids, mask)
    got = step(device, ids.to(npu), mask.to(npu))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-6)
