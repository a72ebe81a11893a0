"""Mirror of `flash_attn.utils.pretrained`: the weights of a Hugging Face checkpoint.

transformers and huggingface_hub are not needed: a local folder is read here, with safetensors for
files of that format, and only a name that is no folder is asked for from the hub.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ArgumentError
from ._checkpoint_files import inside, load_tensors, package, parts_of

__all__ = ["state_dict_from_pretrained"]

_NAMES = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.safetensors",
    "model.safetensors.index.json",
)
"""In this order, as upstream; an index names the files of a checkpoint in several parts."""


def state_dict_from_pretrained(
    model_name: str | os.PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The state_dict of a checkpoint.

    Args:
        model_name: a folder, or the name of a model on the Hugging Face hub.
        device: where the tensors go; the CPU if None.
        dtype: what floating tensors are cast to; as stored if None. They are cast on the CPU.

    Returns:
        Every tensor of every part, by name.

    Raises:
        ArgumentError: the folder or the hub has no checkpoint of that name, or one that is
            malformed, or that names or links to files out of its folder.
        UnsupportedError: it takes a package that is not installed.

    Contract: flash-attention 2.8, `state_dict_from_pretrained`. Different: tensors that are not
    floating keep their dtype, pickled checkpoints are loaded with weights_only=True, and what is
    missing is an ArgumentError instead of an EnvironmentError.
    """
    find = _finder(model_name)
    found = next((path for path in map(find, _NAMES) if path is not None), None)
    if found is None:
        raise _missing(model_name, ", ".join(_NAMES))
    state: dict[str, Tensor] = {}
    where = "cpu" if device is None or dtype is not None else str(device)
    for part in _parts(found, find, model_name):
        state.update(load_tensors("model_name", part, where))
    if dtype is not None:
        state = {
            name: tensor.to(dtype=dtype) if tensor.is_floating_point() else tensor
            for name, tensor in state.items()
        }
    return {name: tensor.to(device=device) for name, tensor in state.items()}


def _finder(model_name: str | os.PathLike[str]) -> Callable[[str], Path | None]:
    """What gives the path of one of the checkpoint's files, or None."""
    folder = Path(model_name)
    if folder.is_dir():

        def find(name: str) -> Path | None:
            path = inside("model_name", folder, name)
            return path if path.is_file() else None

        return find
    hub = package("huggingface_hub", "model_name", f"to download {os.fspath(model_name)}")
    errors = package("huggingface_hub.errors", "model_name", "to download")
    absent = errors.EntryNotFoundError, errors.RepositoryNotFoundError, errors.HFValidationError

    def download(name: str) -> Path | None:
        try:
            return Path(hub.hf_hub_download(os.fspath(model_name), name))
        except absent:
            return None

    return download


def _parts(
    found: Path, find: Callable[[str], Path | None], model_name: str | os.PathLike[str]
) -> list[Path]:
    if found.suffix != ".json":
        return [found]
    paths = [(name, find(name)) for name in parts_of("model_name", found)]
    for name, path in paths:
        if path is None:
            raise _missing(model_name, f"{name}, which {found.name} names")
    return [path for _, path in paths if path is not None]


def _missing(model_name: str | os.PathLike[str], what: str) -> ArgumentError:
    return ArgumentError(
        "model_name",
        os.fspath(model_name),
        f"a folder or a model of the hub that holds {what}",
        "check the name, the connection, and that all files of the checkpoint are there",
    )
