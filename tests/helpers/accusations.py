"""Who says of an honest card that it does not agree with exact arithmetic is wrong.

The simulated card is honest unless a test lets it lie. So each error of the comparison of first
calls is noted here, forked children's too, and tests/conftest.py fails the test it came in. With
FLASH_ATTN_NPU_VERIFY=compose, or =always, in the environment that holds for every call of every
test, and the whole suite is a search for false alarms.
"""

from __future__ import annotations

import contextlib
import logging
import os

from flash_attn_npu._virtual_ascend.machine import lies

__all__ = ["Accusations"]


class Accusations(logging.Handler):
    """Listens to the package's log."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        # a pipe, so that what a forked child writes is read here
        self._reading, self._writing = os.pipe()
        for end in (self._reading, self._writing):
            os.set_blocking(end, False)
        logging.getLogger("flash_attn_npu").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "does not agree with exact arithmetic" in message and not any(map(lies.told, lies.LIES)):
            # what is too much for the pipe is not needed: one accusation is enough
            with contextlib.suppress(BlockingIOError):
                os.write(self._writing, f"{message}\n".encode())

    def taken(self) -> str:
        """What was noted since it was last asked."""
        try:
            return os.read(self._reading, 1 << 20).decode()
        except BlockingIOError:
            return ""
