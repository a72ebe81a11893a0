"""The file that validate writes, and whether one that somebody sent can be believed.

It holds no names of people, machines or folders. `_core/ground/confirmed.py` reads it.
"""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._core.ground.confirmed import EVERY_CALL, REFUTING, SCHEMA
from .._version import FLASH_ATTN_VERSION

__all__ = ["STATUSES", "MismatchError", "Report", "UnwrittenError", "faults"]

STATUSES = ("right", "skipped", *REFUTING)
MACHINE = ("device", "soc", "cann", "torch_npu", "torch", "python", "architecture")
CASE = {"name": str, "row": str, "kernel": str, "kinds": list, "status": str, "figures": dict}
PRIVATE = re.compile(r"/home/|/root/|/Users/|\\Users\\|@")


class MismatchError(Exception):
    """What is to be resumed is no report, or was made on another machine."""


class UnwrittenError(Exception):
    """A report cannot be written, or no more."""


@dataclass
class Report:
    """What was found so far."""

    version: str
    mode: str
    simulated: bool
    machine: dict[str, str] = field(default_factory=dict)
    cases: list[dict[str, Any]] = field(default_factory=list)
    not_asked: dict[str, str] = field(default_factory=dict)
    complete: bool = False

    @classmethod
    def read(cls, file: Path) -> Report:
        """A report that was written, to be gone on with."""
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise _no_report(file, str(error)) from None
        if _shape_faults(told):
            raise _no_report(file, "; ".join(_shape_faults(told)))
        version = told["flash_attn_npu"].get("version", "")
        told = [told[name] for name in ("mode", "simulated", "machine", "cases", "not_asked")]
        return cls(version, *told)

    def of(self, machine: dict[str, str]) -> None:
        """Say which machine it is about; it may be said again."""
        if self.machine and self.machine != machine:
            raise MismatchError(f"it was made on {self.machine}, and this is {machine}")
        self.machine = machine

    def has(self, name: str) -> bool:
        """Whether a case was asked."""
        return any(case["name"] == name for case in self.cases)

    def add(self, case: dict[str, Any]) -> None:
        """Record the result of a case."""
        self.cases.append(case)

    def as_json(self) -> dict[str, Any]:
        """What is written."""
        answers: dict[str, bool] = {}
        for case in self.cases:
            answers |= case.get("answers", {})
        return {
            "schema": SCHEMA,
            "flash_attn_npu": {"version": self.version, "api": FLASH_ATTN_VERSION},
            "simulated": self.simulated,
            "mode": self.mode,
            "complete": self.complete,
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "machine": self.machine,
            "answers": answers,
            "not_asked": self.not_asked,
            "cases": self.cases,
        }

    def write(self, file: Path) -> None:
        """Replace the file by what is known now, in one step."""
        beside = file.with_name(f"{file.name}.part")
        text = json.dumps(self.as_json(), indent=1, allow_nan=False)
        try:
            beside.write_text(f"{text}\n", encoding="utf-8")
            os.replace(beside, file)
        except OSError as error:
            raise UnwrittenError(
                f"{file}: {error.strerror}; what it held before is whole: mend that, and go on "
                "with --resume"
            ) from error


def _no_report(file: Path, why: str) -> MismatchError:
    return MismatchError(
        f"{file.name} is no report to go on with: {why}; name another file, or leave --resume out"
    )


def faults(report: Mapping[str, Any], rows: frozenset[str], kernels: frozenset[str]) -> list[str]:
    """Why a report is not to be believed; empty if it may be added.

    Args:
        rows, kernels: the names that the tables know.
    """
    if shape := _shape_faults(report):
        return shape
    found = [*_machine_faults(report)]
    names = [case.get("name") for case in report["cases"]]
    found += [f"{name}: asked twice" for name in sorted({n for n in names if names.count(n) > 1})]
    for case in report["cases"]:
        found += [f"{case.get('name')}: {fault}" for fault in _case_faults(case, rows, kernels)]
    if PRIVATE.search(json.dumps(report)):
        found.append("it names a folder or an address, which a report must not")
    return found


def _shape_faults(report: Any) -> list[str]:
    if not isinstance(report, Mapping):
        return ["it is no JSON object"]
    if report.get("schema") != SCHEMA:
        return [f"its schema is {report.get('schema')}, not {SCHEMA}"]
    whole = Report("", "", False).as_json()
    missing = [name for name in whole if name not in report]
    if missing:
        return [f"it lacks {', '.join(missing)}"]
    wrong = [name for name, value in whole.items() if not isinstance(report[name], type(value))]
    if "cases" not in wrong and not all(map(_is_named, report["cases"])):
        wrong.append("cases")
    return [f"{', '.join(wrong)}: of another kind than validate writes"] if wrong else []


def _is_named(case: Any) -> bool:
    return isinstance(case, Mapping) and isinstance(case.get("name", ""), str)


def _machine_faults(report: Mapping[str, Any]) -> Iterator[str]:
    machine = report["machine"]
    lacking = [name for name in MACHINE if not isinstance(machine.get(name), str)]
    if lacking:
        yield f"the machine lacks {', '.join(lacking)}"
        return
    if machine["device"] not in ("npu", "cpu"):
        yield f"the device is {machine['device']!r}, not npu or cpu"
    if machine["device"] != "npu" or report["simulated"]:
        return
    if not machine["soc"].startswith("Ascend"):
        yield f"the SoC is {machine['soc']!r}, not an Ascend"
    if not machine["cann"]:
        yield "the version of CANN is not known"
    numbers = [re.findall(r"\d+", machine[name])[:3] for name in ("torch", "torch_npu")]
    if numbers[0] != numbers[1]:
        yield f"torch_npu {machine['torch_npu']} does not belong to torch {machine['torch']}"


def _case_faults(
    case: Mapping[str, Any], rows: frozenset[str], kernels: frozenset[str]
) -> Iterator[str]:
    wrong = [name for name, kind in CASE.items() if not isinstance(case.get(name), kind)]
    if wrong:
        yield f"lacks {', '.join(wrong)}"
        return
    status, figures = case["status"], case["figures"]
    if status not in STATUSES:
        yield f"the status is {status!r}, not one of {', '.join(STATUSES)}"
        return
    if case["row"] and case["row"] not in (EVERY_CALL, *rows):
        yield f"there is no row {case['row']!r}"
    if status == "right" and case["kernel"] not in kernels:
        yield f"there is no kernel {case['kernel']!r}"
    if status == "right" and not figures and not (case.get("answers") and not case["row"]):
        yield "claims to be right without figures"
    if status in ("crash", "error") and not case.get("note"):
        yield "does not say what happened"
    beyond = [name for name, one in figures.items() if not within(one)]
    if status == "right" and beyond:
        yield f"claims to be right, but {', '.join(beyond)} are beyond what is allowed"
    if status == "wrong" and not beyond:
        yield "claims to be wrong, but no figure is beyond what is allowed"


def within(figure: Mapping[str, Any]) -> bool:
    """Whether an error is allowed; None stands for NaN or an infinity in the wrong place."""
    error, allowed = figure.get("error"), figure.get("allowed")
    if not isinstance(error, (int, float)) or not isinstance(allowed, (int, float)):
        return False
    return 0 <= error <= allowed
