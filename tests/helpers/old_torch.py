"""What older torch and torch_npu cannot do themselves: marks that skip the tests of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu._core.ground import schemas
from flash_attn_npu._core.ground.absent import versions
from flash_attn_npu._core.ground.versions import torch_npu_version
from flash_attn_npu._core.kernels.host import flash

__all__ = [
    "GROUP",
    "HOLDS_KERNELS",
    "NEEDS_SHARED_HEADS",
    "OWN_FAKES",
    "PAGES_OF_TWO_WIDTHS",
    "TORCH",
    "doubled",
    "lacks",
    "like_the_installed",
    "needs",
    "traces",
]

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])

GROUP = 2 if flash.shares_heads() else 1
"""Heads that may share keys in torch's flash attention for a CPU."""

NEEDS_SHARED_HEADS = pytest.mark.skipif(
    not flash.shares_heads(),
    reason="before 2.9 torch's flash attention for a CPU knows no heads that share keys",
)

HOLDS_KERNELS = pytest.mark.skipif(
    TORCH < (2, 9),
    reason="before 2.9 torch cannot hold a kernel, so what torch_npu allocates stays its own",
)

OWN_FAKES = pytest.mark.skipif(
    TORCH < (2, 9),
    reason="torch_npu before 2.9 has other fake operators, or none, for these",
)

PAGES_OF_TWO_WIDTHS = pytest.mark.skipif(
    TORCH < (2, 8),
    reason="torch_npu 2.6 answers from pages in the headdim of queries, whatever that of values",
)


def lacks(operator: str, *arguments: str) -> bool:
    """Whether the torch_npu that runs has no such operator, or not these arguments of it."""
    return virtual_ascend.REASON is None and not schemas.has(operator, *arguments)


def like_the_installed() -> str:
    """The version of the torch_npu that runs, or a newer one that takes the same."""
    version = torch_npu_version()
    return versions()[-2] if version is None or version not in versions() else version


def needs(operator: str, *arguments: str) -> pytest.MarkDecorator:
    """For tests of an operator that the installed torch_npu may lack."""
    which = " with ".join((operator, *arguments[:1]))
    return pytest.mark.skipif(
        lacks(operator, *arguments), reason=f"torch_npu {torch_npu_version()}: no {which}"
    )


def traces(since: tuple[int, int], what: str) -> pytest.MarkDecorator:
    """For tests of what torch.compile cannot trace before a version."""
    spelled = ".".join(map(str, since))
    return pytest.mark.skipif(since > TORCH, reason=f"before {spelled} torch cannot trace {what}")


def doubled(x: Tensor) -> Tensor:
    """x in float64, on its device, where torch_npu before 2.9 makes float32 of it."""
    return x.cpu().double().to(x.device)
