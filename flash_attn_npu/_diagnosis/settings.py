"""The settings in force, and where each comes from."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from ..errors import ArgumentError

__all__ = ["Setting", "illegal", "in_force"]

PREFIX = "FLASH_ATTN_NPU_"
_ROW = re.compile(r"^\| `(\w+)` \| `(\w+)` \| (.*) \|$", re.MULTILINE)
_DEFAULT = re.compile(r"`([^`]*)` \(default\)")

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
        else Setting(name, default, "default")
        for name, variable, default in known
    ]
    variables = {variable for _, variable, _ in known}
    more = [name for name in sorted(os.environ) if name.startswith(PREFIX)]
    for variable in (*more, *OF_OTHERS):
        if variable in os.environ and variable not in variables:
            found.append(Setting(variable, os.environ[variable], variable))
    return found


def illegal() -> str | None:
    """What the package says of a value in the environment that is not legal, else None."""
    try:
        from .._core.ground import settings  # noqa: F401
    except ArgumentError as error:
        return str(error)
    return None


def _documented() -> list[tuple[str, str, str]]:
    """(name, variable, default), as the table at the top of `ground.settings` says."""
    try:
        from .._core.ground import settings
    except ArgumentError:
        return []
    rows = _ROW.findall(settings.__doc__ or "")
    return [
        (name, variable, default.group(1) if default else "")
        for name, variable, values in rows
        for default in [_DEFAULT.search(values)]
    ]
