"""The settings in force, and where each comes from."""

from __future__ import annotations

import ast
import os
import re
from importlib import resources
from typing import NamedTuple

from .._core.ground.absent import WORD, absent
from .._core.ground.variables import PREFIX
from ..errors import ArgumentError

__all__ = ["Setting", "illegal", "in_force"]

_ROW = re.compile(r"^\| `(\w+)` \| `(\w+)` \| ([^|]*)", re.MULTILINE)
_VALUE = re.compile(r"`([^`]*)`")

OF_OTHERS = (
    "TORCH_DEVICE_BACKEND_AUTOLOAD",
    "ASCEND_RT_VISIBLE_DEVICES",
    "ASCEND_LAUNCH_BLOCKING",
    "TASK_QUEUE_ENABLE",
    "NPU_FA2_SPARSE_MODE",
)
"""Variables that are not ours and change what runs, or when."""


class Setting(NamedTuple):
    """source: "default", or the environment variable."""

    name: str
    value: str
    source: str


def in_force() -> list[Setting]:
    """All of ours, and those of others that are set."""
    known = _documented()
    found = [
        Setting(name, os.environ[variable], variable)
        if variable in os.environ
        else Setting(name, legal[0], "default")
        for name, variable, legal in known
    ]
    variables = {variable for _, variable, _ in known}
    more = [name for name in sorted(os.environ) if name.startswith(PREFIX)]
    for variable in (*more, *OF_OTHERS):
        if variable in os.environ and variable not in variables:
            found.append(Setting(variable, os.environ[variable], variable))
    return found


def illegal() -> str | None:
    """The variables whose values are not legal, which the package refuses to be imported with."""
    wrong = [
        f"{variable}={os.environ[variable]} (legal: {', '.join(legal)})"
        for _, variable, legal in _documented()
        if variable in os.environ and not _is_legal(os.environ[variable], legal)
    ]
    return "; ".join(wrong) or None


def _is_legal(value: str, legal: tuple[str, ...]) -> bool:
    try:
        return value in legal or (WORD in legal and absent(value) is not None)
    except ArgumentError:
        return False


def _documented() -> list[tuple[str, str, tuple[str, ...]]]:
    """(name, variable, legal values), as the table at the top of `ground.settings` says.

    Read and not imported: that may take torch. The default is the first value.
    """
    source = resources.files(__package__.partition(".")[0]) / "_core" / "ground" / "settings.py"
    text = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    return [(name, variable, tuple(_VALUE.findall(v))) for name, variable, v in _ROW.findall(text)]
