"""The four inner attentions against float64 mathematics, and the slopes of ALiBi."""

from __future__ import annotations

import math

import pytest
import torch

from flash_attn_npu.errors import ArgumentError, ArgumentTypeError
from flash_attn_npu.modules import mha
from flash_attn_npu.modules.mha import (
    CrossAttention,
    FlashCrossAttention,
    FlashSelfAttention,
    SelfAttention,
    get_alibi_slopes,
)
from tests.helpers import attention_oracle as oracle


def _leaf(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def _compare(got, expected, leaves):
    """Values and gradients of `leaves`, for one cotangent."""
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)
    assert got.is_contiguous()
    cotangent = torch.randn_like(expected)
    mine = torch.autograd.grad(got, leaves, cotangent)
    theirs = torch.autograd.grad(expected, leaves, cotangent)
    for gradient, reference in zip(mine, theirs, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-10)


def _mask(batch, seqlen):
    """The first row keeps its last keys only, the others their first ones."""
    keep = torch.ones(batch, seqlen, dtype=torch.bool)
    keep[0, :2] = False
    keep[1, seqlen - 3 :] = False
    return keep


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_self_attention(causal, masked, scale):
    qkv = _leaf(2, 6, 3, 2, 4)
    keep = _mask(2, 6) if masked else None
    module = SelfAttention(causal=causal, softmax_scale=scale)
    expected = oracle.plain_self(*qkv.unbind(2), causal, keep, scale or 0.5)
    _compare(module(qkv, key_padding_mask=keep), expected, [qkv])
    assert torch.equal(
        SelfAttention(not causal, scale)(qkv, causal, keep), module(qkv, key_padding_mask=keep)
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads_k", [4, 2, 1])
@pytest.mark.parametrize("lengths", [(6, 6), (3, 6), (6, 4)])
def test_cross_attention(causal, masked, heads_k, lengths):
    q, kv = _leaf(2, lengths[0], 4, 4), _leaf(2, lengths[1], 2, heads_k, 4)
    keep = _mask(2, lengths[1]) if masked else None
    module = CrossAttention(causal=causal)
    expected = oracle.plain_cross(q, *kv.unbind(2), causal, keep, 0.5)
    _compare(module(q, kv, key_padding_mask=keep), expected, [q, kv])
    again = CrossAttention(not causal)(q, kv, causal, keep)
    assert torch.equal(again, module(q, kv, key_padding_mask=keep))


def test_weights_are_of_the_values_dtype_and_dropped_in_training_only():
    torch.manual_seed(0)
    for module in (SelfAttention(attention_dropout=0.5), CrossAttention(attention_dropout=0.5)):
        # one key in eight carries everything, so an output of 0 or 2 tells whether it was dropped
        qkv = torch.zeros(1, 8, 3, 500, 1, dtype=torch.bfloat16)
        qkv[:, :, :2] = 20.0 * torch.eye(8)[0].view(1, 8, 1, 1, 1)
        qkv[:, :, 2] = 1.0
        arguments = (qkv,) if isinstance(module, SelfAttention) else (qkv[:, :, 0], qkv[:, :, 1:])
        first = module(*arguments)[0, 0, :, 0]
        assert first.dtype == torch.bfloat16
        assert set(first.tolist()) == {0.0, 2.0}
        assert 0.4 < (first == 0).float().mean() < 0.6
        assert set(module.eval()(*arguments)[0, 0, :, 0].tolist()) == {1.0}


OPTIONS = [
    {},
    {"causal": True},
    {"window_size": (2, 1)},
    {"causal": True, "window_size": (2, -1), "softmax_scale": 0.3},
    {"causal": True, "alibi": True},
]


def _flash(kind, options):
    options = dict(options)
    slopes = torch.tensor(oracle.slopes_of(4)) if options.pop("alibi", False) else None
    return kind(alibi_slopes=slopes, **options)


def _attend(q, k, v, options):
    slopes = oracle.slopes_of(4) if options.get("alibi") else None
    scale, causal = options.get("softmax_scale"), options.get("causal", False)
    return oracle.attend(q, k, v, scale, causal, options.get("window_size", (-1, -1)), slopes)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_flash_self_attention(options):
    qkv = _leaf(2, 6, 3, 4, 4)
    module = _flash(FlashSelfAttention, options)
    expected = _attend(*qkv.unbind(2), options)
    _compare(module(qkv), expected, [qkv])
    lengths = [4, 2]
    cu_seqlens = torch.tensor([0, 4, 6], dtype=torch.int32)
    packed = _leaf(6, 3, 4, 4)
    parts = [_attend(*x[None].unbind(2), options)[0] for x in packed.split(lengths)]
    _compare(module(packed, cu_seqlens=cu_seqlens, max_seqlen=4), torch.cat(parts), [packed])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_flash_cross_attention(options):
    q, kv = _leaf(2, 4, 4, 4), _leaf(2, 6, 2, 2, 4)
    module = _flash(FlashCrossAttention, options)
    _compare(module(q, kv), _attend(q, *kv.unbind(2), options), [q, kv])
    q, kv = _leaf(5, 4, 4), _leaf(8, 2, 2, 4)
    parts = [
        _attend(x[None], *y[None].unbind(2), options)[0]
        for x, y in zip(q.split([3, 2]), kv.split([3, 5]), strict=True)
    ]
    starts, starts_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 3, 5], [0, 3, 8]))
    got = module(q, kv, cu_seqlens=starts, max_seqlen=3, cu_seqlens_k=starts_k, max_seqlen_k=5)
    _compare(got, torch.cat(parts), [q, kv])


def test_causal_of_a_call_overrides_the_module():
    qkv = _leaf(1, 4, 3, 2, 4)
    q, kv = qkv[:, :, 0], qkv[:, :, 1:]
    for of_module in (False, True):
        for of_call in (False, True):
            expected = oracle.attend(*qkv.unbind(2), causal=of_call)
            for got in (
                FlashSelfAttention(of_module)(qkv, of_call),
                FlashCrossAttention(of_module)(q, kv, of_call),
            ):
                torch.testing.assert_close(got, expected)


FUNCTIONS = [
    ("flash_attn_qkvpacked_func", FlashSelfAttention, ("qkv",), {}),
    (
        "flash_attn_varlen_qkvpacked_func",
        FlashSelfAttention,
        ("qkv", "cu", 7),
        {"cu_seqlens": "cu", "max_seqlen": 7},
    ),
    ("flash_attn_kvpacked_func", FlashCrossAttention, ("q", "kv"), {}),
    (
        "flash_attn_varlen_kvpacked_func",
        FlashCrossAttention,
        ("q", "kv", "cu", "cu_k", 7, 8),
        {"cu_seqlens": "cu", "max_seqlen": 7, "cu_seqlens_k": "cu_k", "max_seqlen_k": 8},
    ),
]


@pytest.mark.parametrize(("name", "kind", "passed", "lengths"), FUNCTIONS)
def test_functions_are_looked_up_in_mha_and_get_every_option(
    monkeypatch, name, kind, passed, lengths
):
    calls = []
    monkeypatch.setattr(mha, name, lambda *args, **kwargs: calls.append((args, kwargs)) or "out")
    module = kind(
        causal=True,
        softmax_scale=0.25,
        attention_dropout=0.5,
        window_size=(3, 4),
        alibi_slopes=torch.tensor([0.5, 0.25]),
        deterministic=True,
    )
    tensors = passed[:1] if kind is FlashSelfAttention else passed[:2]
    for training in (True, False):
        assert module.train(training)(*tensors, **lengths) == "out"
        positional, options = calls.pop()
        assert positional == passed
        assert options.pop("alibi_slopes").tolist() == [0.5, 0.25]
        assert options == {
            "dropout_p": 0.5 if training else 0.0,
            "softmax_scale": 0.25,
            "causal": True,
            "window_size": (3, 4),
            "deterministic": True,
        }


def test_slopes_are_a_buffer_that_is_not_saved_and_stay_float32(device):
    # no bfloat16 number, so that a slope which was rounded on the way is another one
    slopes = torch.tensor([0.7071, 0.0442], device=device)
    qkv = torch.randn(1, 64, 3, 2, 16).to(device, torch.bfloat16)
    for kind in (FlashSelfAttention, FlashCrossAttention):
        module = kind(alibi_slopes=slopes)
        assert module.state_dict() == {}
        assert list(dict(module.named_buffers())) == ["alibi_slopes"]
        arguments = (qkv,) if kind is FlashSelfAttention else (qkv[:, :, 0], qkv[:, :, 1:])
        expected = module(*arguments)
        assert torch.equal(module.to(torch.bfloat16)(*arguments), expected)
        assert torch.equal(module.alibi_slopes, slopes)
        assert module.to("meta", torch.float16).alibi_slopes.is_meta
        assert not torch.equal(kind()(*arguments), expected)


@pytest.mark.parametrize(
    ("nheads", "slopes"),
    [
        (1, [2**-8]),
        (2, [2**-4, 2**-8]),
        (3, [2**-4, 2**-8, 2**-2]),
        (8, [2**-1, 2**-2, 2**-3, 2**-4, 2**-5, 2**-6, 2**-7, 2**-8]),
        (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]),
    ],
)
def test_alibi_slopes(nheads, slopes):
    got = get_alibi_slopes(nheads)
    assert got == slopes
    assert all(type(slope) is float for slope in got)


def test_alibi_slopes_of_many_heads():
    for nheads in range(1, 100):
        slopes = get_alibi_slopes(nheads)
        assert len(set(slopes)) == nheads
        power = 2 ** int(math.log2(nheads))
        assert slopes[:power] == [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
        for i, slope in enumerate(slopes[power:]):
            assert slope == 2.0 ** (-4 * (2 * i + 1) / power)


def test_empty_batches():
    for module in (SelfAttention(), FlashSelfAttention()):
        assert module(torch.ones(0, 4, 3, 2, 8)).shape == (0, 4, 2, 8)
    for module in (CrossAttention(), FlashCrossAttention()):
        assert module(torch.ones(0, 4, 2, 8), torch.ones(0, 5, 2, 1, 8)).shape == (0, 4, 2, 8)


def test_bad_input_is_named():
    qkv, cu = torch.ones(2, 4, 3, 2, 8), torch.tensor([0, 4], dtype=torch.int32)
    q, kv = qkv[:, :, 0], qkv[:, :, 1:]
    short = torch.ones(2, 3, dtype=torch.bool)
    for argument, call in (
        ("nheads", lambda: get_alibi_slopes(0)),
        ("nheads", lambda: get_alibi_slopes(4.0)),
        ("qkv", lambda: SelfAttention()(q)),
        ("key_padding_mask", lambda: SelfAttention()(qkv, key_padding_mask=short)),
        ("key_padding_mask", lambda: CrossAttention()(q, kv, key_padding_mask=torch.ones(2, 4))),
        ("kv", lambda: CrossAttention()(q, qkv)),
        ("kv", lambda: CrossAttention()(q, kv[:1])),
        ("kv", lambda: CrossAttention()(torch.ones(2, 4, 3, 8), kv)),
        ("max_seqlen", lambda: FlashSelfAttention()(qkv[0], cu_seqlens=cu)),
        ("cu_seqlens_k", lambda: FlashCrossAttention()(q[0], kv[0], None, cu, 4)),
        ("max_seqlen_k", lambda: FlashCrossAttention()(q[0], kv[0], None, cu, 4, cu)),
    ):
        with pytest.raises(ArgumentError, match=rf"^{argument}: got .*; allowed: .*; to fix it: "):
            call()
    with pytest.raises(ArgumentTypeError, match=r"^qkv: got None"):
        SelfAttention()(None)
