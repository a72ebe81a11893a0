"""Off a card the table answers for an Ascend that is not there, as the simulated card does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import flash_attn_npu
from flash_attn_npu._core.ground import traced, usage
from flash_attn_npu._core.ground.absent import Absent, default, versions
from flash_attn_npu._core.ground.memory import forget_all
from flash_attn_npu._core.table import attention, choice
from flash_attn_npu._core.table.attention import BLOCKWISE, HOST, TABLE
from flash_attn_npu.errors import ArgumentError, UnsupportedError
from tests.helpers import table_examples
from tests.helpers.decided import is_fused, plans
from tests.helpers.old_torch import like_the_installed
from tests.helpers.table_examples import EXAMPLES

CPU = torch.device("cpu")
ELSEWHERE = ("Ascend 310P and 200I", "sink, Ascend 950", "tensors outside an Ascend NPU")
MASK_OF_A_CARD = "backward of a dropout mask drawn by npu_fusion_attention"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The limits that the examples cross, and nothing remembered from other tests."""
    forget_all()
    for name in vars(table_examples):
        if name.startswith("SMALL_"):
            limit = {"SMALL_PAIRS": "MAX_FILLED_PAIRS"}.get(name, name.replace("SMALL", "MAX"))
            monkeypatch.setattr(attention, limit, getattr(table_examples, name))
    yield
    forget_all()


@pytest.mark.parametrize("row", [rule.name for rule in TABLE if rule.name not in ELSEWHERE])
def test_the_verdict_off_a_card_is_that_of_the_card(
    row: str, npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "a torch_npu" in row:
        pytest.skip("another torch_npu than the simulated card's")
    there = Absent(torch.npu.get_device_name(), like_the_installed())
    on_card = [(plan.name, is_fused(plan)) for plan in plans(EXAMPLES[row], npu, monkeypatch)]
    away = plans(EXAMPLES[row], CPU, monkeypatch)
    told = [choice.on_ascend(plan.problem, there) for plan in away]
    assert [(one.kernel, one.fused) for one in told][: len(on_card)] == on_card[: len(told)]
    # a mask that a card drew cannot be drawn again off it
    assert told or row in ("backward from softmax_lse", MASK_OF_A_CARD)


def test_rows_about_another_card_are_judged_by_the_one_that_is_named() -> None:
    q = torch.randn(1, 6, 2, 8, dtype=torch.float16)
    for soc, fused in (("Ascend910B3", True), ("Ascend950PR", True), ("Ascend310P3", False)):
        with flash_attn_npu.fallback("ascend", soc=soc):
            if fused:
                flash_attn_npu.flash_attn_func(q, q, q, causal=True)
            else:
                with pytest.raises(UnsupportedError, match="the chip does not have it"):
                    flash_attn_npu.flash_attn_func(q, q, q, causal=True)


def test_a_torch_npu_may_be_named() -> None:
    q = torch.randn(1, 6, 2, 8, dtype=torch.float16)
    older = flash_attn_npu.fallback("ascend", soc="Ascend910B3", torch_npu="2.5.1")
    with older, pytest.raises(UnsupportedError, match=r"older than 2\.6"):
        flash_attn_npu.flash_attn_func(q, q, q, causal=True)
    with flash_attn_npu.fallback("ascend", torch_npu=versions()[-1]):
        flash_attn_npu.flash_attn_func(q, q, q, causal=True)


@pytest.mark.parametrize(
    "named",
    [
        {"policy": "ascend", "soc": "TPU"},
        {"policy": "ascend", "torch_npu": "1.0"},
        {"policy": "error", "soc": "Ascend910B3"},
        {"policy": "ascend:Ascend910B3"},
    ],
)
def test_what_cannot_be_named_is_an_error(named: dict[str, str]) -> None:
    with pytest.raises(ArgumentError, match="policy"):
        flash_attn_npu.fallback(**named)  # type: ignore[arg-type]


def test_the_policy_refuses_only_what_a_card_would_not_fuse(device: torch.device) -> None:
    q = torch.randn(1, 6, 2, 8).to(device, torch.float16)
    with flash_attn_npu.fallback("ascend"):
        out = flash_attn_npu.flash_attn_func(q, q, q, causal=True)
        assert isinstance(out, torch.Tensor)
        assert out.isfinite().all()
        with pytest.raises(UnsupportedError, match="no Ascend kernel has softcap") as refused:
            flash_attn_npu.flash_attn_func(q, q, q, softcap=2.0)
    assert "runs on Ascend NPUs only" not in str(refused.value)
    assert "fallback policy `ascend" in refused.value.allowed


def test_the_report_says_what_a_card_would_do() -> None:
    q = torch.randn(1, 6, 2, 8, dtype=torch.float16)
    with flash_attn_npu.reporting() as report:
        flash_attn_npu.flash_attn_func(q, q, q, causal=True)
        flash_attn_npu.flash_attn_func(q, q, q, softcap=2.0)
    told = {entry.on_ascend for entry in report.tallies}
    assert told == {
        "fused: npu_fusion_attention",
        "composed, because npu_fusion_attention: no Ascend kernel has softcap",
    }
    assert {entry.kernel for entry in report.tallies} == {HOST, BLOCKWISE}
    heading, *rows = str(report).splitlines()
    assert heading.endswith("on Ascend")
    assert any(row.endswith("fused: npu_fusion_attention") for row in rows)


def test_a_backward_is_told_the_verdict_of_its_forward() -> None:
    q = torch.randn(1, 6, 2, 8, requires_grad=True)
    ends = [0, 2, 6]
    with flash_attn_npu.reporting() as report:
        for out in (
            flash_attn_npu.flash_attn_func(q, q, q, causal=True, window_size=(3, 0)),
            flash_attn_npu.flash_attn_varlen_func(q[0], q[0], q[0], ends, ends, 4, 4),
            flash_attn_npu.flash_attn_func(q, q, q, softcap=2.0),
        ):
            assert isinstance(out, torch.Tensor)
            out.sum().backward()
    told = {entry.function: set[str]() for entry in report.tallies}
    for entry in report.tallies:
        told[entry.function].add(entry.on_ascend)
    assert len(told) == 4
    for function in ("flash_attn_func", "flash_attn_varlen_func"):
        assert told[f"{function} (backward)"] == told[function]
    assert "runs on Ascend NPUs only" not in str(report)


def test_a_graph_off_a_card_is_not_told_its_device_s_reasons() -> None:
    with flash_attn_npu.reporting() as report:
        traced.note("rms_norm_fn", "cpu", "torch", ("it runs on Ascend NPUs only",), True)
        traced.note("rms_norm_fn", "npu", "torch", ("another reason",), False)
    assert "runs on Ascend NPUs only" not in str(report)
    assert [entry.on_ascend for entry in report.tallies] == [traced.UNASKED, ""]


def test_on_a_card_nothing_is_said_of_another(npu: torch.device) -> None:
    q = torch.randn(1, 6, 2, 8).to(npu, torch.float16)
    with usage.reporting() as report:
        flash_attn_npu.flash_attn_func(q, q, q, causal=True)
    assert [entry.on_ascend for entry in report.tallies] == [""]


def test_the_environment_holds_the_line_in_ci(tmp_path: Path) -> None:
    """As a laptop's CI would set it; one interpreter for what passes and what does not."""
    (tmp_path / "script.py").write_text(
        "import torch, flash_attn_npu\n"
        "q = torch.randn(1, 4, 2, 8, dtype=torch.float16)\n"
        "flash_attn_npu.flash_attn_func(q, q, q, causal=True)\n"
        "flash_attn_npu.flash_attn_func(q, q, q, softcap=1.0)\n"
    )
    environment = os.environ | {
        "FLASH_ATTN_NPU_FALLBACK": "ascend:Ascend910B4",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "PYTHONPATH": str(Path(flash_attn_npu.__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "softcap=1.0" in done.stderr
    assert f"ascend (Ascend910B4, torch_npu {default().torch_npu})" in done.stderr
