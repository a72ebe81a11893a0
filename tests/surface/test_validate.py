"""validate asks every row, survives cases that kill its child, and writes what can be believed."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from flash_attn_npu._commands import matrix as matrix_command
from flash_attn_npu._commands import validate
from flash_attn_npu._core.ground import chip, confirmed
from flash_attn_npu._core.ground.memory import forget_all
from flash_attn_npu._core.ground.settings import verifying
from flash_attn_npu._core.table import attention, cache, rowwise
from flash_attn_npu._core.table.choice import KERNELS, ROWS
from flash_attn_npu._core.verification import kinds
from flash_attn_npu._surface import matrix
from flash_attn_npu._validation import cases, session, statements, worker
from flash_attn_npu._validation.attention import Question
from flash_attn_npu._validation.report import MismatchError, Report, faults, within

TABLES = (
    (attention.TABLE, cases.ATTENTION),
    (rowwise.TABLE, cases.ROWWISE),
    (cache.TABLE, cases.MOVED),
)
QUICK = [case for case in cases.cases() if case.quick]


def test_every_row_has_a_case_or_a_reason() -> None:
    for rules, asked in TABLES:
        # of another torch_npu than this one there is nothing to ask
        names = {rule.name for rule in rules if "a torch_npu" not in rule.name}
        assert set(asked) <= names
        assert names - set(asked) <= set(cases.NOT_ASKED)
    assert set(cases.NOT_ASKED) <= ROWS


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_a_case_has_its_row_and_is_right(case: cases.Case, npu: torch.device) -> None:
    with worker._decided(case.row) as seen:
        answer = case.question.ask(npu)
    figures = answer[0] if isinstance(answer, tuple) else answer
    assert all(map(within, figures.values())), figures
    if case.row in ROWS and not case.name.startswith(("open 1", "open 3")):
        assert any(worker._present(case.row, plan) for plan in seen.plans)


LIES = {
    "causal from the top left": Question((20, 20), (45, 45), dense=True, causal=True),
    "window one wider on the left": Question(window=(7, 3)),
    "scale forgotten": Question(),
    "lse in base 2": Question(lse=True),
    "alibi with the wrong sign": Question(alibi=True, causal=True),
    "dropout not scaled": statements.Dropout(),
    "pages in the wrong order": cases.PAGED,
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_card_is_found_out(lie: str, npu: torch.device) -> None:
    from flash_attn_npu import _virtual_ascend

    # as validate has it
    with verifying("off"), _virtual_ascend.lying(lie):
        answer = LIES[lie].ask(npu)
    figures = answer[0] if isinstance(answer, tuple) else answer
    assert not all(map(within, figures.values())), figures


def test_what_a_card_raises_is_recorded_in_its_words(npu: torch.device) -> None:
    from flash_attn_npu import _virtual_ascend

    with verifying("off"), _virtual_ascend.lacking("npu_fusion_attention"):
        result = worker._asked("attention: causal", "npu")
    assert (result["status"], result["kernel"]) == ("error", "npu_fusion_attention")
    assert result["note"].startswith("RuntimeError: aclnnnpu_fusion_attention or ")
    assert any("causal" in kind for kind in result["kinds"])
    assert "time" not in result


@pytest.mark.parametrize("question", [Question(causal=True), cases.PAGED])
def test_a_call_is_timed_beside_the_direct_one(question: Any, npu: torch.device) -> None:
    found = worker._timed(question.again(npu))
    assert set(found) == {"ours_us", "direct_us"}
    assert all(value > 0 for value in found.values())
    # what was recorded is not remembered
    import torch_npu

    assert "recording" not in repr(torch_npu.npu_fusion_attention)


KILLING = """
import os, signal, sys
sys.path[:] = sys.argv[2:]
from flash_attn_npu._validation import cases, worker

class Deadly:
    def ask(self, device):
        import flash_attn_npu, torch
        q = torch.randn(1, 4, 2, 8)
        flash_attn_npu.flash_attn_func(q, q, q)
        os.kill(os.getpid(), signal.SIGSEGV)

class Raising:
    def ask(self, device):
        raise RuntimeError("no kernel in /home/somebody/ascend/libopapi.so")

class Wrong:
    def ask(self, device):
        return {"out": {"error": float("inf"), "allowed": 1.0}}

class Right:
    def ask(self, device):
        return {"out": {"error": 0.5, "allowed": 1.0}}, {"it holds": True}

asked = (("one", Right), ("two", Deadly), ("three", Raising), ("four", Wrong), ("five", Right))
cases.cases = lambda: iter([cases.Case(name, "causal", made()) for name, made in asked])
worker.main(False)
"""


def test_a_run_survives_its_cases_and_an_interrupt(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One interpreter for each start: three, as one dies and the run is interrupted once."""
    monkeypatch.setattr(session, "START", KILLING)
    file = tmp_path / "report.json"
    options = Namespace(full=False, output=str(file), resume=False, only="", simulate=False)

    class Interrupting(validate._Progress):
        def __call__(self, case: dict[str, Any], total: int) -> None:
            super().__call__(case, total)
            if case["name"] == "three":
                raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(validate, "_Progress", Interrupting)
        assert validate.run(options) == 130
    # what was told when it was interrupted is in the next write; what was written before is whole
    kept = json.loads(file.read_text())
    assert [case["name"] for case in kept["cases"]] == ["one", "two"]
    assert not kept["complete"]
    options.resume = True
    assert validate.run(options) == 1
    report = json.loads(file.read_text())
    assert report["complete"]
    assert report["answers"] == {"it holds": True}
    found = {case["name"]: case for case in report["cases"]}
    assert [case["status"] for case in found.values()] == (
        ["right", "crash", "error", "wrong", "right"]
    )
    assert (found["two"]["note"], found["two"]["kernel"]) == ("SIGSEGV", attention.HOST)
    assert found["three"]["note"] == "RuntimeError: no kernel in (path)"
    assert found["four"]["figures"] == {"out": {"error": None, "allowed": 1.0}}
    told = capsys.readouterr()
    assert f"[  2/5] crash   two ({attention.HOST})" in told.err
    assert "crash: two" in told.out
    assert str(tmp_path) not in file.read_text()


def test_a_file_that_can_no_more_be_written_ends_a_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(report: Report, file: Path, *_: Any) -> None:
        report.write(file)
        (tmp_path / "report.json.part").mkdir()
        report.write(file)

    monkeypatch.setattr(session, "run", ask)
    file = tmp_path / "report.json"
    options = Namespace(full=False, output=str(file), resume=False, only="", simulate=False)
    assert validate.run(options) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {file}: Is a directory; what it held before is whole")
    assert "doctor" not in said
    assert json.loads(file.read_text())["cases"] == []


def test_a_name_that_no_case_has_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Worker:
        machine: dict[str, str] = {}  # noqa: RUF012
        not_asked: dict[str, str] = {}  # noqa: RUF012
        cases = (("causal", "causal", True), ("taking long", "", False))

        def __init__(self, simulate: bool) -> None: ...

        def stop(self) -> None: ...

    monkeypatch.setattr(session, "_Worker", Worker)
    file = tmp_path / "report.json"
    options = Namespace(full=False, output=str(file), resume=False, simulate=False)
    for only in ("casual", "taking"):
        options.only = only
        assert validate.run(options) == 2
        assert capsys.readouterr().err.startswith(f"error: --only: got {only!r}; allowed: a part")
    assert not file.exists()


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 0}', "\xff"])
def test_what_is_no_report_is_not_gone_on_with(text: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(text, encoding="latin-1")
    with pytest.raises(MismatchError, match="is no report to go on with: "):
        Report.read(tmp_path / "report.json")


def test_a_report_of_another_machine_is_not_gone_on_with() -> None:
    report = Report("0", "quick", False, {"device": "cpu"})
    with pytest.raises(MismatchError):
        report.of({"device": "npu"})


def believable() -> dict[str, Any]:
    report = Report("0.1.0", "quick", simulated=False)
    report.of(
        {
            "device": "npu",
            "soc": "Ascend910B3",
            "cann": "8.5.0",
            "torch_npu": "2.13.0.post1",
            "torch": "2.13.0+cpu",
            "python": "3.11.7",
            "architecture": "aarch64",
        }
    )
    figures = {"out": {"error": 0.1, "allowed": 0.2}}
    report.add(
        {
            "name": "a",
            "row": "causal",
            "kernel": attention.FUSION,
            "kinds": [],
            "status": "right",
            "figures": figures,
            "answers": {},
        }
    )
    return json.loads(json.dumps(report.as_json()))


SPOILED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "its schema is 2": lambda r: r.update(schema=2),
    "it lacks cases": lambda r: r.pop("cases"),
    "the machine lacks cann": lambda r: r["machine"].pop("cann"),
    "the SoC is 'TPU'": lambda r: r["machine"].update(soc="TPU"),
    "the version of CANN is not known": lambda r: r["machine"].update(cann=""),
    "torch_npu 2.12.0 does not belong": lambda r: r["machine"].update(torch_npu="2.12.0"),
    "a: asked twice": lambda r: r["cases"].append(r["cases"][0]),
    "lacks kernel": lambda r: r["cases"][0].pop("kernel"),
    "the status is 'fine'": lambda r: r["cases"][0].update(status="fine"),
    "there is no row 'caustic'": lambda r: r["cases"][0].update(row="caustic"),
    "there is no kernel 'mine'": lambda r: r["cases"][0].update(kernel="mine"),
    "claims to be right without figures": lambda r: r["cases"][0].update(figures={}),
    "claims to be right, but out": lambda r: r["cases"][0]["figures"]["out"].update(error=0.3),
    "claims to be wrong, but no figure": lambda r: r["cases"][0].update(status="wrong"),
    "does not say what happened": lambda r: r["cases"][0].update(status="crash"),
    "it names a folder": lambda r: r["cases"][0].update(note="/home/somebody"),
}


@pytest.mark.parametrize("fault", SPOILED)
def test_a_report_is_believed_only_if_it_holds_together(fault: str) -> None:
    report = believable()
    assert faults(report, ROWS, KERNELS) == []
    SPOILED[fault](report)
    assert any(fault in found for found in faults(report, ROWS, KERNELS))


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A folder in place of that of the shipped reports."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    forget = (confirmed.reports.cache_clear, confirmed.refuted.cache_clear, forget_all)
    monkeypatch.setattr(confirmed, "FOLDER", folder)
    for call in forget:
        call()
    yield folder
    for call in forget:
        call()


def test_a_report_is_added_and_told(
    shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sent.json"
    file.write_text(json.dumps(believable()))
    assert matrix_command.run(Namespace(add=str(file))) == 0
    (added,) = shelf.iterdir()
    assert added.name == "Ascend910B3-cann8.5.0-torch_npu2.13.0.post1.json"
    where = "confirmed on Ascend910B3, CANN 8.5.0, torch_npu 2.13.0.post1"
    (causal,) = [rule for rule in attention.TABLE if rule.name == "causal"]
    assert f"| native, {where} by {added.stem} |" in matrix._row(causal)
    spoiled = deepcopy(believable())
    spoiled["cases"][0]["figures"] = {}
    for sent, why in (
        (spoiled, "claims to be right without figures"),
        ([], "it is no JSON object"),
        (believable() | {"cases": 3, "machine": []}, "machine, cases: of another kind"),
        (believable() | {"cases": [{"name": {}}]}, "cases: of another kind"),
    ):
        file.write_text(json.dumps(sent))
        assert matrix_command.run(Namespace(add=str(file))) == 1
        assert why in capsys.readouterr().err


def test_a_refuted_cell_is_refused_there_and_nowhere_else(
    shelf: Path, npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    import flash_attn_npu

    here = chip.combination(npu)
    report = believable()
    report["machine"].update(here._asdict())
    report["cases"][0].update(row="window_size", status="crash", note="SIGSEGV")
    (shelf / "one.json").write_text(json.dumps(report))
    q = torch.randn(1, 6, 2, 8, dtype=torch.float16).to(npu)

    def served(**options: Any) -> tuple[str, tuple[str, ...]]:
        with flash_attn_npu.fallback("allow"), flash_attn_npu.reporting() as told:
            flash_attn_npu.flash_attn_func(q, q, q, **options)
        (tally,) = told.tallies
        return tally.kernel, tally.reasons

    kernel, (reason,) = served(window_size=(2, 0))
    assert kernel == "blockwise"
    assert "report one found it wrong here" in reason
    assert served(causal=True)[0] == "npu_fusion_attention"
    forget_all()
    monkeypatch.setattr(chip, "refuted", lambda combination: {})
    assert served(window_size=(2, 0))[0] == "npu_fusion_attention"


def test_a_kind_that_was_seen_right_is_not_compared_again(
    shelf: Path, npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kinds, "verification", lambda: "compose")
    asked = [worker._asked(name, "npu") for name in ("attention: causal", "rowwise: swiglu")]
    named = [kind for case in asked for kind in case["kinds"]]
    # of the forward and the gradient of attention, and of a gate
    assert len(named) >= 3
    assert all(kinds.unsettled(kind, npu) for kind in named)  # type: ignore[arg-type]
    report = believable()
    report["machine"].update(chip.combination(npu)._asdict())
    report["cases"] = json.loads(json.dumps(asked))
    (shelf / "one.json").write_text(json.dumps(report))
    confirmed.reports.cache_clear()
    assert not any(kinds.unsettled(kind, npu) for kind in named)  # type: ignore[arg-type]


def test_the_shipped_reports_hold_together_and_confirm_nothing_yet() -> None:
    shipped = confirmed.reports()
    assert any(report["simulated"] for report in shipped.values())
    for name, report in shipped.items():
        # a renamed row would lose what a card has said of it; the simulated one is made anew
        rows = ROWS | {case["row"] for case in report["cases"] if report["simulated"]}
        assert faults(report, rows, KERNELS) == [], name
    assert [name for name, _ in confirmed.counting()] == []
