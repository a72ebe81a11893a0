"""Mirror of `flash_attn.models.llama`: Llama as a GPT of this package.

Checkpoints come in two forms: Meta's, with params.json and consolidated.*.pth, and that of Hugging
Face. They differ in the order of the rows that are rotated. Here the order is that of the config:
pairs side by side, as Meta has it, with rotary_emb_interleaved, which
`llama_config_to_gpt2_config` sets; otherwise halves, as Hugging Face has it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ArgumentError, UnsupportedError
from ..utils._checkpoint_files import inside, load_tensors, positive, read_json
from ._checkpoint_names import Names, apart, changed, joined, with_vocabulary, without_padding
from ._gpt_config import converted, require, rotary_base, sizes

__all__ = [
    "config_from_checkpoint",
    "config_from_hf_checkpoint",
    "config_from_meta_checkpoint",
    "inv_remap_state_dict_hf_llama",
    "llama_config_to_gpt2_config",
    "remap_state_dict_hf_llama",
    "remap_state_dict_meta_llama",
    "state_dicts_from_checkpoint",
]

_QKV = ("mixer.Wq", "mixer.Wk", "mixer.Wv")
_ROTATED = _QKV[:2]
_FC1 = ("mlp.up", "mlp.gate")
_HF = Names(
    prefixes=("model.",),
    layers="layers",
    outside={
        "embed_tokens": "transformer.embeddings.word_embeddings",
        "norm": "transformer.ln_f",
    },
    inside={
        "self_attn.q_proj": "mixer.Wq",
        "self_attn.k_proj": "mixer.Wk",
        "self_attn.v_proj": "mixer.Wv",
        "self_attn.o_proj": "mixer.out_proj",
        "mlp.up_proj": "mlp.up",
        "mlp.gate_proj": "mlp.gate",
        "mlp.down_proj": "mlp.fc2",
        "input_layernorm": "norm1",
        "post_attention_layernorm": "norm2",
    },
    dropped=(".rotary_emb.inv_freq",),
)
_META = Names(
    prefixes=("",),
    layers="layers",
    outside={
        "tok_embeddings": "transformer.embeddings.word_embeddings",
        "norm": "transformer.ln_f",
        "output": "lm_head",
    },
    inside={
        "attention.wq": "mixer.Wq",
        "attention.wk": "mixer.Wk",
        "attention.wv": "mixer.Wv",
        "attention.wo": "mixer.out_proj",
        "feed_forward.w3": "mlp.up",
        "feed_forward.w1": "mlp.gate",
        "feed_forward.w2": "mlp.fc2",
        "attention_norm": "norm1",
        "ffn_norm": "norm2",
    },
    dropped=("rope.freqs",),
)


def remap_state_dict_hf_llama(state_dict: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The state_dict of a Llama of Hugging Face, by the names that `GPTLMHeadModel` has.

    Args:
        state_dict: left as it is; names that are not known are kept, frequencies are dropped.
        config: as `llama_config_to_gpt2_config` returns it. Its vocabulary is padded to
            pad_vocab_size_multiple.

    Raises:
        ArgumentError: a layer lacks some of its projections.

    Contract: flash-attention 2.8, `remap_state_dict_hf_llama`. Wider: biases, and a config without
    rotary_emb_interleaved.
    """
    return _joined(_reordered(_HF.ours(state_dict), config, interleaved=False), config)


def inv_remap_state_dict_hf_llama(
    state_dict: Mapping[str, Tensor], config: Any
) -> dict[str, Tensor]:
    """The inverse of `remap_state_dict_hf_llama`, without padding.

    Contract: flash-attention 2.8, `inv_remap_state_dict_hf_llama`. Different: the vocabulary is cut
    to config.vocab_size.
    """
    found = sizes(config)
    rows = [found.head_dim * count for count in (found.heads, found.heads_kv, found.heads_kv)]
    state = apart(without_padding(state_dict, config), "mixer.Wqkv", _QKV, lambda w: w.split(rows))
    state = apart(state, "mlp.fc1", _FC1, lambda w: w.chunk(2))
    return _HF.theirs(_reordered(state, config, interleaved=False, back=True))


def remap_state_dict_meta_llama(state_dict: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """A state_dict of Meta's, by the names that `GPTLMHeadModel` has.

    Args:
        state_dict: one of `state_dicts_from_checkpoint`, left as it is. What comes of several of
            them, `combine_state_dicts_tp` puts together.
        config: as for `remap_state_dict_hf_llama`.

    Raises:
        ArgumentError: a layer lacks some of its projections, or a part of a vocabulary would have
            to be padded.

    Contract: flash-attention 2.8, `remap_state_dict_meta_llama`.
    """
    return _joined(_reordered(_META.ours(state_dict), config, interleaved=True), config)


def llama_config_to_gpt2_config(llama_config: Any) -> Any:
    """The GPT2Config of a Llama, from transformers' LlamaConfig.

    Raises:
        UnsupportedError: another activation than silu, heads of a size of their own, rotary
            embedding that is scaled, or transformers is not installed.

    Contract: flash-attention 2.8, `llama_config_to_gpt2_config`. Wider: it also heeds rope_theta,
    attention_dropout, attention_bias, mlp_bias, tie_word_embeddings, and any intermediate_size.
    """
    theirs = llama_config
    require(
        theirs.hidden_act in ("silu", "swish"),
        "llama_config.hidden_act",
        repr(theirs.hidden_act),
        "'silu'",
        "take the model of transformers",
    )
    bias, mlp_bias = getattr(theirs, "attention_bias", False), getattr(theirs, "mlp_bias", False)
    return converted(
        theirs,
        n_head_kv=getattr(theirs, "num_key_value_heads", None),
        n_inner=theirs.intermediate_size,
        activation_function="swiglu",
        mlp_multiple_of=1,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=getattr(theirs, "attention_dropout", 0.0),
        layer_norm_epsilon=theirs.rms_norm_eps,
        pad_token_id=theirs.pad_token_id,
        rms_norm=True,
        rotary_emb_fraction=1.0,
        rotary_emb_interleaved=True,
        rotary_emb_base=rotary_base(theirs),
        tie_word_embeddings=getattr(theirs, "tie_word_embeddings", False),
        qkv_proj_bias=bias,
        out_proj_bias=bias,
        mlp_fc1_bias=mlp_bias,
        mlp_fc2_bias=mlp_bias,
    )


_NAMES = "checkpoint_path, model_name"
_OPTIONAL = ("n_kv_heads", "rope_theta", "ffn_dim_multiplier", "multiple_of")
"""What params.json may leave out."""
_FRACTIONS = ("norm_eps", "rope_theta", "ffn_dim_multiplier")


def config_from_meta_checkpoint(checkpoint_path: str | os.PathLike[str], model_name: str) -> Any:
    """The LlamaConfig of checkpoint_path/model_name/params.json.

    vocab_size is what params.json says; where it does not, that of the tokenizer.model beside it,
    for which sentencepiece is needed, or 32000 without one.

    Raises:
        ArgumentError: there is no params.json, or it lacks a number, or has one that cannot be.
        UnsupportedError: rotary embedding that is scaled, or a package is not installed.

    Contract: flash-attention 2.8, `config_from_meta_checkpoint`. Different: a vocab_size in
    params.json counts.
    """
    folder = Path(checkpoint_path) / model_name
    file = _existing(folder, "params.json")
    params = read_json(_NAMES, file)
    require(
        not params.get("use_scaled_rope", False),
        "use_scaled_rope",
        "true in params.json",
        "false: rotary embedding is not scaled here",
        "take the model of transformers",
    )
    needed = ("dim", "n_heads", "n_layers", "norm_eps")
    given = [key for key in _OPTIONAL if params.get(key) is not None]
    numbers = {
        key: positive(_NAMES, file, params, key, key in _FRACTIONS) for key in (*needed, *given)
    }
    heads = numbers["n_heads"]
    config = _package("transformers").LlamaConfig(
        vocab_size=_vocabulary(folder, params),
        hidden_size=numbers["dim"],
        intermediate_size=_intermediate(numbers),
        num_hidden_layers=numbers["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=numbers.get("n_kv_heads", heads),
        rms_norm_eps=numbers["norm_eps"],
    )
    config.rotary_emb_base = float(numbers.get("rope_theta", 10000.0))
    return config


def config_from_hf_checkpoint(checkpoint_path: str | os.PathLike[str], model_name: str) -> Any:
    """The LlamaConfig of checkpoint_path/{model_name}-hf/config.json.

    Raises:
        ArgumentError: there is no such file.
        UnsupportedError: transformers is not installed.

    Contract: flash-attention 2.8, `config_from_hf_checkpoint`.
    """
    file = _existing(Path(checkpoint_path) / f"{model_name}-hf", "config.json")
    read_json(_NAMES, file)
    return _package("transformers").LlamaConfig.from_pretrained(file.parent)


def config_from_checkpoint(
    checkpoint_path: str | os.PathLike[str], model_name: str, checkpoint_format: str = "meta"
) -> Any:
    """`config_from_meta_checkpoint` or, for checkpoint_format "hf", `config_from_hf_checkpoint`.

    Raises:
        ArgumentError: another checkpoint_format; otherwise as these.

    Contract: flash-attention 2.8, `config_from_checkpoint`. Stricter: other formats are refused.
    """
    if checkpoint_format == "meta":
        return config_from_meta_checkpoint(checkpoint_path, model_name)
    if checkpoint_format == "hf":
        return config_from_hf_checkpoint(checkpoint_path, model_name)
    raise ArgumentError(
        "checkpoint_format",
        repr(checkpoint_format),
        "'meta' or 'hf'",
        "pass 'meta' for params.json, 'hf' for config.json",
    )


def state_dicts_from_checkpoint(
    checkpoint_path: str | os.PathLike[str], model_name: str
) -> list[dict[str, Tensor]]:
    """The parts of a checkpoint of Meta's, checkpoint_path/model_name/consolidated.*.pth.

    Raises:
        ArgumentError: there is none, or one that is no checkpoint, or a link out of the folder.

    Contract: flash-attention 2.8, `state_dicts_from_checkpoint`. Different: they are loaded with
    weights_only=True.
    """
    folder = Path(checkpoint_path) / model_name
    numbered = {file.name: file.name.split(".") for file in folder.glob("consolidated.*.pth")}
    names = [n for n, parts in numbered.items() if len(parts) == 3 and parts[1].isdecimal()]
    names.sort(key=lambda name: int(numbered[name][1]))
    files = [_existing(folder, name) for name in names or ["consolidated.00.pth"]]
    return [load_tensors(_NAMES, file) for file in files]


def _joined(state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    state = joined(state, _QKV, "mixer.Wqkv")
    return with_vocabulary(joined(state, _FC1, "mlp.fc1"), config)


def _reordered(
    state: dict[str, Tensor], config: Any, interleaved: bool, back: bool = False
) -> dict[str, Tensor]:
    """state, rows that are rotated in the order of the config; they are interleaved or not.

    Args:
        back: the other way round.
    """
    wanted = bool(getattr(config, "rotary_emb_interleaved", False))
    if wanted == interleaved:
        return state
    head_dim = sizes(config).head_dim
    # a head is (2, half) where it is in halves, and (half, 2) where it is in pairs
    first = 2 if wanted != back else head_dim // 2

    def turned(weight: Tensor) -> Tensor:
        heads = weight.unflatten(0, (-1, first, head_dim // first)).transpose(1, 2)
        out: Tensor = heads.reshape(weight.shape)
        return out

    for module in _ROTATED:
        state = changed(state, module, turned)
    return state


def _intermediate(params: Mapping[str, Any]) -> int:
    """The width of the MLP: 2/3 of 4 * dim, times a factor, rounded up."""
    width = int(2 * 4 * params["dim"] / 3)
    factor = params.get("ffn_dim_multiplier")
    if factor is not None:
        width = int(factor * width)
    multiple = params.get("multiple_of", 256)
    return int(-(-width // multiple) * multiple)


def _vocabulary(folder: Path, params: Mapping[str, Any]) -> int:
    told = params.get("vocab_size", -1)
    if told is not None and told != -1:
        return int(positive(_NAMES, folder / "params.json", dict(params), "vocab_size"))
    tokenizer = inside(_NAMES, folder, "tokenizer.model")
    if not tokenizer.is_file():
        return 32000
    processor = _package("sentencepiece").SentencePieceProcessor(model_file=str(tokenizer))
    return int(processor.vocab_size())


def _existing(folder: Path, name: str) -> Path:
    file = inside(_NAMES, folder, name)
    if file.is_file():
        return file
    raise ArgumentError(
        _NAMES,
        f"{folder}, without {name}",
        "a folder with the files of a checkpoint",
        "check both names, and the format of the checkpoint",
    )


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            "checkpoint_path",
            f"a checkpoint whose config needs {name}",
            f"an environment with {name}",
            f"install {name}",
        ) from error
