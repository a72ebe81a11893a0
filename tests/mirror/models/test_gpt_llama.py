"""Llama checkpoints of Meta's, whole and in parts, made of the model of transformers."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest
import torch

from flash_attn_npu.errors import ArgumentError, UnsupportedError
from flash_attn_npu.models.gpt import GPTLMHeadModel, combine_state_dicts_tp
from flash_attn_npu.models.llama import (
    config_from_checkpoint,
    config_from_hf_checkpoint,
    config_from_meta_checkpoint,
    inv_remap_state_dict_hf_llama,
    llama_config_to_gpt2_config,
    remap_state_dict_hf_llama,
    remap_state_dict_meta_llama,
    state_dicts_from_checkpoint,
)
from tests.helpers.gpt_oracles import (
    VOCAB,
    config_of,
    logits_of,
    prompt,
    state_of,
    theirs,
    tolerance,
)

transformers = pytest.importorskip("transformers")

HEAD = 8
LAYER = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")


def _in_pairs(weight):
    """Rows (j, j + 4) of a head side by side: how Meta rotates, and transformers does not."""
    order = [i // 2 + (HEAD // 2) * (i % 2) for i in range(HEAD)]
    return weight.view(-1, HEAD, weight.shape[1])[:, order].reshape(weight.shape)


def _metas(variant):
    """The weights as Meta's reference code has them."""
    found = {"rope.freqs": torch.ones(HEAD // 2)}
    for name, tensor in state_of(variant).items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = _in_pairs(tensor)
        if name.startswith("model.layers."):
            index, _, rest = name.removeprefix("model.layers.").partition(".")
            module, _, kind = rest.rpartition(".")
            found[f"layers.{index}.{LAYER[module]}.{kind}"] = tensor
        else:
            outer = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm"}
            module, _, kind = name.rpartition(".")
            found[f"{outer.get(module, 'output')}.{kind}"] = tensor
    return found


def _part(state, rank, by_rows):
    """What Meta's model parallel code holds in one of two ranks."""
    found = {}
    for name, tensor in state.items():
        columns = name.endswith(COLUMNS) or (name.startswith("tok") and not by_rows)
        whole = "norm" in name or name == "rope.freqs"
        found[name] = tensor if whole else tensor.chunk(2, int(columns))[rank].clone()
    return found


def _logits(config, state):
    model = GPTLMHeadModel(config, dtype=torch.float64)
    model.load_state_dict(state)
    with torch.no_grad():
        return model.eval()(prompt()).logits


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("variant", ["llama", "llama grouped"])
def test_the_order_of_rows_is_that_of_the_config(variant, interleaved):
    config = config_of(variant, rotary_emb_interleaved=interleaved)
    close = tolerance(variant)
    state = remap_state_dict_hf_llama(state_of(variant), config)
    torch.testing.assert_close(_logits(config, state), logits_of(variant), **close)
    back = inv_remap_state_dict_hf_llama(state, config)
    assert all(torch.equal(back[name], tensor) for name, tensor in state_of(variant).items())
    state = remap_state_dict_meta_llama(_metas(variant), config)
    torch.testing.assert_close(_logits(config, state), logits_of(variant), **close)


@pytest.mark.parametrize("by_rows", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize("multiple", [1, 5, 64])
@pytest.mark.parametrize("variant", ["llama", "llama grouped"])
def test_parts_are_put_together(variant, multiple, by_rows):
    config = config_of(variant, pad_vocab_size_multiple=multiple)
    parts = [_part(_metas(variant), rank, by_rows) for rank in (0, 1)]
    if multiple == 64:
        with pytest.raises(ArgumentError, match=r"^config.pad_vocab_size_multiple: got 64, for "):
            remap_state_dict_meta_llama(parts[0], config)
        return
    state = combine_state_dicts_tp(
        [remap_state_dict_meta_llama(part, config) for part in parts], config
    )
    whole = remap_state_dict_meta_llama(_metas(variant), config)
    assert state.keys() == whole.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in whole.items())


def _write(folder, **more):
    folder.mkdir(parents=True)
    params = {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "multiple_of": 40,
        "norm_eps": 1e-6,
        "vocab_size": VOCAB,
    }
    (folder / "params.json").write_text(json.dumps(params | more))


def test_a_folder_of_metas(tmp_path):
    folder = tmp_path / "tiny"
    # 2/3 of 4 * 32 is 85, and 0.4 of that 34
    _write(folder, n_kv_heads=2, ffn_dim_multiplier=0.4, rope_theta=500.0)
    for rank in (1, 0):
        part = _part(_metas("llama grouped"), rank, False)
        torch.save(part, folder / f"consolidated.{rank:02d}.pth")
    theirs_of_it = config_from_checkpoint(tmp_path, "tiny")
    assert isinstance(theirs_of_it, transformers.LlamaConfig)
    config = llama_config_to_gpt2_config(theirs_of_it)
    states = state_dicts_from_checkpoint(str(tmp_path), "tiny")
    assert [len(state["output.weight"]) for state in states] == [VOCAB // 2] * 2
    state = combine_state_dicts_tp(
        [remap_state_dict_meta_llama(state, config) for state in states], config
    )
    expected = logits_of("llama grouped")
    torch.testing.assert_close(_logits(config, state), expected, **tolerance("llama grouped"))


PUBLISHED = {
    "7B": ({"dim": 4096, "n_heads": 32, "multiple_of": 256}, 11008, 32, 10000.0),
    "2-70B": (
        {
            "dim": 8192,
            "n_heads": 64,
            "n_kv_heads": 8,
            "multiple_of": 4096,
            "ffn_dim_multiplier": 1.3,
        },
        28672,
        8,
        10000.0,
    ),
    "3-8B": (
        {
            "dim": 4096,
            "n_heads": 32,
            "n_kv_heads": 8,
            "multiple_of": 1024,
            "ffn_dim_multiplier": 1.3,
            "rope_theta": 500000.0,
        },
        14336,
        8,
        500000.0,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_widths_of_published_models(name, tmp_path):
    params, width, heads_kv, base = PUBLISHED[name]
    _write(tmp_path / name, **params)
    config = config_from_meta_checkpoint(tmp_path, name)
    assert (config.intermediate_size, config.num_key_value_heads) == (width, heads_kv)
    assert llama_config_to_gpt2_config(config).rotary_emb_base == base


def test_the_size_of_the_vocabulary(tmp_path, monkeypatch):
    _write(tmp_path / "told", vocab_size=77)
    assert config_from_meta_checkpoint(tmp_path, "told").vocab_size == 77
    _write(tmp_path / "bare", vocab_size=-1)
    assert config_from_meta_checkpoint(tmp_path, "bare").vocab_size == 32000
    (tmp_path / "bare" / "tokenizer.model").touch()
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UnsupportedError, match=r"^checkpoint_path: got .* needs sentencepiece; "):
        config_from_meta_checkpoint(tmp_path, "bare")

    class Processor:
        def __init__(self, model_file):
            assert model_file == str(tmp_path / "bare" / "tokenizer.model")

        def vocab_size(self):
            return 32016

    module = ModuleType("sentencepiece")
    module.SentencePieceProcessor = Processor
    monkeypatch.setitem(sys.modules, "sentencepiece", module)
    assert config_from_meta_checkpoint(tmp_path, "bare").vocab_size == 32016


def test_a_config_of_transformers(tmp_path):
    theirs("llama grouped").config.save_pretrained(tmp_path / "tiny-hf")
    for found in (
        config_from_hf_checkpoint(tmp_path, "tiny"),
        config_from_checkpoint(str(tmp_path), "tiny", checkpoint_format="hf"),
    ):
        assert isinstance(found, transformers.LlamaConfig)
        assert llama_config_to_gpt2_config(found).rotary_emb_base == 500.0
        assert found.num_key_value_heads == 2


def test_what_is_not_there_is_named(tmp_path):
    both = r"^checkpoint_path, model_name: got .*tiny.*, without {}; allowed: .*; to fix it: "
    for function, file in (
        (config_from_meta_checkpoint, "params.json"),
        (config_from_hf_checkpoint, "config.json"),
        (state_dicts_from_checkpoint, "consolidated.00.pth"),
    ):
        with pytest.raises(ArgumentError, match=both.format(file)):
            function(tmp_path, "tiny")
    with pytest.raises(ArgumentError, match=r"^checkpoint_format: got 'gguf'; allowed: 'meta' or"):
        config_from_checkpoint(tmp_path, "tiny", "gguf")
    _write(tmp_path / "scaled", use_scaled_rope=True)
    with pytest.raises(UnsupportedError, match=r"^use_scaled_rope: got true in params.json; "):
        config_from_meta_checkpoint(tmp_path, "scaled")
