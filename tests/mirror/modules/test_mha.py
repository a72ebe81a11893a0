"""`MHA` against its projections, rotation and attention written out in float64."""

from __future__ import annotations

import pytest
import torch

from flash_attn_npu.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from flash_attn_npu.layers.rotary import RotaryEmbedding
from flash_attn_npu.modules import mha
from flash_attn_npu.modules._cached_attention import LinearResidual
from flash_attn_npu.modules.mha import MHA
from flash_attn_npu.ops.fused_dense import FusedDense
from flash_attn_npu.utils.generation import InferenceParams
from tests.helpers import attention_oracle as oracle

SIZE, HEADS, HEADDIM = 32, 4, 8


def _qkv(parameters, x, x_kv, options):
    """q, k and v by heads."""
    heads_kv = options.get("num_heads_kv", HEADS)
    kv_size = heads_kv * HEADDIM
    if options.get("cross_attn"):
        q = oracle.linear(x, parameters, "Wq")
        kv = oracle.linear(x if x_kv is None else x_kv, parameters, "Wkv")
    else:
        q, kv = oracle.linear(x, parameters, "Wqkv").split((SIZE, 2 * kv_size), -1)
    if "dwconv_qkv.weight" in parameters:
        weight, bias = parameters["dwconv_qkv.weight"], parameters["dwconv_qkv.bias"]
        q, kv = (
            oracle.convolve(part, weight[rows], bias[rows])
            for part, rows in ((q, slice(SIZE)), (kv, slice(SIZE, None)))
        )
    elif "dwconv_q.weight" in parameters:
        q = oracle.convolve(q, parameters["dwconv_q.weight"], parameters["dwconv_q.bias"])
        kv = oracle.convolve(kv, parameters["dwconv_kv.weight"], parameters["dwconv_kv.bias"])
    k, v = kv.split(kv_size, -1)
    return (part.unflatten(-1, (-1, HEADDIM)) for part in (q, k, v))


def _expected(parameters, x, options, x_kv=None, rows=None, keep=None):
    q, k, v = _qkv(parameters, x, x_kv, options)
    dim = options.get("rotary_emb_dim", 0)
    if dim:
        turn = (dim, options.get("rotary_emb_interleaved", False))
        base = options.get("rotary_emb_base", 10000.0)
        q, k = oracle.rotate(q, *turn, base), oracle.rotate(k, *turn, base)
    q = q if rows is None else q[:, rows]
    causal, scale = options.get("causal", False), options.get("softmax_scale")
    if keep is not None:
        plain = oracle.plain_self if q.shape[2] == k.shape[2] else oracle.plain_cross
        context = plain(q, k, v, causal, keep, HEADDIM**-0.5 if scale is None else scale)
    else:
        window = options.get("window_size", (-1, -1))
        slopes = oracle.slopes_of(HEADS) if options.get("use_alibi") else None
        context = oracle.attend(q, k, v, scale, causal, window, slopes)
    return oracle.linear(context.flatten(2), parameters, "out_proj")


def _make(**options):
    torch.manual_seed(0)
    return MHA(SIZE, HEADS, dtype=torch.float64, **options)


def _compare(module, got, expected, x, tolerance=1e-10):
    assert got.is_contiguous()
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    cotangent = torch.randn_like(expected)
    leaves = [x, *module.parameters()]
    mine = torch.autograd.grad(got, leaves, cotangent)
    theirs = torch.autograd.grad(expected, leaves, cotangent)
    for gradient, reference in zip(mine, theirs, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=tolerance, atol=10 * tolerance)


def _input(*shape):
    return torch.randn(*(shape or (2, 7, SIZE)), dtype=torch.float64, requires_grad=True)


CASES = [
    {},
    {"causal": True},
    {"causal": True, "num_heads_kv": 2, "softmax_scale": 0.5},
    {"num_heads_kv": 1, "qkv_proj_bias": False, "out_proj_bias": False},
    {"causal": True, "dwconv": True},
    {"dwconv": True, "num_heads_kv": 2},
    {"cross_attn": True, "causal": True},
    {"cross_attn": True, "num_heads_kv": 2, "dwconv": True},
    {"causal": True, "fused_bias_fc": True},
    {"cross_attn": True, "fused_bias_fc": True},
    {"causal": True, "checkpointing": True},
    {"checkpointing": True, "num_heads_kv": 2},
]


@pytest.mark.parametrize("flash", [False, True], ids=["plain", "flash"])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_values_and_gradients(options, flash):
    module = _make(use_flash_attn=flash, **options)
    x = _input()
    _compare(module, module(x), _expected(dict(module.named_parameters()), x, options), x)


FLASH_CASES = [
    {"window_size": (2, 1)},
    {"use_alibi": True, "causal": True, "num_heads_kv": 2},
    {"causal": True, "window_size": (3, 0), "use_alibi": True},
]


@pytest.mark.parametrize("options", FLASH_CASES, ids=str)
def test_windows_and_slopes(options):
    module = _make(use_flash_attn=True, **options)
    x = _input()
    _compare(module, module(x), _expected(dict(module.named_parameters()), x, options), x)


ROTARY_CASES = [
    {"rotary_emb_dim": HEADDIM, "causal": True},
    {"rotary_emb_dim": 4, "num_heads_kv": 2, "rotary_emb_interleaved": True},
    {"rotary_emb_dim": HEADDIM, "fused_bias_fc": True},
    {"rotary_emb_dim": HEADDIM, "num_heads_kv": 1, "rotary_emb_base": 100.0, "checkpointing": True},
]


@pytest.mark.parametrize("flash", [False, True], ids=["plain", "flash"])
@pytest.mark.parametrize("options", ROTARY_CASES, ids=str)
def test_rotary(options, flash):
    module = _make(use_flash_attn=flash, **options)
    x = _input()
    # the tables are computed in float32
    expected = _expected(dict(module.named_parameters()), x, options)
    _compare(module, module(x, max_seqlen=12), expected, x, tolerance=1e-5)
    assert module.rotary_emb._seq_len_cached == 12


@pytest.mark.parametrize("flash", [False, True], ids=["plain", "flash"])
def test_cross_attention_to_something_else_and_to_a_subset(flash):
    module = _make(cross_attn=True, use_flash_attn=flash)
    parameters = dict(module.named_parameters())
    x, x_kv = _input(), _input(2, 5, SIZE)
    expected = _expected(parameters, x, {"cross_attn": True}, x_kv)
    _compare(module, module(x, x_kv), expected, x)
    for rows in (slice(0, 1), torch.tensor([4, 0])):
        expected = _expected(parameters, x, {"cross_attn": True}, rows=rows)
        _compare(module, module(x, mixer_subset=rows), expected, x)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "num_heads_kv": 2}])
def test_key_padding_mask(options):
    module = _make(**options)
    x, keep = _input(), torch.arange(7) < torch.tensor([[7], [4]])
    expected = _expected(dict(module.named_parameters()), x, options, keep=keep)
    _compare(module, module(x, key_padding_mask=keep), expected, x)


PACKED_CASES = [{}, {"num_heads_kv": 2, "causal": True}, {"cross_attn": True}]


@pytest.mark.parametrize("options", PACKED_CASES, ids=str)
def test_packed_sequences(options):
    module = _make(use_flash_attn=True, **options)
    parameters, x = dict(module.named_parameters()), _input(7, SIZE)
    starts = torch.tensor([0, 4, 7], dtype=torch.int32)
    parts = [_expected(parameters, part[None], options)[0] for part in x.split([4, 3])]
    _compare(module, module(x, cu_seqlens=starts, max_seqlen=4), torch.cat(parts), x)


def test_packed_cross_attention_with_lengths_of_its_own():
    module = _make(use_flash_attn=True, cross_attn=True)
    parameters, x, x_kv = dict(module.named_parameters()), _input(5, SIZE), _input(7, SIZE)
    starts, starts_k = (torch.tensor(s, dtype=torch.int32) for s in ([0, 2, 5], [0, 6, 7]))
    parts = [
        _expected(parameters, a[None], {"cross_attn": True}, b[None])[0]
        for a, b in zip(x.split([2, 3]), x_kv.split([6, 1]), strict=True)
    ]
    got = module(x, x_kv, cu_seqlens=starts, max_seqlen=3, cu_seqlens_k=starts_k, max_seqlen_k=6)
    _compare(module, got, torch.cat(parts), x)
    with pytest.raises(ArgumentError, match=r"^cu_seqlens_k: got None"):
        module(x, x_kv, cu_seqlens=starts, max_seqlen=3)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_return_residual(fused, cross):
    module = _make(return_residual=True, fused_bias_fc=fused, cross_attn=cross)
    x = _input()
    out, residual = module(x)
    assert torch.equal(residual, x)
    first = module.Wkv if cross else module.Wqkv
    assert isinstance(first, FusedDense if fused else LinearResidual)
    expected = _expected(dict(module.named_parameters()), x, {"cross_attn": cross})
    _compare(module, out + 2 * residual, expected + 2 * x, x)
    if cross:
        x_kv = _input(2, 3, SIZE)
        out, residual = module(x, x_kv)
        assert residual is x
        expected = _expected(dict(module.named_parameters()), x, {"cross_attn": True}, x_kv)
        _compare(module, out, expected, x)


def test_further_arguments_reach_the_inner_attention():
    x = _input()
    for flash in (False, True):
        module, causal = (_make(use_flash_attn=flash, causal=c) for c in (False, True))
        assert torch.equal(module(x, causal=True), causal(x))
        with pytest.raises(TypeError, match="unknown"):
            module(x, unknown=True)


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        (
            {"rotary_emb_dim": 8, "use_flash_attn": True, "use_alibi": True},
            {"Wqkv.weight": (48, 16), "Wqkv.bias": (48,)},
        ),
        ({"num_heads_kv": 1, "qkv_proj_bias": False}, {"Wqkv.weight": (32, 16)}),
        (
            {"cross_attn": True, "num_heads_kv": 1, "return_residual": True},
            {
                "Wq.weight": (16, 16),
                "Wq.bias": (16,),
                "Wkv.weight": (16, 16),
                "Wkv.bias": (16,),
            },
        ),
        (
            {"dwconv": True, "fused_bias_fc": True},
            {
                "Wqkv.weight": (48, 16),
                "Wqkv.bias": (48,),
                "dwconv_qkv.weight": (48, 1, 3),
                "dwconv_qkv.bias": (48,),
            },
        ),
        (
            {"dwconv": True, "num_heads_kv": 1, "qkv_proj_bias": False},
            {
                "Wqkv.weight": (32, 16),
                "dwconv_q.weight": (16, 1, 3),
                "dwconv_q.bias": (16,),
                "dwconv_kv.weight": (16, 1, 3),
                "dwconv_kv.bias": (16,),
            },
        ),
    ],
    ids=["rotary", "grouped", "cross", "dwconv", "grouped dwconv"],
)
def test_state_dict(options, shapes):
    module = MHA(16, 2, dtype=torch.float64, **options)
    expected = {**shapes, "out_proj.weight": (16, 16), "out_proj.bias": (16,)}
    assert {name: tuple(p.shape) for name, p in module.state_dict().items()} == expected
    assert all(p.dtype == torch.float64 for p in module.parameters())
    other = MHA(16, 2, dtype=torch.float64, **options)
    other.load_state_dict(module.state_dict())
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    for mine, theirs in zip(module(x), other(x), strict=True):
        assert torch.equal(mine, theirs)


def _with_gradients(parameters, out):
    return [out, *torch.autograd.grad(out.square().sum(), list(parameters.values()))]


def test_low_precision(device):
    """Twice the error of the same steps in bfloat16, at most."""
    options = {"causal": True, "num_heads_kv": 2, "rotary_emb_dim": 8, "window_size": (4, 0)}
    module = _make(use_flash_attn=True, **options).to(torch.bfloat16)
    x = torch.randn(2, 9, SIZE, dtype=torch.bfloat16)
    answers = {}
    for dtype in (torch.float64, torch.bfloat16):
        parameters = {
            name: p.detach().to(dtype).requires_grad_() for name, p in module.named_parameters()
        }
        answers[dtype] = _with_gradients(parameters, _expected(parameters, x.to(dtype), options))
    module = module.to(device)
    got = _with_gradients(dict(module.named_parameters()), module(x.to(device)))
    for mine, plain, exact in zip(got, *reversed(answers.values()), strict=True):
        assert mine.dtype == torch.bfloat16
        allowed = 2 * (plain.double() - exact).abs().max() + 1e-5 * exact.abs().max()
        assert (mine.cpu().double() - exact).abs().max() <= allowed


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_in_one_graph():
    options = {"rotary_emb_dim": 8, "num_heads_kv": 2, "checkpointing": True}
    torch._dynamo.reset()
    module, x = _make(use_flash_attn=True, causal=True, **options), _input()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    _compare(module, compiled(x), module(x), x)
    torch._dynamo.reset()


def test_names_are_looked_up_when_used(monkeypatch):
    class Own(RotaryEmbedding):
        pass

    monkeypatch.setattr(mha, "RotaryEmbedding", Own)
    monkeypatch.setattr(mha, "get_alibi_slopes", lambda nheads: [7.0] * nheads)
    module = MHA(16, 2, rotary_emb_dim=8, use_flash_attn=True, use_alibi=True)
    assert type(module.rotary_emb) is Own
    assert module.inner_attn.alibi_slopes.tolist() == [7.0, 7.0]
    assert module.inner_cross_attn.alibi_slopes.tolist() == [7.0, 7.0]


def test_empty_batch():
    for flash in (False, True):
        module = _make(use_flash_attn=flash, rotary_emb_dim=8)
        assert module(torch.ones(0, 5, SIZE, dtype=torch.float64)).shape == (0, 5, SIZE)


def test_arguments_that_exclude_each_other_are_named():
    x, cu = torch.ones(1, 4, SIZE), torch.tensor([0, 4], dtype=torch.int32)
    keep, params = torch.ones(1, 4, dtype=torch.bool), InferenceParams(8, 1)

    def plain(**options):
        return MHA(SIZE, HEADS, **options)

    def flash(**options):
        return MHA(SIZE, HEADS, use_flash_attn=True, **options)

    lengths = InferenceParams(8, 1, 4, lengths_per_sample=torch.tensor([4], dtype=torch.int32))
    for argument, call in (
        ("num_heads", lambda: MHA(SIZE, 5)),
        ("num_heads_kv", lambda: plain(num_heads_kv=3)),
        ("num_heads_kv", lambda: plain(num_heads_kv=0)),
        ("use_alibi", lambda: plain(use_alibi=True)),
        ("window_size", lambda: plain(window_size=(3, 0))),
        ("rotary_emb_dim", lambda: plain(rotary_emb_dim=8, cross_attn=True)),
        ("rotary_emb_dim", lambda: plain(rotary_emb_dim=10)),
        ("x_kv", lambda: plain()(x, x)),
        ("mixer_subset", lambda: plain()(x, mixer_subset=slice(1))),
        ("mixer_subset", lambda: flash(cross_attn=True)(x[0], None, None, cu, 4, slice(1))),
        ("key_padding_mask", lambda: flash()(x, key_padding_mask=keep)),
        ("cu_seqlens", lambda: plain()(x[0], cu_seqlens=cu, max_seqlen=4)),
        ("cu_seqlens", lambda: flash(dwconv=True)(x[0], cu_seqlens=cu, max_seqlen=4)),
        ("cu_seqlens", lambda: flash(rotary_emb_dim=8)(x[0], cu_seqlens=cu, max_seqlen=4)),
        ("max_seqlen", lambda: flash()(x[0], cu_seqlens=cu)),
        ("x", lambda: plain()(x[0])),
        ("x", lambda: plain()(x[..., 1:])),
        ("x", lambda: flash()(x, cu_seqlens=cu, max_seqlen=4)),
        ("x_kv", lambda: plain(cross_attn=True)(x, x[0])),
        ("inference_params", lambda: plain()(x, key_padding_mask=keep, inference_params=params)),
        ("inference_params", lambda: flash()(x, max_seqlen=4, inference_params=params)),
        ("inference_params", lambda: plain(dwconv=True)(x, inference_params=params)),
        ("causal", lambda: plain(layer_idx=0)(x, inference_params=params, causal=True)),
        ("layer_idx", lambda: plain()(x, inference_params=params)),
    ):
        with pytest.raises(ArgumentError, match=rf"^{argument}: got .*; allowed: .*; to fix it: "):
            call()
    assert params.key_value_memory_dict == {}
    with pytest.raises(ArgumentTypeError, match=r"^x: got None"):
        plain()(None)
    with pytest.raises(UnsupportedError, match=r"^inference_params.lengths_per_sample: "):
        plain(layer_idx=0)(x, inference_params=lengths)
