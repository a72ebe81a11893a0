"""The kernels: each turns a validated problem into a function of tensors.

Only this package and `integrations` may import torch_npu, and only when a problem needs it.
"""

from __future__ import annotations

__all__ = ["forget"]


def forget() -> None:
    """Drop what kernels keep between calls: masks, prepared calls, page tables, chip names."""
    from . import fusion, infer, soc

    fusion.forget()
    infer.forget()
    soc.forget_soc_names()
