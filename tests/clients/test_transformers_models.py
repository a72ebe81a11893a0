"""Unmodified transformers models on the simulated Ascend, against eager attention on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Module

import flash_attn_npu
from flash_attn_npu import _virtual_ascend as virtual_ascend

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("npu")

VOCABULARY = 53
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    **dict.fromkeys(("bos_token_id", "eos_token_id")),
    "pad_token_id": 0,
    "dtype": torch.float32,
}
GROUPED = {"num_key_value_heads": 2}
WINDOW = {"sliding_window": 8}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED | WINDOW),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", GROUPED | WINDOW),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", GROUPED | WINDOW),
    "qwen2": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        GROUPED | WINDOW | {"use_sliding_window": True, "max_window_layers": 0},
    ),
    "bert": ("BertForMaskedLM", "BertConfig", {}),
}
WITH_WINDOW = [name for name, (_, _, extra) in MODELS.items() if "sliding_window" in extra]


def build(name: str, attention: str, device: str, **more: Any) -> Module:
    """The same random weights whatever the attention and the device."""
    model_type, config_type, extra = MODELS[name]
    if name == "bert" and transformers.__version__.startswith("4."):
        pytest.skip("transformers 4.x knows no flash attention for BERT")
    config = getattr(transformers, config_type)(
        **(SIZES | extra | more), attn_implementation=attention
    )
    torch.manual_seed(0)
    model = getattr(transformers, model_type)(config)
    # wide enough for the attention to have preferences
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.2)
    return model.to(device).eval()


def batch(padding: str = "left") -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids, mask = torch.randint(1, VOCABULARY, (3, 40)), torch.ones(3, 40, dtype=torch.long)
    for row, missing in enumerate((0, 9, 25)):
        if padding == "left":
            mask[row, :missing] = 0
        elif padding == "right":
            mask[row, 40 - missing :] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def on(device: str, inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


def logits(model: Module, inputs: dict[str, Tensor]) -> Tensor:
    """Those of the positions that are not padding."""
    with torch.no_grad():
        found = model(**on(model.device.type, inputs)).logits.cpu()
    return found[inputs["attention_mask"].bool()]


def difference(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


def forget_the_implementation() -> None:
    """transformers keeps the first functions it found; without this it would keep others' too."""
    from transformers import modeling_flash_attention_utils

    modeling_flash_attention_utils._loaded_implementation = None


@pytest.fixture
def stock() -> Iterator[None]:
    """transformers as it is without us."""
    assert not flash_attn_npu.installed()
    forget_the_implementation()
    yield
    forget_the_implementation()


@pytest.fixture
def installed() -> Iterator[None]:
    with flash_attn_npu.install():
        yield


@contextmanager
def only_fused() -> Iterator[None]:
    """Attention was served inside the block, all of it by the fused kernel."""
    with virtual_ascend.record() as rec, flash_attn_npu.reporting() as report:
        yield
    assert {tally.kernel for tally in report.tallies} == {"npu_fusion_attention"}
    calls = sum(tally.calls for tally in report.tallies)
    launches = [launch for launch in rec.launches if launch.name == "npu_fusion_attention"]
    assert len(launches) == calls > 0


@pytest.mark.parametrize("padding", ["left", "right", "none"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_eagers(name: str, padding: str, installed: None) -> None:
    inputs = batch(padding)
    expected = logits(build(name, "eager", "cpu"), inputs)
    model = build(name, "flash_attention_2", "npu")
    with only_fused():
        got = logits(model, inputs)
    assert model.config._attn_implementation == "flash_attention_2"
    assert difference(got, expected) < 2e-3


@pytest.mark.parametrize("name", WITH_WINDOW)
def test_without_us_the_window_is_dropped_and_the_test_above_would_notice(
    name: str, stock: None
) -> None:
    inputs = batch()
    expected = logits(build(name, "eager", "cpu"), inputs)
    assert difference(logits(build(name, "flash_attention_2", "npu"), inputs), expected) > 0.1


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", ["mistral", "bert"])
def test_a_training_step_has_eagers_gradients(name: str, padding: str, installed: None) -> None:
    inputs = batch(padding)
    real = inputs["attention_mask"].bool()
    if name == "mistral":
        # the first real token is predicted from padding, where the two kinds may differ
        real[:, 1:] &= real[:, :-1].clone()
    inputs["labels"] = inputs["input_ids"].masked_fill(~real, -100)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    more = dropout if name == "bert" else {}
    eager = build(name, "eager", "cpu", **more).train()
    flash = build(name, "flash_attention_2", "npu", **more).train()
    eager(**inputs).loss.backward()
    with only_fused():
        flash(**on("npu", inputs)).loss.backward()
    for (label, mine), other in zip(flash.named_parameters(), eager.parameters(), strict=True):
        largest = other.grad.abs().max()
        assert (mine.grad.cpu() - other.grad).abs().max() <= 2e-3 * largest + 1e-6, label


@pytest.mark.parametrize("name", ["mistral", "llama"])
def test_generation_picks_eagers_tokens(name: str, installed: None) -> None:
    inputs = batch("left")
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = build(name, "eager", "cpu").generate(**inputs, **options)
    with only_fused():
        got = build(name, "flash_attention_2", "npu").generate(**on("npu", inputs), **options)
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("explicit", [False, True])
def test_packed_sequences_are_those_eager_sees_alone(explicit: bool, installed: None) -> None:
    inputs, eager = packed_inputs(explicit), build("mistral", "eager", "cpu")
    with torch.no_grad():
        alone = [eager(input_ids=part).logits[0] for part in inputs["input_ids"].split((25, 15), 1)]
    model = build("mistral", "flash_attention_2", "npu")
    with only_fused(), torch.no_grad():
        got = model(**on("npu", inputs), use_cache=False).logits[0]
    assert difference(got.cpu(), torch.cat(alone)) < 2e-3


def packed_inputs(explicit: bool) -> dict[str, Any]:
    """Two sequences in one row, told apart by position_ids, or by lengths beside them."""
    torch.manual_seed(1)
    inputs: dict[str, Any] = {"input_ids": torch.randint(1, VOCABULARY, (1, 40))}
    inputs["position_ids"] = torch.cat((torch.arange(25), torch.arange(15)))[None]
    if explicit:
        cu = torch.tensor([0, 25, 40], dtype=torch.int32)
        inputs |= {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu.clone()}
        inputs |= {"max_length_q": 25, "max_length_k": 25}
    return inputs


def infer(model: Module, inputs: dict[str, Any]) -> None:
    with torch.no_grad():
        model(**inputs, use_cache=False)


def infer_without_versions(model: Module, inputs: dict[str, Any]) -> None:
    with torch.inference_mode():
        model(**inputs, use_cache=False)


def train(model: Module, inputs: dict[str, Any]) -> None:
    model.train()
    model(**inputs, use_cache=False).logits.square().sum().backward()


Step = Callable[[Module, dict[str, Any]], None]

FORMS: dict[str, tuple[Callable[[], dict[str, Any]], int, int]] = {
    # the mask, and what is made of it; transformers itself asks once whether anything is padded
    "left": (lambda: batch("left"), 2, 2),
    "right": (lambda: batch("right"), 2, 2),
    # both tensors of lengths; transformers asks whether position_ids restart
    "lengths": (lambda: packed_inputs(True), 3, 0),
    # the lengths made of position_ids; transformers asks twice, and moves a total
    "position_ids": (lambda: packed_inputs(False), 3, 1),
}
"""A batch, and the copies of a step with a new one: to the host, to the device."""


def copies_of(layers: int, step: Step, make: Callable[[], dict[str, Any]]) -> tuple[int, int]:
    """(to the host, to the device) in a step with inputs that were not seen before."""
    model = build("mistral", "flash_attention_2", "npu", num_hidden_layers=layers)
    step(model, on("npu", make()))
    fresh = on("npu", make())
    with virtual_ascend.record() as rec:
        step(model, fresh)
    return len(rec.device_to_host), len(rec.host_to_device)


@pytest.mark.parametrize("step", [infer, train])
@pytest.mark.parametrize("form", FORMS)
def test_ten_layers_copy_no_more_than_two(form: str, step: Step, installed: None) -> None:
    make, to_host, to_device = FORMS[form]
    assert copies_of(2, step, make) == (to_host, to_device)
    assert copies_of(10, step, make) == (to_host, to_device)


@pytest.mark.parametrize("form", ["lengths", "position_ids"])
def test_inference_mode_copies_no_more_where_the_caller_made_the_tensors(
    form: str, installed: None
) -> None:
    make, to_host, to_device = FORMS[form]
    assert copies_of(10, infer_without_versions, make) == (to_host, to_device)


@pytest.mark.parametrize("layers", [2, 48])
def test_inference_mode_reads_a_mask_once_too(layers: int, installed: None) -> None:
    """transformers makes the mask there, without a version counter: it is given a copy with one."""
    make, to_host, to_device = FORMS["left"]
    assert copies_of(layers, infer_without_versions, make) == (to_host, to_device)


@pytest.mark.parametrize("layers", [2, 10])
def test_inference_mode_asks_position_ids_made_there_in_every_layer(
    layers: int, installed: None
) -> None:
    """They have no version counter: an answer that is remembered could be stale, unseen."""
    model = build("mistral", "flash_attention_2", "npu", num_hidden_layers=layers)
    inputs = on("npu", {"input_ids": packed_inputs(False)["input_ids"]})
    found = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), virtual_ascend.record() as rec:
            model(**inputs, use_cache=False)
        found.append(len(rec.device_to_host))
    # attention asks once where the answer can be remembered, and so may the mask
    assert found[0] <= 2
    assert found[1] == found[0] + layers - 1


def test_inference_mode_reads_the_lengths_of_images_once(installed: None) -> None:
    pytest.importorskip("transformers", minversion="5.20")
    from transformers.models.qwen2_5_vl import configuration_qwen2_5_vl as configuration
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling

    sizes = {"hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "out_hidden_size": 32}
    found = []
    for layers in (2, 8):
        config = configuration.Qwen2_5_VLVisionConfig(
            **sizes, depth=layers, window_size=56, fullatt_block_indexes=[1]
        )
        tower = modeling.Qwen2_5_VisionTransformerPretrainedModel._from_config(
            config, attn_implementation="flash_attention_2", dtype=torch.float32
        )
        pixels, grid = torch.randn(128, 1176), torch.tensor([[1, 8, 12], [1, 4, 8]])
        tower, pixels, grid = tower.to("npu").eval(), pixels.to("npu"), grid.to("npu")
        with torch.inference_mode(), virtual_ascend.record() as rec:
            tower(pixels, grid)
        found.append((len(rec.device_to_host), len(rec.host_to_device)))
    assert found[0] == found[1]


def test_a_mask_is_read_once_for_all_layers(
    installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    varlen = flash_attn_npu.flash_attn_interface.flash_attn_varlen_func

    def spy(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, *args: Any) -> Tensor:
        seen.append(cu_seqlens_q)
        return varlen(q, k, v, cu_seqlens_q, *args)

    # looked up at call time, as clients who replace it expect
    monkeypatch.setattr(flash_attn_npu.flash_attn_interface, "flash_attn_varlen_func", spy)
    model, inputs = build("mistral", "flash_attention_2", "npu"), on("npu", batch())
    with torch.no_grad(), virtual_ascend.record() as rec:
        model(**inputs)
    assert len(seen) == 2
    assert seen[0] is seen[1]
    masks = [copy for copy in rec.device_to_host if tuple(copy.shape) == (3, 40)]
    assert len(masks) == 1
