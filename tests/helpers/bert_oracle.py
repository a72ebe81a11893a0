"""A tiny BERT of transformers with random weights, and the batch that it and ours run on."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

WORDS, LENGTHS, SEQLEN = 37, (7, 4, 1), 7

OPTIONS = {
    "plain": {},
    "flash": {"use_flash_attn": True},
    "plain fused": {"fused_bias_fc": True, "fused_dropout_add_ln": True, "hidden_act": "gelu_new"},
    "flash fused": {
        "use_flash_attn": True,
        "fused_bias_fc": True,
        "fused_mlp": True,
        "mlp_checkpoint_lvl": [0, 2],
        "fused_dropout_add_ln": True,
        "hidden_act": "gelu_new",
    },
}


def make_config(**options):
    """transformers' config without dropout; what is ours is set as attributes."""
    sizes = {
        "vocab_size": WORDS,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 12,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    config = transformers.BertConfig(**sizes)
    for name, value in options.items():
        setattr(config, name, value)
    return config


def make_oracle(kind="BertForPreTraining", seed=0, **options):
    """A model of transformers in float64, whose weights matter."""
    config = make_config(hidden_act=options.get("hidden_act", "gelu"))
    model = getattr(transformers, kind)(config).double().eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.4)
            if "LayerNorm.weight" in name:
                parameter.add_(1.0)
    return model


def batch():
    """input_ids, token_type_ids, attention_mask, labels (0 for none) and next_sentence_label."""
    generator = torch.Generator().manual_seed(1)
    shape = (len(LENGTHS), SEQLEN)
    mask = (torch.arange(SEQLEN) < torch.tensor(LENGTHS)[:, None]).long()
    words = torch.randint(1, WORDS, shape, generator=generator) * mask
    labels = torch.randint(1, WORDS, shape, generator=generator)
    # no label in the last row, one on a first token
    labels = labels * torch.tensor([[0, 1, 0, 1, 1, 0, 0], [1, 0, 1, 0, 0, 0, 0], [0] * 7])
    types = torch.randint(0, 2, shape, generator=generator)
    return {
        "input_ids": words,
        "token_type_ids": types,
        "attention_mask": mask,
        "labels": labels,
        "next_sentence_label": torch.tensor([1, 0, 1]),
    }


def inputs():
    """The part of `batch` that BertModel takes."""
    given = batch()
    return {name: given[name] for name in ("input_ids", "token_type_ids", "attention_mask")}


def losses(model, given):
    """The outputs of the oracle, whose labels are -100 where ours are 0."""
    labels = given["labels"].masked_fill(given["labels"] == 0, -100)
    return model(**{**given, "labels": labels})


def in_dtype(model, dtype):
    """A copy of the model, rounded."""
    other = type(model)(model.config).to(dtype).eval()
    other.load_state_dict(model.state_dict())
    return other
