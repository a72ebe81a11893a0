"""Mirror of `flash_attn.models.gptj`: GPT-J as a GPT of this package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ._checkpoint_names import Names, joined, with_vocabulary
from ._gpt_config import converted, require, rotary_fraction, sizes

__all__ = ["gptj_config_to_gpt2_config", "remap_state_dict_hf_gptj"]

_PROJECTIONS = ("mixer.Wq", "mixer.Wk", "mixer.Wv")
_NAMES = Names(
    prefixes=("transformer.",),
    layers="h",
    outside={
        "wte": "transformer.embeddings.word_embeddings",
        "ln_f": "transformer.ln_f",
    },
    inside={
        "ln_1": "norm1",
        "attn.q_proj": "mixer.Wq",
        "attn.k_proj": "mixer.Wk",
        "attn.v_proj": "mixer.Wv",
        "attn.out_proj": "mixer.out_proj",
        "mlp.fc_in": "mlp.fc1",
        "mlp.fc_out": "mlp.fc2",
    },
    dropped=(".attn.bias", ".attn.masked_bias", ".attn.embed_positions"),
)


def gptj_config_to_gpt2_config(gptj_config: Any) -> Any:
    """The GPT2Config of a GPT-J model, from transformers' GPTJConfig.

    Raises:
        UnsupportedError: no rotary_dim, or transformers is not installed.

    Contract: flash-attention 2.8, `gptj_config_to_gpt2_config`.
    """
    theirs, found = gptj_config, sizes(gptj_config)
    require(
        bool(theirs.rotary_dim),
        "gptj_config.rotary_dim",
        theirs.rotary_dim,
        "how many dimensions of a head are rotated",
        "set it to the size of a head to rotate whole heads",
    )
    return converted(
        theirs,
        n_inner=theirs.n_inner,
        activation_function=theirs.activation_function,
        resid_pdrop=theirs.resid_pdrop,
        embd_pdrop=theirs.embd_pdrop,
        attn_pdrop=theirs.attn_pdrop,
        layer_norm_epsilon=theirs.layer_norm_epsilon,
        prenorm=True,
        parallel_block=True,
        parallel_block_tied_norm=True,
        rotary_emb_fraction=rotary_fraction(theirs.rotary_dim, found.head_dim),
        rotary_emb_interleaved=True,
        tie_word_embeddings=theirs.tie_word_embeddings,
        qkv_proj_bias=False,
        out_proj_bias=False,
        lm_head_bias=True,
    )


def remap_state_dict_hf_gptj(state_dict: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The state_dict of a GPT-J of Hugging Face, by the names that `GPTLMHeadModel` has.

    Args:
        state_dict: left as it is; names that are not known are kept, masks are dropped.
        config: as `gptj_config_to_gpt2_config` returns it. Its vocabulary is padded to
            pad_vocab_size_multiple, with a bias of -100.

    Raises:
        ArgumentError: a layer lacks some of its projections.

    Contract: flash-attention 2.8, `remap_state_dict_hf_gptj`.
    """
    state = joined(_NAMES.ours(state_dict), _PROJECTIONS, "mixer.Wqkv")
    return with_vocabulary(state, config)
