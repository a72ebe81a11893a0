"""`models.gpt` against a plain GPT in float64, the names of its weights, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from flash_attn_npu.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from flash_attn_npu.models import gpt
from flash_attn_npu.models.gpt import (
    GPTLMHeadModel,
    GPTModel,
    GPTPreTrainedModel,
    _init_weights,
    create_block,
    create_mixer_cls,
    create_mlp_cls,
)
from flash_attn_npu.modules.block import Block, ParallelBlock
from flash_attn_npu.modules.mlp import FusedMLP
from flash_attn_npu.ops.triton.layer_norm import RMSNorm
from flash_attn_npu.utils.generation import InferenceParams
from tests.helpers.gpt_reference import VOCAB, gpt_config, gpt_logits, spread

FLASH = {"use_flash_attn": True}
ROTARY = {"n_positions": 0, "rotary_emb_fraction": 1.0}
FUSED = {"fused_mlp": True, "fused_dropout_add_ln": True, "fused_bias_fc": True}
PARALLEL = {"parallel_block": True}
NO_BIAS = dict.fromkeys(("qkv_proj_bias", "out_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias"), False)
CONFIGS = {
    "plain": {},
    "flash": FLASH,
    "fused": {**FLASH, **FUSED, "activation_function": "gelu_new", "residual_in_fp32": False},
    "untied": {"tie_word_embeddings": False, "lm_head_bias": True},
    "norm_head": {"norm_head": True, "tie_word_embeddings": False, "lm_head_bias": True},
    "no biases": NO_BIAS,
    "grouped": {**FLASH, "n_head_kv": 1},
    "rotary": {**FLASH, **ROTARY, "rotary_emb_base": 500.0},
    "part rotary": {**FLASH, **ROTARY, "rotary_emb_fraction": 0.5, "rotary_emb_interleaved": True},
    "alibi": {**FLASH, "n_positions": 0, "use_alibi": True},
    "window": {**FLASH, "window_size": (2, 0)},
    "by layer": {"scale_attn_by_inverse_layer_idx": True},
    "unscaled": {**FLASH, "scale_attn_weights": False},
    "convolved": {"attn_dwconv": True},
    "postnorm": {"prenorm": False},
    "postnorm fused": {"prenorm": False, "fused_dropout_add_ln": True},
    "narrow": {"word_embed_proj_dim": 8},
    "narrow untied": {"word_embed_proj_dim": 8, "tie_word_embeddings": False},
    "rms": {"rms_norm": True, "activation_function": "swiglu", "mlp_multiple_of": 1},
    "rms fused": {"rms_norm": True, "fused_dropout_add_ln": True},
    "parallel": PARALLEL,
    "parallel fused": {**PARALLEL, "fused_dropout_add_ln": True, "rms_norm": True},
    "tied": {**PARALLEL, "parallel_block_tied_norm": True},
    "tied fused": {**PARALLEL, "parallel_block_tied_norm": True, "fused_dropout_add_ln": True},
    "mup": {
        "mup_width_scale": 0.5,
        "mup_embeddings_multiplier": 3.0,
        "mup_output_multiplier": 0.7,
        "mup_attn_multiplier": 1.5,
        "mup_scale_qk_dot_by_d": True,
        "lm_head_bias": True,
    },
    "wide": {"n_inner": None},
    "no layers": {"n_layer": 0},
    **{
        name: {"activation_function": name, "mlp_multiple_of": 8}
        for name in ("gelu_new", "gelu_fast", "gelu_approx", "gelu_pytorch_tanh", "relu", "sqrelu")
        + ("glu", "swiglu", "geglu")
    },
    "sqrelu fused": {"activation_function": "sqrelu", "fused_mlp": True, "mlp_checkpoint_lvl": 2},
    "sqrelu by its flag": {"activation_function": "sqrelu", "fused_dense_sqrelu_dense": True},
    "relu fused": {"activation_function": "relu", "fused_mlp": True},
}


def _model(seed=0, **more):
    return spread(GPTLMHeadModel(gpt_config(**more), dtype=torch.float64), seed)


def _ids(batch=2, seqlen=7):
    return torch.randint(0, VOCAB, (batch, seqlen), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients(name):
    model = _model(**CONFIGS[name])
    weights = dict(model.named_parameters())
    logits = model(_ids()).logits
    expected = gpt_logits(model.config, weights, _ids())
    # our tables of rotary embedding are float32
    close = dict.fromkeys(("atol", "rtol"), 1e-5 if "rotary" in name else 1e-9)
    torch.testing.assert_close(logits, expected, **close)
    cotangent = torch.randn(logits.shape, dtype=torch.float64)
    parts = [*weights.values()]
    gradients = torch.autograd.grad(logits, parts, cotangent)
    references = torch.autograd.grad(expected, parts, cotangent)
    for got, reference in zip(gradients, references, strict=True):
        scale = reference.abs().max().item()
        torch.testing.assert_close(got, reference, atol=close["atol"] * scale, rtol=close["rtol"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fused", [False, True], ids=["composed", "fused"])
def test_other_dtypes_and_devices(device, dtype, fused):
    more = {**FLASH, **ROTARY, "n_head_kv": 1, "activation_function": "gelu_approx"}
    if fused:
        more |= {**FUSED, "residual_in_fp32": True}
    model = _model(**more).to(device=device, dtype=dtype)
    exact = {name: weight.detach().cpu().double() for name, weight in model.named_parameters()}
    rounded = {name: weight.detach().cpu() for name, weight in model.named_parameters()}
    with torch.no_grad():
        logits = model.eval()(_ids().to(device)).logits
    assert logits.dtype == dtype
    expected = gpt_logits(model.config, exact, _ids())
    plain = gpt_logits(model.config, rounded, _ids())
    error = (logits.cpu().double() - expected).abs().max()
    assert error <= 2 * (plain.double() - expected).abs().max() + 1e-5 * expected.abs().max()


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", ["rotary", "fused", "tied fused", "swiglu"])
def test_it_compiles_as_one_graph(name):
    model = _model(**CONFIGS[name])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    weights = [*model.parameters()]
    logits, expected = (m(_ids()).logits for m in (compiled, model))
    torch.testing.assert_close(logits, expected)
    gradients, references = (torch.autograd.grad(x.sum(), weights) for x in (logits, expected))
    torch.testing.assert_close(gradients, references)


def test_the_names_of_the_weights():
    block = [
        f"{module}.{kind}"
        for module in ("mixer.Wqkv", "mixer.out_proj", "norm1", "mlp.fc1", "mlp.fc2", "norm2")
        for kind in ("weight", "bias")
    ]
    names = [
        "transformer.embeddings.word_embeddings.weight",
        "transformer.embeddings.position_embeddings.weight",
        *[f"transformer.layers.0.{name}" for name in block],
        *[f"transformer.layers.1.{name}" for name in block],
        "transformer.ln_f.weight",
        "transformer.ln_f.bias",
        "lm_head.weight",
    ]
    model = GPTLMHeadModel(gpt_config())
    assert list(model.state_dict()) == names
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == {
        **dict.fromkeys(names, (24,)),
        "transformer.embeddings.word_embeddings.weight": (30, 24),
        "transformer.embeddings.position_embeddings.weight": (16, 24),
        "lm_head.weight": (30, 24),
        **{
            f"transformer.layers.{i}.{name}": shape
            for i in (0, 1)
            for name, shape in {
                "mixer.Wqkv.weight": (72, 24),
                "mixer.Wqkv.bias": (72,),
                "mixer.out_proj.weight": (24, 24),
                "mlp.fc1.weight": (40, 24),
                "mlp.fc1.bias": (40,),
                "mlp.fc2.weight": (24, 40),
            }.items()
        },
    }
    assert model.lm_head.weight is model.transformer.embeddings.word_embeddings.weight


EXTRA = [
    ({"lm_head_bias": True, "tie_word_embeddings": False}, {"lm_head.bias": (30,)}, ()),
    (
        {"word_embed_proj_dim": 8},
        {
            "transformer.embeddings.word_embeddings.weight": (30, 8),
            "transformer.embeddings.project_in.weight": (24, 8),
            "project_out.weight": (8, 24),
            "lm_head.weight": (30, 8),
        },
        (),
    ),
    ({"prenorm": False}, {}, ("transformer.ln_f.weight", "transformer.ln_f.bias")),
    (
        {**ROTARY, **PARALLEL, "parallel_block_tied_norm": True},
        {},
        (
            "transformer.embeddings.position_embeddings.weight",
            *[
                f"transformer.layers.{i}.norm2.{kind}"
                for i in (0, 1)
                for kind in ("weight", "bias")
            ],
        ),
    ),
    (
        {"pad_vocab_size_multiple": 8, "activation_function": "glu"},
        {
            "transformer.embeddings.word_embeddings.weight": (32, 24),
            "lm_head.weight": (32, 24),
            **{f"transformer.layers.{i}.mlp.fc1.weight": (256, 24) for i in (0, 1)},
            **{f"transformer.layers.{i}.mlp.fc1.bias": (256,) for i in (0, 1)},
            **{f"transformer.layers.{i}.mlp.fc2.weight": (24, 128) for i in (0, 1)},
        },
        (),
    ),
]


@pytest.mark.parametrize(("more", "added", "gone"), EXTRA)
def test_what_options_add_to_the_names(more, added, gone):
    def shapes(**options):
        state = GPTLMHeadModel(gpt_config(**options)).state_dict()
        return {name: tuple(tensor.shape) for name, tensor in state.items()}

    expected = {name: shape for name, shape in shapes().items() if name not in gone} | added
    assert shapes(**more) == expected


@pytest.mark.parametrize(
    "more", [FLASH, {}, {**FLASH, **ROTARY, "n_head_kv": 1, **PARALLEL}], ids=str
)
def test_steps_over_caches(more):
    model = _model(**more).eval()
    ids = _ids(2, 9)
    caches = model.allocate_inference_cache(3, 9)
    assert {i: cache.shape[:3] for i, cache in caches.items()} == dict.fromkeys((0, 1), (3, 9, 2))
    params = InferenceParams(9, 3, key_value_memory_dict=caches)
    with torch.no_grad():
        whole = model(ids).logits
        steps = []
        for part in ids.split([4, 1, 3, 1], 1):
            positions = params.seqlen_offset + torch.arange(part.shape[1]).expand_as(part)
            output = model(part, position_ids=positions, inference_params=params)
            steps.append(output.logits)
            params.seqlen_offset += part.shape[1]
        last = model(ids, num_last_tokens=2)
    torch.testing.assert_close(torch.cat(steps, 1), whole)
    torch.testing.assert_close(last.logits, whole[:, -2:])
    assert last._fields == ("logits",)


def test_generation_on_devices(device):
    model = _model(**FLASH, **ROTARY).to(device=device, dtype=torch.float32).eval()
    tokens = model.generate(_ids().to(device), 14, cg=True)
    weights = {name: weight.detach().cpu().double() for name, weight in model.named_parameters()}
    for length in range(7, 14):
        logits = gpt_logits(model.config, weights, tokens[:, :length].cpu())[:, -1]
        best = logits.topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 1e-3
        assert torch.equal(logits.argmax(-1), tokens[:, length].cpu())


def test_dropout_is_where_the_config_says():
    drops = {"embd_pdrop": 0.1, "resid_pdrop": 0.2, "attn_pdrop": 0.3}
    model = GPTLMHeadModel(gpt_config(**drops)).transformer
    assert [layer.dropout1.p for layer in model.layers] == [0.1, 0.2]
    assert [layer.dropout2.p for layer in model.layers] == [0.2, 0.2]
    assert model.drop_f.p == 0.2
    assert [layer.mixer.inner_attn.drop.p for layer in model.layers] == [0.3, 0.3]
    assert create_block(gpt_config(**drops)).dropout1.p == 0.2
    for fused in (False, True):
        # an embedding that is dropped throughout leaves what a model without one gives
        everything = _model(embd_pdrop=1.0, fused_dropout_add_ln=fused).train()
        nothing = _model(embd_pdrop=0.0).train()
        nothing.transformer.embeddings.word_embeddings.weight.data.zero_()
        nothing.transformer.embeddings.position_embeddings.weight.data.zero_()
        got, expected = (m.transformer(_ids()) for m in (everything, nothing))
        torch.testing.assert_close(got, expected)


def test_layers_share_their_tables():
    model = _model(**ROTARY).transformer
    assert model.layers[0].mixer.rotary_emb is model.layers[1].mixer.rotary_emb


def test_positions_that_are_given():
    model = _model()
    positions = torch.tensor([3, 1, 4, 1, 5, 9, 2])
    weights = dict(model.named_parameters())
    name = "transformer.embeddings.position_embeddings.weight"
    expected = gpt_logits(model.config, {**weights, name: weights[name][positions]}, _ids())
    torch.testing.assert_close(model(_ids(), position_ids=positions).logits, expected)
    torch.testing.assert_close(model(_ids(), positions.expand(2, 7)).logits, expected)


@pytest.mark.parametrize("width", [1.0, 0.25])
def test_first_weights(width):
    torch.manual_seed(0)
    more = {"n_embd": 128, "n_inner": 512, "n_head": 2, "n_layer": 8, "vocab_size": 512}
    more |= {"initializer_range": 0.1, "mup_width_scale": width, "tie_word_embeddings": False}
    model = GPTLMHeadModel(gpt_config(**more))
    std = 0.1 * math.sqrt(width)
    layer = model.transformer.layers[3]
    for weight, expected in (
        (model.transformer.embeddings.word_embeddings.weight, 0.1),
        (model.lm_head.weight, std),
        (layer.mixer.Wqkv.weight, std),
        (layer.mlp.fc1.weight, std),
        (layer.mixer.out_proj.weight, std / 4),
        (layer.mlp.fc2.weight, std / 4),
    ):
        assert abs(weight.mean()) < 0.05 * expected
        assert abs(weight.std() / expected - 1) < 0.03
    assert layer.mlp.fc1.weight._optim == {"lr_multiplier": width}
    assert not hasattr(model.transformer.embeddings.word_embeddings.weight, "_optim")
    assert not layer.mlp.fc1.bias.any()
    assert (layer.norm1.weight == 1).all()


def test_first_weights_of_a_module():
    torch.manual_seed(0)
    module = nn.ModuleDict({"out_proj": nn.Linear(64, 64), "fc2": nn.Linear(64, 64)})
    _init_weights(module, 2, initializer_range=1.0)
    assert abs(module["out_proj"].weight.std() - 0.5) < 0.03
    _init_weights(module["fc2"], 2, initializer_range=1.0, rescale_prenorm_residual=False)
    assert abs(module["fc2"].weight.std() - 1.0) < 0.06


def test_checkpoints_with_norms_behind_the_sublayers():
    model = _model()
    state = model.state_dict()
    names = {
        "transformer.layers.0.norm1": "transformer.ln_0",
        "transformer.layers.0.norm2": "transformer.layers.0.norm1",
        "transformer.layers.1.norm1": "transformer.layers.0.norm2",
        "transformer.layers.1.norm2": "transformer.layers.1.norm1",
        "transformer.ln_f": "transformer.layers.1.norm2",
    }
    old = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        old[f"{names.get(module, module)}.{kind}"] = tensor
    given = dict(old)
    other = _model(seed=1)
    other.load_state_dict(old)
    assert old.keys() == given.keys()
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in state.items())


def test_what_is_built():
    config = gpt_config(n_head_kv=1, rms_norm=True)
    block = create_block(config, layer_idx=5)
    assert isinstance(block, Block)
    assert (block.layer_idx, block.mixer.layer_idx) == (5, 5)
    assert isinstance(block.norm1, RMSNorm)
    assert isinstance(create_block(gpt_config(**PARALLEL)), ParallelBlock)
    mixer = create_mixer_cls(gpt_config(), dtype=torch.float64)(24)
    assert mixer.causal
    assert mixer.Wqkv.weight.dtype == torch.float64
    levels = gpt_config(fused_mlp=True, activation_function="relu", mlp_checkpoint_lvl=[0, 2])
    mlp = create_mlp_cls(levels, layer_idx=1)(24)
    assert isinstance(mlp, FusedMLP)
    assert (mlp.checkpoint_lvl, mlp.activation) == (2, "relu")
    assert GPTPreTrainedModel("config", 1, two=2).config == "config"


def test_clients_may_replace_names(monkeypatch):
    class Other(gpt.MHA):
        pass

    monkeypatch.setattr(gpt, "MHA", Other)
    assert isinstance(GPTModel(gpt_config()).layers[0].mixer, Other)
    monkeypatch.setattr(gpt, "create_mlp_cls", lambda *args: lambda dim: nn.Identity())
    assert isinstance(create_block(gpt_config()).mlp, nn.Identity)


REFUSED = [
    ({"activation_function": "silu"}, UnsupportedError, "config.activation_function"),
    ({"fused_mlp": True}, UnsupportedError, "config.activation_function"),
    ({"fused_dense_sqrelu_dense": True}, UnsupportedError, "config.activation_function"),
    ({"head_dim": 16}, UnsupportedError, "config.head_dim"),
    ({**PARALLEL, "prenorm": False}, UnsupportedError, "config.parallel_block"),
    ({"prenorm": False, "residual_in_fp32": True}, ArgumentError, "residual_in_fp32"),
    ({"use_alibi": True}, ArgumentError, "use_alibi"),
    ({"n_embd": None}, ArgumentTypeError, "config"),
]


@pytest.mark.parametrize(("more", "error", "argument"), REFUSED)
def test_what_cannot_be_built_is_refused(more, error, argument):
    with pytest.raises(error, match=rf"^{argument}: got .*; allowed: .*; to fix it: "):
        GPTLMHeadModel(gpt_config(**more))


def test_what_is_no_config_is_refused():
    with pytest.raises(ArgumentTypeError, match=r"^config: got a dict without vocab_size, n_inner"):
        GPTModel({"vocab_size": 3})
    config = gpt_config(scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ArgumentError, match=r"^layer_idx: got None; allowed: .*; to fix it: "):
        create_mixer_cls(config)
    with pytest.raises(ArgumentError, match=r"^input_ids: got shape \(3,\); allowed: .*; to fix"):
        GPTModel(gpt_config())(torch.arange(3))
    with pytest.raises(ArgumentTypeError, match=r"^input_ids: got .*; allowed: .*; to fix it: "):
        GPTModel(gpt_config())([[1, 2]])
