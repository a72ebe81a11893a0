"""A GPT over two ranks is the GPT of one process: logits, loss, gradients, tokens, state_dicts."""

from __future__ import annotations

import pytest
import torch

from flash_attn_npu.errors import ArgumentError, UnsupportedError
from flash_attn_npu.losses.cross_entropy import CrossEntropyLoss
from flash_attn_npu.models.gpt import GPTLMHeadModel, combine_state_dicts_tp, shard_state_dict_tp
from flash_attn_npu.utils.distributed import allreduce_sequence_parallel_grad
from flash_attn_npu.utils.generation import InferenceParams
from tests.helpers import world
from tests.helpers.gpt_reference import VOCAB, gpt_config, spread

BATCH, SEQLEN = 2, 6
ROTARY = {"n_positions": 0, "rotary_emb_fraction": 1.0, "n_head": 4, "n_embd": 32}
FLASH = {"use_flash_attn": True}
CONFIGS = {
    "plain": {"n_head": 4, "n_embd": 32},
    "untied": {**FLASH, **ROTARY, "tie_word_embeddings": False, "lm_head_bias": True},
    "gated and grouped": {
        **FLASH,
        **ROTARY,
        "n_head_kv": 2,
        "activation_function": "swiglu",
        "mlp_multiple_of": 1,
        "rms_norm": True,
        "fused_dropout_add_ln": True,
        "norm_head": True,
    },
    "parallel blocks": {
        **FLASH,
        **ROTARY,
        "parallel_block": True,
        "fused_mlp": True,
        "activation_function": "gelu_fast",
        "mup_output_multiplier": 0.5,
    },
    # three heads and an odd width over two ranks
    "uneven": {**FLASH, "use_alibi": True, "n_positions": 0, "n_inner": 37},
    "uneven and gated": {
        "n_inner": 37,
        "activation_function": "geglu",
        "mlp_multiple_of": 1,
        "prenorm": False,
    },
}


def _ids(seqlen=SEQLEN):
    shape = (BATCH, seqlen)
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(1))


def _model(config):
    return spread(GPTLMHeadModel(config, dtype=torch.float64))


def _rank(group, config, state, rank):
    model = GPTLMHeadModel(config, process_group=group, dtype=torch.float64)
    model.load_state_dict(shard_state_dict_tp(state, config, world.SIZE, rank))
    return model


def _gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def _train(rank, group, config, state):
    model = _rank(group, config, state, rank)
    logits = model(_ids()).logits
    assert logits.shape[-1] == VOCAB // 2
    loss = CrossEntropyLoss(process_group=group)(logits.flatten(0, -2), _ids().flatten().flip(0))
    loss.backward()
    if config.sequence_parallel:
        assert logits.dim() == 2
        allreduce_sequence_parallel_grad(model, group)
    return logits.detach().view(BATCH, SEQLEN, -1), loss.detach(), _gradients(model)


@pytest.mark.parametrize("scattered", [True, False], ids=["sequence parallel", "whole"])
@pytest.mark.parametrize("name", CONFIGS)
def test_training(name, scattered):
    config = gpt_config(**CONFIGS[name], sequence_parallel=scattered)
    model = _model(config)
    logits = model(_ids()).logits
    loss = CrossEntropyLoss()(logits.flatten(0, 1), _ids().flatten().flip(0))
    loss.backward()
    ranks = world.run(_train, config, model.state_dict())
    parts, losses, gradients = zip(*ranks, strict=True)
    torch.testing.assert_close(torch.cat(parts, -1), logits.detach())
    for got in losses:
        torch.testing.assert_close(got, loss.detach())
    # gradients are dealt as the weights are
    combined = combine_state_dicts_tp(gradients, config)
    expected = _gradients(model)
    assert combined.keys() == expected.keys()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(combined[parameter], gradient)
        for rank in gradients:
            if parameter.endswith(("norm1.weight", "norm2.weight", "ln_f.weight")):
                torch.testing.assert_close(rank[parameter], gradient)


def _generate(rank, group, config, state):
    model = _rank(group, config, state, rank).eval()
    output = model.generate(
        _ids(), 10, return_dict_in_generate=True, output_scores=True, tensor_parallel=2
    )
    return output.sequences, torch.stack(output.scores)


@pytest.mark.parametrize("name", ["untied", "gated and grouped", "uneven"])
def test_generation(name):
    config = gpt_config(**CONFIGS[name], sequence_parallel=False)
    model = _model(config).eval()
    expected = model.generate(_ids(), 10, return_dict_in_generate=True, output_scores=True)
    for tokens, scores in world.run(_generate, config, model.state_dict()):
        assert torch.equal(tokens, expected.sequences)
        torch.testing.assert_close(scores, torch.stack(expected.scores))


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_shards_are_put_together_again(name, size):
    config = gpt_config(**CONFIGS[name])
    if CONFIGS[name].get("n_head_kv", 3) < size or ("n_embd" in CONFIGS[name] and size == 3):
        config = gpt_config(**(CONFIGS[name] | {"n_head": 6, "n_head_kv": 6, "n_embd": 48}))
    state = _model(config).state_dict()
    copies = {key: tensor.clone() for key, tensor in state.items()}
    shards = [shard_state_dict_tp(state, config, size, rank) for rank in range(size)]
    back = combine_state_dicts_tp(shards, config)
    assert back.keys() == state.keys() == copies.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in copies.items())
    assert all(torch.equal(state[key], tensor) for key, tensor in copies.items())
    alone = {key for key in state if key.endswith(("out_proj.bias", "fc2.bias"))}
    assert all(shard.keys() == state.keys() - alone for shard in shards[1:])


def test_the_rows_of_a_rank():
    config = gpt_config(n_embd=8, n_head=4, n_head_kv=2, n_inner=3, activation_function="glu")
    state = {
        "transformer.layers.0.mixer.Wqkv.bias": torch.arange(16),
        "transformer.layers.0.mlp.fc1.bias": torch.arange(6),
        "transformer.layers.0.mixer.out_proj.weight": torch.arange(8)[None],
        "lm_head.bias": torch.arange(30),
    }
    first, second = (shard_state_dict_tp(state, config, 2, rank) for rank in (0, 1))
    assert [tensor.flatten().tolist() for tensor in first.values()] == [
        [0, 1, 2, 3, 8, 9, 12, 13],
        [0, 1, 3, 4],
        [0, 1, 2, 3],
        [*range(15)],
    ]
    assert [tensor.flatten().tolist() for tensor in second.values()] == [
        [4, 5, 6, 7, 10, 11, 14, 15],
        [2, 5],
        [4, 5, 6, 7],
        [*range(15, 30)],
    ]


def _refusals(rank, group):
    model = GPTLMHeadModel(gpt_config(**CONFIGS["plain"]), process_group=group)
    params = InferenceParams(SEQLEN, BATCH)
    for argument, call in (
        ("inference_params", lambda: model(_ids(), inference_params=params)),
        ("inference_params", lambda: model.transformer(_ids(), inference_params=params)),
        ("num_last_tokens", lambda: model(_ids(), num_last_tokens=1)),
    ):
        with pytest.raises(ArgumentError, match=rf"^{argument}: got a value, with sequence_par"):
            call()
    for name, value in (("word_embed_proj_dim", 8), ("attn_dwconv", True)):
        with pytest.raises(UnsupportedError, match=rf"^config.{name}: got .*with process_group; "):
            GPTLMHeadModel(gpt_config(**{name: value}), process_group=group)
    other = GPTLMHeadModel(gpt_config(**CONFIGS["plain"]), process_group=group)
    shared = [name for name, p in other.named_parameters() if hasattr(p, "_shared_params")]
    parts = [name for name, p in other.named_parameters() if hasattr(p, "_sequence_parallel")]
    return shared, parts


def test_refusals_and_marks():
    norms = [f"layers.{i}.norm{half}" for i in (0, 1) for half in (1, 2)] + ["ln_f"]
    names = [f"transformer.{norm}.{kind}" for norm in norms for kind in ("weight", "bias")]
    for shared, parts in world.run(_refusals):
        assert sorted(shared) == sorted(parts) == sorted(names)


def test_what_cannot_be_dealt_is_refused():
    config = gpt_config()
    state = _model(config).state_dict()
    with pytest.raises(ArgumentError, match=r"^rank: got 2; allowed: 0 to 1, for world_size 2; "):
        shard_state_dict_tp(state, config, 2, 2)
    with pytest.raises(ArgumentError, match=r"^world_size: got 4, for .*word_embeddings.weight wi"):
        shard_state_dict_tp(state, config, 4, 0)
    shards = [shard_state_dict_tp(state, config, 2, rank) for rank in (0, 1)]
    del shards[1]["transformer.layers.1.mlp.fc1.bias"]
    for given in (shards, []):
        with pytest.raises(ArgumentError, match=r"^state_dicts: got .*; allowed: .*; to fix it: "):
            combine_state_dicts_tp(given, config)
