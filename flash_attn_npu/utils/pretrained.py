"""Mirror of `flash_attn.utils.pretrained`: the weights of a Hugging Face checkpoint.

transformers and huggingface_hub are not needed: a local folder is read here, with safetensors for
files of that format, and only a name that is no folder is asked for from the hub.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, UnsupportedError, explain

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
        ArgumentError: the folder or the hub has no checkpoint of that name.
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
    for part in _parts(found, find, model_name):
        state.update(_load(part, device if dtype is None else None))
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
            path = folder / name
            return path if path.is_file() else None

        return find
    hub = _package("huggingface_hub", f"to download {os.fspath(model_name)}")
    errors = _package("huggingface_hub.errors", "to download")
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
    files = sorted(set(json.loads(found.read_text(encoding="utf-8"))["weight_map"].values()))
    paths = [(name, find(name)) for name in files]
    for name, path in paths:
        if path is None:
            raise _missing(model_name, f"{name}, which {found.name} names")
    return [path for _, path in paths if path is not None]


def _load(path: Path, device: torch.device | str | None) -> dict[str, Tensor]:
    where = "cpu" if device is None else str(device)
    if path.suffix == ".safetensors":
        reader = _package("safetensors.torch", f"to read {path.name}")
        tensors: dict[str, Tensor] = reader.load_file(path, device=where)
    else:
        tensors = torch.load(path, map_location=where, weights_only=True)
    return tensors


def _package(name: str, purpose: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        raise UnsupportedError(
            explain(
                "model_name",
                f"a checkpoint that needs {package}, {purpose}",
                f"a local folder, or an environment with {package}",
                f"install {package}",
            )
        ) from error


def _missing(model_name: str | os.PathLike[str], what: str) -> ArgumentError:
    return ArgumentError(
        explain(
            "model_name",
            os.fspath(model_name),
            f"a folder or a model of the hub that holds {what}",
            "check the name, the connection, and that all files of the checkpoint are there",
        )
    )
