"""The simulated npu_mrope against float64 turns of pairs, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flash_attn_npu._virtual_ascend import CardRefusal
from tests.helpers.fused_cases import DTYPES, close, on_device, random
from tests.helpers.old_torch import doubled

pytestmark = pytest.mark.usefixtures("npu")

HALF = torch.float16
ROWS = 10


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def given(width: int = 64, dtype: torch.dtype = torch.float32, **changed: Any) -> dict[str, Any]:
    """Four tokens of three query heads and one key head of 64."""
    return {
        "positions": torch.tensor([7, 0, 3, 7]),
        "query": random(4, 192, dtype=dtype),
        "key": random(4, 64, dtype=dtype),
        "cos_sin_cache": random(ROWS, width, dtype=dtype),
        "head_size": 64,
        "mrope_section": [0, 0, 0],
        "rotary_mode": "half",
    } | changed


def asked(call: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    import torch_npu

    return torch_npu.npu_mrope(**on_device(call))


def turned(call: dict[str, Any], name: str) -> torch.Tensor:
    """Pair by pair, as the multiplication of complex numbers."""
    heads = call[name].double().unflatten(-1, (-1, call["head_size"])).clone()
    cos, sin = call["cos_sin_cache"].double()[call["positions"]].chunk(2, -1)
    half = cos.shape[-1]
    for pair in range(half):
        places = (pair, pair + half) if call["rotary_mode"] == "half" else (2 * pair, 2 * pair + 1)
        number = torch.complex(heads[..., places[0]], heads[..., places[1]])
        number = number * torch.complex(cos[:, None, pair], sin[:, None, pair])
        heads[..., places[0]], heads[..., places[1]] = number.real, number.imag
    return heads.flatten(1)


@pytest.mark.parametrize("mode", ["half", "interleave"])
@pytest.mark.parametrize("width", [64, 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_looked_up_and_turn_both(dtype: torch.dtype, width: int, mode: str) -> None:
    call = given(width, dtype, rotary_mode=mode)
    for out, name in zip(asked(call), ("query", "key"), strict=True):
        assert out.dtype == dtype
        close(out, turned(call, name))


def test_rows_may_lie_apart() -> None:
    whole = random(4, 5 * 64)
    call = given(query=whole[:, :192], key=whole[:, 192:256])
    there = whole.npu()
    moved = call | {"query": there[:, :192], "key": there[:, 192:256]}
    for out, name in zip(asked(moved), ("query", "key"), strict=True):
        assert out.is_contiguous()
        close(out, turned(call, name))


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "int32 positions": ("positions must be int64", {"positions": torch.arange(4).int()}),
    "a position beyond the table": ("rows of cos_sin_cache", {"positions": torch.arange(7, 11)}),
    "a negative position": ("rows of cos_sin_cache", {"positions": torch.arange(-1, 3)}),
    "fewer positions": ("positions must have shape", {"positions": torch.arange(3)}),
    "several kinds of positions": ("positions must have", {"positions": torch.zeros(3, 4).long()}),
    "sections": ("mrope_section", {"mrope_section": [16, 8, 8]}),
    "heads of 48": ("head_size must be a multiple of 32", {"head_size": 48}),
    "a table of 48": ("rotary_dim must be a", {"cos_sin_cache": random(ROWS, 48, dtype=HALF)}),
    "a table wider than heads": ("at most", {"cos_sin_cache": random(ROWS, 96, dtype=HALF)}),
    "two dtypes": ("must have query's dtype", {"cos_sin_cache": random(ROWS, 64)}),
    "heads of their own axis": ("2 to 2 dimensions", {"query": random(4, 3, 64, dtype=HALF)}),
    "no token": ("must not be empty", {"query": random(0, 192, dtype=HALF)}),
    "keys of other tokens": ("query's 4 tokens", {"key": random(3, 64, dtype=HALF)}),
    "part of a head": ("whole heads", {"key": random(4, 96, dtype=HALF)}),
    "65 heads": ("4096 numbers", {"query": random(4, 65 * 64, dtype=HALF)}),
    "rows that are not dense": ("must be dense", {"key": random(64, 4, dtype=HALF).t()}),
    "an odd start": ("start at a multiple", {"key": random(4, 80, dtype=HALF)[:, 8:72]}),
    "rows apart by half a block": ("whole blocks", {"key": random(4, 72, dtype=HALF)[:, :64]}),
    "one row for all tokens": (
        "whole blocks",
        {"query": random(1, 192, dtype=HALF).expand(4, -1)},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    rule, changed = REFUSED[name]
    call = given(dtype=HALF) | changed
    # strides and starts are kept by a copy of the whole memory
    for tensor, value in changed.items():
        if isinstance(value, torch.Tensor) and not value.is_contiguous():
            memory = torch.empty(value.untyped_storage().nbytes() // value.itemsize, dtype=HALF)
            place = (value.shape, value.stride(), value.storage_offset())
            call[tensor] = memory.npu().as_strided(*place)
    with pytest.raises(CardRefusal, match=rule):
        asked(call)


def test_other_chips_and_dtypes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = {n: doubled(x) for n, x in on_device(given()).items() if n in ("query", "key")}
    with pytest.raises(CardRefusal, match="only float16, bfloat16, float32"):
        asked(given() | wide)
    for chip in ("Ascend310P3", "Ascend950PR"):
        monkeypatch.setenv("VIRTUAL_ASCEND_SOC", chip)
        with pytest.raises(CardRefusal, match="A2 and A3 only"):
            asked(given())
