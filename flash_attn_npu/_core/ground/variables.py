"""Environment variables that begin like ours: which are, and what another one may have meant."""

from __future__ import annotations

import logging
import os

from ..._startup import VARIABLE
from ...errors import printable

__all__ = ["KNOWN", "PREFIX", "unread", "warn_of_unread"]

PREFIX = "FLASH_ATTN_NPU_"
KNOWN = (
    f"{PREFIX}FALLBACK",
    f"{PREFIX}ALIBI_OFFSET",
    f"{PREFIX}VERIFY",
    f"{PREFIX}CONSISTENT",
    VARIABLE,
)
"""The documented ones."""

OF_TESTS = (f"{PREFIX}REQUIRE_ASCEND",)

logger = logging.getLogger("flash_attn_npu")


def unread() -> dict[str, str]:
    """Name -> what may be meant by it, of those that are set and that nothing reads."""
    found = [name for name in os.environ if name.startswith(PREFIX)]
    return {name: _meant(name) for name in found if name not in KNOWN and name not in OF_TESTS}


def warn_of_unread() -> None:
    """Say in the log which these are: a setting that is misspelt would change nothing."""
    names = unread()
    if names:
        told = printable(", ".join(f"{name} (meant: {meant}?)" for name, meant in names.items()))
        logger.warning("flash_attn_npu: set in the environment, but read by nothing: %s", told)


def _meant(name: str) -> str:
    # where all are known there is none to look for
    import difflib

    rests = [known.removeprefix(PREFIX) for known in KNOWN]
    near = difflib.get_close_matches(name.removeprefix(PREFIX).upper(), rests, n=1)
    return f"{PREFIX}{near[0]}" if near else f"one of {', '.join(KNOWN)}"
