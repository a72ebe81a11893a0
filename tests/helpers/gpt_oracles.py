"""Tiny random models of transformers, and the functions that make GPTs of this package of them."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from flash_attn_npu.models import bigcode, falcon, gpt, gpt_neox, gptj, llama, opt
from flash_attn_npu.models.gpt import GPTLMHeadModel

transformers = pytest.importorskip("transformers")

VOCAB = 50
BATCH, SEQLEN = 2, 11
_SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_TOKENS = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


class Family(NamedTuple):
    """What belongs to a model_type: classes of transformers, and functions of ours."""

    model: str
    config: str
    sizes: dict[str, Any]
    to_gpt2: Any
    remap: Any
    tolerance: float
    """1e-9 if transformers computes in float64 throughout, more if float32 comes in between."""


FAMILIES = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_positions": 24},
        lambda config: transformers.GPT2Config(**config.to_dict()),
        gpt.remap_state_dict_hf_gpt2,
        1e-9,
    ),
    "llama": Family(
        "LlamaForCausalLM",
        "LlamaConfig",
        {"intermediate_size": 40},
        llama.llama_config_to_gpt2_config,
        llama.remap_state_dict_hf_llama,
        2e-6,
    ),
    "opt": Family(
        "OPTForCausalLM",
        "OPTConfig",
        {"max_position_embeddings": 24, "ffn_dim": 40},
        opt.opt_config_to_gpt2_config,
        opt.remap_state_dict_hf_opt,
        1e-9,
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {"intermediate_size": 40},
        gpt_neox.gpt_neox_config_to_gpt2_config,
        gpt_neox.remap_state_dict_hf_gpt_neox,
        1e-9,
    ),
    "gptj": Family(
        "GPTJForCausalLM",
        "GPTJConfig",
        {"rotary_dim": 4, "n_positions": 24},
        gptj.gptj_config_to_gpt2_config,
        gptj.remap_state_dict_hf_gptj,
        2e-6,
    ),
    "falcon": Family(
        "FalconForCausalLM",
        "FalconConfig",
        {},
        falcon.falcon_config_to_gpt2_config,
        falcon.remap_state_dict_hf_falcon,
        1e-9,
    ),
    "bigcode": Family(
        "GPTBigCodeForCausalLM",
        "GPTBigCodeConfig",
        {"n_positions": 24},
        bigcode.bigcode_config_to_gpt2_config,
        bigcode.remap_state_dict_hf_bigcode,
        1e-9,
    ),
}
_NEW = {"new_decoder_architecture": True, "num_kv_heads": 2}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2 scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "llama": ("llama", {}),
    "llama grouped": ("llama", {"num_key_value_heads": 2, "rope_theta": 500.0}),
    "llama biased": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "llama tied": ("llama", {"tie_word_embeddings": True, "intermediate_size": 128}),
    "opt": ("opt", {}),
    "opt narrow postnorm": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "opt without biases": ("opt", {"enable_bias": False}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox sequential": (
        "gpt_neox",
        {
            "use_parallel_residual": False,
            "rotary_pct": 0.5,
            "rotary_emb_base": 500,
            "hidden_act": "gelu_fast",
            "attention_bias": False,
        },
    ),
    "gptj": ("gptj", {}),
    "falcon 7b": ("falcon", {}),
    "falcon 40b": ("falcon", {**_NEW, "ffn_hidden_size": 40}),
    "falcon 11b": ("falcon", {**_NEW, "num_ln_in_parallel_attn": 1, "rope_theta": 500.0}),
    "falcon sequential": (
        "falcon",
        {"parallel_attn": False, "multi_query": False, "bias": True, "tie_word_embeddings": False},
    ),
    "bigcode": ("bigcode", {}),
    "bigcode of all heads": ("bigcode", {"multi_query": False, "n_inner": 40}),
}


@cache
def theirs(variant: str) -> Any:
    """The model of transformers, float64."""
    name, extra = VARIANTS[variant]
    family = FAMILIES[name]
    config = getattr(transformers, family.config)(**(_SHAPE | _TOKENS | family.sizes | extra))
    # GPT-J has no other attention
    config._attn_implementation = "eager" if name == "gptj" else "sdpa"
    torch.manual_seed(0)
    model = getattr(transformers, family.model)(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        # wide enough for the attention to have preferences, and no norm or bias that does nothing
        noise = torch.randn(parameter.shape, generator=generator)
        centre = parameter.data if parameter.dim() == 1 else 0.0
        parameter.data = centre + noise * (0.3 if parameter.dim() == 1 else 0.25)
    return model.double().eval()


def config_of(variant: str, **more: Any) -> Any:
    """Our config of the same model."""
    config = FAMILIES[VARIANTS[variant][0]].to_gpt2(theirs(variant).config)
    for name, value in more.items():
        setattr(config, name, value)
    return config


def state_of(variant: str) -> dict[str, Tensor]:
    """The state_dict of transformers' model."""
    return theirs(variant).state_dict()


def remapped(variant: str, config: Any) -> dict[str, Tensor]:
    """That state_dict by our names."""
    return FAMILIES[VARIANTS[variant][0]].remap(state_of(variant), config)


def ours(variant: str, **more: Any) -> GPTLMHeadModel:
    """Our model with the same weights, loaded strictly."""
    config = config_of(variant, **more)
    model = GPTLMHeadModel(config, dtype=torch.float64)
    model.load_state_dict(remapped(variant, config))
    return model.eval()


def prompt() -> Tensor:
    return torch.randint(0, VOCAB, (BATCH, SEQLEN), generator=torch.Generator().manual_seed(2))


@cache
def logits_of(variant: str) -> Tensor:
    with torch.no_grad():
        return theirs(variant)(prompt()).logits


def tolerance(variant: str) -> dict[str, float]:
    """As fractions of logits, whose scale is about 1."""
    return dict.fromkeys(("atol", "rtol"), FAMILIES[VARIANTS[variant][0]].tolerance)
