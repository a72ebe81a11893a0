"""A check in a forked child."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable

__all__ = ["exit_code_of"]


def exit_code_of(child: Callable[[], bool], seconds: int = 60) -> int:
    """0 if `child`, run in a forked process, returns True; -SIGALRM if it takes so many seconds."""
    with warnings.catch_warnings():
        # Python 3.12 warns of forking beside threads, which is what is tried here
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()
    if process == 0:
        signal.alarm(seconds)
        code = 1
        try:
            code = 0 if child() else 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
