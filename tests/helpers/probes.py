"""The ways clients ask what flash_attn is, and the tensors their calls are tried with."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


def importable(name: str) -> bool:
    """`import name` inside try/except, with the narrowest except that clients write."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return False
    return True


def default_arguments(function: Callable[..., Any]) -> dict[str, Any]:
    """Every argument at its default, as ring-flash-attention, nanotron and ms-swift read it off.

    They take a function as it is and anything else for a torch CustomOpDef.
    """
    spec = inspect.getfullargspec(function if inspect.isfunction(function) else function._init_fn)
    arguments = dict.fromkeys(spec.args)
    arguments.update(zip(reversed(spec.args), reversed(spec.defaults or ()), strict=False))
    if "softcap" in arguments:
        arguments["softcap"] = 0.0
    return arguments


def randn(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal values, the same on every device."""
    return torch.randn(shape).to(dtype).to(device)


def cumulative(lengths: Sequence[int], device: torch.device) -> Tensor:
    """cu_seqlens."""
    return torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32, device=device)


def mask(lengths: Sequence[int], seqlen: int, device: torch.device) -> Tensor:
    """(batch, seqlen) bool: every sequence begins at the left."""
    rows = torch.arange(seqlen)[None] < torch.tensor(lengths)[:, None]
    return rows.to(device)
