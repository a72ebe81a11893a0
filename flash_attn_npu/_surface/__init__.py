"""Our namespace against flash-attention's: what is served, what is absent and why.

`flash_attn.json` is upstream's surface, frozen: module -> name -> kind, parameters, bases.
Nothing imports this package when flash_attn_npu is imported; compat_matrix.md and the tests do.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any

from .._activation.install import MIRRORED
from .comparison import Comparison, compare
from .exceptions import RULES

__all__ = ["FROZEN", "compared"]

FROZEN: dict[str, dict[str, Any]] = json.loads(
    (resources.files(__package__) / "flash_attn.json").read_text(encoding="utf-8")
)
"""The surface of flash-attention 2.8."""

PACKAGE = __package__.rpartition(".")[0]


@cache
def compared() -> Comparison:
    """This package against FROZEN; imports every mirrored module."""
    return compare(FROZEN, PACKAGE, MIRRORED, RULES)
