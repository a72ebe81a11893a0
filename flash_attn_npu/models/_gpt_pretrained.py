"""The base of the GPT models: `from_pretrained`, and which family a checkpoint belongs to.

`models.gpt` re-exports the class, and the functions that it calls are looked up there.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError, printable
from ..utils._checkpoint_files import read_json
from ._gpt_blocks import registry

__all__ = ["GPTPreTrainedModel"]

_FAMILIES = {
    "gpt2": ("gpt2", "openai-community/gpt2"),
    "opt": ("facebook/opt",),
    "gptj": ("EleutherAI/gpt-j-", "togethercomputer/GPT-JT-"),
    "gpt_neox": (
        "EleutherAI/gpt-neox-",
        "EleutherAI/pythia-",
        "togethercomputer/RedPajama-INCITE-",
    ),
    "falcon": ("tiiuae/falcon-",),
    "llama": ("meta-llama/Llama-",),
    "bigcode": ("bigcode/", "WizardLM/"),
}
"""How the names of models on the hub begin, by the family that tells the names of their weights."""

_TYPES = {name: name for name in _FAMILIES if name != "bigcode"} | {"gpt_bigcode": "bigcode"}
"""The family of a model_type in config.json."""


class GPTPreTrainedModel(nn.Module):
    """What the GPT models share: their config, and checkpoints of Hugging Face.

    Args:
        config: any object with the attributes of transformers' GPT2Config.
        inputs, kwargs: ignored.

    Contract: flash-attention 2.8, `GPTPreTrainedModel`. Wider: a config of another class.
    """

    def __init__(self, config: Any, *inputs: Any, **kwargs: Any) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def from_pretrained(
        cls,
        model_name: str | os.PathLike[str],
        config: Any,
        *args: Any,
        strict: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        world_size: int = 1,
        rank: int = 0,
        **kwargs: Any,
    ) -> Any:
        """A model with the weights of a checkpoint.

        Args:
            model_name: the name of a model on the hub, one of a known family; or a folder that
                holds a checkpoint, and with it config.json unless its name is such a name.
            config: of the model to make, as the `*_config_to_gpt2_config` of the family returns.
            args, kwargs: further arguments of the class, as process_group.
            strict: whether all names of the checkpoint and of the model must agree.
            device, dtype: of the model.
            world_size, rank: the share of the checkpoint to load, for a process_group.

        Raises:
            ArgumentError: no checkpoint of that name.
            UnsupportedError: an unknown family.

        Contract: flash-attention 2.8, `from_pretrained`. Wider: folders with config.json.
        """
        names, family = registry(), _family(model_name)
        model: Any = cls(config, *args, device=device, dtype=dtype, **kwargs)
        state = names.state_dict_from_pretrained(model_name, device="cpu", dtype=dtype)
        state = getattr(names, f"remap_state_dict_hf_{family}")(state, config)
        if world_size > 1:
            state = names.shard_state_dict_tp(state, config, world_size, rank)
        outcome = model.load_state_dict(state, strict=strict)
        names.logger.info("loaded %s: %s", printable(model_name), printable(outcome))
        return model


def _family(model_name: str | os.PathLike[str]) -> str:
    name, told = os.fspath(model_name), None
    file = Path(model_name) / "config.json"
    if file.is_file():
        told = read_json("model_name", file).get("model_type")
        if told in _TYPES:
            return _TYPES[told]
    for family, beginnings in _FAMILIES.items():
        if told is None and name.startswith(beginnings):
            return family
    raise UnsupportedError(
        "model_name",
        name if told is None else f"{name}, of model_type {told!r}",
        "a name that begins with " + ", ".join(b for all_ in _FAMILIES.values() for b in all_),
        "load it with state_dict_from_pretrained, and rename its weights",
    )
