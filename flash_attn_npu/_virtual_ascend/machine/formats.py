"""Casts between memory formats. The simulated memory knows the plain ones only, which torch_npu
gives by default too: a cast to one that a kernel keeps for itself is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .memory import host_view
from .refusal import require

CASTS = {"_npu_format_cast", "npu_format_cast"}
# NCHW, NHWC, ND, NCDHW: the numbers lie as the strides say
_PLAIN = {0, 1, 2, 30}


def cast(real: Callable[..., Any]) -> Callable[..., Any]:
    """The real operator allocates, or returns its input, and launches nothing that would copy."""

    def kernel(source: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        import torch_npu

        out: torch.Tensor = real(source, *args, **kwargs)
        with torch._C.DisableTorchFunction():
            if out.data_ptr() == source.data_ptr():
                return out
            number = int(torch_npu.get_npu_format(out))
            require(number in _PLAIN, f"memory format {number} is not simulated")
            require(out.dtype == source.dtype, "a format cast to another dtype is not simulated")
            host_view(out).copy_(host_view(source))
        return out

    return kernel
