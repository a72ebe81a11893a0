"""GPT-2 checkpoints of Hugging Face, and names that early checkpoints of flash-attention have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ._checkpoint_names import Names, changed, with_vocabulary

__all__ = ["remap_state_dict_hf_gpt2", "with_late_norms"]

_LINEAR = {
    "attn.c_attn": "mixer.Wqkv",
    "attn.c_proj": "mixer.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_NAMES = Names(
    prefixes=("transformer.",),
    layers="h",
    outside={
        "wte": "transformer.embeddings.word_embeddings",
        "wpe": "transformer.embeddings.position_embeddings",
        "ln_f": "transformer.ln_f",
    },
    inside={"ln_1": "norm1", "ln_2": "norm2", **_LINEAR},
    dropped=(".attn.bias", ".attn.masked_bias"),
)


def remap_state_dict_hf_gpt2(state_dict: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The state_dict of a GPT-2 of Hugging Face, by the names that `GPTLMHeadModel` has.

    Args:
        state_dict: left as it is; names that are not known are kept, masks are dropped. Names with
            and without the prefix "transformer." are understood.
        config: the GPT2Config of the model. Its vocabulary is padded to pad_vocab_size_multiple.

    Contract: flash-attention 2.8, `remap_state_dict_hf_gpt2`. Wider: the names of GPT2LMHeadModel.
    """
    state = _NAMES.ours(state_dict)
    for module in _LINEAR.values():
        # the weights of GPT-2 are (in_features, out_features)
        state = changed(state, module, Tensor.t)
    return with_vocabulary(state, config)


def with_late_norms(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """state_dict; if it has ln_0, its norms by the names that they have today.

    Norms once were counted from the embeddings on, so that those of a layer stood behind its mixer
    and its MLP.
    """
    if "transformer.ln_0.weight" not in state_dict:
        return state_dict
    layers = 1 + max(
        int(name.split(".")[2]) for name in state_dict if name.startswith("transformer.layers.")
    )
    within = [f"transformer.layers.{i}.norm{half}" for i in range(layers) for half in (1, 2)]
    names = dict(zip(["transformer.ln_0", *within], [*within, "transformer.ln_f"], strict=True))
    renamed = {}
    for name, tensor in state_dict.items():
        module, _, kind = name.rpartition(".")
        renamed[f"{names[module]}.{kind}" if module in names else name] = tensor
    return renamed
