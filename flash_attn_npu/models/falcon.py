"""Mirror of `flash_attn.models.falcon`: Falcon as a GPT of this package."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from ._checkpoint_names import Names, by_kind, changed, with_vocabulary
from ._gpt_config import converted, require, rotary_base, sizes

__all__ = ["falcon_config_to_gpt2_config", "remap_state_dict_hf_falcon"]

_NAMES = Names(
    prefixes=("transformer.",),
    layers="h",
    outside={
        "word_embeddings": "transformer.embeddings.word_embeddings",
        "ln_f": "transformer.ln_f",
    },
    inside={
        "self_attention.query_key_value": "mixer.Wqkv",
        "self_attention.dense": "mixer.out_proj",
        "mlp.dense_h_to_4h": "mlp.fc1",
        "mlp.dense_4h_to_h": "mlp.fc2",
        "input_layernorm": "norm1",
        "post_attention_layernorm": "norm2",
        "ln_attn": "norm1",
        "ln_mlp": "norm2",
    },
    dropped=(".rotary_emb.inv_freq",),
)


def falcon_config_to_gpt2_config(falcon_config: Any) -> Any:
    """The GPT2Config of a Falcon model, from transformers' FalconConfig.

    Raises:
        UnsupportedError: ALiBi, which Falcon scales with the scores, unlike flash-attention; rotary
            embedding that is scaled; or transformers is not installed.

    Contract: flash-attention 2.8, `falcon_config_to_gpt2_config`. Wider: blocks that are not
    parallel, one norm in the new architecture, biases.
    """
    theirs = falcon_config
    require(
        not getattr(theirs, "alibi", False),
        "falcon_config.alibi",
        True,
        "False: Falcon's ALiBi is scaled with the scores, flash-attention's is not",
        "take the model of transformers",
    )
    new = getattr(theirs, "new_decoder_architecture", False)
    found = sizes(theirs)
    heads_kv = found.heads
    if new:
        heads_kv = theirs.num_kv_heads
    elif theirs.multi_query:
        heads_kv = 1
    norms = getattr(theirs, "num_ln_in_parallel_attn", None)
    bias = theirs.bias
    return converted(
        theirs,
        n_head_kv=heads_kv,
        n_inner=getattr(theirs, "ffn_hidden_size", None),
        activation_function=getattr(theirs, "activation", "gelu"),
        resid_pdrop=theirs.hidden_dropout,
        embd_pdrop=theirs.hidden_dropout,
        attn_pdrop=theirs.attention_dropout,
        layer_norm_epsilon=theirs.layer_norm_epsilon,
        prenorm=True,
        parallel_block=bool(new or theirs.parallel_attn),
        parallel_block_tied_norm=not new or norms == 1,
        rotary_emb_fraction=1.0,
        rotary_emb_base=rotary_base(theirs),
        tie_word_embeddings=getattr(theirs, "tie_word_embeddings", True),
        qkv_proj_bias=bias,
        out_proj_bias=bias,
        mlp_fc1_bias=bias,
        mlp_fc2_bias=bias,
        lm_head_bias=False,
    )


def remap_state_dict_hf_falcon(state_dict: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The state_dict of a Falcon of Hugging Face, by the names that `GPTLMHeadModel` has.

    Args:
        state_dict: left as it is; names that are not known are kept, frequencies are dropped.
        config: as `falcon_config_to_gpt2_config` returns it. Its vocabulary is padded to
            pad_vocab_size_multiple.

    Contract: flash-attention 2.8, `remap_state_dict_hf_falcon`.
    """
    found = sizes(config)
    split = partial(by_kind, heads=found.heads, heads_kv=found.heads_kv)
    return with_vocabulary(changed(_NAMES.ours(state_dict), "mixer.Wqkv", split), config)
