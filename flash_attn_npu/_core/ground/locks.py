"""A lock that a forked child can take, whoever held it in the parent."""

from __future__ import annotations

import os
import weakref
from threading import RLock

__all__ = ["Lock"]


class Lock:
    """A re-entrant lock, free in a forked child unless the thread that forked holds it.

    Other threads are not there any more in the child, so what they held they would never release.
    """

    def __init__(self) -> None:
        self._lock = RLock()
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def renew(self) -> None:
        """Replace it, if a thread that is gone holds it."""
        if self._lock.acquire(blocking=False):
            self._lock.release()
        else:
            self._lock = RLock()


_locks: weakref.WeakSet[Lock] = weakref.WeakSet()


def _renew_all() -> None:
    for lock in _locks:
        lock.renew()


# Windows has no fork
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
