"""Mirror of `flash_attn.models.gpt_neox`: GPT-NeoX and Pythia as a GPT of this package."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from ._checkpoint_names import Names, by_kind, changed, with_vocabulary
from ._gpt_config import converted, rotary_base, sizes

__all__ = ["gpt_neox_config_to_gpt2_config", "remap_state_dict_hf_gpt_neox"]

_NAMES = Names(
    prefixes=("gpt_neox.",),
    layers="layers",
    outside={
        "embed_in": "transformer.embeddings.word_embeddings",
        "final_layer_norm": "transformer.ln_f",
        # the head of old releases of transformers
        "embed_out": "lm_head",
    },
    inside={
        "attention.query_key_value": "mixer.Wqkv",
        "attention.dense": "mixer.out_proj",
        "mlp.dense_h_to_4h": "mlp.fc1",
        "mlp.dense_4h_to_h": "mlp.fc2",
        "input_layernorm": "norm1",
        "post_attention_layernorm": "norm2",
    },
    dropped=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
)


def gpt_neox_config_to_gpt2_config(gpt_neox_config: Any) -> Any:
    """The GPT2Config of a GPT-NeoX model, from transformers' GPTNeoXConfig.

    Raises:
        UnsupportedError: rotary embedding that is scaled, or transformers is not installed.

    Contract: flash-attention 2.8, `gpt_neox_config_to_gpt2_config`. Wider: attention_bias=False,
    and the configs of transformers 5.
    """
    theirs = gpt_neox_config
    parameters = getattr(theirs, "rope_parameters", None) or {}
    bias = getattr(theirs, "attention_bias", True)
    return converted(
        theirs,
        n_inner=theirs.intermediate_size,
        activation_function=theirs.hidden_act,
        resid_pdrop=getattr(theirs, "hidden_dropout", 0.0),
        embd_pdrop=getattr(theirs, "hidden_dropout", 0.0),
        attn_pdrop=getattr(theirs, "attention_dropout", 0.0),
        layer_norm_epsilon=theirs.layer_norm_eps,
        prenorm=True,
        parallel_block=theirs.use_parallel_residual,
        parallel_block_tied_norm=False,
        rotary_emb_fraction=parameters.get(
            "partial_rotary_factor", getattr(theirs, "rotary_pct", 1.0)
        ),
        rotary_emb_base=rotary_base(theirs),
        tie_word_embeddings=theirs.tie_word_embeddings,
        qkv_proj_bias=bias,
        out_proj_bias=bias,
    )


def remap_state_dict_hf_gpt_neox(
    state_dict: Mapping[str, Tensor], config: Any
) -> dict[str, Tensor]:
    """The state_dict of a GPT-NeoX of Hugging Face, by the names that `GPTLMHeadModel` has.

    Args:
        state_dict: left as it is; names that are not known are kept, masks and frequencies are
            dropped.
        config: as `gpt_neox_config_to_gpt2_config` returns it. Its vocabulary is padded to
            pad_vocab_size_multiple.

    Contract: flash-attention 2.8, `remap_state_dict_hf_gpt_neox`.
    """
    heads = sizes(config).heads
    state = _NAMES.ours(state_dict)
    state = changed(state, "mixer.Wqkv", partial(by_kind, heads=heads, heads_kv=heads))
    return with_vocabulary(state, config)
