"""`utils.generation` with a tiny language model: what it picks is what the whole forward says."""

from __future__ import annotations

import copy
import dataclasses
import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from flash_attn_npu._core.ground.memory import forget_all
from flash_attn_npu.errors import ArgumentError, ArgumentTypeError
from flash_attn_npu.modules.block import Block
from flash_attn_npu.modules.mha import MHA
from flash_attn_npu.modules.mlp import Mlp
from flash_attn_npu.utils import generation
from flash_attn_npu.utils.generation import (
    DecodingCGCache,
    GenerationMixin,
    GreedySearchDecoderOnlyOutput,
    InferenceParams,
    SampleDecoderOnlyOutput,
    allocate_inference_cache,
    capture_graph,
    decode,
    decode_speculative,
    update_graph_cache,
)

VOCAB, SIZE, HEADS = 32, 32, 2


class Model(nn.Module, GenerationMixin):
    """A prenorm transformer of two blocks with learned positions."""

    def __init__(self, seed=0, dtype=torch.float64, flash=True, rotary=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(VOCAB, SIZE, dtype=dtype)
        self.positions = nn.Embedding(64, SIZE, dtype=dtype)
        place = {"dtype": dtype}
        self.layers = nn.ModuleList(
            Block(
                SIZE,
                lambda dim, i=i: MHA(
                    dim,
                    HEADS,
                    causal=True,
                    layer_idx=i,
                    use_flash_attn=flash,
                    rotary_emb_dim=rotary,
                    **place,
                ),
                lambda dim: Mlp(dim, 2 * dim, **place),
                lambda dim: nn.LayerNorm(dim, **place),
            )
            for i in range(2)
        )
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)
        self.seen = []

    def forward(self, input_ids, position_ids=None, inference_params=None, num_last_tokens=0):
        self.seen.append((tuple(input_ids.shape), num_last_tokens))
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        hidden, residual = self.embedding(input_ids) + self.positions(position_ids), None
        for layer in self.layers:
            options = {"inference_params": inference_params} if inference_params else None
            hidden, residual = layer(hidden, residual, mixer_kwargs=options)
        out = (hidden + residual)[:, -num_last_tokens:] @ self.embedding.weight.T
        return SimpleNamespace(logits=out)

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        return {
            i: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
            for i, layer in enumerate(self.layers)
        }


def _prompt(batch=2, seqlen=3):
    return torch.randint(VOCAB, (batch, seqlen), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _greedy(model, tokens, length, vocab=VOCAB):
    """The most likely token of the whole forward, again and again; and its logits."""
    scores = []
    while tokens.shape[1] < length:
        scores.append(model(tokens).logits[:, -1, :vocab])
        tokens = torch.cat((tokens, scores[-1].argmax(-1, keepdim=True)), 1)
    return tokens, scores


@pytest.mark.parametrize("cg", [False, True], ids=["", "cg"])
@pytest.mark.parametrize(("flash", "rotary"), [(False, 16), (True, 0), (True, 16)])
def test_greedy_is_the_argmax_of_the_whole_forward(flash, rotary, cg):
    model, prompt = Model(flash=flash, rotary=rotary), _prompt()
    tokens, scores = _greedy(model, prompt, 10)
    assert len(tokens[:, 3:].unique()) > 4
    model.seen.clear()
    out = decode(prompt, model, 10, cg=cg)
    assert isinstance(out, GreedySearchDecoderOnlyOutput)
    assert torch.equal(out.sequences, tokens)
    torch.testing.assert_close(list(out.scores), scores)
    assert model.seen == [((2, 3), 1), *[((2, 1), 1)] * 6]
    assert torch.equal(model.generate(prompt, 10, cg=cg), tokens)


@torch.no_grad()
def test_on_the_card(device):
    model, prompt = Model(dtype=torch.float32, rotary=16).to(device), _prompt().to(device)
    out = decode(prompt, model, 8)
    assert out.sequences.device.type == device.type
    for i, score in enumerate(out.scores):
        whole = model(out.sequences[:, : 3 + i]).logits[:, -1]
        torch.testing.assert_close(score, whole, rtol=1e-4, atol=1e-4)
        assert torch.equal(out.sequences[:, 3 + i], score.argmax(-1))


def test_generate_returns_what_is_asked_for():
    model, prompt = Model(), _prompt()
    out = model.generate(prompt, 6, return_dict_in_generate=True, output_scores=True)
    assert len(out.scores) == 3
    without = model.generate(prompt, 6, return_dict_in_generate=True)
    assert without.scores is None
    assert torch.equal(out.sequences, without.sequences)
    torch.manual_seed(0)
    sampled = model.generate(prompt, 6, top_k=5, return_dict_in_generate=True, output_scores=True)
    assert isinstance(sampled, SampleDecoderOnlyOutput)
    for i, scores in enumerate(sampled.scores):
        best = scores.topk(5).indices
        assert (best == sampled.sequences[:, 3 + i, None]).any(-1).all()
    torch.manual_seed(0)
    assert torch.equal(model.generate(prompt, 6, top_k=5), sampled.sequences)
    with pytest.raises(NotImplementedError, match="GenerationMixin"):
        GenerationMixin().allocate_inference_cache(1, 2)


def test_it_stops_when_all_sequences_end_in_the_same_step():
    model, prompt = Model(), _prompt(1)
    tokens, _ = _greedy(model, prompt, 10)
    # the first token that comes for the first time as the third or later one
    new = tokens[0, 3:].tolist()
    end = next(i for i in range(2, 7) if new[i] not in new[:i])
    out = decode(prompt, model, 10, eos_token_id=new[end])
    assert torch.equal(out.sequences, tokens[:, : 3 + end + 1])
    assert len(out.scores) == end + 1
    # another sequence does not end there
    both = torch.cat((prompt, _prompt(2)[1:]))
    out = decode(both, model, 10, eos_token_id=new[end])
    assert out.sequences.shape == (2, 10)
    # a token of the prompt ends nothing
    assert decode(prompt, model, 5, eos_token_id=int(prompt[0, -1])).sequences.shape[1] >= 4


def test_teacher_outputs_are_followed():
    model, prompt = Model(), _prompt()
    teacher = torch.cat((prompt, _prompt(2, 4).flip(0)), 1)
    out = decode(prompt, model, 10, teacher_outputs=teacher)
    assert torch.equal(out.sequences[:, :7], teacher)
    expected, scores = _greedy(model, teacher, 10)
    assert torch.equal(out.sequences, expected)
    torch.testing.assert_close(list(out.scores[4:]), scores)
    with torch.no_grad():
        whole = model(teacher).logits[:, 2:-1]
    torch.testing.assert_close(torch.stack(out.scores[:4], 1), whole)


def test_vocab_size_cuts_and_a_full_prompt_gets_one_token():
    model, prompt = Model(), _prompt()
    tokens, scores = _greedy(model, prompt, 9, vocab=11)
    out = decode(prompt, model, 9, vocab_size=11)
    assert torch.equal(out.sequences, tokens)
    torch.testing.assert_close(list(out.scores), scores)
    assert not torch.equal(tokens, _greedy(model, prompt, 9)[0])
    assert decode(prompt, model, 3).sequences.shape == (2, 4)


def test_timing_is_printed(capsys):
    decode(_prompt(), Model(), 5)
    assert capsys.readouterr().out == ""
    decode(_prompt(), Model(), 5, enable_timing=True)
    assert capsys.readouterr().out.endswith(" ms\n")


@pytest.mark.parametrize("cg", [False, True], ids=["", "cg"])
@pytest.mark.parametrize("lookahead", [1, 3, 6])
def test_speculation_changes_no_token(lookahead, cg):
    model, prompt = Model(rotary=16), _prompt(1)
    tokens, scores = _greedy(model, prompt, 14)
    for draft in (model, Model(seed=3), Model(rotary=16)):
        model.seen.clear()
        out = decode_speculative(prompt, model, draft, 14, lookahead, cg=cg)
        assert isinstance(out, GreedySearchDecoderOnlyOutput)
        assert torch.equal(out.sequences, tokens)
        torch.testing.assert_close(list(out.scores), scores)
    # the last draft agrees, so every token is kept
    assert len(model.seen) == -(-11 // (lookahead + 1))
    end = next(i for i in range(1, 11) if tokens[0, 3 + i] not in tokens[0, 3 : 3 + i])
    out = decode_speculative(prompt, model, draft, 14, lookahead, eos_token_id=tokens[0, 3 + end])
    assert torch.equal(out.sequences, tokens[:, : 4 + end])
    assert len(out.scores) == end + 1


def test_speculation_samples_and_says_what_it_keeps(capsys):
    model, prompt = Model(), _prompt(1)
    torch.manual_seed(0)
    out = decode_speculative(prompt, model, Model(seed=3), 12, top_k=4, vocab_size=20, debug=True)
    assert isinstance(out, SampleDecoderOnlyOutput)
    assert out.sequences.shape == (1, 12)
    with torch.no_grad():
        whole = model(out.sequences).logits[0, 2:-1, :20]
    torch.testing.assert_close(torch.cat(out.scores), whole)
    best = whole.topk(4).indices
    assert (best == out.sequences[0, 3:, None]).any(-1).all()
    assert "kept 0 of 3 drafted tokens" in capsys.readouterr().out


def test_caches_are_kept_between_generations(caplog):
    forget_all()
    model, prompt = Model(), _prompt()
    with caplog.at_level(logging.WARNING, logger="flash_attn_npu"):
        first = decode(prompt, model, 10, cg=True)
        cache = model._decoding_cache
        tensors = cache.inference_params.key_value_memory_dict
        again = decode(prompt[:1, :2], model, 6, cg=True)
    assert [record.message for record in caplog.records] == [
        "no graph is captured for decoding: the model itself runs at every step"
    ]
    assert model._decoding_cache is cache
    assert cache.inference_params.key_value_memory_dict is tensors
    assert (cache.max_batch_size, cache.max_seqlen) == (2, 10)
    assert set(cache.callables) == {(2, 1), (1, 1)}
    assert torch.equal(again.sequences, decode(prompt[:1, :2], model, 6).sequences)
    assert torch.equal(first.sequences, decode(prompt, model, 10, cg=True).sequences)
    for length, dtype in ((11, None), (10, torch.float32)):
        model._decoding_cache = cache = update_graph_cache(model, cache, 2, 3, length, dtype=dtype)
        assert cache.inference_params.key_value_memory_dict is not tensors
        tensors = cache.inference_params.key_value_memory_dict
        assert tensors[1].dtype == (dtype or torch.float64)
        assert tensors[1].shape == (2, length, 2, HEADS, SIZE // HEADS)


# torch_npu's storages say so when they are copied
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
def test_a_copied_model_runs_itself():
    model, prompt = Model(), _prompt()
    decode(prompt, model, 8, cg=True)
    copied = copy.deepcopy(model)
    copied.load_state_dict(Model(seed=1).state_dict())
    expected, _ = _greedy(copied, prompt, 8)
    assert not torch.equal(expected, _greedy(model, prompt, 8)[0])
    assert torch.equal(decode(prompt, copied, 8, cg=True).sequences, expected)


def test_running_a_captured_graph_by_hand():
    model, prompt = Model(), _prompt()
    cache = update_graph_cache(model, None, 2, 3, 8, decoding_seqlens=(1, 2))
    assert isinstance(cache, DecodingCGCache)
    params = cache.inference_params
    with torch.no_grad():
        model(prompt, inference_params=params, num_last_tokens=1)
        tokens = prompt[:, :2]
        logits = cache.run(tokens, torch.tensor([[3, 4]]), 3)
        whole = model(torch.cat((prompt, tokens), 1)).logits[:, -2:]
    torch.testing.assert_close(logits, whole)
    assert params.seqlen_offset == 0
    run = capture_graph(model, params, 2, 8)
    with pytest.raises(ArgumentError, match=r"^input_ids: got shape \(2, 2\); allowed: \(2, 1\)"):
        run(tokens, None, 3)


def test_a_model_that_only_has_a_config():
    config = SimpleNamespace(num_attention_heads=4, hidden_size=32, num_hidden_layers=2)
    model = SimpleNamespace(config=config, parameters=Model().parameters)
    params = update_graph_cache(model, None, 2, 3, 8, tensor_parallel=2).inference_params
    assert {k: v.shape for k, v in params.key_value_memory_dict.items()} == {
        0: (2, 8, 2, 2, 8),
        1: (2, 8, 2, 2, 8),
    }


def test_inference_params():
    params = InferenceParams(8, 2)
    assert dataclasses.asdict(params) == {
        "max_seqlen": 8,
        "max_batch_size": 2,
        "seqlen_offset": 0,
        "batch_size_offset": 0,
        "key_value_memory_dict": {},
        "lengths_per_sample": None,
    }
    assert params.key_value_memory_dict is not InferenceParams(8, 2).key_value_memory_dict
    params.reset(4, 1)
    lengths = torch.tensor([3, 4], dtype=torch.int32)
    params = InferenceParams(8, 2, 5, 1, {0: "kept"}, lengths)
    params.reset(9, 3)
    assert params == InferenceParams(9, 3, 0, 1, {0: "kept"}, lengths)
    assert lengths.tolist() == [0, 0]


def test_allocate_inference_cache():
    for layers, keys in ((2, [0, 1]), ([4, 7], [4, 7])):
        caches = allocate_inference_cache(3, 5, 2, 8, layers, "cpu")
        assert list(caches) == keys
        for cache in caches.values():
            assert cache.shape == (3, 5, 2, 2, 8)
            assert cache.dtype == torch.float16
    assert allocate_inference_cache(1, 1, 1, 1, 1, "cpu", torch.float64)[0].dtype == torch.float64


def test_bad_input_is_named():
    model, prompt = Model(), _prompt()
    for argument, call in (
        ("input_ids", lambda: decode(prompt, model, 2)),
        ("input_ids", lambda: decode(prompt[:, :0], model, 2)),
        ("input_ids", lambda: decode(prompt[0], model, 5)),
        ("temperature", lambda: decode(prompt, model, 5, top_k=2, temperature=0.0)),
        ("top_p", lambda: decode(prompt, model, 5, top_k=2, top_p=1.5)),
        ("teacher_outputs", lambda: decode(prompt, model, 5, teacher_outputs=prompt[:1])),
        ("input_ids", lambda: decode_speculative(prompt, model, model, 5)),
        ("speculative_lookahead", lambda: decode_speculative(prompt[:1], model, model, 5, 0)),
    ):
        with pytest.raises(ArgumentError, match=rf"^{argument}: got .*; allowed: .*; to fix it: "):
            call()
    with pytest.raises(ArgumentTypeError, match=r"^input_ids: got"):
        decode([[1]], model, 5)
    with pytest.raises(ArgumentTypeError, match=r"^eos_token_id: got \[1, 2\]"):
        decode(prompt, model, 5, eos_token_id=[1, 2])


def test_clients_may_replace_sample(monkeypatch):
    monkeypatch.setattr(generation, "sample", lambda logits, **options: logits.argmin(-1))
    model, prompt = Model(), _prompt()
    out = decode(prompt, model, 5)
    assert torch.equal(out.sequences[:, 3], out.scores[0].argmin(-1))
