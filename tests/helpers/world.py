"""Two processes that share a gloo process group, started once for the whole test session.

    from tests.helpers import world        # by this name, so that all tests share the processes

    def _doubled(rank, group, x):          # a module-level function of an importable module
        return all_gather(2 * x, group)    # what it returns is pickled back

    def test_doubled():
        first, second = world.run(_doubled, torch.ones(3))

`world.run(function, *args)` calls `function(rank, group, *args)` in both ranks at once and returns
[rank 0's result, rank 1's result]. `group` is the group of both ranks; `per_rank(a, b)` as an
argument gives a to rank 0 and b to rank 1. Each call starts from `torch.manual_seed(0)`, one
thread, warnings as errors, and the parent's sys.path; there is no simulated Ascend, and the module
of the function must be importable without one. Do not leave a collective half done: keep refusals
inside the function (`with pytest.raises(...)`).

If a rank raises, `RankError` carries the traceback of each rank that did. What fails, dies or takes
longer than `timeout` seconds costs the processes: the next call starts new ones (about 3 s, which
do not count; far longer where a machine reads slowly).
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

SIZE = 2
START = 300.0
"""How long both processes may take to import torch."""
TIMEOUT = 45.0
GRACE = 2.0
"""How long a rank may go on after the other has failed: it may wait for it in a collective."""


class RankError(AssertionError):
    """A rank raised, died or hung; the message holds the tracebacks."""


class per_rank(NamedTuple):  # noqa: N801
    """An argument that differs between the ranks."""

    first: Any
    second: Any


def run(function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
    """`[function(rank, group, *args) for rank in (0, 1)]`, both at once."""
    global _world
    if _world is None:
        _world = _World()
    done = False
    try:
        _world.start()
        results = _world.call(function, args, timeout)
        done = True
        return results
    finally:
        if not done:
            stop()


def stop() -> None:
    """End the processes, if there are any."""
    global _world
    ending, _world = _world, None
    if ending is not None:
        ending.close()


class _World:
    """The two processes, seen from the session."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="world-")
        self.processes: list[subprocess.Popen[bytes]] = []
        self.connections: list[Connection] = []
        self.started = False
        environment = dict(os.environ, TORCH_DEVICE_BACKEND_AUTOLOAD="0", OMP_NUM_THREADS="1")
        if sys.platform == "linux":
            environment["GLOO_SOCKET_IFNAME"] = "lo"
        for rank in range(SIZE):
            ours, theirs = socket.socketpair()
            self.connections.append(Connection(ours.detach()))
            with theirs:
                number = theirs.fileno()
                command = [sys.executable, __file__, str(rank), str(number), self.folder.name]
                process = subprocess.Popen(command, env=environment, pass_fds=[number])
                self.processes.append(process)

    def start(self) -> None:
        """Let both ranks meet, once both can."""
        if self.started:
            return
        deadline = time.monotonic() + START
        for rank, connection in enumerate(self.connections):
            if not connection.poll(max(0.0, deadline - time.monotonic())):
                raise RankError(f"rank {rank}: not started in {START} s")
            try:
                connection.recv_bytes()
            except EOFError:
                raise RankError(f"rank {rank}: the process ended before it started") from None
        for connection in self.connections:
            connection.send_bytes(b"meet")
        self.started = True

    def call(
        self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float
    ) -> list[Any]:
        messages = []
        for rank in range(SIZE):
            own = tuple(arg[rank] if isinstance(arg, per_rank) else arg for arg in args)
            messages.append(pickle.dumps((sys.path, _pack((function, own)))))
        for connection, message in zip(self.connections, messages, strict=True):
            with contextlib.suppress(OSError):  # the answer of a process that died is the news
                connection.send_bytes(message)
        deadline = time.monotonic() + timeout
        answers: dict[int, tuple[bool, Any]] = {}
        while len(answers) < SIZE and time.monotonic() < deadline:
            for rank, connection in enumerate(self.connections):
                if rank not in answers and connection.poll(0.005):
                    answers[rank] = _answer(connection)
                    if not answers[rank][0]:
                        deadline = min(deadline, time.monotonic() + GRACE)
        failures = []
        for rank in range(SIZE):
            succeeded, outcome = answers.get(rank, (False, "not done in time"))
            if not succeeded:
                failures.append(f"rank {rank}: {outcome}")
        if failures:
            raise RankError("\n".join(failures))
        return [answers[rank][1] for rank in range(SIZE)]

    def close(self) -> None:
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.close()
        for process in self.processes:
            process.kill()
            process.wait()
        self.folder.cleanup()


def _pack(message: Any) -> bytes:
    """`message` pickled, and its tensors as torch.save does: torch_npu changes their own pickle."""
    import torch

    packed = io.BytesIO()
    torch.save(message, packed)
    return packed.getvalue()


def _unpack(packed: bytes) -> Any:
    import torch

    return torch.load(io.BytesIO(packed), weights_only=False)


def _answer(connection: Connection) -> tuple[bool, Any]:
    try:
        return _unpack(connection.recv_bytes())
    except (EOFError, OSError):
        return False, "the process ended"


_world: _World | None = None
atexit.register(stop)


def _serve(rank: int, connection: Connection, folder: str) -> None:
    """What a process does until the session closes the connection."""
    import datetime

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    connection.send_bytes(b"ready")
    connection.recv_bytes()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=SIZE,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    while True:
        try:
            path, message = pickle.loads(connection.recv_bytes())
        except EOFError:
            dist.destroy_process_group()
            return
        sys.path[:] = path
        try:
            function, args = _unpack(message)
            torch.manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                outcome = function(rank, dist.group.WORLD, *args)
            answer = _pack((True, outcome))
        except BaseException:
            answer = _pack((False, traceback.format_exc()))
        connection.send_bytes(answer)


if __name__ == "__main__":
    _serve(int(sys.argv[1]), Connection(int(sys.argv[2])), sys.argv[3])
