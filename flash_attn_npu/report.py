"""Which public function was served by which kernel, how often, and why not by a fused one."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Tally", "reset", "summary", "tally"]


@dataclass
class Tally:
    """Calls of one function that one kernel served, and the reasons of the kernels before it."""

    function: str
    kernel: str
    reasons: tuple[str, ...]
    calls: int = 0


_tallies: dict[tuple[str, str, tuple[str, ...]], Tally] = {}


def tally(function: str, kernel: str, reasons: tuple[str, ...]) -> Tally:
    """The one tally of this function, kernel and set of reasons."""
    return _tallies.setdefault((function, kernel, reasons), Tally(function, kernel, reasons))


def reset() -> None:
    """Set every count to 0."""
    for entry in _tallies.values():
        entry.calls = 0


def summary() -> str:
    """One line for each tally that counts something; empty if nothing was served."""
    lines = []
    for entry in _tallies.values():
        if entry.calls:
            why = f" ({'; '.join(entry.reasons)})" if entry.reasons else ""
            lines.append(f"{entry.function}: {entry.kernel} x{entry.calls}{why}")
    return "\n".join(lines)
