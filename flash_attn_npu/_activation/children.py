"""What this process tells its children: an environment variable, taken back when it is over.

Every new interpreter reads it, whoever starts it: spawn, forkserver, subprocess, a DataLoader.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection

from .._startup import VARIABLE, WORDS

__all__ = ["followed", "take_back", "tell"]

START_FILE = "_zz_flash_attn_npu.pth"


class _State:
    """told: every value that was set, before it was. before: what is to come back."""

    told: list[str] = []  # noqa: RUF012
    before: str | None = None


def tell(words: Collection[str]) -> None:
    """Set the variable for processes that are started from now on.

    Words that this process was itself told by its parent stay.
    """
    if not _State.told:
        _State.before = os.environ.get(VARIABLE)
    inherited = (_State.before or "").split(",")
    value = ",".join(word for word in WORDS if word in {*words, *inherited})
    _State.told = [*_State.told, value]
    os.environ[VARIABLE] = value


def take_back() -> None:
    """Leave the variable as it was found, unless somebody else has set it meanwhile."""
    if os.environ.get(VARIABLE) in _State.told:
        if _State.before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = _State.before
    _State.told = []


def followed() -> bool:
    """Whether a new interpreter of this environment would read the variable."""
    return any(os.path.exists(os.path.join(folder, START_FILE)) for folder in sys.path)
