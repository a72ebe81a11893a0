"""Which calls are small on a CPU, where an autograd.Function costs more than what it saves."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["is_few", "is_small"]

SMALL = 1 << 16
"""Elements whose operations torch's own autograd is left to record: what it keeps is little."""


def is_small(x: Tensor) -> bool:
    """Whether a composed operation on x is differentiated by torch, operation by operation."""
    return not torch.compiler.is_compiling() and is_few(x)


def is_few(x: Tensor) -> bool:
    """`is_small` where it is known that nothing is traced, as a `key_of` says."""
    return x.is_cpu and x.numel() <= SMALL
