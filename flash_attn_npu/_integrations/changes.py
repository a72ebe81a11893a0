"""Changes to other people's modules that can be taken back, whatever interrupts.

How to undo a change is written down before the change is made, and crossed out after it is
undone. An undo looks at what is there, so that it may be called for a change that never came
or twice, and leaves alone what somebody else has put there meanwhile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, MutableMapping
from typing import Any

__all__ = ["Changes"]


class Changes:
    """Changes that were made, the last one first to be undone."""

    def __init__(self) -> None:
        self._undoing: list[Callable[[], object]] = []

    def before(self, undo: Callable[[], object]) -> None:
        """Write `undo` down, before what it undoes is done."""
        self._undoing.append(undo)

    def set(self, mapping: MutableMapping[str, Any], key: str, value: object) -> None:
        """`mapping[key] = value`, for as long as nobody else replaces it."""
        self.before(functools.partial(_put_back, mapping, key, value, mapping[key]))
        mapping[key] = value

    def undo(self) -> None:
        """Take all back. What fails is raised at the end, and tried again by the next call."""
        failed: Exception | None = None
        for undo in reversed(list(self._undoing)):
            try:
                undo()
            except Exception as error:  # the others are no less to be undone
                failed = error
            else:
                self._undoing.remove(undo)
        if failed is not None:
            raise failed


def _put_back(mapping: MutableMapping[str, Any], key: str, ours: object, old: object) -> None:
    if mapping.get(key) is ours:
        mapping[key] = old
