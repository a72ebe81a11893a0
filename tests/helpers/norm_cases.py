"""Arguments of norms: tensors by name, drawn for a list of wishes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

SHAPE = (3, 5, 32)
# every dtype on one device, and one dtype on every device
each_place = pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.float16),
        ("cpu", torch.bfloat16),
        ("cpu", torch.float32),
        ("npu", torch.bfloat16),
    ],
    indirect=["device"],
    ids=str,
)
LIKE_WEIGHT = ("weight", "bias", "weight1", "bias1", "layerscale")


def draw(
    wishes: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...] = SHAPE
) -> dict[str, Tensor]:
    """Leaves with gradients, by name.

    Args:
        wishes: names, separated by blanks; "residual:float32" draws that one in float32.
    """
    drawn = {}
    for wish in f"x weight {wishes}".split():
        name, _, own = wish.partition(":")
        size = shape[-1:] if name in LIKE_WEIGHT else shape
        if name == "rowscale":
            size = shape[:-1]
        values = torch.randn(size) + (1 if "weight" in name else 0)
        drawn[name] = values.to(device, getattr(torch, own) if own else dtype)
        drawn[name].requires_grad_(name != "rowscale")
    return drawn


def as_tuple(results: Any) -> tuple[Any, ...]:
    return results if isinstance(results, tuple) else (results,)
