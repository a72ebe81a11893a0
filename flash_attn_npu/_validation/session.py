"""A run of validate: children that ask cases and may die of them, and a file that outlives all."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .report import Report

__all__ = ["NoCaseError", "NoWorkerError", "run"]

EXAMPLE = "causal"
"""What may be asked of `only`, for who asks what is not."""

SECONDS = 600
START_SECONDS = 300
START = (
    "import sys; sys.path[:] = sys.argv[2:]; from flash_attn_npu._validation.worker import main; "
    "main(sys.argv[1] == 'simulate')"
)


class NoCaseError(Exception):
    """No case has such a name, so nothing is asked."""


class NoWorkerError(Exception):
    """No child could be started, so nothing can be asked."""


class _Worker:
    """A child that waits for a name."""

    def __init__(self, simulate: bool) -> None:
        word = "simulate" if simulate else "card"
        environment = {**os.environ, "FLASH_ATTN_NPU_VERIFY": "off"}
        environment |= {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "FLASH_ATTN_NPU_FALLBACK": "allow"}
        environment.pop("FLASH_ATTN_NPU_INSTALL", None)
        self._child = subprocess.Popen(
            [sys.executable, "-c", START, word, *sys.path],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Ctrl-C is for us: a case is not to be recorded as one that died of it
            start_new_session=True,
        )
        self._rest = b""
        self.alive = True
        self.serving = ""
        told = self._read(START_SECONDS)
        if told is None or "machine" not in told:
            self.stop()
            raise NoWorkerError(self.death() if told is None else told.get("failed", str(told)))
        self.machine: dict[str, str] = told["machine"]
        self.cases: list[tuple[str, str, bool]] = told["cases"]
        self.not_asked: dict[str, str] = told["not_asked"]

    def ask(self, name: str) -> dict[str, Any] | None:
        """The result of a case, None if the child died of it or did not answer in time."""
        assert self._child.stdin is not None
        self.serving = ""
        try:
            self._child.stdin.write(f"{name}\n".encode())
            self._child.stdin.flush()
        except BrokenPipeError:
            return None
        return self._read(SECONDS)

    def death(self) -> str:
        """What became of the child, which is gone then."""
        try:
            status = self._child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return f"no answer in {SECONDS} seconds"
        finally:
            self.stop()
        return signal.Signals(-status).name if status < 0 else f"exit status {status}"

    def stop(self) -> None:
        """End the child, whatever it does."""
        self.alive = False
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _read(self, seconds: float) -> dict[str, Any] | None:
        assert self._child.stdout is not None
        end = time.monotonic() + seconds
        descriptor = self._child.stdout.fileno()
        while True:
            line, found, rest = self._rest.partition(b"\n")
            if found:
                self._rest = rest
                # torch_npu and CANN write where they like
                if line.startswith(b"{"):
                    told: dict[str, Any] = json.loads(line)
                    if "serving" not in told:
                        return told
                    self.serving = told["serving"]
                continue
            left = end - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                return None
            data = os.read(descriptor, 65536)
            if not data:
                return None
            self._rest += data


def run(
    report: Report,
    file: Path | None,
    tell: Callable[[dict[str, Any], int], None],
    only: str = "",
) -> None:
    """Ask every case of the report's mode that it lacks, and write the file after each.

    Args:
        tell: called with each result, and how many cases there are.
        only: ask only cases that have this in their names.

    Raises:
        NoWorkerError: no child can be started.
        NoCaseError: `only` is in no name.
        KeyboardInterrupt: what was done until then is in the report and the file.
    """
    worker = _Worker(report.simulated)
    try:
        report.of(worker.machine)
        report.not_asked = worker.not_asked
        quick = report.mode == "quick"
        cases = [(n, row) for n, row, is_quick in worker.cases if only in n and is_quick >= quick]
        if not cases:
            raise NoCaseError(
                f"--only: got {only!r}; allowed: a part of a case's name, such as {EXAMPLE!r}, of "
                f"{len(worker.cases)} cases with --full; to fix it: leave it out to see them all"
            )
        for name, row in cases:
            if report.has(name):
                continue
            worker = worker if worker.alive else _Worker(report.simulated)
            result = worker.ask(name) or _death(name, row, worker)
            report.add(result)
            tell(result, len(cases))
            if file is not None:
                report.write(file)
        report.complete = not only
        if file is not None:
            report.write(file)
    finally:
        worker.stop()


def _death(name: str, row: str, worker: _Worker) -> dict[str, Any]:
    """The result of a case that its child did not survive."""
    return {
        "name": name,
        "row": row,
        "kernel": worker.serving,
        "kinds": [],
        "status": "crash",
        "note": worker.death(),
        "figures": {},
        "answers": {},
    }
