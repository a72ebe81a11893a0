"""What `models.gpt` reads from a config, and what the converters of other configs share.

A config is any object with the attributes of transformers' GPT2Config; what flash-attention adds
to them may be missing. transformers is imported only where a GPT2Config is to be made.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from ..errors import ArgumentTypeError, UnsupportedError

__all__ = [
    "GATED",
    "Sizes",
    "check_config",
    "converted",
    "gelu_kind",
    "make_config",
    "positions",
    "require",
    "rotary_base",
    "rotary_fraction",
    "sizes",
]

_NEEDED = (
    "vocab_size",
    "n_inner",
    "activation_function",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "layer_norm_epsilon",
    "initializer_range",
)
_GELU = {
    "gelu": "none",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_approx": "tanh",
    "gelu_pytorch_tanh": "tanh",
}
"""activation_function, and the `approximate` of GELU that it means."""

GATED = ("glu", "swiglu", "geglu")
_ACTIVATIONS = (*_GELU, "relu", "sqrelu", *GATED)


class Sizes(NamedTuple):
    """Of a model; heads_kv are the heads of keys and values."""

    hidden: int
    layers: int
    heads: int
    heads_kv: int
    head_dim: int


def sizes(config: Any) -> Sizes:
    """The sizes in config, by the names of GPT2Config or by those that transformers maps to them.

    Raises:
        ArgumentTypeError: one is missing.
        UnsupportedError: heads of another size than hidden_size / num_attention_heads.
    """
    hidden = _either(config, "hidden_size", "n_embd")
    heads = _either(config, "num_attention_heads", "n_head")
    heads_kv = getattr(config, "n_head_kv", None)
    head_dim = hidden // heads
    asked = getattr(config, "head_dim", None)
    require(
        asked in (None, head_dim),
        "config.head_dim",
        asked,
        f"{head_dim}, which is hidden_size / num_attention_heads",
        "leave head_dim out",
    )
    layers = _either(config, "num_hidden_layers", "n_layer")
    return Sizes(hidden, layers, heads, heads if heads_kv is None else heads_kv, head_dim)


def positions(config: Any) -> int:
    """How many positions have an embedding; 0 or less for no such embedding.

    Raises:
        ArgumentTypeError: it is missing.
    """
    return _either(config, "max_position_embeddings", "n_positions")


def check_config(config: Any, parallel: bool) -> Sizes:
    """Refuse what is no config, and one that asks for another model than can be built.

    Args:
        parallel: whether there is a process group.

    Raises:
        ArgumentTypeError: attributes are missing.
        UnsupportedError: an unknown activation, a narrow embedding with a process group, or a
            parallel block without prenorm.
    """
    missing = [name for name in _NEEDED if not hasattr(config, name)]
    if missing:
        raise _no_config(config, ", ".join(missing))
    found = sizes(config)
    require(
        config.activation_function in _ACTIVATIONS,
        "config.activation_function",
        repr(config.activation_function),
        ", ".join(map(repr, _ACTIVATIONS)),
        "use one of these activations",
    )
    require(
        not parallel or getattr(config, "word_embed_proj_dim", None) is None,
        "config.word_embed_proj_dim",
        "a value with process_group",
        "None with a process_group",
        "run the model on one process",
    )
    require(
        getattr(config, "prenorm", True) or not getattr(config, "parallel_block", False),
        "config.parallel_block",
        "True with prenorm=False",
        "False without prenorm",
        "set config.prenorm to True",
    )
    return found


def gelu_kind(config: Any) -> str | None:
    """The `approximate` of the GELU that config.activation_function names; None if it is none."""
    return _GELU.get(config.activation_function)


def make_config(**settings: Any) -> Any:
    """transformers' GPT2Config with these attributes.

    Raises:
        UnsupportedError: transformers is not installed.
    """
    try:
        from transformers import GPT2Config
    except ImportError as error:
        raise UnsupportedError(
            "config",
            "one to convert, which makes a GPT2Config, without transformers",
            "an environment with transformers",
            "install transformers, or set the attributes of a config of your own",
        ) from error
    return GPT2Config(**settings)


def converted(theirs: Any, **own: Any) -> Any:
    """The GPT2Config of another model's config: what most of them name alike, and their own.

    Raises:
        UnsupportedError: as `sizes` and `make_config`.
    """
    found = sizes(theirs)
    shared = {
        "vocab_size": theirs.vocab_size,
        "n_positions": 0,
        "n_embd": found.hidden,
        "n_layer": found.layers,
        "n_head": found.heads,
        "initializer_range": theirs.initializer_range,
        "bos_token_id": theirs.bos_token_id,
        "eos_token_id": theirs.eos_token_id,
    }
    return make_config(**{**shared, **own})


def rotary_base(config: Any) -> float:
    """The base of the rotary embedding of another model's config.

    It is rotary_emb_base, or rope_theta, by itself or in rope_parameters; 10000 without any.

    Raises:
        UnsupportedError: a kind of scaling beside it.
    """
    parameters = {
        **(getattr(config, "rope_scaling", None) or {}),
        **(getattr(config, "rope_parameters", None) or {}),
    }
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    require(
        kind in (None, "default"),
        "config.rope_parameters",
        f"rope_type {kind!r}",
        "'default': rotary embedding is not scaled here",
        "take the model of transformers",
    )
    theta = parameters.get("rope_theta", getattr(config, "rope_theta", 10000.0))
    return float(getattr(config, "rotary_emb_base", theta))


def rotary_fraction(dim: int, head_dim: int) -> float:
    """The fraction of head_dim that is dim, also after it is multiplied and truncated again."""
    fraction = dim / head_dim
    return fraction if int(fraction * head_dim) == dim else math.nextafter(fraction, 2.0)


def require(right: bool, argument: str, came: object, allowed: str, remedy: str) -> None:
    """Raise UnsupportedError unless right."""
    if not right:
        raise UnsupportedError(argument, came, allowed, remedy)


def _either(config: Any, *names: str) -> int:
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    raise _no_config(config, " or ".join(names))


def _no_config(config: Any, missing: str) -> ArgumentTypeError:
    return ArgumentTypeError(
        "config",
        f"a {type(config).__name__} without {missing}",
        "an object with the attributes of transformers' GPT2Config",
        "pass such a config, and a dict as types.SimpleNamespace(**config)",
    )
