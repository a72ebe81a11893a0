"""What the key maps of the GPT families share: names, the layout of Wqkv, and the vocabulary.

Each family lists how its modules are called; `Names` turns whole names both ways. Nothing here
changes a state_dict that it is given.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import ArgumentError
from ._config_values import padded_size

__all__ = [
    "POSITIONS",
    "WORDS",
    "Names",
    "apart",
    "by_group",
    "by_kind",
    "changed",
    "joined",
    "with_vocabulary",
    "without_padding",
]

WORDS = "transformer.embeddings.word_embeddings.weight"
POSITIONS = "transformer.embeddings.position_embeddings.weight"
_HEAD = "lm_head.weight"
_HEAD_BIAS = "lm_head.bias"
_UNLIKELY = -100.0
"""The bias of the logits of padding of the vocabulary: softmax gives them next to nothing."""


class Names(NamedTuple):
    """How a family calls its modules.

    Attributes:
        prefixes: what may stand before all names but the head's; the first one is written.
        layers: what stands before the number of a layer.
        outside: their modules outside of the layers, and ours.
        inside: their modules of a layer, and ours of a layer.
        head: their name of the head.
        dropped: the ends of names that hold no weights.
    """

    prefixes: tuple[str, ...]
    layers: str
    outside: Mapping[str, str]
    inside: Mapping[str, str]
    head: str = "lm_head"
    dropped: tuple[str, ...] = ()

    def ours(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors by our names; names that are not known are kept."""
        return {
            self._our_name(name): tensor
            for name, tensor in state_dict.items()
            if not name.endswith(self.dropped)
        }

    def theirs(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors by their names; names that are not known are kept."""
        return {self._their_name(name): tensor for name, tensor in state_dict.items()}

    def _our_name(self, name: str) -> str:
        module, _, kind = name.rpartition(".")
        if module == self.head:
            return f"lm_head.{kind}"
        before = next((prefix for prefix in self.prefixes if module.startswith(prefix)), "")
        module = module.removeprefix(before)
        if module in self.outside:
            return f"{self.outside[module]}.{kind}"
        layer = re.fullmatch(rf"{re.escape(self.layers)}\.(\d+)\.(.+)", module)
        if layer and layer[2] in self.inside:
            return f"transformer.layers.{layer[1]}.{self.inside[layer[2]]}.{kind}"
        return name

    def _their_name(self, name: str) -> str:
        module, _, kind = name.rpartition(".")
        if module == "lm_head":
            return f"{self.head}.{kind}"
        for theirs, ours in self.outside.items():
            if module == ours:
                return f"{self.prefixes[0]}{theirs}.{kind}"
        layer = re.fullmatch(r"transformer\.layers\.(\d+)\.(.+)", module)
        for theirs, ours in self.inside.items():
            if layer and layer[2] == ours:
                return f"{self.prefixes[0]}{self.layers}.{layer[1]}.{theirs}.{kind}"
        return name


def changed(
    state: Mapping[str, Tensor], module: str, change: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """state, with the weight and the bias of a module of every layer changed."""
    ends = f".{module}.weight", f".{module}.bias"
    return {
        name: change(tensor) if name.endswith(ends) else tensor for name, tensor in state.items()
    }


def joined(state: Mapping[str, Tensor], modules: tuple[str, ...], into: str) -> dict[str, Tensor]:
    """state, with the weights and the biases of some modules of every layer as one, in order.

    Raises:
        ArgumentError: a layer has some of them and not all.
    """
    found = dict(state)
    for name in state:
        before, first, kind = name.rpartition(f".{modules[0]}.")
        if not first:
            continue
        parts = [f"{before}.{module}.{kind}" for module in modules]
        missing = [part for part in parts if part not in found]
        if missing:
            raise ArgumentError(
                "state_dict",
                f"a layer without {', '.join(missing)}, as it is called here",
                f"all of {', '.join(modules)} in a layer that has {modules[0]}",
                "pass the state_dict of the whole checkpoint",
            )
        found[f"{before}.{into}.{kind}"] = torch.cat([found.pop(part) for part in parts])
    return found


def apart(
    state: Mapping[str, Tensor],
    module: str,
    into: tuple[str, ...],
    split: Callable[[Tensor], tuple[Tensor, ...]],
) -> dict[str, Tensor]:
    """state, with the weight and the bias of a module of every layer as those of several."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        before, middle, kind = name.rpartition(f".{module}.")
        if middle:
            pieces = zip(into, split(tensor), strict=True)
            found.update({f"{before}.{part}.{kind}": piece.clone() for part, piece in pieces})
        else:
            found[name] = tensor
    return found


def by_kind(qkv: Tensor, heads: int, heads_kv: int) -> Tensor:
    """All q, then all k, then all v: from groups of some q with their k and their v.

    Args:
        qkv: (heads_kv * (heads / heads_kv + 2) * headdim, ...); heads of their own k and v are
            groups of one.
    """
    group = heads // heads_kv
    grouped = qkv.unflatten(0, (heads_kv, group + 2, -1))
    q, kv = grouped[:, :group].flatten(0, 2), grouped[:, group:].transpose(0, 1).flatten(0, 2)
    return torch.cat((q, kv))


def by_group(qkv: Tensor, heads: int, heads_kv: int) -> Tensor:
    """The inverse of `by_kind`."""
    group = heads // heads_kv
    parts = qkv.unflatten(0, (heads + 2 * heads_kv, -1))
    q = parts[:heads].unflatten(0, (heads_kv, group))
    kv = parts[heads:].unflatten(0, (2, heads_kv)).transpose(0, 1)
    return torch.cat((q, kv), dim=1).flatten(0, 2)


def with_vocabulary(state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """state, its vocabulary padded to config.pad_vocab_size_multiple, and its head there.

    The weights of padding are zeros, and their bias is -100. If config.tie_word_embeddings (True if
    missing) the head is the embedding of words.

    Raises:
        ArgumentError: a part of a vocabulary that would have to be padded, or a head of its own
            where it is to be tied.
    """
    found = dict(state)
    tied = getattr(config, "tie_word_embeddings", True) and WORDS in found
    if tied:
        _check_tied(found[WORDS], found.get(_HEAD))
    for name, value in ((WORDS, 0.0), (_HEAD, 0.0), (_HEAD_BIAS, _UNLIKELY)):
        if name in found:
            found[name] = _padded(name, found[name], config, value)
    if tied:
        found[_HEAD] = found[WORDS]
    return found


def without_padding(state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """state, its vocabulary cut to config.vocab_size."""
    return {
        name: tensor[: config.vocab_size] if name in (WORDS, _HEAD, _HEAD_BIAS) else tensor
        for name, tensor in state.items()
    }


def _check_tied(words: Tensor, head: Tensor | None) -> None:
    # parts of one checkpoint may have different parts of the two
    if head is not None and head.shape == words.shape and not torch.equal(head, words):
        raise ArgumentError(
            "config.tie_word_embeddings",
            "True, for a checkpoint whose head is not its embedding of words",
            "False, where they differ",
            "set config.tie_word_embeddings to False",
        )


def _padded(name: str, tensor: Tensor, config: Any, value: float) -> Tensor:
    rows, multiple = tensor.shape[0], getattr(config, "pad_vocab_size_multiple", 1)
    if rows < config.vocab_size and rows % multiple:
        raise ArgumentError(
            "config.pad_vocab_size_multiple",
            f"{multiple}, for {name} with {rows} of {config.vocab_size} rows",
            f"a divisor of {rows}, where a vocabulary comes in parts",
            "leave it out, and pad the weights when they are combined",
        )
    missing = padded_size(config) - rows if rows >= config.vocab_size else 0
    if missing <= 0:
        return tensor
    return pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, missing), value=value)
