"""The state_dict of a GPT over the ranks of a process group, and of all ranks as one.

Both ways follow from one description: along which dimension a weight is dealt, and in which
sections and units, as the parallel modules deal it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ArgumentError
from ._config_values import padded_size
from ._gpt_blocks import registry
from ._gpt_config import GATED, sizes

__all__ = ["combine_state_dicts_tp", "shard_state_dict_tp"]


_VOCABULARY = ("embeddings.word_embeddings.weight", "lm_head.weight")


class _Deal(NamedTuple):
    """How a tensor is dealt: every section of a dimension by itself, in whole units.

    Attributes:
        dim: the dimension.
        sections: (size, unit) of each section, in order.
    """

    dim: int
    sections: tuple[tuple[int, int], ...]

    def share(self, world_size: int, rank: int) -> list[int]:
        """How much of each section a rank has."""
        deal = registry().get_dim_for_local_rank
        return [deal(size, world_size, rank, unit) for size, unit in self.sections]


def shard_state_dict_tp(
    state_dict: Mapping[str, Tensor], config: Any, world_size: int, rank: int
) -> dict[str, Tensor]:
    """What one rank of a process group holds of the state_dict of a GPT.

    Args:
        state_dict: of `GPTLMHeadModel` or `GPTModel` without a process_group; left as it is.
        config: of the model.
        world_size, rank: of the process group.

    Returns:
        The state_dict of the rank: heads, rows and columns as the parallel modules deal them; the
        biases of out_proj and fc2 in rank 0 alone; everything else whole.

    Raises:
        ArgumentError: no such rank, or the ranks cannot share the vocabulary evenly.

    Contract: flash-attention 2.8, `shard_state_dict_tp`. Different: state_dict stays as it is.
    """
    if not 0 <= rank < world_size:
        raise ArgumentError(
            "rank", rank, f"0 to {world_size - 1}, for world_size {world_size}", "pass another"
        )
    found: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if _first_alone(name) and rank > 0:
            continue
        deal = _deal(name, tensor.shape, config)
        if deal is None:
            found[name] = tensor
            continue
        _check_even(name, deal, world_size)
        sections = tensor.split([size for size, _ in deal.sections], deal.dim)
        pieces = []
        for index, section in enumerate(sections):
            shares = [deal.share(world_size, other)[index] for other in range(world_size)]
            pieces.append(section.split(shares, deal.dim)[rank])
        found[name] = torch.cat(pieces, deal.dim)
    return found


def combine_state_dicts_tp(
    state_dicts: Sequence[Mapping[str, Tensor]], config: Any
) -> dict[str, Tensor]:
    """The inverse of `shard_state_dict_tp`, of the state_dicts of all ranks in order.

    Embeddings of words may also come by columns, as in the first checkpoints of Llama.

    Raises:
        ArgumentError: no state_dicts, or they have different names.

    Contract: flash-attention 2.8, `combine_state_dicts_tp`.
    """
    _check_names(state_dicts)
    ranks = range(len(state_dicts))
    found: dict[str, Tensor] = {}
    for name, tensor in state_dicts[0].items():
        if len(ranks) == 1 or _first_alone(name) or _deal(name, tensor.shape, config) is None:
            found[name] = tensor
            continue
        parts = [state[name] for state in state_dicts]
        if name.endswith(_VOCABULARY) and len(tensor) >= padded_size(config):
            found[name] = torch.cat(parts, 1)
            continue
        deal = _whole(name, parts, config)
        pieces = [
            part.split(deal.share(len(ranks), rank), deal.dim) for rank, part in enumerate(parts)
        ]
        found[name] = torch.cat(
            [torch.cat(section, deal.dim) for section in zip(*pieces, strict=True)], deal.dim
        )
    return found


def _whole(name: str, parts: list[Tensor], config: Any) -> _Deal:
    """How the tensor that these are the parts of was dealt."""
    deal = _deal(name, parts[0].shape, config)
    assert deal is not None
    shape = list(parts[0].shape)
    shape[deal.dim] = sum(part.shape[deal.dim] for part in parts)
    whole = _deal(name, torch.Size(shape), config)
    assert whole is not None
    return whole


def _deal(name: str, shape: torch.Size, config: Any) -> _Deal | None:
    """How a tensor of this shape is dealt; None if every rank holds it."""
    place, bias = _place(name), name.endswith(".bias")
    found = sizes(config)
    if place in ("embeddings.word_embeddings", "lm_head"):
        return _Deal(0, ((shape[0], 1),))
    if place == "embeddings.position_embeddings":
        return _Deal(1, ((shape[1], 1),))
    if place == "mixer.Wqkv":
        # whole groups, of the heads of q that share a head of k and v
        group, size = found.heads // found.heads_kv, found.head_dim
        kv = (found.heads_kv * size, size)
        return _Deal(0, ((found.heads * size, group * size), kv, kv))
    if place == "mixer.out_proj" and not bias:
        return _Deal(1, ((shape[1], found.heads // found.heads_kv * found.head_dim),))
    if place == "mlp.fc1":
        halves = 2 if config.activation_function in GATED else 1
        return _Deal(0, ((shape[0] // halves, 1),) * halves)
    if place == "mlp.fc2" and not bias:
        return _Deal(1, ((shape[1], 1),))
    return None


def _place(name: str) -> str:
    """The module that a tensor belongs to, without what stands before it."""
    return ".".join(name.split(".")[:-1][-2:])


def _first_alone(name: str) -> bool:
    """Whether rank 0 holds a tensor alone: a bias that is added to a sum over the ranks."""
    return _place(name) in ("mixer.out_proj", "mlp.fc2") and name.endswith(".bias")


def _check_even(name: str, deal: _Deal, world_size: int) -> None:
    shared = _place(name).startswith(("embeddings.", "lm_head"))
    if shared and deal.sections[0][0] % world_size:
        raise ArgumentError(
            "world_size",
            f"{world_size}, for {name} with {deal.sections[0][0]} entries to share",
            "a divisor of it",
            "set config.pad_vocab_size_multiple to a multiple of world_size",
        )


def _check_names(state_dicts: Sequence[Mapping[str, Tensor]]) -> None:
    names = [{name for name in state if not _first_alone(name)} for state in state_dicts]
    if not names or any(other != names[0] for other in names):
        raise ArgumentError(
            "state_dicts",
            "none" if not names else "state_dicts with different names",
            "one of each rank, all of the same model",
            "pass those that shard_state_dict_tp has made, in order of their ranks",
        )
