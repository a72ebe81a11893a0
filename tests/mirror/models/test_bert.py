"""BERT against transformers, in float64: hidden states, logits, losses and gradients."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flash_attn_npu.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from flash_attn_npu.models import bert
from flash_attn_npu.models.bert import BertForPreTraining, BertModel
from flash_attn_npu.ops.fused_dense import FusedDense, FusedMLP
from tests.helpers import bert_oracle
from tests.helpers.bert_oracle import OPTIONS, batch, inputs, losses, make_config, make_oracle

ways = pytest.mark.parametrize("way", OPTIONS)
SUBSET = {"dense_seq_output": True, "last_layer_subset": True}


def _ours(oracle, kind=BertForPreTraining, **options):
    config = make_config(**options)
    model = kind(config).double().eval()
    model.load_state_dict(bert.remap_state_dict(oracle.state_dict(), config), strict=True)
    return model


def _close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padding"])
@ways
def test_hidden_states(way, masked):
    oracle = make_oracle("BertModel", **OPTIONS[way])
    given = inputs()
    kept = given["attention_mask"].bool()
    if not masked:
        del given["attention_mask"]
        kept = torch.ones_like(kept)
    expected = oracle(**given)
    got = _ours(oracle, BertModel, **OPTIONS[way])(**given)
    _close(got.last_hidden_state[kept], expected.last_hidden_state[kept])
    _close(got.pooler_output, expected.pooler_output)
    if "flash" in way:
        assert not got.last_hidden_state[~kept].any()
    assert got[0] is got.last_hidden_state
    assert got[1] is got.pooler_output


@pytest.mark.parametrize(
    "output",
    [{}, {"dense_seq_output": True}, SUBSET, {**SUBSET, "use_xentropy": True}],
    ids=["all", "dense", "subset", "xentropy"],
)
@ways
def test_pretraining(way, output):
    """Gradients come back by transformers' names, so every one of them is compared."""
    given = batch()
    oracle = make_oracle(**OPTIONS[way])
    expected = losses(oracle, given)
    model = _ours(oracle, **OPTIONS[way], **output).train()
    got = model(**given)
    kept = (given["labels"] > 0) if output else given["attention_mask"].bool()
    logits = got.prediction_logits if output else got.prediction_logits[kept]
    assert got.loss.dtype == torch.float64
    _close(got.loss, expected.loss)
    _close(logits, expected.prediction_logits[kept])
    _close(got.seq_relationship_logits, expected.seq_relationship_logits)
    got.loss.backward()
    expected.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    gradients = bert.inv_remap_state_dict(gradients, model.config)
    for name, parameter in oracle.named_parameters():
        if name != "cls.predictions.bias":
            _close(gradients[name], parameter.grad)
    _close(gradients["cls.predictions.bias"], oracle.cls.predictions.bias.grad)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padding"])
@pytest.mark.parametrize("subset", [{}, SUBSET], ids=["every layer", "last layer"])
@pytest.mark.parametrize("flash", [False, True])
def test_wanted_tokens(flash, subset, masked):
    """The tokens of masked_tokens_mask, row by row, padding left out, and the pooled first ones."""
    oracle = make_oracle("BertModel")
    given, wanted = inputs(), batch()["labels"] > 0
    wanted[1, 6] = True
    if not masked:
        del given["attention_mask"]
    expected = oracle(**given)
    got = _ours(oracle, BertModel, use_flash_attn=flash, **subset)(
        **given, masked_tokens_mask=wanted
    )
    kept = wanted & given["attention_mask"].bool() if masked else wanted
    _close(got.last_hidden_state, expected.last_hidden_state[kept])
    _close(got.pooler_output, expected.pooler_output)


def test_the_last_layer_runs_on_the_wanted_tokens_alone():
    model = _ours(make_oracle(), use_flash_attn=True, **SUBSET)
    rows = []
    for layer in model.bert.encoder.layers:
        layer.mlp.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[0]))
    model(**batch())
    # five labels, and the first tokens of three rows, of which one has a label
    assert rows == [12, 7]


def test_labels_are_optional():
    given = batch()
    model = _ours(make_oracle(), use_flash_attn=True, **SUBSET)
    both = model(**given)
    del given["next_sentence_label"]
    one = model(**given)
    assert one.loss is None
    _close(one.prediction_logits, both.prediction_logits)
    del given["labels"]
    none = model(**given)
    assert none.loss is None
    assert none.prediction_logits.shape == (3, 7, bert_oracle.WORDS)
    _close(none.prediction_logits[batch()["labels"] > 0], both.prediction_logits)


def test_outputs_are_those_of_transformers():
    oracle, given = make_oracle(), inputs()
    got, expected = _ours(oracle)(**given), oracle(**given)
    assert type(got) is type(expected)
    assert list(got) == ["prediction_logits", "seq_relationship_logits"]
    _close(got[0], expected[0])
    _close(got["seq_relationship_logits"], expected[1])
    encoded = BertModel(make_config(), add_pooling_layer=False).double().eval()(**given)
    assert encoded.to_tuple() == (encoded["last_hidden_state"],)


def test_outputs_without_transformers():
    script = """
import json
import sys
from types import SimpleNamespace
sys.modules["transformers"] = None
import torch
from flash_attn_npu.models.bert import BertForPreTraining, BertModel
config, ids = SimpleNamespace(**json.loads(sys.argv[1])), torch.ones(1, 4, dtype=torch.long)
sequence, pooled = BertModel(config)(ids)
assert pooled.shape == (1, sequence.shape[-1])
assert BertForPreTraining(config)(ids).loss is None
"""
    config = json.dumps(make_config().to_dict())
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", script, config], cwd=root, check=True)


def test_positions_and_bool_masks_and_no_pooler():
    oracle = make_oracle("BertModel")
    given = inputs()
    positions = torch.tensor([3, 1, 4, 1, 5, 9, 2])[None]
    expected = oracle(**given, position_ids=positions).last_hidden_state
    given["attention_mask"] = kept = given["attention_mask"].bool()
    config = make_config(use_flash_attn=True)
    model = BertModel(config, add_pooling_layer=False).double().eval()
    state = bert.remap_state_dict(oracle.state_dict(), config)
    state = {name: tensor for name, tensor in state.items() if not name.startswith("pooler")}
    model.load_state_dict(state, strict=True)
    got = model(**given, position_ids=positions)
    assert got.pooler_output is None
    _close(got.last_hidden_state[kept], expected[kept])
    chosen = model(**given, position_ids=positions, masked_tokens_mask=batch()["labels"] > 0)
    assert chosen.pooler_output is None
    _close(chosen.last_hidden_state, expected[batch()["labels"] > 0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision(device, dtype):
    """Twice the error of transformers in the same dtype, at most."""
    given = inputs()
    oracle = make_oracle("BertModel")
    kept = given["attention_mask"].bool()
    with torch.no_grad():
        rounded = bert_oracle.in_dtype(oracle, dtype)
        exact = bert_oracle.in_dtype(rounded, torch.float64)(**given)
        plain = rounded(**given)
        model = _ours(rounded, BertModel, use_flash_attn=True).to(device, dtype)
        got = model(**{name: tensor.to(device) for name, tensor in given.items()})
    for name in ("last_hidden_state", "pooler_output"):
        mine, theirs, truth = (getattr(answer, name) for answer in (got, plain, exact))
        assert mine.dtype == dtype
        mine = mine.cpu()
        if name == "last_hidden_state":
            mine, theirs, truth = mine[kept], theirs[kept], truth[kept]
        allowed = 2 * (theirs.double() - truth).abs().max() + 1e-5 * truth.abs().max()
        assert (mine.double() - truth).abs().max() <= allowed


def test_keys_and_kinds():
    config = make_config(num_hidden_layers=1)
    names = list(BertForPreTraining(config).state_dict())
    layer = "bert.encoder.layers.0."
    parts = ("mixer.Wqkv", "mixer.out_proj", "norm1", "mlp.fc1", "mlp.fc2", "norm2")
    both = [f"{place}.{kind}" for place in parts for kind in ("weight", "bias")]
    assert names == [
        "bert.embeddings.word_embeddings.weight",
        "bert.embeddings.position_embeddings.weight",
        "bert.embeddings.token_type_embeddings.weight",
        "bert.emb_ln.weight",
        "bert.emb_ln.bias",
        *(layer + name for name in both),
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "cls.predictions.transform.dense.weight",
        "cls.predictions.transform.dense.bias",
        "cls.predictions.transform.layer_norm.weight",
        "cls.predictions.transform.layer_norm.bias",
        "cls.predictions.decoder.weight",
        "cls.predictions.decoder.bias",
        "cls.seq_relationship.weight",
        "cls.seq_relationship.bias",
    ]
    model = BertForPreTraining(make_config(**OPTIONS["flash fused"]))
    layers = model.bert.encoder.layers
    assert [layer.mlp.checkpoint_lvl for layer in layers] == [0, 2]
    assert all(isinstance(layer.mlp, FusedMLP) for layer in layers)
    assert all(layer.fused_dropout_add_ln for layer in layers)
    for part in (layers[0].mixer.Wqkv, model.cls.predictions.decoder, model.bert.pooler.dense):
        assert isinstance(part, FusedDense)
    words = model.bert.embeddings.word_embeddings.weight
    assert model.cls.predictions.decoder.weight is words


def test_initial_weights_and_dropout():
    config = make_config(
        hidden_dropout_prob=0.3,
        attention_probs_dropout_prob=0.2,
        initializer_range=0.5,
        hidden_size=64,
    )
    model = BertForPreTraining(config)
    words = model.bert.embeddings.word_embeddings.weight
    assert not words[config.pad_token_id].any()
    assert 0.45 < words[1:].std() < 0.55
    assert 0.45 < model.bert.encoder.layers[0].mixer.Wqkv.weight.std() < 0.55
    assert not model.bert.pooler.dense.bias.any()
    for layer in model.bert.encoder.layers:
        assert (layer.dropout1.p, layer.dropout2.p) == (0.3, 0.3)
        assert layer.mixer.inner_attn.drop.p == 0.2
    assert model.bert.emb_drop.p == 0.3
    given = batch()
    assert not torch.equal(model(**given)[1], model(**given)[1])
    model.eval()
    assert torch.equal(model(**given)[1], model(**given)[1])


def test_padding_of_the_vocabulary():
    """The logits of words are those of the model without padding, and so is the loss."""
    given = batch()
    oracle = make_oracle()
    expected = losses(oracle, given)
    config = make_config(pad_vocab_size_multiple=16, orig_vocab_size=bert_oracle.WORDS)
    model = BertForPreTraining(config).double().eval()
    assert config.vocab_size == 48
    assert BertModel(config).embeddings.word_embeddings.num_embeddings == 48
    state = bert.remap_state_dict(oracle.state_dict(), config)
    model.load_state_dict(state, strict=True)
    got = model(**given)
    kept = given["attention_mask"].bool()
    _close(got.prediction_logits[kept][:, :37], expected.prediction_logits[kept])
    assert (got.prediction_logits[..., 37:] == -100).all()
    _close(got.loss, expected.loss)


def test_rotary_positions():
    options = {"position_embedding_type": "rotary", "rotary_emb_dim": 4, "rotary_emb_base": 100.0}
    given = inputs()
    del given["attention_mask"]
    torch.manual_seed(0)
    model = BertModel(make_config(**options, initializer_range=0.3)).double().eval()
    flash = BertModel(make_config(**options, use_flash_attn=True)).double().eval()
    flash.load_state_dict(model.state_dict())
    for layer in model.encoder.layers:
        assert layer.mixer.rotary_emb_dim == 4
        assert layer.mixer.rotary_emb.base == 100.0
    _close(flash(**given)[0], model(**given)[0])
    plain = model(**inputs())
    with pytest.raises(ArgumentError, match="key_padding_mask: got a mask beside rotary"):
        flash(**inputs())
    assert not torch.allclose(plain[0], model(**given)[0])


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"is_decoder": True}, UnsupportedError, "config.is_decoder: got True; allowed: False"),
        ({"add_cross_attention": True}, UnsupportedError, "config.add_cross_attention"),
        ({"tie_word_embeddings": False}, UnsupportedError, "config.tie_word_embeddings"),
        (
            {"position_embedding_type": "relative_key"},
            UnsupportedError,
            "config.position_embedding_type: got 'relative_key'; allowed: 'absolute'",
        ),
        ({"position_embedding_type": "rotary"}, ArgumentError, "config.rotary_emb_dim: got None"),
        ({"hidden_act": "relu"}, ArgumentError, "config.hidden_act: got 'relu'"),
        ({"fused_mlp": True}, ArgumentError, "config.hidden_act: got 'gelu' with fused_mlp"),
        (
            {"fused_mlp": True, "hidden_act": "gelu_fast", "mlp_checkpoint_lvl": [1]},
            ArgumentError,
            "layer_idx: got 1; allowed: 0 to 0",
        ),
        ({"last_layer_subset": True}, ArgumentError, "config.last_layer_subset: got True"),
    ],
)
def test_configs_that_are_refused(options, error, told):
    with pytest.raises(error, match="to fix it: ") as caught:
        BertForPreTraining(make_config(**options))
    assert told in str(caught.value)


def test_a_config_is_any_object_with_the_attributes():
    given = vars(make_config())
    assert isinstance(BertModel(SimpleNamespace(**given)), bert.BertPreTrainedModel)
    del given["hidden_size"]
    for config in (SimpleNamespace(**given), given):
        with pytest.raises(ArgumentTypeError, match=r"config: got a .* without .*hidden_size"):
            BertModel(config)


@pytest.mark.parametrize("flash", [False, True])
def test_arguments_that_are_refused(flash):
    model = _ours(make_oracle(), use_flash_attn=flash, **SUBSET)
    given = batch()

    def told(error=ArgumentError, **changed):
        with pytest.raises(error, match="to fix it: ") as caught:
            model(**{**given, **changed})
        return str(caught.value)

    mask = given["attention_mask"]
    assert "attention_mask: got a torch.float32 tensor" in told(attention_mask=mask.float())
    assert "attention_mask: got a torch.int64 tensor" in told(attention_mask=mask[:, None, None])
    assert "attention_mask: got list" in told(ArgumentTypeError, attention_mask=mask.tolist())
    assert "labels: got shape (3, 6)" in told(labels=given["labels"][:, 1:])
    assert "labels: got 6 labels above 0 for 5" in told(
        labels=given["labels"].index_put((torch.tensor(2), torch.tensor(6)), torch.tensor(5))
    )
    left = mask.flip(1)
    labels = given["labels"] * left
    assert "1 of 3 rows begin with a token" in told(attention_mask=left, labels=labels)
