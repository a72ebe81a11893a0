"""Mirror of `flash_attn.models.opt`: OPT as a GPT of this package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ._checkpoint_names import POSITIONS, Names, joined, with_vocabulary
from ._gpt_config import make_config, require

__all__ = ["opt_config_to_gpt2_config", "remap_state_dict_hf_opt"]

_PROJECTIONS = ("mixer.Wq", "mixer.Wk", "mixer.Wv")
_NAMES = Names(
    prefixes=("model.decoder.", "decoder."),
    layers="layers",
    outside={
        "embed_tokens": "transformer.embeddings.word_embeddings",
        "embed_positions": "transformer.embeddings.position_embeddings",
        "project_in": "transformer.embeddings.project_in",
        "final_layer_norm": "transformer.ln_f",
        "project_out": "project_out",
    },
    inside={
        "self_attn.q_proj": "mixer.Wq",
        "self_attn.k_proj": "mixer.Wk",
        "self_attn.v_proj": "mixer.Wv",
        "self_attn.out_proj": "mixer.out_proj",
        "self_attn_layer_norm": "norm1",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
        "final_layer_norm": "norm2",
    },
)
_UNUSED = 2
"""How many embeddings stand before that of the first position."""


def opt_config_to_gpt2_config(opt_config: Any) -> Any:
    """The GPT2Config of an OPT model, from transformers' OPTConfig.

    In training dropout counts for the embeddings too, which transformers' OPT does not drop.

    Raises:
        UnsupportedError: layers that are dropped, norms without weights, norms before the
            sublayers and none behind the last; or transformers is not installed.

    Contract: flash-attention 2.8, `opt_config_to_gpt2_config`. Wider: enable_bias=False.
    """
    before, narrow = opt_config.do_layer_norm_before, opt_config.word_embed_proj_dim
    bias = getattr(opt_config, "enable_bias", True)
    for name, usual in (
        ("layerdrop", 0.0),
        ("layer_norm_elementwise_affine", True),
        ("_remove_final_layer_norm", False),
    ):
        value = getattr(opt_config, name, usual)
        require(
            value == usual or (name == "_remove_final_layer_norm" and not before),
            f"opt_config.{name}",
            value,
            repr(usual),
            "take the model of transformers",
        )
    return make_config(
        vocab_size=opt_config.vocab_size,
        n_positions=opt_config.max_position_embeddings,
        n_embd=opt_config.hidden_size,
        n_layer=opt_config.num_hidden_layers,
        n_head=opt_config.num_attention_heads,
        n_inner=opt_config.ffn_dim,
        activation_function=opt_config.activation_function,
        resid_pdrop=opt_config.dropout,
        embd_pdrop=opt_config.dropout,
        attn_pdrop=opt_config.attention_dropout,
        initializer_range=opt_config.init_std,
        bos_token_id=opt_config.bos_token_id,
        eos_token_id=opt_config.eos_token_id,
        prenorm=before,
        word_embed_proj_dim=None if narrow in (None, opt_config.hidden_size) else narrow,
        tie_word_embeddings=getattr(opt_config, "tie_word_embeddings", True),
        qkv_proj_bias=bias,
        out_proj_bias=bias,
        mlp_fc1_bias=bias,
        mlp_fc2_bias=bias,
    )


def remap_state_dict_hf_opt(state_dict: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The state_dict of an OPT of Hugging Face, by the names that `GPTLMHeadModel` has.

    Args:
        state_dict: left as it is; names that are not known are kept. Names with and without the
            prefix "model." are understood.
        config: as `opt_config_to_gpt2_config` returns it. Its vocabulary is padded to
            pad_vocab_size_multiple.

    Raises:
        ArgumentError: a layer lacks some of its projections.

    Contract: flash-attention 2.8, `remap_state_dict_hf_opt`.
    """
    state = joined(_NAMES.ours(state_dict), _PROJECTIONS, "mixer.Wqkv")
    if POSITIONS in state:
        state[POSITIONS] = state[POSITIONS][_UNUSED:]
    return with_vocabulary(state, config)
