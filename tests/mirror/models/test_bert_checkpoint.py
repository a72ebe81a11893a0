"""BERT checkpoints of transformers: names, both ways, and what is missing from them."""

from __future__ import annotations

import logging

import pytest
import torch

from flash_attn_npu.errors import ArgumentError, UnsupportedError
from flash_attn_npu.models import bert
from flash_attn_npu.models.bert import BertForPreTraining, BertModel
from tests.helpers.bert_oracle import WORDS, batch, inputs, make_config, make_oracle

OPTIONS = {
    "plain": {},
    "subset": {"last_layer_subset": True, "dense_seq_output": True},
    "padded": {"pad_vocab_size_multiple": 8, "orig_vocab_size": WORDS},
}


def _equal(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("way", OPTIONS)
@pytest.mark.parametrize("kind", [BertForPreTraining, BertModel])
def test_round_trip(kind, way):
    oracle = make_oracle(kind.__name__)
    config = make_config(**OPTIONS[way])
    theirs = oracle.state_dict()
    before = dict(theirs)
    ours = bert.remap_state_dict(theirs, config)
    model = kind(config).double()
    model.load_state_dict(ours, strict=True)
    back = bert.inv_remap_state_dict(model.state_dict(), config)
    _equal(back, before)
    _equal(theirs, before)
    assert oracle.load_state_dict(back, strict=True)


def test_old_names_and_what_is_not_saved():
    oracle = make_oracle()
    config = make_config()
    expected = bert.remap_state_dict(oracle.state_dict(), config)
    old = {}
    for name, tensor in oracle.state_dict().items():
        old[
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            )
        ] = tensor
    del old["cls.predictions.decoder.weight"], old["cls.predictions.decoder.bias"]
    old["bert.embeddings.position_ids"] = torch.arange(12)[None]
    _equal(bert.remap_state_dict(old, config), expected)
    _equal(bert.remap_state_dict(expected, config), expected)


def test_states_that_are_refused():
    config = make_config()
    state = make_oracle().state_dict()
    untied = {**state, "cls.predictions.decoder.weight": torch.randn(WORDS, 16)}
    with pytest.raises(UnsupportedError, match=r"decoder.weight.*: got other values"):
        bert.remap_state_dict(untied, config)
    del state["bert.encoder.layer.1.attention.self.key.bias"]
    with pytest.raises(ArgumentError, match=r"layer.1.attention.self with query, value; allowed"):
        bert.remap_state_dict(state, config)
    with pytest.raises(ArgumentError, match=r"config.orig_vocab_size: got None"):
        bert.inv_remap_state_dict({}, make_config(pad_vocab_size_multiple=8))


def _saved(folder, state):
    torch.save(state, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("kind", [BertForPreTraining, BertModel])
@pytest.mark.parametrize("saved", ["BertForPreTraining", "BertModel"])
def test_from_pretrained(tmp_path, caplog, kind, saved):
    """A trunk is found with and without the prefix; heads may be missing, with a warning."""
    oracle = make_oracle(saved)
    _saved(tmp_path, oracle.state_dict())
    with caplog.at_level(logging.WARNING):
        model = kind.from_pretrained(str(tmp_path), make_config()).double().eval()
    trunk = oracle if saved == "BertModel" else oracle.bert
    mine = model if kind is BertModel else model.bert
    given = inputs()
    torch.testing.assert_close(
        mine(**given).pooler_output, trunk(**given).pooler_output, rtol=1e-4, atol=1e-5
    )
    lacking = kind is BertForPreTraining and saved == "BertModel"
    assert ("cls.predictions.decoder.bias" in caplog.text) == lacking
    assert "encoder" not in caplog.text


def test_from_pretrained_with_further_arguments(tmp_path, monkeypatch):
    state = make_oracle("BertModel").state_dict()
    monkeypatch.setattr(bert, "state_dict_from_pretrained", lambda name: state)
    model = BertModel.from_pretrained("any", make_config(), add_pooling_layer=False)
    assert model.pooler is None
    with pytest.raises(ArgumentError, match=r"any, which lacks 12 parameters: encoder.layers.2."):
        BertModel.from_pretrained("any", make_config(num_hidden_layers=3))


def test_from_pretrained_as_transformers_saves(tmp_path):
    pytest.importorskip("safetensors")
    oracle = make_oracle().float()
    oracle.save_pretrained(tmp_path)
    model = BertForPreTraining.from_pretrained(tmp_path, make_config()).eval()
    given = batch()
    del given["labels"]
    expected = oracle(**given).seq_relationship_logits
    got = model(**given).seq_relationship_logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    _equal(bert.inv_remap_state_dict(model.state_dict(), model.config), dict(oracle.state_dict()))
