"""The benchmark scripts run and print their ratios; how large those are is for people to read."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

RATIO = re.compile(r"\d+\.\d+$", re.MULTILINE)


def test_overhead(npu: object, run_python: Callable[..., str]) -> None:
    printed = run_python(str(BENCHMARKS / "overhead.py"), "--quick")
    assert "host overhead only" in printed
    for title in ("packed, inference", "dense, inference", "packed, forward of training"):
        table = printed.split(title)[1]
        line = next(line for line in table.splitlines() if line.strip().startswith("flash_attn"))
        assert RATIO.search(line), printed


@pytest.mark.sweep
def test_rowwise(npu: object, run_python: Callable[..., str]) -> None:
    printed = run_python(str(BENCHMARKS / "rowwise.py"), "--quick")
    for name in ("rms_norm_fn", "layer_norm_fn", "swiglu", "apply_rotary_emb"):
        line = next(line for line in printed.splitlines() if line.strip().startswith(name))
        assert RATIO.search(line), printed


@pytest.mark.sweep
def test_launches(npu: object, run_python: Callable[..., str], tmp_path: Path) -> None:
    """Counted twice, the same, and told side by side."""
    command = (str(BENCHMARKS / "launches.py"), "--only", "RMS", "-o", str(tmp_path / "a.json"))
    run_python(*command)
    printed = run_python(*command, "--before", str(tmp_path / "a.json"))
    line = printed.strip().splitlines()[-1]
    name, launches, copies, _ = (cell.strip() for cell in line.strip("|").split("|"))
    assert "RMS norm" in name
    assert re.fullmatch(r"(\d+) → \1", launches), launches
    assert copies == "0 → 0"


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.sweep
def test_memory(run_python: Callable[..., str]) -> None:
    memory, window = run_python(str(BENCHMARKS / "memory.py"), "--quick").split("window of")
    for table in (memory, window):
        assert "ratio" in table
        assert RATIO.search(table.strip()), table
