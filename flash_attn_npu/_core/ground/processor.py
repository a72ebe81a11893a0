"""What the CPU of this machine does by itself."""

from __future__ import annotations

from functools import cache

import torch

__all__ = ["multiplies_bf16"]


@cache
def multiplies_bf16() -> bool:
    """Whether products of bfloat16 are faster than those of float32, as torch computes them."""
    told = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return told is not None and torch.backends.mkldnn.is_available() and bool(told())
