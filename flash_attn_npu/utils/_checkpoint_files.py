"""Files of a checkpoint: only those that lie in its folder, and only what they should hold.

A checkpoint is what somebody else wrote. What is wrong with one is said with the file's name.
"""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import ArgumentError, UnsupportedError

__all__ = ["inside", "load_tensors", "package", "parts_of", "positive", "read_json"]


def inside(argument: str, folder: Path, name: str) -> Path:
    """The path of a file of the folder, which may not be there.

    Raises:
        ArgumentError: the name, or a link under it, leads out of the folder. The links that
            huggingface_hub makes from its snapshots to its blobs do not count as out.
    """
    _check_name(argument, str(folder), name)
    path = folder / name
    whole = folder.resolve()
    allowed = [whole]
    if whole.parent.name == "snapshots":
        allowed.append(whole.parents[1] / "blobs")
    if not any(path.resolve().is_relative_to(root) for root in allowed):
        _refuse(argument, path, f"it links to {path.resolve()}, out of its folder", "the file")
    return path


def parts_of(argument: str, index: Path) -> list[str]:
    """The files that an index names, each once, in the order of their names."""
    content = read_json(argument, index)
    named = content.get("weight_map")
    if not isinstance(named, dict) or not named:
        _refuse(argument, index, "it has no weight_map with entries", "a weight_map of names")
    files = sorted({file if isinstance(file, str) else repr(file) for file in named.values()})
    if not all(isinstance(file, str) for file in named.values()):
        _refuse(argument, index, f"its weight_map names {files[0]}", "names of files")
    for file in files:
        _check_name(argument, str(index), file)
    return files


def read_json(argument: str, file: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        _refuse(argument, file, f"it is not JSON ({error})", "a JSON object", error)
    if not isinstance(content, dict):
        _refuse(argument, file, f"it holds a {type(content).__name__}", "a JSON object")
    return content


def positive(
    argument: str, file: Path, content: dict[str, Any], key: str, fraction: bool = False
) -> Any:
    """A number of a JSON object that is finite and above 0, and whole unless `fraction`."""
    if key not in content:
        _refuse(argument, file, f"it has no {key}", f"a {key}")
    value = content[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _refuse(argument, file, f"its {key} is {value!r:.60}", f"a number as {key}")
    if not math.isfinite(value) or value <= 0:
        _refuse(argument, file, f"its {key} is {value!r:.60}", f"a finite {key} above 0")
    if not fraction and value != int(value):
        _refuse(argument, file, f"its {key} is {value!r:.60}", f"a whole number as {key}")
    return value if fraction else int(value)


def load_tensors(argument: str, file: Path, where: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a file of torch or of safetensors, by name. No code of a pickle is run."""
    try:
        if file.suffix == ".safetensors":
            reader = package("safetensors.torch", argument, f"to read {file.name}")
            content = reader.load_file(file, device=where)
        else:
            content = torch.load(file, map_location=where, weights_only=True)
    except (MemoryError, torch.OutOfMemoryError, UnsupportedError):
        raise
    except Exception as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        _refuse(argument, file, f"it cannot be read ({first})", "a checkpoint of tensors", error)
    if not isinstance(content, dict):
        _refuse(argument, file, f"it holds a {type(content).__name__}", "tensors by name")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            told = f"it holds a {type(value).__name__} under {name!r:.60}"
            nested = isinstance(value, dict)
            how = f"torch.load(...)[{name!r:.60}], saved by itself" if nested else "tensors by name"
            _refuse(argument, file, told, how)
    return content


def package(name: str, argument: str, purpose: str) -> Any:
    """A module that only some checkpoints need."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        wanted = name.partition(".")[0]
        raise UnsupportedError(
            argument,
            f"a checkpoint that needs {wanted}, {purpose}",
            f"a local folder, or an environment with {wanted}",
            f"install {wanted}",
        ) from error


def _check_name(argument: str, of: str, name: str) -> None:
    windows = PureWindowsPath(name)
    out = windows.is_absolute() or windows.drive or windows.root or ".." in windows.parts
    if out or PurePosixPath(name).is_absolute() or not name.strip() or "\0" in name:
        raise ArgumentError(
            argument,
            f"{of}, which names {name!r:.100}",
            "files in the folder of the checkpoint",
            "put all files into one folder, and name them without a path",
        )


def _refuse(
    argument: str, file: Path, what: str, instead: str, cause: Exception | None = None
) -> NoReturn:
    raise ArgumentError(
        argument,
        f"{file}: {what}",
        f"{instead}, in files that lie in the folder",
        "check that the checkpoint is complete and of a form that is read here",
    ) from cause
