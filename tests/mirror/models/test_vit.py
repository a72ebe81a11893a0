"""The vision transformer against transformers, with weights by timm's names.

It is compared in float32, with float64 of the oracle: the error must be at most twice that of
transformers in float32.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from flash_attn_npu.errors import ArgumentError, ArgumentTypeError
from flash_attn_npu.layers.patch_embed import PatchEmbed
from flash_attn_npu.models import vit
from flash_attn_npu.models.vit import VisionTransformer
from flash_attn_npu.ops.fused_dense import FusedDense, FusedMLP
from flash_attn_npu.ops.triton.layer_norm import RMSNorm
from tests.helpers.vit_oracle import SIZES, by_timm_names, images, make_oracle

OPTIONS = {
    "plain": {},
    "flash": {"use_flash_attn": True},
    "plain fused": {"fused_bias_fc": True, "fused_dropout_add_ln": True},
    "flash fused": {
        "use_flash_attn": True,
        "fused_bias_fc": True,
        "fused_mlp": True,
        "fused_dropout_add_ln": True,
    },
}
ways = pytest.mark.parametrize("way", OPTIONS)


def _ours(oracle, **options):
    model = VisionTransformer(**SIZES, **options).eval()
    model.load_state_dict(by_timm_names(oracle.state_dict()))
    return model


def _at_most_twice(got, plain, exact):
    exact = exact.double()
    allowed = 2 * (plain.double() - exact).abs().max() + 2e-6 * exact.abs().max()
    assert got.shape == exact.shape
    assert (got.cpu().double() - exact).abs().max() <= allowed


@ways
def test_values_and_gradients(way):
    activation = "gelu_new" if "fused_mlp" in OPTIONS[way] else "gelu"
    plain, exact = (make_oracle(dtype, activation) for dtype in (torch.float32, torch.float64))
    model = _ours(plain, **OPTIONS[way]).train()
    answers, gradients = [], []
    for oracle in (plain, exact):
        x = images(oracle.dtype).requires_grad_()
        logits = oracle(x).logits
        logits.square().sum().backward()
        answers.append((logits, x.grad))
        named = {name: p.grad for name, p in oracle.named_parameters()}
        expected = VisionTransformer(**SIZES).double()
        expected.load_state_dict(by_timm_names(named))
        gradients.append(expected.state_dict())
    x = images().requires_grad_()
    logits = model(x)
    logits.square().sum().backward()
    for got, theirs, truth in zip((logits, x.grad), *answers, strict=True):
        _at_most_twice(got, theirs, truth)
    for name, parameter in model.named_parameters():
        _at_most_twice(parameter.grad, gradients[0][name], gradients[1][name])


def test_in_float64():
    oracle = make_oracle(torch.float64)
    model = _ours(oracle).double()
    x = images(torch.float64)
    torch.testing.assert_close(model(x), oracle(x).logits, rtol=1e-11, atol=1e-12)


@ways
def test_features(way):
    activation = "gelu_new" if "fused_mlp" in OPTIONS[way] else "gelu"
    plain, exact = (make_oracle(dtype, activation) for dtype in (torch.float32, torch.float64))
    model = _ours(plain, **OPTIONS[way])
    with torch.no_grad():
        whole = model.forward_features(images())
        states = [oracle.vit(images(oracle.dtype)).last_hidden_state for oracle in (plain, exact)]
        _at_most_twice(whole, *states)
        token = model.forward_features(images(), all_tokens=False)
        assert token.shape == (3, 1, 16)
        _at_most_twice(token, *(state[:, :1] for state in states))
        assert torch.equal(model.forward_head(token, pre_logits=True), token[:, 0])
        assert torch.equal(model.forward_head(token), model(images()))


def test_a_class_token_without_position_and_no_bias():
    plain, exact = (make_oracle(dtype, qkv_bias=False) for dtype in (torch.float32, torch.float64))
    for oracle in (plain, exact):
        oracle.vit.embeddings.position_embeddings.data[:, :1] = 0
    model = VisionTransformer(**SIZES, no_embed_class=True, qkv_bias=False).eval()
    state = by_timm_names(plain.state_dict())
    state["pos_embed"] = state["pos_embed"][:, 1:]
    model.load_state_dict(state)
    with torch.no_grad():
        answers = [oracle(images(oracle.dtype)).logits for oracle in (plain, exact)]
        _at_most_twice(model(images()), *answers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["flash", "flash fused"])
def test_low_precision(device, way, dtype):
    """Twice the error of transformers in the same dtype, at most."""
    activation = "gelu_new" if "fused_mlp" in OPTIONS[way] else "gelu"
    plain = make_oracle(dtype, activation)
    exact = make_oracle(torch.float64, activation)
    exact.load_state_dict(plain.state_dict())
    model = _ours(plain, **OPTIONS[way]).to(device, dtype)
    with torch.no_grad():
        got = model(images(dtype).to(device))
        answers = plain(images(dtype)).logits, exact(images(dtype).double()).logits
    assert got.dtype == dtype
    _at_most_twice(got, *answers)


def test_names_of_ours_load_and_nothing_is_changed():
    model = _ours(make_oracle())
    state = model.state_dict()
    assert "blocks.0.mixer.Wqkv.weight" in state
    assert {"blocks.1.mixer.Wq.bias", "blocks.1.mixer.Wkv.weight"} <= state.keys()
    assert state["patch_embed.proj.weight"].shape == (16, 3 * 4 * 2)
    other = VisionTransformer(**SIZES).eval()
    assert other.load_state_dict(state) == ([], [])
    assert torch.equal(other(images()), model(images()))
    timm = by_timm_names(make_oracle().state_dict())
    before = dict(timm)
    assert other.load_state_dict(timm) == ([], [])
    assert all(timm[name] is tensor for name, tensor in before.items())
    assert timm.keys() == before.keys()
    del timm["head.bias"]
    timm["blocks.0.attn.q_norm.weight"] = torch.ones(8)
    found = other.load_state_dict(timm, strict=False)
    assert found == (["head.bias"], ["blocks.0.attn.q_norm.weight"])
    with pytest.raises(RuntimeError, match=r"blocks\.0\.attn\.q_norm\.weight"):
        other.load_state_dict(timm)


def test_options_reach_the_parts():
    model = VisionTransformer(**SIZES, **OPTIONS["flash fused"], attn_drop_rate=0.25)
    assert isinstance(model.patch_embed.proj, FusedDense)
    for i, block in enumerate(model.blocks):
        assert isinstance(block.mlp, FusedMLP)
        assert block.fused_dropout_add_ln
        assert block.residual_in_fp32
        assert block.mixer.use_flash_attn
        assert block.mixer.inner_attn.drop.p == 0.25
        assert block.mixer.cross_attn == (i == 1)
        assert isinstance(block.mixer.out_proj, FusedDense)
    model = VisionTransformer(**{**SIZES, "num_classes": 0}, norm_layer=RMSNorm, act_layer=nn.SiLU)
    assert isinstance(model.blocks[0].mlp.activation, nn.SiLU)
    assert isinstance(model.norm, RMSNorm)
    assert model(images()).shape == (3, 16)
    assert model.no_weight_decay() == {"pos_embed", "cls_token"}


def test_a_fused_rms_norm_is_the_composed_one():
    model = VisionTransformer(**SIZES, norm_layer=RMSNorm)
    fused = VisionTransformer(**SIZES, norm_layer=RMSNorm, fused_dropout_add_ln=True)
    fused.load_state_dict(model.state_dict())
    torch.testing.assert_close(fused(images()), model(images()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_stochastic_depth_grows_up_to_the_last_layer(fused):
    """With a rate of 1 the last of two layers adds nothing, and the first all."""
    make = {**SIZES, "fused_dropout_add_ln": fused}
    model = VisionTransformer(**make, drop_path_rate=1.0)
    one = VisionTransformer(**{**make, "depth": 1})
    state = model.state_dict()
    shared = {name: tensor for name, tensor in state.items() if "blocks.1." not in name}
    # the last layer of one has Wq and Wkv
    one.load_state_dict(shared)
    torch.testing.assert_close(model(images()), one(images()), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(model.eval()(images()), one(images()))
    rates = [
        (block.drop_path1.p, block.drop_path2.p)
        for block in VisionTransformer(**{**SIZES, "depth": 3}, drop_path_rate=0.5).blocks
    ]
    assert rates == [(0.0, 0.0), (0.0, 0.25), (0.25, 0.5)]


@pytest.mark.parametrize("fused", [False, True])
def test_dropout(fused):
    """Of what enters and of every branch: where all is dropped, a norm of zeros is left."""
    model = VisionTransformer(**SIZES, drop_rate=1.0, fused_dropout_add_ln=fused)
    nn.init.normal_(model.norm.bias)
    expected = model.head(model.norm.bias).expand(3, -1)
    torch.testing.assert_close(model(images()), expected)
    model.eval()
    assert torch.equal(model(images()), model(images()))
    assert not torch.allclose(model(images()), expected)
    rates = [(block.dropout1.p, block.dropout2.p) for block in model.blocks]
    assert rates == [(1.0, 1.0), (1.0, 1.0)]


def test_initial_weights():
    torch.manual_seed(0)
    model = VisionTransformer(**{**SIZES, "embed_dim": 64})
    assert 0.018 < model.pos_embed.std() < 0.022
    assert 0 < model.cls_token.abs().max() < 1e-5
    for part in (model.head, model.patch_embed.proj, model.blocks[1].mixer.Wkv):
        assert 0.016 < part.weight.std() < 0.024
        assert not part.bias.any()
    before = model.head.weight.clone()
    model.init_weights()
    assert not torch.equal(model.head.weight, before)

    class Own(nn.Module):
        def init_weights(self):
            self.called = True

    own = Own()
    vit.init_weights_vit_timm(own, "own")
    assert own.called
    vit.init_weights_vit_timm(nn.LayerNorm(3))


def test_an_embed_layer_of_the_caller():
    """It gets no fused_bias_fc, and a convolution's weight stays one."""

    class Convolution(nn.Module):
        def __init__(self, img_size, patch_size, in_chans, embed_dim, bias):
            super().__init__()
            self.num_patches = (img_size // patch_size[0]) * (img_size // patch_size[1])
            self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size, bias=bias)

        def forward(self, x):
            return self.proj(x).flatten(2).transpose(1, 2)

    oracle = make_oracle()
    model = _ours(oracle, embed_layer=Convolution, fused_bias_fc=True)
    torch.testing.assert_close(model(images()), oracle(images()).logits, rtol=1e-4, atol=1e-5)


def test_vit_base():
    # 86 million weights need not be drawn
    with torch.device("meta"):
        model = vit.vit_base_patch16_224(num_classes=7, use_flash_attn=True)
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 7)
    assert len(model.blocks) == 12
    assert model.pos_embed.shape == (1, 197, 768)
    assert model.blocks[0].mlp.fc1.weight.shape == (3072, 768)
    assert model.blocks[0].mixer.num_heads == 12
    assert model.blocks[0].norm1.eps == 1e-6
    with pytest.raises(ArgumentError, match=r"pretrained: got True; allowed: False; to fix it: "):
        vit.vit_base_patch16_224(pretrained=True)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"global_pool": "avg"}, "global_pool: got 'avg'; allowed: 'token'"),
        ({"global_pool": ""}, "global_pool: got ''"),
        ({"class_token": False}, "class_token: got False; allowed: True"),
        ({"init_values": 1e-5}, "init_values: got 1e-05; allowed: None"),
        ({"weight_init": "jax"}, "weight_init: got 'jax'"),
        ({"fc_norm": True}, "fc_norm: got True"),
        ({"pre_norm": True}, "pre_norm: got True"),
        ({"depth": 0}, "depth: got 0"),
        ({"fused_mlp": True, "act_layer": nn.SiLU}, "act_layer: got <class"),
    ],
)
def test_options_that_are_refused(options, told):
    with pytest.raises(ArgumentError, match="to fix it: ") as caught:
        VisionTransformer(**{**SIZES, **options})
    assert told in str(caught.value)


def test_arguments_that_are_refused():
    model = VisionTransformer(**SIZES)
    with pytest.raises(ArgumentError, match=r"mode: got 'jax'"):
        model.init_weights("jax")
    with pytest.raises(ArgumentError, match=r"x: got shape \(3, 3, 8, 7\)"):
        model(images()[..., :7])
    with pytest.raises(ArgumentTypeError, match=r"x: got \[\] \(list\)"):
        model.forward_features([])
    assert inspect.signature(VisionTransformer).parameters["embed_layer"].default is PatchEmbed
