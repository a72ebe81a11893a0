"""Composed attention on a device holds what TILE_BYTES allows for a tile, with every option."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from flash_attn_npu._core.kernels.composed import attention, tiles
from tests.helpers.peak_bytes import PeakBytes
from tests.helpers.strategies import Problem
from tests.helpers.tile_cases import Case, assert_case, solve, tiles_of

ALLOWED = 1 << 20
PROBLEM = Problem(((256, 256),), nheads_k=4, group=4, headdim=8, dtype=torch.float16)
CAPPED = {"softcap": 5.0}
CASES = {
    "softcap": Case(PROBLEM, False, **CAPPED),
    "causal": Case(replace(PROBLEM, causal=True), False, **CAPPED),
    "window": Case(replace(PROBLEM, window_size=(100, 50)), False, **CAPPED),
    "alibi": Case(replace(PROBLEM, causal=True), False, slopes="sequences", **CAPPED),
    "dropout": Case(PROBLEM, False, dropout_p=0.3, **CAPPED),
    "sink": Case(replace(PROBLEM, causal=True), False, sink=True, **CAPPED),
    "everything": Case(
        replace(PROBLEM, window_size=(100, 50)), False, slopes="heads", dropout_p=0.3, **CAPPED
    ),
    "float32-dropout": Case(replace(PROBLEM, dtype=torch.float32), False, dropout_p=0.3),
}


@pytest.fixture(autouse=True)
def allowed(monkeypatch) -> None:
    monkeypatch.setattr(tiles, "TILE_BYTES", ALLOWED)
    # so that what is allowed is used up
    monkeypatch.setattr(tiles, "EVEN_TILE", 1)


@contextmanager
def peaks() -> Iterator[dict[str, int]]:
    """The most bytes that a forward and a backward of one group held."""
    found: dict[str, int] = {}

    def counted(name: str, function: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            with PeakBytes() as bytes_held:
                function(*args)
            found[name] = bytes_held.peak

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("attend", "attend_backward"):
            patch.setattr(attention, name, counted(name, getattr(attention, name)))
        yield found


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_tile_holds_what_is_allowed(npu, case):
    """Beside what is linear in the lengths, which the smallest tiles hold too; and it is right.

    Where there is dropout, so are gradients only if both directions have the same tiles.
    """
    with peaks() as found:
        assert_case(case, npu)
    with peaks() as least, tiles_of(32):
        solve(case, npu)
    tile = {name: found[name] - least[name] for name in ("attend", "attend_backward")}
    assert max(tile.values()) <= ALLOWED, tile
    # what is allowed is used: large tiles are few launches
    assert tile["attend_backward"] >= 0.55 * ALLOWED, tile
