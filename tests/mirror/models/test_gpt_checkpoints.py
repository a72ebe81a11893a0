"""GPTs made of transformers' models: the same logits, the same tokens, and the way back."""

from __future__ import annotations

import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from flash_attn_npu.errors import ArgumentError, UnsupportedError
from flash_attn_npu.models import gpt
from flash_attn_npu.models.bigcode import inv_remap_state_dict_hf_bigcode
from flash_attn_npu.models.falcon import falcon_config_to_gpt2_config
from flash_attn_npu.models.gpt import GPTLMHeadModel
from flash_attn_npu.models.gpt_neox import gpt_neox_config_to_gpt2_config
from flash_attn_npu.models.gptj import gptj_config_to_gpt2_config
from flash_attn_npu.models.llama import inv_remap_state_dict_hf_llama, llama_config_to_gpt2_config
from flash_attn_npu.models.opt import opt_config_to_gpt2_config, remap_state_dict_hf_opt
from tests.helpers.gpt_oracles import (
    FAMILIES,
    VARIANTS,
    VOCAB,
    config_of,
    logits_of,
    ours,
    prompt,
    remapped,
    state_of,
    theirs,
    tolerance,
)

INVERSES = {
    "llama": inv_remap_state_dict_hf_llama,
    "bigcode": inv_remap_state_dict_hf_bigcode,
}
INVERTIBLE = [variant for variant, (name, _) in VARIANTS.items() if name in INVERSES]


@pytest.mark.parametrize("flash", [False, True], ids=["plain", "flash"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(variant, flash):
    with torch.no_grad():
        logits = ours(variant, use_flash_attn=flash)(prompt()).logits
    assert logits.std() > 0.5
    torch.testing.assert_close(logits, logits_of(variant), **tolerance(variant))


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens(variant):
    tokens = ours(variant, use_flash_attn=True).generate(prompt(), 20)
    expected = theirs(variant).generate(
        prompt(),
        attention_mask=torch.ones_like(prompt()),
        max_length=20,
        do_sample=False,
        pad_token_id=0,
    )
    assert tokens.tolist() == expected.tolist()


FUSED = {
    "gpt2": {"fused_mlp": True, "fused_bias_fc": True, "fused_dropout_add_ln": True},
    "opt": {"fused_mlp": True, "mlp_checkpoint_lvl": [0, 2], "fused_dropout_add_ln": True},
    "opt narrow postnorm": {"fused_mlp": True, "fused_dropout_add_ln": True},
    "llama grouped": {"fused_bias_fc": True, "fused_dropout_add_ln": True},
    "gptj": {"fused_mlp": True, "fused_bias_fc": True, "fused_dropout_add_ln": True},
    "gpt_neox": {"fused_bias_fc": True, "fused_dropout_add_ln": True},
}


@pytest.mark.parametrize("variant", FUSED)
def test_fused_modules_change_nothing(variant):
    model = ours(variant, use_flash_attn=True, **FUSED[variant])
    with torch.no_grad():
        logits = model(prompt()).logits
    torch.testing.assert_close(logits, logits_of(variant), **tolerance(variant))


@pytest.mark.parametrize("variant", ["gpt2", "llama", "gptj", "opt narrow postnorm"])
def test_a_padded_vocabulary(variant):
    model = ours(variant, pad_vocab_size_multiple=16)
    with torch.no_grad():
        logits = model(prompt()).logits
    assert logits.shape[-1] == 64
    torch.testing.assert_close(logits[..., :VOCAB], logits_of(variant), **tolerance(variant))
    unlikely = -100.0 if variant == "gptj" else 0.0
    assert (logits[..., VOCAB:] == unlikely).all()
    tokens = model.generate(prompt(), 16, vocab_size=VOCAB)
    assert tokens.tolist() == ours(variant).generate(prompt(), 16).tolist()


@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("variant", INVERTIBLE)
def test_the_way_back(variant, multiple):
    config = config_of(variant, pad_vocab_size_multiple=multiple)
    state = remapped(variant, config)
    before = dict(state)
    back = INVERSES[VARIANTS[variant][0]](state, config)
    expected = state_of(variant)
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in expected.items())
    assert state.keys() == before.keys()
    assert all(state[name] is tensor for name, tensor in before.items())


@pytest.mark.parametrize("variant", ["gpt2", "llama", "opt", "gpt_neox", "gptj", "bigcode"])
def test_what_is_given_stays_and_what_is_unknown_is_reported(variant):
    remap, config = FAMILIES[variant].remap, config_of(variant)
    given = {**state_of(variant), "transformer.h.0.extra.weight": torch.ones(1)}
    copies = {name: tensor.clone() for name, tensor in given.items()}
    found = remap(given, config)
    assert given.keys() == copies.keys()
    assert all(torch.equal(given[name], tensor) for name, tensor in copies.items())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*transformer\.h\.0\.extra\.weight"):
        GPTLMHeadModel(config, dtype=torch.float64).load_state_dict(found)


NAMES = [
    ("gpt2", "transformer.", "", ("h.0.attn.bias", "h.1.attn.masked_bias")),
    ("bigcode", "transformer.", "", ("h.0.attn.bias",)),
    ("opt", "model.decoder.", "decoder.", ()),
    ("gpt_neox", "lm_head.", "embed_out.", ("gpt_neox.layers.0.attention.rotary_emb.inv_freq",)),
    ("llama", "model.", "model.", ("model.layers.1.self_attn.rotary_emb.inv_freq",)),
    ("gptj", "h.", "h.", ("transformer.h.0.attn.masked_bias",)),
]


@pytest.mark.parametrize(("variant", "prefix", "other", "buffers"), NAMES)
def test_names_of_other_releases(variant, prefix, other, buffers):
    config = config_of(variant)
    state = {re.sub(f"^{prefix}", other, name): value for name, value in state_of(variant).items()}
    if config.tie_word_embeddings:
        # published checkpoints hold tied weights once
        del state["lm_head.weight"]
    state |= dict.fromkeys(buffers, torch.ones(1))
    found, expected = FAMILIES[variant].remap(state, config), remapped(variant, config)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_from_pretrained_reads_a_folder(family, tmp_path):
    variant = next(name for name, (owner, _) in VARIANTS.items() if owner == family)
    theirs(variant).save_pretrained(tmp_path)
    model = GPTLMHeadModel.from_pretrained(tmp_path, config_of(variant), dtype=torch.float64)
    with torch.no_grad():
        logits = model.eval()(prompt()).logits
    torch.testing.assert_close(logits, logits_of(variant), **tolerance(variant))
    half = GPTLMHeadModel.from_pretrained(str(tmp_path), config_of(variant), dtype=torch.float16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}


HUB = {
    "gpt2-medium": "gpt2",
    "openai-community/gpt2": "gpt2",
    "facebook/opt-350m": "opt",
    "EleutherAI/gpt-j-6B": "gptj",
    "togethercomputer/GPT-JT-6B-v1": "gptj",
    "EleutherAI/pythia-70m": "gpt_neox",
    "EleutherAI/gpt-neox-20b": "gpt_neox",
    "togethercomputer/RedPajama-INCITE-7B-Base": "gpt_neox",
    "tiiuae/falcon-7b": "falcon",
    "meta-llama/Llama-2-7b-hf": "llama",
    "bigcode/starcoder": "bigcode",
    "WizardLM/WizardCoder-15B-V1.0": "bigcode",
}


@pytest.mark.parametrize("name", HUB)
def test_from_pretrained_knows_the_family_of_a_name(name, monkeypatch):
    asked = []

    def fetch(model_name, device=None, dtype=None):
        asked.append((model_name, device, dtype))
        return "weights"

    class Model(gpt.GPTPreTrainedModel):
        def __init__(self, config, process_group, device, dtype):
            super().__init__(config)
            self.seen = [process_group, device, dtype]

        def load_state_dict(self, state_dict, strict=True):
            self.seen += [state_dict, strict]

    monkeypatch.setattr(gpt, "state_dict_from_pretrained", fetch)
    monkeypatch.setattr(
        gpt, f"remap_state_dict_hf_{HUB[name]}", lambda state, config: f"{config}: renamed {state}"
    )
    monkeypatch.setattr(gpt, "shard_state_dict_tp", lambda *args: args)
    made = Model.from_pretrained(name, "config", "group", device="meta", dtype=torch.half)
    assert asked == [(name, "cpu", torch.half)]
    assert made.seen == ["group", "meta", torch.half, "config: renamed weights", True]
    made = Model.from_pretrained(
        name, "config", process_group=None, strict=False, world_size=4, rank=3
    )
    renamed = ("config: renamed weights", "config", 4, 3)
    assert made.seen == [None, None, None, renamed, False]


def test_from_pretrained_refuses_what_it_does_not_know(tmp_path):
    with pytest.raises(UnsupportedError, match=r"^model_name: got mistralai/x; allowed: .*gpt2.*;"):
        GPTLMHeadModel.from_pretrained("mistralai/x", config_of("gpt2"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    with pytest.raises(UnsupportedError, match=r"^model_name: got .*of model_type 'mistral'; all"):
        GPTLMHeadModel.from_pretrained(tmp_path, config_of("gpt2"))


REFUSED = [
    (falcon_config_to_gpt2_config, "falcon 7b", "alibi", True),
    (falcon_config_to_gpt2_config, "falcon 7b", "rope_parameters", {"rope_type": "linear"}),
    (llama_config_to_gpt2_config, "llama", "hidden_act", "gelu"),
    (llama_config_to_gpt2_config, "llama", "head_dim", 16),
    (llama_config_to_gpt2_config, "llama", "rope_parameters", {"rope_type": "llama3"}),
    (llama_config_to_gpt2_config, "llama", "rope_scaling", {"type": "linear", "factor": 2.0}),
    (gptj_config_to_gpt2_config, "gptj", "rotary_dim", None),
    (opt_config_to_gpt2_config, "opt", "layer_norm_elementwise_affine", False),
    (opt_config_to_gpt2_config, "opt", "_remove_final_layer_norm", True),
    (opt_config_to_gpt2_config, "opt", "layerdrop", 0.1),
]


@pytest.mark.parametrize(("convert", "variant", "name", "value"), REFUSED)
def test_what_a_gpt_cannot_be_is_refused(convert, variant, name, value):
    settings = {**theirs(variant).config.to_dict(), "rope_scaling": None}
    if name == "rope_scaling":
        settings["rope_parameters"] = None
    convert(SimpleNamespace(**settings))
    shown = "config.rope_parameters" if name.startswith("rope") else rf"\w*config\.{name}"
    with pytest.raises(UnsupportedError, match=rf"^{shown}: got .*; allowed: .*; to fix it: "):
        convert(SimpleNamespace(**{**settings, name: value}))


def test_configs_of_older_transformers():
    names = {"rope_parameters": None, "rope_theta": 500.0, "rope_scaling": None}
    config = SimpleNamespace(**{**theirs("llama").config.to_dict(), **names})
    assert llama_config_to_gpt2_config(config).rotary_emb_base == 500.0
    config.rotary_emb_base = 600.0
    assert llama_config_to_gpt2_config(config).rotary_emb_base == 600.0
    names = {"rope_parameters": None, "rotary_emb_base": 500, "rotary_pct": 0.5}
    config = SimpleNamespace(**{**theirs("gpt_neox").config.to_dict(), **names})
    found = gpt_neox_config_to_gpt2_config(config)
    assert (found.rotary_emb_base, found.rotary_emb_fraction) == (500.0, 0.5)


def test_the_fraction_of_gptj_gives_its_rotary_dim_back():
    # 30 / 88 * 88 is less than 30
    config = SimpleNamespace(**{**theirs("gptj").config.to_dict(), "n_embd": 352, "rotary_dim": 30})
    assert int(gptj_config_to_gpt2_config(config).rotary_emb_fraction * 88) == 30


def test_a_layer_without_all_projections_is_named():
    state = dict(state_of("opt"))
    del state["model.decoder.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(ArgumentError, match=r"^state_dict: got a layer without .*layers\.1\.mix"):
        remap_state_dict_hf_opt(state, config_of("opt"))


@pytest.mark.parametrize("variant", ["llama", "gpt_neox", "falcon sequential"])
def test_a_head_of_its_own_is_not_lost(variant):
    config = config_of(variant, tie_word_embeddings=True)
    with pytest.raises(ArgumentError, match=r"^config.tie_word_embeddings: got True, for a check"):
        remapped(variant, config)


def test_transformers_is_asked_for_where_it_is_missing(monkeypatch):
    config = theirs("opt").config
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UnsupportedError, match=r"^config: got .*without transformers; allowed: "):
        opt_config_to_gpt2_config(config)
