"""Which public function was served by which kernel, how often, and why not by a fused one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from ...errors import printable
from .memory import snapshot

__all__ = ["Report", "Tally", "report", "reporting", "summary", "tally"]


@dataclass
class Tally:
    """Calls of one function that one kernel served.

    reasons: why the kernels before this one were passed over; empty for a fused kernel.
    on_ascend: what would serve them on an Ascend; empty where they ran on one.
    """

    function: str
    kernel: str
    reasons: tuple[str, ...]
    calls: int = 0
    on_ascend: str = ""


@dataclass
class Report:
    """Tallies that count at least one call; `str()` of it is a table."""

    tallies: list[Tally] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.tallies:
            return "flash_attn_npu has served no call"
        away = any(entry.on_ascend for entry in self.tallies)
        rows = [("function", "kernel", "calls", "on Ascend" if away else "why not fused")]
        rows += [
            (
                printable(entry.function),
                printable(entry.kernel),
                str(entry.calls),
                printable(entry.on_ascend or "; ".join(entry.reasons)),
            )
            for entry in self.tallies
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(_aligned(row, widths) for row in rows)


def _aligned(row: tuple[str, ...], widths: list[int]) -> str:
    cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
    return "  ".join([*cells, row[-1]]).rstrip()


_Key = tuple[str, str, tuple[str, ...], str]

_tallies: dict[_Key, Tally] = {}


def tally(function: str, kernel: str, reasons: tuple[str, ...], on_ascend: str = "") -> Tally:
    """The one tally of this function, kernel, set of reasons and what would serve on an Ascend."""
    key = (function, kernel, reasons, on_ascend)
    return _tallies.setdefault(key, Tally(function, kernel, reasons, on_ascend=on_ascend))


def report() -> Report:
    """What has served the calls of this process so far; child processes count for themselves.

    The backward of a fused forward belongs to its call and is not counted apart.
    """
    return Report(_served({}))


class _Region(Report):
    """What was served since it was made, until it is closed."""

    def __init__(self) -> None:
        self._known = {key: entry.calls for key, entry in snapshot(_tallies)}
        self._closed: list[Tally] | None = None

    @property
    def tallies(self) -> list[Tally]:  # type: ignore[override]
        return _served(self._known) if self._closed is None else self._closed

    def close(self) -> None:
        self._closed = self.tallies


def _served(before: dict[_Key, int]) -> list[Tally]:
    """Copies of the tallies that count more calls than before."""
    now = [(entry, entry.calls - before.get(key, 0)) for key, entry in snapshot(_tallies)]
    return [replace(entry, calls=calls) for entry, calls in now if calls]


@contextmanager
def reporting() -> Iterator[Report]:
    """A report of one region: up to date inside the block, and left as it is when that ends."""
    region = _Region()
    try:
        yield region
    finally:
        region.close()


def summary() -> str:
    """One line for each tally; empty if nothing was served."""
    return "\n".join(
        f"{entry.function}: {entry.kernel} x{entry.calls}"
        + (f" ({'; '.join(entry.reasons)})" if entry.reasons else "")
        for entry in report().tallies
    )
