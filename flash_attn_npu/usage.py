"""Which public function was served by which kernel, how often, and why not by a fused one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

__all__ = ["Report", "Tally", "report", "reporting", "summary", "tally"]


@dataclass
class Tally:
    """Calls of one function that one kernel served.

    reasons: why the kernels before this one were passed over; empty for a fused kernel.
    """

    function: str
    kernel: str
    reasons: tuple[str, ...]
    calls: int = 0


@dataclass
class Report:
    """Tallies that count at least one call; `str()` of it is a table."""

    tallies: list[Tally] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.tallies:
            return "flash_attn_npu has served no call"
        rows = [("function", "kernel", "calls", "why not fused")]
        rows += [
            (entry.function, entry.kernel, str(entry.calls), "; ".join(entry.reasons))
            for entry in self.tallies
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(_aligned(row, widths) for row in rows)


def _aligned(row: tuple[str, ...], widths: list[int]) -> str:
    cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
    return "  ".join([*cells, row[-1]]).rstrip()


_tallies: dict[tuple[str, str, tuple[str, ...]], Tally] = {}


def tally(function: str, kernel: str, reasons: tuple[str, ...]) -> Tally:
    """The one tally of this function, kernel and set of reasons."""
    return _tallies.setdefault((function, kernel, reasons), Tally(function, kernel, reasons))


def report() -> Report:
    """What has served the calls of this process so far; child processes count for themselves.

    The backward of a fused forward belongs to its call and is not counted apart.
    """
    return Report([replace(entry) for entry in list(_tallies.values()) if entry.calls])


@contextmanager
def reporting() -> Iterator[Report]:
    """A report of one region: filled when the block ends."""
    before = {key: entry.calls for key, entry in _tallies.items()}
    region = Report()
    try:
        yield region
    finally:
        for key, entry in list(_tallies.items()):
            calls = entry.calls - before.get(key, 0)
            if calls:
                region.tallies.append(replace(entry, calls=calls))


def summary() -> str:
    """One line for each tally; empty if nothing was served."""
    return "\n".join(
        f"{entry.function}: {entry.kernel} x{entry.calls}"
        + (f" ({'; '.join(entry.reasons)})" if entry.reasons else "")
        for entry in report().tallies
    )
