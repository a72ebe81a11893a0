"""What recipes around transformers' models ask: accelerate, peft, trl, VeOmni, xDiT."""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Module

import flash_attn_npu

transformers = pytest.importorskip("transformers", minversion="5.20")

from transformers import modeling_flash_attention_utils as flash  # noqa: E402

pytestmark = pytest.mark.usefixtures("flash_attn")

# as VeOmni and verl do at their import, which may be before ours
HELD_BEFORE_US = flash._flash_attention_forward


def pair(dtype: torch.dtype = torch.float32) -> tuple[Module, Module]:
    """A model with eager attention, and the same with flash attention."""
    config = transformers.MistralConfig(
        vocab_size=53, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=8, pad_token_id=0,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    models = []
    for attention in ("eager", "flash_attention_2"):
        torch.manual_seed(0)
        models.append(
            transformers.MistralForCausalLM._from_config(
                copy.deepcopy(config), attn_implementation=attention, dtype=torch.float32
            ).eval()
        )
        for parameter in models[-1].parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(std=0.2)
        models[-1].to(dtype)
    return models[0], models[1]


def ids(length: int = 40, rows: int = 1) -> Tensor:
    return torch.randint(1, 53, (rows, length), generator=torch.Generator().manual_seed(1))


def dtypes_of_q(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Filled with what reaches flash_attn_func."""
    seen, theirs = [], flash_attn_npu.flash_attn_interface.flash_attn_func

    def spy(q: Tensor, *args: Any) -> Tensor:
        seen.append(q.dtype)
        return theirs(q, *args)

    monkeypatch.setattr(flash_attn_npu.flash_attn_interface, "flash_attn_func", spy)
    return seen


def test_accelerate_with_mixed_precision(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32 weights under autocast: the attention is done in autocast's dtype."""
    eager, ours = pair()
    ours.to(device)
    seen = dtypes_of_q(monkeypatch)
    with torch.no_grad():
        exact = eager(ids()).logits
        with torch.autocast("cpu", torch.bfloat16):
            rounded = eager(ids()).logits
        with torch.autocast(device.type, torch.bfloat16):
            got = ours(ids().to(device)).logits.cpu()
    assert seen == [torch.bfloat16] * 2
    assert (got - exact).abs().max() <= 2 * (rounded - exact).abs().max() + 1e-3


def test_peft_with_norms_in_float32(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision weights, and what reaches the attention is float32: it is cast back."""
    _, ours = pair(torch.bfloat16)
    for name, module in ours.named_modules():
        if name.endswith(("q_proj", "k_proj", "v_proj")):
            module.register_forward_hook(lambda _, __, out: out.float())
        elif name.endswith("self_attn"):
            module.o_proj.register_forward_pre_hook(lambda m, given: given[0].to(m.weight.dtype))
    seen = dtypes_of_q(monkeypatch)
    with torch.no_grad():
        ours.to(device)(ids().to(device))
    assert seen == [torch.bfloat16] * 2


@pytest.mark.parametrize("told", [False, True], ids=["position_ids", "lengths"])
def test_trl_padding_free(told: bool, device: torch.device) -> None:
    """Batches that transformers' collator for flattening makes, with and without lengths."""
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=told)
    rows = [ids()[0, :25], ids()[0, 25:]]
    batch = dict(collate([{"input_ids": row.tolist()} for row in rows]))
    labels = batch.pop("labels")
    assert (labels == -100).sum() == len(rows)
    eager, ours = pair()
    there = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    with torch.no_grad():
        alone = torch.cat([eager(row[None]).logits[0] for row in rows])
        got = ours.to(device)(**there, use_cache=False).logits[0].cpu()
    assert (got - alone).abs().max() < 1e-5 * alone.abs().max()


def test_veomni_registers_an_attention_of_its_own(device: torch.device) -> None:
    """Under a name of its own, over transformers' function, which it holds since its import."""
    calls = []

    def with_sequence_parallelism(
        module: Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        calls.append(query.shape)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        out = HELD_BEFORE_US(
            query, key, value, attention_mask, query_length=query.shape[1], is_causal=True,
            softmax_scale=scaling, sliding_window=sliding_window,
            attn_implementation="flash_attention_2",
        )  # fmt: skip
        return out, None

    name = "veomni_flash_attention_2_with_sp"
    functions = transformers.AttentionInterface()
    functions.register(name, with_sequence_parallelism)
    masks = transformers.AttentionMaskInterface()
    masks.register(name, masks["flash_attention_2"])
    eager, ours = pair()
    ours.set_attn_implementation(name)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :9] = 0
    with torch.no_grad():
        expected = eager(ids(rows=2), attention_mask=mask).logits[mask.bool()]
        ours.to(device)
        got = ours(ids(rows=2).to(device), attention_mask=mask.to(device)).logits.cpu()
    assert len(calls) == 2
    assert (got[mask.bool()] - expected).abs().max() < 1e-5 * expected.abs().max()


def test_sentence_transformers_pools_over_what_is_no_padding(device: torch.device) -> None:
    config = transformers.BertConfig(
        vocab_size=53, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, pad_token_id=0,
    )  # fmt: skip
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[1, 5:] = mask[2, 9:] = 0
    found = []
    for attention, where in (("eager", torch.device("cpu")), ("flash_attention_2", device)):
        torch.manual_seed(0)
        model = transformers.BertModel._from_config(
            copy.deepcopy(config), attn_implementation=attention, dtype=torch.float32
        ).eval()
        with torch.no_grad():
            states = model.to(where)(ids(12, 3).to(where), attention_mask=mask.to(where))
        weights = mask[..., None].to(where)
        pooled = (states.last_hidden_state * weights).sum(1) / weights.sum(1)
        found.append(torch.nn.functional.normalize(pooled, dim=1).cpu())
    assert torch.allclose(found[1], found[0], atol=1e-6)


def test_xdit_compares_versions_as_strings(flash_attn: ModuleType) -> None:
    from flash_attn import __version__
    from flash_attn.flash_attn_interface import _flash_attn_forward, flash_attn_func

    assert __version__ >= "2.6.0"
    assert flash_attn.flash_attn_func is flash_attn_func
    assert callable(_flash_attn_forward)
