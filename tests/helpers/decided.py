"""What the table decided while a call ran."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

import flash_attn_npu
from flash_attn_npu._core.ground.memory import forget_all
from flash_attn_npu._core.table import choice
from flash_attn_npu.errors import UnsupportedError

__all__ = ["is_fused", "plans"]


def plans(
    example: Callable[[torch.device], Any], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> list[choice.Plan]:
    """Every plan that was made, in order."""
    decide, seen = choice._decide, []

    def noted(problem: Any) -> choice.Plan:
        seen.append(decide(problem))
        return seen[-1]

    with monkeypatch.context() as patched, flash_attn_npu.fallback("allow"):
        patched.setattr(choice, "_decide", noted)
        # refused after the decision, or by the simulated card, which has no collectives
        with contextlib.suppress(UnsupportedError, NotImplementedError):
            example(device)
    forget_all()
    return seen


def is_fused(plan: choice.Plan) -> bool:
    return not plan.reasons or plan.candidate.detour is not None
