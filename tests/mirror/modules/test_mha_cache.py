"""Keys and values in a cache: what is written where, and steps that add up to the whole."""

from __future__ import annotations

import pytest
import torch

from flash_attn_npu.errors import ArgumentError
from flash_attn_npu.modules import mha
from flash_attn_npu.modules.mha import MHA, _update_kv_cache
from flash_attn_npu.utils.generation import InferenceParams

SIZE, HEADS, LENGTH = 64, 4, 9

COMMON = [
    {},
    {"num_heads_kv": 2},
    {"rotary_emb_dim": 16},
    {"rotary_emb_dim": 16, "num_heads_kv": 1, "rotary_emb_interleaved": True},
    {"rotary_emb_dim": 8},
    {"cross_attn": True},
]
FLASH = [
    {"use_alibi": True},
    {"window_size": (3, 0), "num_heads_kv": 2},
    {"window_size": (2, 0), "use_alibi": True, "rotary_emb_dim": 16},
]


CASES = [*COMMON, *({**options, "use_flash_attn": True} for options in (*COMMON, *FLASH))]


def _make(options, **more):
    torch.manual_seed(0)
    dtype = more.pop("dtype", torch.float64)
    return MHA(SIZE, HEADS, causal=True, layer_idx=3, dtype=dtype, **options, **more)


def _steps(module, x, params, steps=(4, 1, 1, 2, 1)):
    outs = []
    for part in x.split(steps, 1):
        outs.append(module(part, inference_params=params))
        params.seqlen_offset += part.shape[1]
        if params.lengths_per_sample is not None:
            params.lengths_per_sample += part.shape[1]
    return torch.cat(outs, 1)


def _poisoned(module, batch, seqlen, dtype=None):
    cache = module.allocate_inference_cache(batch, seqlen, dtype).fill_(float("nan"))
    return {3: cache}


@torch.no_grad()
@pytest.mark.parametrize("options", CASES, ids=str)
def test_steps_equal_the_whole(options):
    module, x = _make(options), torch.randn(2, LENGTH, SIZE, dtype=torch.float64)
    expected = module(x)
    params = InferenceParams(12, 3, key_value_memory_dict=_poisoned(module, 3, 12))
    torch.testing.assert_close(_steps(module, x, params), expected)
    cache = params.key_value_memory_dict[3]
    assert not cache[:2, :LENGTH].isnan().any()
    assert cache[2:].isnan().all()
    assert cache[:, LENGTH:].isnan().all()
    # the layer makes a cache of this shape itself
    made = InferenceParams(12, 3)
    assert torch.equal(_steps(module, x, made), _steps(module, x, InferenceParams(12, 3)))
    assert made.key_value_memory_dict[3].shape == cache.shape
    torch.testing.assert_close(made.key_value_memory_dict[3][:2, :LENGTH], cache[:2, :LENGTH])


@torch.no_grad()
def test_steps_of_xpos():
    """It is centred elsewhere with a longer table, and tables are computed in float32."""
    for flash in (False, True):
        module = _make({"rotary_emb_dim": 16, "rotary_emb_scale_base": 8.0}, use_flash_attn=flash)
        x = torch.randn(2, LENGTH, SIZE, dtype=torch.float64)
        got, expected = _steps(module, x, InferenceParams(12, 2)), module(x)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        plain = _make({"rotary_emb_dim": 16}, use_flash_attn=flash)
        assert (plain(x) - expected).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"rotary_emb_dim": 16}, {"rotary_emb_dim": 8}], ids=str)
def test_lengths_and_rows_of_the_batch(options):
    """Two groups of rows share a cache; each sequence has its own length."""
    module = _make(options, use_flash_attn=True)
    x = torch.randn(2, LENGTH, SIZE, dtype=torch.float64)
    lengths = torch.zeros(4, dtype=torch.int32)
    params = InferenceParams(12, 4, 0, 1, _poisoned(module, 4, 12), lengths)
    module(x[:, :5], inference_params=params)
    params.seqlen_offset = 5
    # of row 0 three positions count, of row 1 five
    lengths.copy_(torch.tensor([77, 3, 5, 77]))
    tokens = torch.stack((x[0, 3:4], x[1, 5:6]))
    got = module(tokens, inference_params=params)
    expected = torch.stack((module(x[:1, :4])[0, -1:], module(x[1:, :6])[0, -1:]))
    torch.testing.assert_close(got, expected)
    cache = params.key_value_memory_dict[3]
    assert cache[[0, 3]].isnan().all()
    assert not cache[1:3, :5].isnan().any()


@torch.no_grad()
def test_on_the_card(device):
    options = {"rotary_emb_dim": 16, "num_heads_kv": 2, "use_flash_attn": True}
    exact = _make(options)
    module = _make(options, dtype=torch.bfloat16)
    module.load_state_dict(exact.state_dict())
    exact.load_state_dict({k: v.double() for k, v in module.state_dict().items()})
    x = torch.randn(2, LENGTH, SIZE, dtype=torch.bfloat16)
    expected = exact(x.double())
    whole = (module(x).double() - expected).abs().max()
    got = _steps(module.to(device), x.to(device), InferenceParams(12, 2))
    assert got.device.type == device.type
    assert (got.cpu().double() - expected).abs().max() <= 2 * whole + 1e-5


def test_the_kvcache_function_is_looked_up_and_gets_every_option(monkeypatch):
    calls = []

    def record(q, *args, **options):
        calls.append(options)
        return q

    monkeypatch.setattr(mha, "flash_attn_with_kvcache", record)
    module = _make(
        {"rotary_emb_dim": 16, "use_alibi": True, "window_size": (2, 0)},
        softmax_scale=0.3,
        rotary_emb_interleaved=True,
        use_flash_attn=True,
    )
    params = InferenceParams(12, 1, 4, key_value_memory_dict=_poisoned(module, 1, 12))
    module(torch.zeros(1, 1, SIZE, dtype=torch.float64), inference_params=params)
    (options,) = calls
    for name in ("rotary_cos", "rotary_sin"):
        assert options.pop(name).shape == (12, 8)
    assert options.pop("alibi_slopes").tolist() == mha.get_alibi_slopes(HEADS)
    assert options == {
        "cache_seqlens": 4,
        "softmax_scale": 0.3,
        "causal": True,
        "window_size": (2, 0),
        "rotary_interleaved": True,
    }


def test_update_kv_cache():
    kv = torch.randn(2, 3, 2, 4, 8)
    params = InferenceParams(8, 5, seqlen_offset=2, batch_size_offset=1)
    filled = _update_kv_cache(kv, params, "any key")
    cache = params.key_value_memory_dict["any key"]
    assert cache.shape == (5, 8, 2, 4, 8)
    assert filled.shape == (2, 5, 2, 4, 8)
    assert filled.data_ptr() == cache[1:].data_ptr()
    assert torch.equal(cache[1:3, 2:5], kv)
    cache.fill_(float("nan"))
    params.seqlen_offset = 5
    assert torch.equal(_update_kv_cache(kv, params, "any key")[:, 5:], kv)
    assert cache.isnan().sum() == cache.numel() - kv.numel()
    before = cache.clone()
    for argument, refused, offset, first in (
        ("inference_params.seqlen_offset", kv, 6, 1),
        ("inference_params.batch_size_offset", kv, 0, 4),
        ("kv", kv[:, :, 0], 0, 0),
        ("kv", kv[:, :, :, :1], 0, 0),
    ):
        params.seqlen_offset, params.batch_size_offset = offset, first
        with pytest.raises(ArgumentError, match=rf"^{argument}: got .*; allowed: .*; to fix it: "):
            _update_kv_cache(refused, params, "any key")
    torch.testing.assert_close(cache, before, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ArgumentError, match=r"^layer_idx: got None"):
        _update_kv_cache(torch.ones(1, 1, 2, 4, 8), InferenceParams(8, 1), None)
    small = InferenceParams(2, 1)
    with pytest.raises(ArgumentError, match=r"^inference_params.seqlen_offset: "):
        _update_kv_cache(torch.ones(1, 3, 2, 4, 8), small, 0)
    assert small.key_value_memory_dict == {}


def test_allocate_inference_cache(device):
    module = MHA(SIZE, HEADS, num_heads_kv=2, device=device, dtype=torch.bfloat16)
    cache = module.allocate_inference_cache(3, 7)
    assert cache.shape == (3, 7, 2, 2, 16)
    assert (cache.dtype, cache.device) == (torch.bfloat16, module.out_proj.weight.device)
    assert module.allocate_inference_cache(3, 7, torch.float16).dtype == torch.float16


@pytest.mark.parametrize("flash", [False, True])
@torch.no_grad()
def test_decoding_without_a_prompt_is_refused(flash):
    module = _make({}, use_flash_attn=flash)
    token = torch.ones(2, 1, SIZE, dtype=torch.float64)
    empty = InferenceParams(8, 2, seqlen_offset=3)
    narrow = InferenceParams(8, 2, 3, key_value_memory_dict=_poisoned(module, 1, 8))
    for params in (empty, narrow):
        with pytest.raises(ArgumentError, match=r"^inference_params.key_value_memory_dict: "):
            module(token, inference_params=params)
    full = InferenceParams(8, 2, 8, key_value_memory_dict=_poisoned(module, 2, 8))
    argument = "cache_seqlens" if flash else "inference_params.seqlen_offset"
    with pytest.raises(ArgumentError, match=rf"^{argument}: "):
        module(token, inference_params=full)
    assert empty.key_value_memory_dict == {}
    nameless = MHA(SIZE, HEADS, causal=True, use_flash_attn=flash, dtype=torch.float64)
    with pytest.raises(ArgumentError, match=r"^layer_idx: got None"):
        nameless(token, inference_params=empty)
    assert full.key_value_memory_dict[3].isnan().all()
