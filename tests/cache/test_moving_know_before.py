"""Off a card the third table answers for an Ascend that is not there, as a simulated card does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flash_attn_npu import flash_attn_with_kvcache
from flash_attn_npu._core.ground import schemas
from flash_attn_npu._core.ground.absent import Absent
from flash_attn_npu._core.problems.transfer import APPEND, GATHER
from flash_attn_npu._core.table import choice
from flash_attn_npu._core.table.rowwise import TORCH
from tests.helpers.decided import is_fused, plans
from tests.helpers.old_torch import like_the_installed

Example = Callable[[torch.device], Any]


def moved(
    headdim: int = 64, dtype: torch.dtype = torch.bfloat16, *, strided: bool = False,
    apart: bool = False, tokens: int = 2, **options: Any,
) -> Example:  # fmt: skip
    """New keys, and keys that are gathered because of softcap.

    strided: of the new keys and values. apart: of the caches.
    """

    def run(device: torch.device) -> Any:
        def drawn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        generator = torch.Generator().manual_seed(0)
        # only a view keeps its strides on the way to a device
        caches = [drawn(6, 32, 2, 2 * headdim)[..., :headdim] for _ in range(2)]
        new = [drawn(2, tokens, 2, 2 * headdim)[..., :headdim] for _ in range(2)]
        caches = caches if apart else [x.contiguous() for x in caches]
        new = new if strided else [x.contiguous() for x in new]
        table = torch.arange(6, dtype=torch.int32).view(2, 3).to(device)
        given = {
            name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()
        }
        q = drawn(2, 1, 2, headdim)
        return flash_attn_with_kvcache(
            q, *caches, *new, cache_seqlens=20, block_table=table, softcap=5.0, **given
        )

    return run


EXAMPLES: dict[str, tuple[Example, str, str]] = {
    "plain": (moved(), APPEND, GATHER),
    "no new token": (moved(tokens=0), TORCH, GATHER),
    "float32": (moved(dtype=torch.float32), TORCH, TORCH),
    "headdim 12": (moved(headdim=12), TORCH, TORCH),
    "a cache that is not contiguous": (moved(apart=True), TORCH, TORCH),
    "new keys that are not contiguous": (moved(strided=True), TORCH, GATHER),
    "cache_leftpad": (moved(cache_leftpad=torch.tensor([0, 3], dtype=torch.int32)), APPEND, TORCH),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_verdict_off_a_card_is_that_of_the_card(
    name: str, npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Absent(torch.npu.get_device_name(), like_the_installed())
    example, *operators = EXAMPLES[name]
    on_card = plans(example, npu, monkeypatch)
    told = [
        choice.on_ascend(plan.problem, there)
        for plan in plans(example, torch.device("cpu"), monkeypatch)
    ]
    assert [(one.kernel, one.fused) for one in told] == [(p.name, is_fused(p)) for p in on_card]
    if schemas.has(APPEND, "cache_mode") and schemas.has(GATHER):
        assert set(operators) <= {plan.name for plan in on_card}
