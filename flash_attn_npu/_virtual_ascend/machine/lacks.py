"""A card whose operators raise: its CANN is older than torch_npu, or nobody knows their limits.

`with lacking("npu_swiglu"):` makes the simulated card raise what torch_npu raises then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["NOT_IN_CANN", "Lack", "lacking", "lacks", "launched"]

NOT_IN_CANN = """aclnn{0} or aclnn{0}GetWorkspaceSize not in libopapi.so, or libopapi.so not found.
[ERROR] 2026-01-01-00:00:00 (PID:1, Device:0, RankID:-1) ERR01004 OPS invalid pointer"""
"""Of a function that an older CANN lacks."""


class Lack:
    """Operators whose launches raise.

    operators: the beginning of their names. spared: launches that do not raise yet. late: it is
        raised of what has been computed, as where a device is at fault. raised: how often it was.
    """

    def __init__(self, operators: str, words: str, spared: int, late: bool) -> None:
        self.operators, self.words, self.spared, self.late = operators, words, spared, late
        self.raised = 0


_lacks: list[Lack] = []


@contextmanager
def lacking(
    operators: str, words: str = "", *, spared: int = 0, late: bool = False
) -> Iterator[Lack]:
    """Let the card raise inside the block, in every thread, where such an operator is launched.

    Args:
        words: what it raises; as a default that CANN has no such function.
        operators, spared, late: see `Lack`.
    """
    lack = Lack(operators, words or NOT_IN_CANN.format(operators), spared, late)
    _lacks.append(lack)
    try:
        yield lack
    finally:
        _lacks.remove(lack)


def lacks() -> bool:
    """Whether some operator raises."""
    return bool(_lacks)


def launched(name: str, late: bool) -> None:
    """Raise if the operator does, before it computes or behind it."""
    for lack in _lacks:
        if late == lack.late and name.startswith(lack.operators):
            lack.spared -= 1
            if lack.spared < 0:
                lack.raised += 1
                raise RuntimeError(lack.words)
