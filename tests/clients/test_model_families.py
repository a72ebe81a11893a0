"""Ten families of models in every way that people run them, against eager attention on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Module

import flash_attn_npu

transformers = pytest.importorskip("transformers", minversion="5.20")

pytestmark = [pytest.mark.sweep, pytest.mark.usefixtures("flash_attn")]

VOCABULARY, LENGTH = 53, 40
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    **dict.fromkeys(("bos_token_id", "eos_token_id")),
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2}
WINDOW = GROUPED | {"sliding_window": 8}
CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", GROUPED),
    "Mistral": ("MistralForCausalLM", WINDOW),
    "Qwen2": ("Qwen2ForCausalLM", WINDOW | {"use_sliding_window": True, "max_window_layers": 1}),
    "Qwen3Moe": (
        "Qwen3MoeForCausalLM",
        GROUPED
        | {"head_dim": 8, "num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "Gemma2": (
        "Gemma2ForCausalLM",
        WINDOW | {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    ),
    "GptOss": (
        "GptOssForCausalLM",
        WINDOW | {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 2},
    ),
    "Phi3": ("Phi3ForCausalLM", WINDOW),
    "Qwen2_5_VLText": ("Qwen2_5_VLForConditionalGeneration", GROUPED),
}
NAMES = pytest.mark.parametrize("name", CAUSAL)


def config_of(name: str) -> Any:
    if name == "Qwen2_5_VLText":
        rope = {"type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
        text = SMALL | GROUPED | {"rope_parameters": rope}
        vision = {"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48}
        vision |= {"out_hidden_size": 32, "window_size": 56, "fullatt_block_indexes": [1]}
        return transformers.Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, image_token_id=50, video_token_id=51,
            vision_start_token_id=52, vision_end_token_id=49,
        )  # fmt: skip
    return getattr(transformers, f"{name}Config")(**SMALL, **CAUSAL[name][1])


def make(name: str, attention: str, dtype: torch.dtype = torch.float32) -> Module:
    torch.manual_seed(0)
    kind = getattr(transformers, CAUSAL[name][0])
    model = kind._from_config(
        config_of(name), attn_implementation=attention, dtype=torch.float32
    ).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.2)
    return model.to(dtype)


def batch(padding: str = "left") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 49, (3, LENGTH), generator=generator)
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    for row, missing in enumerate((0, 9, 25) if padding == "left" else ()):
        mask[row, :missing] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def on(device: torch.device, inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 2e-3) -> None:
    largest = expected.float().abs().max()
    assert (got.cpu().float() - expected.float()).abs().max() <= tolerance * largest + 1e-6


def logits(model: Module, inputs: dict[str, Tensor], device: torch.device) -> Tensor:
    with torch.no_grad():
        found = model.to(device)(**on(device, inputs)).logits.cpu()
    return found[inputs["attention_mask"].bool()]


@NAMES
def test_left_padding(name: str, device: torch.device) -> None:
    expected = logits(make(name, "eager"), batch(), torch.device("cpu"))
    with flash_attn_npu.reporting() as report:
        assert_close(logits(make(name, "flash_attention_2"), batch(), device), expected)
    assert sum(tally.calls for tally in report.tallies) >= 2


@NAMES
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients(name: str, checkpointed: bool, device: torch.device) -> None:
    inputs = batch()
    real = inputs["attention_mask"].bool()
    # the first real token is predicted from padding, where the two kinds may differ
    real[:, 1:] &= real[:, :-1].clone()
    inputs["labels"] = inputs["input_ids"].masked_fill(~real, -100)
    eager, ours = (make(name, kind).train() for kind in ("eager", "flash_attention_2"))
    if checkpointed:
        ours.gradient_checkpointing_enable({"use_reentrant": False})
    eager(**inputs, use_cache=False).loss.backward()
    ours.to(device)(**on(device, inputs), use_cache=False).loss.backward()
    for (label, mine), other in zip(ours.named_parameters(), eager.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None), label
        if mine.grad is not None:
            assert_close(mine.grad, other.grad)


@NAMES
@pytest.mark.parametrize("cache", ["dynamic", "static", "sliding_window"])
@pytest.mark.parametrize("padding", ["left", "none"])
def test_generation(name: str, cache: str, padding: str, device: torch.device) -> None:
    if cache == "sliding_window" and "sliding_window" not in CAUSAL[name][1]:
        pytest.skip("this family has no window")
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "disable_compile": True}
    expected = make(name, "eager").generate(**batch(padding), **options)
    if cache != "sliding_window":
        # a dynamic cache keeps the window of the layers that have one by itself
        options["cache_implementation"] = cache
    ours = make(name, "flash_attention_2").to(device)
    got = ours.generate(**on(device, batch(padding)), **options)
    assert torch.equal(got.cpu(), expected)


@NAMES
@pytest.mark.parametrize("form", ["position_ids", "lengths"])
def test_packed_sequences(name: str, form: str, device: torch.device) -> None:
    ids = batch("none")["input_ids"][:1]
    with torch.no_grad():
        eager = make(name, "eager")
        alone = [
            eager(input_ids=part, use_cache=False).logits[0] for part in ids.split((25, 15), 1)
        ]
    positions = torch.cat((torch.arange(25), torch.arange(15)))[None]
    if name == "Qwen2_5_VLText":
        # of text, and of time, height and width
        positions = positions[None].expand(4, 1, LENGTH)
    inputs: dict[str, Any] = {"input_ids": ids, "position_ids": positions}
    if form == "lengths":
        cu = torch.tensor([0, 25, 40], dtype=torch.int32)
        inputs |= {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 25, "max_length_k": 25}
    with torch.no_grad():
        ours = make(name, "flash_attention_2").to(device)
        got = ours(**on(device, inputs), use_cache=False).logits[0]
    assert_close(got, torch.cat(alone))


@NAMES
def test_bfloat16(name: str, device: torch.device) -> None:
    """By upstream's rule: at most twice as far off as eager attention in bfloat16."""
    host = torch.device("cpu")
    exact = logits(make(name, "eager"), batch(), host)
    eager = logits(make(name, "eager", torch.bfloat16), batch(), host)
    got = logits(make(name, "flash_attention_2", torch.bfloat16), batch(), device)
    # the weights are rounded in both, so what is left is mostly theirs
    allowed = 2 * (eager.float() - exact).abs().max() + 1e-3
    assert (got.float() - exact).abs().max() <= allowed


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma2", "GptOss"])
def test_compiled(name: str) -> None:
    model, host = make(name, "flash_attention_2"), torch.device("cpu")
    expected = logits(make(name, "eager"), batch("none"), host)
    model.forward = torch.compile(model.forward, backend="aot_eager")
    assert_close(logits(model, batch("none"), host), expected)


@pytest.mark.parametrize("padding", ["right", "none"])
def test_modernbert(padding: str, device: torch.device) -> None:
    config = transformers.ModernBertConfig(
        **SMALL | {"num_hidden_layers": 3}, local_attention=8, global_attn_every_n_layers=3
    )
    inputs = batch("none")
    if padding == "right":
        inputs["attention_mask"][1, 30:] = 0
    kind = transformers.ModernBertForMaskedLM
    found = []
    for attention, where in (("eager", torch.device("cpu")), ("flash_attention_2", device)):
        torch.manual_seed(0)
        model = kind._from_config(
            copy.deepcopy(config), attn_implementation=attention, dtype=torch.float32
        ).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(std=0.2)
        found.append(logits(model, inputs, where))
    assert_close(found[1], found[0])


@pytest.mark.parametrize("length", [1, 9])
def test_whisper(length: int, device: torch.device) -> None:
    sizes = {f"{side}_{what}": value for side in ("encoder", "decoder") for what, value in
             (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
    config = transformers.WhisperConfig(
        vocab_size=60, d_model=32, num_mel_bins=8, max_source_positions=24, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, dropout=0.0, **sizes,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "input_features": torch.randn(2, 8, 48, generator=generator),
        "decoder_input_ids": torch.randint(3, 60, (2, length), generator=generator),
    }
    found = []
    for attention, where in (("eager", torch.device("cpu")), ("flash_attention_2", device)):
        torch.manual_seed(0)
        model = transformers.WhisperForConditionalGeneration._from_config(
            copy.deepcopy(config), attn_implementation=attention, dtype=torch.float32
        ).eval()
        with torch.no_grad():
            found.append(model.to(where)(**on(where, inputs)).logits)
    assert_close(found[1], found[0])
