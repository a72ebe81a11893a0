"""BERT checkpoints: between the names of Hugging Face and those of `models.bert`.

Names with and without the prefix "bert." are understood, as are the old gamma and beta of norms.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import ArgumentError, UnsupportedError
from ._config_values import padded_size

__all__ = ["fit_prefix", "inv_remap_state_dict", "remap_state_dict"]

_THEIR_LAYER = re.compile(r"((?:bert\.)?encoder\.)layer\.(\d+)\.(.+)\.(weight|bias)")
_OUR_LAYER = re.compile(r"((?:bert\.)?encoder\.)layers\.(\d+)\.(.+)\.(weight|bias)")
_IN_LAYER = {
    "attention.output.dense": "mixer.out_proj",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "output.LayerNorm": "norm2",
}
_FROM_OURS = {ours: theirs for theirs, ours in _IN_LAYER.items()}
_PROJECTIONS = ("query", "key", "value")
_ELSEWHERE = (
    ("embeddings.LayerNorm.", "emb_ln."),
    ("cls.predictions.transform.LayerNorm.", "cls.predictions.transform.layer_norm."),
)
_WORDS = re.compile(r"(?:bert\.)?embeddings\.word_embeddings\.weight")
_TIED, _BIAS = "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"
_THEIR_BIAS = "cls.predictions.bias"
_UNLIKELY = -100.0
"""The bias of the logits of padding of the vocabulary: softmax gives them next to nothing."""


def remap_state_dict(state_dict: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The state_dict of a BERT of Hugging Face, by the names that `models.bert` has.

    Query, key and value become one Wqkv, in the last layer Wq and Wkv with
    config.last_layer_subset. The vocabulary is padded to config.pad_vocab_size_multiple, with
    zeros and with a bias of -100. A decoder that was not saved is that of the word embeddings.

    Args:
        state_dict: left as it is; names that are not known are kept.
        config: as for `BertModel`.

    Raises:
        ArgumentError: a layer has some of query, key and value and not all.
        UnsupportedError: the decoder has weights of its own.

    Contract: flash-attention 2.8, `remap_state_dict` of models.bert. Wider: names without "bert.",
    and checkpoints without the tied weights.
    """
    found: dict[str, Tensor] = {}
    apart: dict[tuple[str, int, str], dict[str, Tensor]] = {}
    for name, tensor in state_dict.items():
        name = _modern(name)
        layer = _THEIR_LAYER.fullmatch(name)
        part = layer[3].removeprefix("attention.self.") if layer else ""
        if layer and part in _PROJECTIONS:
            apart.setdefault((layer[1], int(layer[2]), layer[4]), {})[part] = tensor
        elif layer:
            part = _IN_LAYER.get(part, part)
            found[f"{layer[1]}layers.{layer[2]}.{part}.{layer[4]}"] = tensor
        elif not name.endswith("embeddings.position_ids"):
            found[_renamed(name, _ELSEWHERE)] = tensor
    for (before, index, kind), tensors in apart.items():
        for place, tensor in _joined(tensors, f"{before}layer.{index}", _subset(config, index)):
            found[f"{before}layers.{index}.mixer.{place}.{kind}"] = tensor
    _tie(found)
    return _with_padding(found, config)


def inv_remap_state_dict(state_dict: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Undo `remap_state_dict`: the names of Hugging Face, which the result loads into.

    Args:
        state_dict: left as it is; the result shares its memory.
        config: with pad_vocab_size_multiple it must have orig_vocab_size, the size of the
            vocabulary without padding.

    Raises:
        ArgumentError: config.orig_vocab_size is missing.

    Contract: flash-attention 2.8, `inv_remap_state_dict` of models.bert.
    """
    found: dict[str, Tensor] = {}
    turned = [(ours, theirs) for theirs, ours in _ELSEWHERE]
    for name, tensor in _without_padding(state_dict, config).items():
        layer = _OUR_LAYER.fullmatch(name)
        if layer is None:
            found[_renamed(name, turned)] = tensor
            continue
        for part, piece in _parted(layer[3], tensor):
            found[f"{layer[1]}layer.{layer[2]}.{part}.{layer[4]}"] = piece
    if _BIAS in found:
        found[_THEIR_BIAS] = found[_BIAS]
    return found


def fit_prefix(state: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """state, with "bert." added to its names or taken away where `names` has them so."""

    def fitting(name: str) -> str:
        candidates = (name, name.removeprefix("bert."), f"bert.{name}")
        return next((candidate for candidate in candidates if candidate in names), name)

    return {fitting(name): tensor for name, tensor in state.items()}


def _modern(name: str) -> str:
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith(f"LayerNorm{old}"):
            name = name.removesuffix(old) + new
    return name


def _renamed(name: str, places: Collection[tuple[str, str]]) -> str:
    prefix = "bert." if name.startswith("bert.") else ""
    bare = name.removeprefix(prefix)
    for old, new in places:
        if bare.startswith(old):
            return prefix + new + bare.removeprefix(old)
    return name


def _subset(config: Any, index: int) -> bool:
    """Whether a layer has Wq and Wkv."""
    last: bool = index == config.num_hidden_layers - 1
    return last and bool(getattr(config, "last_layer_subset", False))


def _joined(tensors: dict[str, Tensor], layer: str, subset: bool) -> Iterator[tuple[str, Tensor]]:
    if len(tensors) < len(_PROJECTIONS):
        raise ArgumentError(
            "state_dict",
            f"{layer}.attention.self with {', '.join(tensors)}",
            "query, key and value",
            "pass the whole state_dict of the model",
        )
    query, key, value = (tensors[name] for name in _PROJECTIONS)
    if subset:
        yield "Wq", query
        yield "Wkv", torch.cat((key, value))
    else:
        yield "Wqkv", torch.cat((query, key, value))


def _parted(part: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    held = {"mixer.Wqkv": _PROJECTIONS, "mixer.Wq": _PROJECTIONS[:1], "mixer.Wkv": _PROJECTIONS[1:]}
    if part not in held:
        yield _FROM_OURS.get(part, part), tensor
        return
    for name, piece in zip(held[part], tensor.chunk(len(held[part])), strict=True):
        yield f"attention.self.{name}", piece


def _tie(found: dict[str, Tensor]) -> None:
    """Give the decoder one bias, and the weight of the word embeddings."""
    if _THEIR_BIAS in found:
        bias = found.pop(_THEIR_BIAS)
        found.setdefault(_BIAS, bias)
    words = next((tensor for name, tensor in found.items() if _WORDS.fullmatch(name)), None)
    if words is None or not any(name.startswith("cls.predictions.") for name in found):
        return
    weight = found.setdefault(_TIED, words)
    if weight is not words and not torch.equal(weight, words):
        raise UnsupportedError(
            f"state_dict[{_TIED!r}]",
            "other values than those of the word embeddings",
            "the same values, as the model has one parameter for both",
            "take the model of transformers for a checkpoint that is not tied",
        )


def _vocabulary(found: Mapping[str, Tensor]) -> Iterator[tuple[str, float]]:
    """What has a row for each word, and what to pad it with."""
    for name in found:
        if _WORDS.fullmatch(name) or name == _TIED:
            yield name, 0.0
        elif name == _BIAS:
            yield name, _UNLIKELY


def _with_padding(found: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    if getattr(config, "pad_vocab_size_multiple", 1) == 1:
        return found
    size, padded = padded_size(config), dict(found)
    for name, filling in _vocabulary(found):
        tensor = found[name]
        # pad takes the last dimension first
        missing = (0, 0) * (tensor.dim() - 1) + (0, max(size - tensor.shape[0], 0))
        padded[name] = pad(tensor, missing, value=filling)
    return padded


def _without_padding(found: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    whole = dict(found)
    if getattr(config, "pad_vocab_size_multiple", 1) == 1:
        return whole
    size = getattr(config, "orig_vocab_size", None)
    if size is None:
        raise ArgumentError(
            "config.orig_vocab_size",
            None,
            "the size of the vocabulary without padding",
            "set it, as vocab_size was rounded up to pad_vocab_size_multiple",
        )
    whole.update({name: found[name][:size] for name, _ in _vocabulary(found)})
    return whole
