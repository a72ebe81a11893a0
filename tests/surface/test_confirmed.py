"""What reports say of a combination, a cell and a kind; a simulated one says nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flash_attn_npu._core.ground import confirmed as reports
from flash_attn_npu._core.ground.confirmed import Combination, Standing, confirmed

HERE = Combination("Ascend910B3", "8.5.0", "2.13.0")
ELSEWHERE = HERE._replace(cann="8.3.RC1")
Shelve = Callable[..., None]


def case(status: str, row: str = "causal", kernel: str = "fusion", **more: Any) -> dict[str, Any]:
    return {"row": row, "kernel": kernel, "kinds": [f"{row} {kernel}"], "status": status, **more}


@pytest.fixture
def shelve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shelve]:
    """Puts reports where the shipped ones are looked for."""

    def put(name: str, *cases: dict[str, Any], where: Combination = HERE, **changed: Any) -> None:
        machine = {"device": "npu", **where._asdict()}
        report = {"schema": 1, "simulated": False, "machine": machine, "cases": cases, **changed}
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
        reports.reports.cache_clear()
        reports.refuted.cache_clear()

    monkeypatch.setattr(reports, "FOLDER", tmp_path)
    reports.reports.cache_clear()
    reports.refuted.cache_clear()
    yield put
    reports.reports.cache_clear()
    reports.refuted.cache_clear()


def test_a_kind_is_confirmed_where_it_was_seen_right_and_nowhere_wrong(shelve: Shelve) -> None:
    assert confirmed(*HERE, "causal fusion") is None
    shelve("one", case("right"), case("composed", "softcap"))
    assert confirmed(*HERE, "causal fusion") is True
    assert confirmed(*ELSEWHERE, "causal fusion") is None
    assert confirmed(*HERE, "softcap fusion") is None
    for status in ("wrong", "crash", "error"):
        shelve("two", case(status))
        assert confirmed(*HERE, "causal fusion") is False
    shelve("two", case("wrong"), where=ELSEWHERE)
    assert confirmed(*HERE, "causal fusion") is True
    assert confirmed(*ELSEWHERE, "causal fusion") is False


@pytest.mark.parametrize(
    "changed",
    [
        {"simulated": True},
        {"schema": 2},
        {"machine": {"device": "cpu", **HERE._asdict()}},
    ],
)
def test_what_is_no_report_of_a_card_says_nothing(shelve: Shelve, changed: dict[str, Any]) -> None:
    shelve("one", case("right"), case("wrong", "window"), **changed)
    assert confirmed(*HERE, "causal fusion") is None
    assert not reports.refuted(HERE)
    assert reports.told(("causal", "fusion")) == "simulated"


def test_cells_are_told_by_combination(shelve: Shelve) -> None:
    shelve("one", case("right"), case("right"), case("crash", "window"))
    shelve("two", case("wrong"), where=ELSEWHERE)
    assert reports.refuted(HERE) == {("window", "fusion"): "one"}
    assert reports.refuted(ELSEWHERE) == {("causal", "fusion"): "two"}
    assert reports.cells(reports.counting()) == {
        ("causal", "fusion"): Standing(("one",), ("two",)),
        ("window", "fusion"): Standing((), ("one",)),
    }
    assert reports.told(("causal", "fusion")) == (
        f"confirmed on {HERE} by one; refuted on {ELSEWHERE} by two"
    )
