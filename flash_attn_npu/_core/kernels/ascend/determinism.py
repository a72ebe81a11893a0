"""How a kernel is told to add up in one order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ...ground.locks import Lock

__all__ = ["deterministically"]

_lock = Lock()


@contextmanager
def deterministically() -> Iterator[None]:
    """CANN takes its determinism from torch's global setting at the call; leave that as it was."""
    with _lock:
        before = torch.are_deterministic_algorithms_enabled()
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warn_only)
