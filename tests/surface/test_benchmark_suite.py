"""`python -m benchmarks` on tiny sizes: what it writes, and what `--check` answers. No time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as suite
from benchmarks import costs, figures

TINY = replace(
    figures.QUICK, lengths=(8,), long=32, window=8, medium=(8,), packed=8, cache=8, memory=64,
    curves=(16,), rows=(2, 4, 64),
)  # fmt: skip
OVERHEAD = {
    "packed, inference": "flash_attn_varlen_func",
    "dense, inference": "flash_attn_func",
    "packed, forward of training": "flash_attn_varlen_func",
}


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Every case runs; every ratio is `ratio`, every import takes `seconds`."""
    told = {"ratio": 0.2, "seconds": 0.01, "bytes": 1}

    def pair(self: figures.Clock, ours: figures.Call, theirs: figures.Call) -> tuple[float, ...]:
        ours(), theirs()
        return told["ratio"], told["ratio"], 1.0

    def in_child(*command: str) -> str:
        if "-o" in command:
            table: dict[str, Any] = {"apply_rotary_emb": told["ratio"]}
            if not any("rowwise" in word for word in command):
                table = {title: {name: told["ratio"]} for title, name in OVERHEAD.items()}
            Path(command[command.index("-o") + 1]).write_text(json.dumps(table))
        if "benchmarks.models" in command:
            return "warned\n" + json.dumps([["BERT", "sdpa", told["ratio"], 2.0, 1.0]])
        return json.dumps([told["seconds"]] * 3)

    monkeypatch.setattr(figures.Clock, "pair", pair)
    monkeypatch.setattr(costs, "in_child", in_child)
    monkeypatch.setattr(costs, "peak_bytes", lambda call: told["bytes"] * (call() is not None))
    monkeypatch.setattr(suite, "QUICK", TINY)
    return told


def test_a_folder_that_is_not_there_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        suite.options_of(["-o", "no/such/figures.json"])
    assert leaving.value.code == 2
    assert "no/such is no folder; make it first" in capsys.readouterr().err


def test_every_bound_is_measured_and_check_follows_the_ratios(
    pretend: dict[str, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "figures.json"
    arguments = ["--quick", "--check", "-o", str(target)]
    assert suite.main(arguments) == 0
    held = json.loads(target.read_text())
    assert {bound["bound"] for bound in held["bounds"]} == set(figures.BOUNDS)
    assert all(bound["met"] is True for bound in held["bounds"]), held["bounds"]
    assert not held["not_measured"]
    assert {point["what"] for point in held["curves"]} == set(suite.plots.STYLES)
    pretend["ratio"] = 1.5
    assert suite.main([*arguments, "--merge", "--only", "softcap", "decode"]) == 1
    bounds = {bound["bound"]: bound for bound in json.loads(target.read_text())["bounds"]}
    assert {key for key, bound in bounds.items() if not bound["met"]} == {"decode"}
    assert "MISSED" in capsys.readouterr().out


@pytest.mark.parametrize(("which", "value", "key"), [
    ("ratio", 1.09, "host dense"), ("seconds", 0.051, "import"),
    ("bytes", 1e9, "memory"),
])  # fmt: skip
def test_a_missed_bound_of_a_child(
    pretend: dict[str, float], which: str, value: float, key: str
) -> None:
    pretend[which] = value
    arguments = ["--quick", "--only", key.split()[0]]
    assert suite.main(arguments) == 0
    assert suite.main([*arguments, "--check"]) == 1


def test_what_cannot_be_measured_is_neither_met_nor_missed(
    pretend: dict[str, float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*command: str) -> str:
        raise RuntimeError("the virtual Ascend is not running")

    monkeypatch.setattr(costs, "in_child", fails)
    assert suite.main(["--quick", "--check", "--only", "host"]) == 0
    assert "not measured: host: RuntimeError: the virtual Ascend" in capsys.readouterr().out
