"""What `models.bert` reads from a config, and what a config may not ask of it.

A config is any object with the attributes of transformers' BertConfig; what flash-attention adds
to them may be missing. transformers is not needed.
"""

from __future__ import annotations

from typing import Any

from ..errors import ArgumentError, ArgumentTypeError, UnsupportedError

__all__ = ["check_config", "gelu_kind", "rotary_options"]

_NEEDED = (
    "attention_probs_dropout_prob",
    "hidden_act",
    "hidden_dropout_prob",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "layer_norm_eps",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "pad_token_id",
    "type_vocab_size",
    "vocab_size",
)
_GELU = {
    "gelu": "none",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_pytorch_tanh": "tanh",
}
"""hidden_act, and the `approximate` of GELU that it means."""


def check_config(config: Any) -> None:
    """Refuse what is no config, and one that asks for another model than can be built.

    Raises:
        ArgumentTypeError: attributes are missing.
        UnsupportedError: a decoder, cross-attention, or relative positions.
    """
    missing = [name for name in _NEEDED if not hasattr(config, name)]
    if missing:
        raise ArgumentTypeError(
            "config",
            f"a {type(config).__name__} without {', '.join(missing)}",
            "an object with the attributes of transformers' BertConfig",
            "pass such a config, and a dict as types.SimpleNamespace(**config)",
        )
    for name in ("is_decoder", "add_cross_attention"):
        if getattr(config, name, False):
            _unsupported(f"config.{name}", True, "False", "take the encoder of transformers")
    kind = getattr(config, "position_embedding_type", "absolute")
    if kind not in ("absolute", "rotary"):
        _unsupported(
            "config.position_embedding_type",
            repr(kind),
            "'absolute' or 'rotary'",
            "take the model of transformers for relative positions",
        )


def gelu_kind(config: Any, fused: bool = False) -> str:
    """The `approximate` of the GELU that config.hidden_act names: "none" or "tanh".

    Raises:
        ArgumentError: another activation, or the exact one if fused.
    """
    kind = _GELU.get(config.hidden_act) if isinstance(config.hidden_act, str) else None
    if kind is None or (fused and kind != "tanh"):
        allowed = [name for name, found in _GELU.items() if not fused or found == "tanh"]
        raise ArgumentError(
            "config.hidden_act",
            repr(config.hidden_act) + (" with fused_mlp" if fused else ""),
            ", ".join(map(repr, allowed)),
            "leave fused_mlp out" if kind else "use one of these activations",
        )
    return kind


def rotary_options(config: Any) -> dict[str, Any]:
    """The rotary arguments of `MHA`, none if the config has absolute positions.

    Raises:
        ArgumentError: config.rotary_emb_dim is missing.
    """
    if getattr(config, "position_embedding_type", "absolute") != "rotary":
        return {}
    if getattr(config, "rotary_emb_dim", None) is None:
        raise ArgumentError(
            "config.rotary_emb_dim",
            None,
            "1 or more with position_embedding_type='rotary'",
            "set it to hidden_size // num_attention_heads to rotate whole heads",
        )
    return {
        "rotary_emb_dim": config.rotary_emb_dim,
        "rotary_emb_base": getattr(config, "rotary_emb_base", 10000.0),
        "rotary_emb_scale_base": getattr(config, "rotary_emb_scale_base", None),
        "rotary_emb_interleaved": getattr(config, "rotary_emb_interleaved", False),
    }


def _unsupported(argument: str, came: object, allowed: str, remedy: str) -> None:
    raise UnsupportedError(argument, came, allowed, remedy)
