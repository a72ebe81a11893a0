"""Tiny language models, ragged prompts, and eager attention's opinion of what they generated."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from torch.nn import Module

import flash_attn_npu
from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu._core.problems.transfer import APPEND, GATHER

VOCABULARY = 31
LAYERS = 2
NEW_TOKENS = 32
WINDOW = 8
# the last one is shorter than the window, so its padding stays in sight for some steps
PROMPT_LENGTHS = (40, 15, 5)
GREEDY: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    # the fused kernel for paged caches takes 64 and 128
    "head_dim": 64,
    **dict.fromkeys(("bos_token_id", "eos_token_id")),
    "pad_token_id": 0,
    "dtype": torch.float32,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {"use_sliding_window": False}),
    # one layer sees everything, the other one a window
    "qwen2_mixed": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": WINDOW},
    ),
}
NAMES = ["llama", "mistral", "qwen2_mixed"]


def build(name: str, attention: str, device: str, dtype: torch.dtype, **more: Any) -> Module:
    """The same random weights, rounded to dtype, whatever the attention and the device."""
    model_type, config_type, extra = MODELS[name]
    config = getattr(transformers, config_type)(
        **(SIZES | extra | more), attn_implementation=attention
    )
    # found by search: of 40 seeds, the one with varied tokens and wide gaps for every model
    torch.manual_seed(26)
    model = getattr(transformers, model_type)(config)
    # wide enough for the attention to have preferences
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.3)
    return model.to(device, dtype).eval()


def prompts() -> list[list[int]]:
    torch.manual_seed(1)
    return [torch.randint(1, VOCABULARY, (length,)).tolist() for length in PROMPT_LENGTHS]


def left_padded(rows: list[list[int]], device: str = "cpu") -> dict[str, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def new_tokens(model: Module, **options: Any) -> Tensor:
    """What `generate` adds to the padded prompts, (batch, NEW_TOKENS)."""
    inputs = left_padded(prompts(), model.device.type)
    found = model.generate(**inputs, **(GREEDY | options))
    return found[:, inputs["input_ids"].shape[1] :].cpu()


def logits_along(model: Module, tokens: Tensor) -> Tensor:
    """The logits that precede each of the tokens, from one forward, in float32."""
    inputs = left_padded([row + new.tolist() for row, new in zip(prompts(), tokens, strict=True)])
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        found = model(**inputs, position_ids=positions).logits
    return found[:, -NEW_TOKENS - 1 : -1].float()


class Opinion(NamedTuple):
    """What eager attention in float32 on the CPU says of generated tokens, in units of logits.

    gap: the smallest distance between the best two, over all steps.
    shortfall: how far the worst choice lies below the best one; 0 if all are the best.
    agreed: the share of the tokens that are the best.
    noise: the largest error of eager attention itself, computed in the dtype of the model.
    """

    gap: float
    shortfall: float
    agreed: float
    noise: float


def opinion(name: str, dtype: torch.dtype, tokens: Tensor) -> Opinion:
    eager = build(name, "eager", "cpu", dtype)
    rounded = logits_along(eager, tokens)
    exact = logits_along(eager.float(), tokens)
    best = exact.topk(2, -1).values
    chosen = exact.gather(-1, tokens[..., None])[..., 0]
    return Opinion(
        (best[..., 0] - best[..., 1]).min().item(),
        (best[..., 0] - chosen).max().item(),
        (best[..., 0] == chosen).float().mean().item(),
        (rounded - exact).abs().max().item(),
    )


@functools.cache
def eagers_tokens(name: str) -> Tensor:
    return new_tokens(build(name, "eager", "cpu", torch.float32))


def check_tokens(name: str, dtype: torch.dtype, tokens: Tensor) -> None:
    """float32: exactly eager's tokens. bfloat16: eager's, or as good within eager's own rounding.

    In float32 the best two logits are never closer than 5e-3, over 500 times what the order of
    additions moves them, so nothing but the right attention gives these tokens. In bfloat16 eager
    attention itself is 0.2 off, so a near tie may fall either way.
    """
    said = opinion(name, dtype, tokens)
    if dtype == torch.float32:
        assert said.gap > 5e-3
        assert tokens.tolist() == eagers_tokens(name).tolist()
        return
    # that of eager depends on the tokens, too, and a quarter of a logit is much
    assert said.shortfall <= min(said.noise, 0.25) / 2, said
    assert said.agreed > 0.95, said


Served = dict[tuple[str, str], int]


@contextmanager
def counting(device: str) -> Iterator[Served]:
    """(function, kernel) -> calls, filled when the block ends; on the NPU each is one launch.

    What moves keys into a cache and out of it is left out.
    """
    served: Served = {}
    with virtual_ascend.record() as rec, flash_attn_npu.reporting() as report:
        yield served
    for tally in report.tallies:
        key = tally.function, tally.kernel
        served[key] = served.get(key, 0) + tally.calls
    if device == "npu":
        launched: dict[str, int] = {}
        for launch in rec.launches:
            if launch.name not in (APPEND, GATHER):
                launched[launch.name] = launched.get(launch.name, 0) + 1
        kernels = {kernel for _, kernel in served}
        assert launched == {kernel: calls_of(served, kernel) for kernel in kernels}


def calls_of(served: Served, kernel: str) -> int:
    return sum(calls for (_, name), calls in served.items() if name == kernel)
