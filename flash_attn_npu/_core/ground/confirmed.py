"""What reports from machines say: which kernels were seen right or wrong there, and by which one.

A report is a file of `flash_attn_npu validate`, kept in `flash_attn_npu/_confirmed`. One that was
made on a simulated card, or on a CPU, confirms nothing. Nothing here imports torch.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from typing import Any, NamedTuple

__all__ = ["EVERY_CALL", "FOLDER", "REFUTING", "SCHEMA", "Cell", "Combination", "Standing"]
__all__ += ["cells", "combination_of", "confirmed", "counting", "refuted", "reports", "told"]

FOLDER = resources.files(__package__.partition(".")[0]) / "_confirmed"
SCHEMA = 1
"""Of the files; what another schema says is not known here, and does not count."""

EVERY_CALL = "every call"
"""Stands for a row in a case about what no row of a table names."""

COMPOSED = ("blockwise", "torch")
"""What serves where no kernel of Ascend does, so that refusing it would help nobody."""

REFUTING = ("wrong", "crash", "error")
"""What may have become of a case so that its kernel must not serve."""

Report = Mapping[str, Any]
Cell = tuple[str, str]
"""(the name of a row of a table, the kernel)."""


class Combination(NamedTuple):
    """What a report speaks of: the numbers of a kernel depend on all three."""

    soc: str
    cann: str
    torch_npu: str

    def __str__(self) -> str:
        return f"{self.soc}, CANN {self.cann or 'unknown'}, torch_npu {self.torch_npu}"


class Standing(NamedTuple):
    """Of one cell: the reports that confirm it, and those that refute it, by their names."""

    confirmed: tuple[str, ...]
    refuted: tuple[str, ...]


@functools.cache
def reports() -> Mapping[str, Report]:
    """Every report that is shipped, by the name of its file, oldest name first."""
    files = [file for file in FOLDER.iterdir() if file.name.endswith(".json")]
    found = {
        file.name.removesuffix(".json"): json.loads(file.read_text(encoding="utf-8"))
        for file in sorted(files, key=lambda file: file.name)
    }
    return {name: report for name, report in found.items() if report.get("schema") == SCHEMA}


def combination_of(report: Report) -> Combination:
    """The machine that a report was made on."""
    machine = report["machine"]
    return Combination(machine["soc"], machine["cann"], machine["torch_npu"])


def counting() -> Iterator[tuple[str, Report]]:
    """The reports of real Ascend machines."""
    for name, report in reports().items():
        if not report["simulated"] and report["machine"]["device"] == "npu":
            yield name, report


def confirmed(soc: str, cann: str, torch_npu: str, kind: object) -> bool | None:
    """Whether reports of this combination saw calls of a kind right; None if none saw any.

    Args:
        kind: its `str()` is what reports name it by.
    """
    wanted, name, right = Combination(soc, cann, torch_npu), str(kind), None
    for _, report in counting():
        if combination_of(report) != wanted:
            continue
        for case in report["cases"]:
            if name in case["kinds"]:
                if case["status"] in REFUTING:
                    return False
                right = True if case["status"] == "right" else right
    return right


def cells(which: Iterable[tuple[str, Report]]) -> dict[Cell, Standing]:
    """What some reports say of each cell; one that none of them speaks of is not there."""
    found: dict[Cell, Standing] = {}
    for name, report in which:
        for case in report["cases"]:
            cell = (case["row"], case["kernel"])
            right, wrong = found.get(cell, Standing((), ()))
            if case["status"] == "right" and name not in right:
                found[cell] = Standing((*right, name), wrong)
            elif case["status"] in REFUTING and name not in wrong:
                found[cell] = Standing(right, (*wrong, name))
    return found


@functools.cache
def refuted(combination: Combination) -> Mapping[Cell, str]:
    """The cells that reports of a combination refute, and the first report that does."""
    which = [(name, report) for name, report in counting() if combination_of(report) == combination]
    return {
        cell: standing.refuted[0] for cell, standing in cells(which).items() if standing.refuted
    }


def told(cell: Cell) -> str:
    """One cell in words, over all combinations: what compat_matrix.md and doctor say."""
    words = []
    for name, report in counting():
        standing = cells([(name, report)]).get(cell)
        if standing is not None:
            word = "refuted" if standing.refuted else "confirmed"
            words.append(f"{word} on {combination_of(report)} by {name}")
    return "; ".join(words) or "simulated"
