"""`Block` and `ParallelBlock`: the residual stream around any mixer and MLP, fused or not."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from flash_attn_npu.errors import ArgumentError, ArgumentTypeError
from flash_attn_npu.modules import block as blocks
from flash_attn_npu.modules._residual import StochasticDepth
from flash_attn_npu.modules.block import MHA, Block, Mlp, ParallelBlock, RMSNorm

DIM = 8
NORMS = {
    "layer norm": partial(nn.LayerNorm, dtype=torch.float64),
    "rms norm": partial(RMSNorm, dtype=torch.float64),
    "centred": partial(RMSNorm, zero_centered_weight=True, dtype=torch.float64),
}


class Layer(nn.Linear):
    """A sublayer that is not symmetric in its inputs, and takes an argument."""

    def __init__(self, dim, residual=False, dtype=torch.float64):
        super().__init__(dim, dim, dtype=dtype)
        self.residual = residual

    def forward(self, x, shift=0.0, mixer_subset=None):
        y = x if mixer_subset is None else x[:, mixer_subset]
        out = torch.tanh(super().forward(y)) + shift
        return (out, x) if self.residual else out


def _norm(module, x):
    """Of the mathematics, with the parameters of a norm."""
    mean = 0 if isinstance(module, RMSNorm) else x.mean(-1, keepdim=True)
    size = (x - mean).square().mean(-1, keepdim=True)
    weight = module.weight + (1 if getattr(module, "zero_centered_weight", False) else 0)
    out = (x - mean) / (size + module.eps).sqrt() * weight
    return out if module.bias is None else out + module.bias


def _layer(module, x, shift=0.0):
    return torch.tanh(x @ module.weight.T + module.bias) + shift


def _make(kind, norm="layer norm", **options):
    torch.manual_seed(0)
    module = kind(DIM, Layer, Layer, NORMS[norm], **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def _stream(*shape):
    return torch.randn(*(shape or (3, 5, DIM)), dtype=torch.float64, requires_grad=True)


def _compare(got, expected, leaves):
    cotangents = [torch.randn_like(x) for x in expected]
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    mine = torch.autograd.grad(got, leaves, cotangents)
    theirs = torch.autograd.grad(expected, leaves, cotangents)
    for gradient, reference in zip(mine, theirs, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-9)


fused = pytest.mark.parametrize("fused", [False, True], ids=["composed", "fused"])


@fused
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("first", [False, True])
def test_prenorm(first, norm, fused):
    module = _make(Block, norm, fused_dropout_add_ln=fused)
    hidden, residual = _stream(), None if first else _stream()
    total = hidden if first else hidden + residual
    mixed = _layer(module.mixer, _norm(module.norm1, total), 0.5)
    after = total + mixed
    expected = (_layer(module.mlp, _norm(module.norm2, after)), after)
    got = module(hidden, residual, mixer_kwargs={"shift": 0.5})
    leaves = [hidden, *module.parameters(), *([] if first else [residual])]
    _compare(got, expected, leaves)


@fused
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("residual", [False, True])
def test_postnorm(residual, norm, fused):
    torch.manual_seed(0)
    layer = partial(Layer, residual=residual)
    module = Block(
        DIM,
        layer,
        layer,
        NORMS[norm],
        prenorm=False,
        fused_dropout_add_ln=fused,
        return_residual=residual,
    )
    hidden = _stream()
    middle = _norm(module.norm1, _layer(module.mixer, hidden, 0.5) + hidden)
    expected = _norm(module.norm2, _layer(module.mlp, middle) + middle)
    got = module(hidden, mixer_kwargs={"shift": 0.5})
    _compare([got], [expected], [hidden, *module.parameters()])


@fused
@pytest.mark.parametrize("kind", [Block, ParallelBlock])
def test_a_residual_in_fp32_is_not_rounded_in_float64(kind, fused):
    module = kind(DIM, Layer, Layer, fused_dropout_add_ln=fused, residual_in_fp32=True).double()
    hidden = _stream()
    for residual in (None, _stream()):
        got = module(hidden, residual=residual, mixer_kwargs={"shift": 0.5})[-1]
        assert got.dtype == torch.float64
        assert (got != got.float()).any()


@fused
def test_without_an_mlp_and_for_a_subset_of_positions(fused):
    torch.manual_seed(0)
    module = Block(DIM, Layer, nn.Identity, NORMS["layer norm"], fused_dropout_add_ln=fused)
    assert sorted(module.state_dict()) == [
        "mixer.bias",
        "mixer.weight",
        "norm1.bias",
        "norm1.weight",
    ]
    hidden, residual = _stream(), _stream()
    for rows in (None, slice(1, 3), torch.tensor([4, 0])):
        total = hidden + residual
        mixed = _layer(module.mixer, _norm(module.norm1, total))
        kept = slice(None) if rows is None else rows
        got = module(hidden, residual, mixer_subset=rows)
        _compare(got, (mixed[:, kept], total[:, kept]), [hidden, residual])
    module = _make(Block, fused_dropout_add_ln=fused)
    options = {"shift": 0.5}
    got = module(hidden, residual, torch.tensor([4, 0]), options)
    whole = module(hidden, residual, None, options)
    assert options == {"shift": 0.5}
    for mine, theirs in zip(got, whole, strict=True):
        torch.testing.assert_close(mine, theirs[:, [4, 0]])
    packed = module(hidden.flatten(0, 1), residual.flatten(0, 1), None, options)
    for mine, theirs in zip(packed, whole, strict=True):
        torch.testing.assert_close(mine, theirs.flatten(0, 1))


@fused
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_parallel_blocks(norm, tied, fused):
    """Two in a row: the first has no second branch and no residual."""
    options = {"tied_norm": tied, "fused_dropout_add_ln": fused}
    first, second = _make(ParallelBlock, norm, **options), _make(ParallelBlock, norm, **options)
    hidden = _stream()

    def expected(module, total):
        norm2 = module.norm1 if tied else module.norm2
        mixed = _layer(module.mixer, _norm(module.norm1, total), 0.5)
        return mixed, _layer(module.mlp, _norm(norm2, total)), total

    reference = expected(first, hidden)
    reference = expected(second, sum(reference))
    got = first(hidden, mixer_kwargs={"shift": 0.5})
    got = second(*got, mixer_kwargs={"shift": 0.5})
    _compare(got, reference, [hidden, *first.parameters(), *second.parameters()])
    assert hasattr(first, "norm2") != tied


@fused
@pytest.mark.parametrize("kind", [Block, ParallelBlock])
def test_the_residual_may_stay_in_float32(device, kind, fused):
    torch.manual_seed(0)
    make = partial(
        kind,
        DIM,
        partial(Layer, dtype=torch.bfloat16),
        partial(Layer, dtype=torch.bfloat16),
        partial(nn.LayerNorm, dtype=torch.bfloat16),
        fused_dropout_add_ln=fused,
    )
    hidden = torch.randn(3, 5, DIM).to(device, torch.bfloat16)
    for in_fp32, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        module = make(residual_in_fp32=in_fp32).to(device)
        *outs, residual = module(hidden)
        assert [out.dtype for out in outs] == [torch.bfloat16] * len(outs)
        assert residual.dtype == dtype
        *outs, residual = module(*outs, residual)
        assert residual.dtype == dtype
        assert [out.dtype for out in outs] == [torch.bfloat16] * len(outs)


@fused
@pytest.mark.parametrize("kind", [Block, ParallelBlock])
def test_dropout_in_training_only(kind, fused):
    torch.manual_seed(0)
    options = {"fused_dropout_add_ln": fused, "resid_dropout1": 0.25, "resid_dropout2": 0.25}
    module = kind(256, nn.Identity, nn.Identity, **options)
    first, second = torch.ones(4, 8, 256), torch.full((4, 8, 256), 10.0)
    arguments = (first, None) if kind is Block else (first, second, None)
    assert torch.equal(module.eval()(*arguments)[-1], first if kind is Block else first + second)
    total = module.train()(*arguments)[-1]
    kept = 1 / 0.75
    expected = [0.0, kept] if kind is Block else [0.0, kept, 10 * kept, 11 * kept]
    values = total.unique()
    torch.testing.assert_close(values, torch.tensor(expected))
    assert 0.2 < (total == 0).float().mean() / (0.25 if kind is ParallelBlock else 1) < 0.3


def test_two_dropouts_that_differ_are_both_honoured():
    options = {"resid_dropout1": 0.0, "resid_dropout2": 0.5, "fused_dropout_add_ln": True}
    module = ParallelBlock(64, nn.Identity, nn.Identity, **options)
    total = module(torch.ones(4, 64), torch.full((4, 64), 10.0))[-1]
    assert set(total.unique().tolist()) == {1.0, 21.0}
    assert set(module.eval()(torch.ones(4, 64), torch.ones(4, 64))[-1].unique().tolist()) == {2.0}


@fused
@pytest.mark.parametrize("half", [1, 2])
@pytest.mark.parametrize("prenorm", [False, True])
def test_drop_path_drops_whole_rows_in_training(prenorm, half, fused):
    torch.manual_seed(0)
    module = _make(Block, prenorm=prenorm, fused_dropout_add_ln=fused, **{f"drop_path{half}": 0.25})
    hidden = _stream(200, 2, DIM)
    got = module(hidden, torch.ones_like(hidden))[1] if prenorm else module(hidden)
    counted = []
    # what comes out for each row is one of two answers: scaled by 4 / 3, or left out
    for scale in (4 / 3, 0.0):
        of_half = [1.0, 1.0]
        of_half[half - 1] = scale
        if prenorm:
            total = hidden * of_half[0] + 1
            expected = total + _layer(module.mixer, _norm(module.norm1, total)) * of_half[1]
        else:
            middle = _norm(module.norm1, _layer(module.mixer, hidden) * of_half[0] + hidden)
            expected = _norm(module.norm2, _layer(module.mlp, middle) * of_half[1] + middle)
        counted.append(torch.isclose(got, expected).all(-1).all(-1))
    assert (counted[0] ^ counted[1]).all()
    assert 0.15 < counted[1].float().mean() < 0.35


def test_stochastic_depth():
    torch.manual_seed(0)
    x = torch.ones(1000, 2, 3)
    out = StochasticDepth(0.25)(x)
    rows = out[:, 0, 0]
    assert torch.equal(out, rows[:, None, None].expand_as(out))
    torch.testing.assert_close(rows.unique(), torch.tensor([0.0, 4 / 3]))
    assert 0.2 < (rows == 0).float().mean() < 0.3
    assert not StochasticDepth(1.0)(x).any()
    for module in (StochasticDepth(0.0), StochasticDepth(0.25).eval()):
        assert module(x) is x
    assert StochasticDepth(0.25).state_dict() == {}
    assert repr(StochasticDepth(0.25)) == "StochasticDepth(p=0.25)"
    with pytest.raises(ArgumentError, match=r"^drop_path: got 1.5"):
        Block(64, drop_path1=1.5)


def test_defaults_are_attention_and_an_mlp_and_the_state_dict_is_upstreams():
    for kind in (Block, ParallelBlock):
        module = kind(128)
        assert type(module.mixer) is MHA
        assert module.mixer.num_heads == 2
        assert type(module.mlp) is Mlp
        assert module.mlp.fc1.weight.shape == (512, 128)
        assert list(module.state_dict()) == [
            "mixer.Wqkv.weight",
            "mixer.Wqkv.bias",
            "mixer.out_proj.weight",
            "mixer.out_proj.bias",
            "norm1.weight",
            "norm1.bias",
            "mlp.fc1.weight",
            "mlp.fc1.bias",
            "mlp.fc2.weight",
            "mlp.fc2.bias",
            "norm2.weight",
            "norm2.bias",
        ]
        assert module.allocate_inference_cache(2, 3, torch.float16).shape == (2, 3, 2, 2, 64)
        *_, residual = module(torch.ones(1, 4, 128))
        assert residual.shape == (1, 4, 128)


@pytest.mark.parametrize("kind", [Block, ParallelBlock])
def test_parameters_of_norms_are_marked(kind):
    for options, marks in (
        ({}, set()),
        ({"sequence_parallel": True}, {"_sequence_parallel"}),
        ({"mark_shared_params": True}, {"_shared_params"}),
        (
            {"sequence_parallel": True, "mark_shared_params": True},
            {"_sequence_parallel", "_shared_params"},
        ),
    ):
        module = _make(kind, **options)
        for name, parameter in module.named_parameters():
            expected = marks if name.startswith("norm") else set()
            found = {
                mark
                for mark in ("_sequence_parallel", "_shared_params")
                if getattr(parameter, mark, False)
            }
            assert found == expected, name


def test_the_fused_function_is_looked_up_when_used(monkeypatch):
    calls = []

    def record(x, weight, bias, **options):
        calls.append(options)
        return blocks_layer_norm(x, weight, bias, **options)

    blocks_layer_norm = blocks.layer_norm_fn
    monkeypatch.setattr(blocks, "layer_norm_fn", record)
    options = {"resid_dropout1": 0.5, "drop_path2": 0.5, "fused_dropout_add_ln": True}
    module = _make(Block, "centred", residual_in_fp32=True, **options)
    module(_stream())
    first, second = calls
    assert first["rowscale"] is None
    assert second["rowscale"].shape == (3, 5)
    assert (first["dropout_p"], second["dropout_p"]) == (0.5, 0.0)
    for call in calls:
        assert call["is_rms_norm"]
        assert call["zero_centered_weight"]
        assert call["prenorm"]
        assert call["residual_in_fp32"]
        assert call["eps"] == 1e-5
    _make(Block)(_stream())
    assert len(calls) == 2


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_in_one_graph():
    torch._dynamo.reset()
    module, hidden = _make(Block), _stream()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    _compare(compiled(hidden), module(hidden), [hidden, *module.parameters()])
    torch._dynamo.reset()


def test_what_excludes_each_other_is_named():
    post, hidden = _make(Block, prenorm=False), _stream()
    for argument, call in (
        ("residual_in_fp32", lambda: _make(Block, prenorm=False, residual_in_fp32=True)),
        ("residual", lambda: post(hidden, hidden)),
        ("mixer_subset", lambda: post(hidden, mixer_subset=slice(1))),
    ):
        with pytest.raises(ArgumentError, match=rf"^{argument}: got .*; allowed: .*; to fix it: "):
            call()
    fused = {"fused_dropout_add_ln": True}
    for argument, options in (
        ("norm_cls", {"norm_cls": nn.BatchNorm1d}),
        ("norm_cls", {"norm_cls": partial(nn.LayerNorm, elementwise_affine=False)}),
        ("norm_cls", {"norm_cls": partial(RMSNorm, dropout_p=0.5)}),
        ("dropout_cls", {"dropout_cls": nn.Dropout2d}),
    ):
        for kind in (Block, ParallelBlock):
            # what cannot be fused is taken otherwise
            kind(DIM, Layer, Layer, **options)
            allowed = "allowed: Dropout;" if argument == "dropout_cls" else "allowed: .*weight"
            with pytest.raises(ArgumentTypeError, match=rf"^{argument}: got .*; {allowed}"):
                kind(DIM, Layer, Layer, **fused, **options)
    with pytest.raises(ArgumentTypeError, match=r"^hidden_states: got None"):
        post(None)
    with pytest.raises(ArgumentTypeError, match=r"^hidden_states1: got None"):
        _make(ParallelBlock)(None)


@pytest.mark.parametrize("kind", [Block, ParallelBlock])
def test_other_norms_and_dropouts(kind):
    norm = partial(nn.LayerNorm, elementwise_affine=False)
    module, hidden = kind(DIM, Layer, Layer, norm, nn.AlphaDropout), _stream()
    got = module(hidden)
    normed = nn.functional.layer_norm(hidden, (DIM,))
    mixed = _layer(module.mixer, normed)
    if kind is Block:
        total = hidden + mixed
        expected = _layer(module.mlp, nn.functional.layer_norm(total, (DIM,))), total
    else:
        expected = mixed, _layer(module.mlp, normed), hidden
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    kind(DIM, Layer, Layer, norm, lambda p: nn.Identity())(hidden)
