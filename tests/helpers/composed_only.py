"""Composed attention where torch's own kernel for a CPU would serve."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from flash_attn_npu._core.ground.memory import forget_all
from flash_attn_npu._core.table import attention


@contextmanager
def composed_only() -> Iterator[None]:
    """No call in the block is served by torch's own kernel for a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CANDIDATES", "OVER_PAGES"):
            kept = [c for c in getattr(attention, name) if c.name != attention.HOST]
            patch.setattr(attention, name, tuple(kept))
        # what was decided before must not answer within, nor what is decided within behind it
        forget_all()
        yield
    forget_all()
