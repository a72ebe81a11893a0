"""Mirror of `flash_attn.models.bigcode`: GPT-BigCode, as StarCoder, as a GPT of this package."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from ._checkpoint_names import Names, by_group, by_kind, changed, with_vocabulary, without_padding
from ._gpt_config import converted, positions, sizes

__all__ = [
    "bigcode_config_to_gpt2_config",
    "inv_remap_state_dict_hf_bigcode",
    "remap_state_dict_hf_bigcode",
]

_NAMES = Names(
    prefixes=("transformer.",),
    layers="h",
    outside={
        "wte": "transformer.embeddings.word_embeddings",
        "wpe": "transformer.embeddings.position_embeddings",
        "ln_f": "transformer.ln_f",
    },
    inside={
        "ln_1": "norm1",
        "ln_2": "norm2",
        "attn.c_attn": "mixer.Wqkv",
        "attn.c_proj": "mixer.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    },
    dropped=(".attn.bias", ".attn.masked_bias"),
)


def bigcode_config_to_gpt2_config(bigcode_config: Any) -> Any:
    """The GPT2Config of a GPT-BigCode model, from transformers' GPTBigCodeConfig.

    Raises:
        UnsupportedError: transformers is not installed.

    Contract: flash-attention 2.8, `bigcode_config_to_gpt2_config`.
    """
    theirs, found = bigcode_config, sizes(bigcode_config)
    return converted(
        theirs,
        n_positions=positions(theirs),
        n_head_kv=1 if theirs.multi_query else found.heads,
        n_inner=theirs.n_inner,
        activation_function=theirs.activation_function,
        resid_pdrop=theirs.resid_pdrop,
        embd_pdrop=theirs.embd_pdrop,
        attn_pdrop=theirs.attn_pdrop,
        layer_norm_epsilon=theirs.layer_norm_epsilon,
        scale_attn_weights=theirs.scale_attn_weights,
        tie_word_embeddings=getattr(theirs, "tie_word_embeddings", True),
    )


def remap_state_dict_hf_bigcode(state_dict: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The state_dict of a GPT-BigCode of Hugging Face, by the names that `GPTLMHeadModel` has.

    Args:
        state_dict: left as it is; names that are not known are kept, masks are dropped. Names with
            and without the prefix "transformer." are understood.
        config: as `bigcode_config_to_gpt2_config` returns it. Its vocabulary is padded to
            pad_vocab_size_multiple.

    Contract: flash-attention 2.8, `remap_state_dict_hf_bigcode`. Wider: multi_query=False.
    """
    found = sizes(config)
    split = partial(by_kind, heads=found.heads, heads_kv=found.heads_kv)
    return with_vocabulary(changed(_NAMES.ours(state_dict), "mixer.Wqkv", split), config)


def inv_remap_state_dict_hf_bigcode(
    state_dict: Mapping[str, Tensor], config: Any
) -> dict[str, Tensor]:
    """The inverse of `remap_state_dict_hf_bigcode`, with the prefix and without padding.

    Contract: flash-attention 2.8, `inv_remap_state_dict_hf_bigcode`. Different: the vocabulary is
    cut to config.vocab_size.
    """
    found = sizes(config)
    grouped = partial(by_group, heads=found.heads, heads_kv=found.heads_kv)
    state = without_padding(changed(state_dict, "mixer.Wqkv", grouped), config)
    return _NAMES.theirs(state)
