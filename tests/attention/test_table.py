"""Every cell of the support table is reached by a call, and compat_matrix.md is printed from it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu._core.ground import chip, settings, usage
from flash_attn_npu._core.ground.memory import forget_all
from flash_attn_npu._core.problems import attention as problems
from flash_attn_npu._core.table import attention, choice, installed
from flash_attn_npu._core.table.attention import BLOCKWISE, FUSION, INFER, TABLE
from flash_attn_npu._core.table.rule import Rule
from flash_attn_npu._surface import matrix
from flash_attn_npu.errors import UnsupportedError
from tests.helpers.table_examples import (
    EXAMPLES,
    SMALL_CACHED_SEQUENCES,
    SMALL_PAIRS,
    SMALL_SEQUENCES,
    SMALL_TOKENS,
)
from tests.helpers.wheel import pretend_row

ROWS = {row.name: row for row in TABLE}
CHIPS = {"Ascend 310P and 200I": "Ascend310P3", "sink, Ascend 950": "Ascend950PR"}


@pytest.fixture(autouse=True)
def fresh(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plans and warnings of other tests must not answer here; some rows need another chip."""
    forget_all()
    row = request.node.callspec.params.get("row") if hasattr(request.node, "callspec") else None
    if isinstance(row, Rule):
        pretend_row(row.name, monkeypatch)
    if isinstance(row, Rule) and row.name in CHIPS:
        for place in (attention, installed):
            monkeypatch.setattr(place, "soc_name", lambda device: CHIPS[row.name])
        chip._names.put(request.getfixturevalue("npu"), CHIPS[row.name])
    if isinstance(row, Rule) and "CONSISTENT" in row.name:
        monkeypatch.setattr(settings, "_consistent", True)
    if isinstance(row, Rule) and "does not share heads" in row.name:
        monkeypatch.setattr(attention.host, "shares_heads", lambda: False)
    monkeypatch.setattr(attention, "MAX_SEQUENCES", SMALL_SEQUENCES)
    monkeypatch.setattr(problems, "FEW_SINGLES", 1)
    monkeypatch.setattr(attention, "MAX_TOKENS", SMALL_TOKENS)
    monkeypatch.setattr(attention, "MAX_FILLED_PAIRS", SMALL_PAIRS)
    monkeypatch.setattr(attention, "MAX_CACHED_SEQUENCES", SMALL_CACHED_SEQUENCES)
    yield
    forget_all()


def launches(recorded: object) -> list[str]:
    names = [launch.name for launch in recorded.launches]  # type: ignore[attr-defined]
    kernels = ("npu_fusion_attention", "npu_fused_infer_attention_score")
    return [name for name in names if name.startswith(kernels)]


def test_every_row_has_an_example() -> None:
    assert list(EXAMPLES) == list(ROWS)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_the_example_has_the_property(
    row: Rule, npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, refusals = [], choice.refusals
    monkeypatch.setattr(
        choice,
        "refusals",
        lambda kernel, problem: seen.append(problem) or refusals(kernel, problem),
    )
    try:
        EXAMPLES[row.name](npu)
    except UnsupportedError:
        assert matrix.outcome(row) in ("impossible", "fused or impossible")
    assert any(row.present(problem) for problem in seen)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_the_cell_says_what_happens(
    row: Rule, npu: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "flash_attn_npu")
    outcome = matrix.outcome(row)
    with virtual_ascend.record() as recorded, usage.reporting() as report:
        if outcome == "fused or impossible":
            with pytest.raises(UnsupportedError, match=row.refused[BLOCKWISE]):
                EXAMPLES[row.name](npu)
        else:
            out = EXAMPLES[row.name](npu)
            out = out[0] if isinstance(out, tuple) else out
    if outcome == "fused":
        assert launches(recorded)
        assert [entry.reasons for entry in report.tallies] == [()]
        assert not caplog.records
        return
    if outcome == "gathered":
        assert launches(recorded) == ["npu_fusion_attention"]
        assert any(row.refused[INFER] in record.getMessage() for record in caplog.records)
        return
    if row.name == "varlen, window_size (0, 0), with gradient or dropout":
        # the forward is native; only the backward is composed, and says so when it runs
        with virtual_ascend.record() as recorded:
            out.sum().backward()
    assert not launches(recorded)
    if outcome == "composed" and row.name != "no query sees a key":
        assert any(row.refused[FUSION] in record.getMessage() for record in caplog.records)
        assert out.isfinite().all()


def test_compat_matrix_is_printed_from_the_table() -> None:
    committed = (Path(__file__).parents[2] / "compat_matrix.md").read_text()
    assert committed == matrix.matrix(), (
        "run: python -m flash_attn_npu._surface.matrix > compat_matrix.md"
    )
