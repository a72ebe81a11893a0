"""The first call of a kind: launched and compared, and served by another kernel where it raises.

An older CANN may lack the function behind an operator, and a limit may be in no document: then what
the launch raises says nothing of the call, which another kernel serves exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch

from ...errors import ActivationError, ArgumentError, ArgumentTypeError, UnsupportedError, printable
from ..ground.memory import Memo
from ..ground.settings import verification
from .judging import Finding
from .kinds import Case, Kind, Refuted, conclude, raised, refuted

__all__ = ["rehearsed", "tried"]

T = TypeVar("T")

MOST_WORDS = 400

OURS = (ActivationError, ArgumentError, ArgumentTypeError, UnsupportedError)

FULL = ("out of memory", "EL0004", "207001")
"""Of memory; the last two are CANN's codes of an allocation that failed."""

MACHINE = (
    "FORCE STOP",
    "UCE ERROR",
    "HBM MULTI BIT ECC ERROR",
    "SUSPECT MEM ERROR",
    "SUSPECT REMOTE ERROR",
    "HCCL OP RETRY FAILED",
    "HCCS LINK ERROR",
    "UB LINK ERROR",
)
"""What torch_npu raises of a machine at fault, for those who restart it."""

_rehearsed: Memo[Kind, bool] = Memo("kinds of gradients that were launched", 1024)
"""False of a launch that told nothing."""


def tried(
    case: Case,
    kind: Kind,
    look: Callable[[], tuple[T, list[Finding]]],
    instead: Callable[[], T] | None,
) -> T:
    """What the first call of a kind answers.

    Args:
        look: launches; gives what was answered, and what was found of it, nothing where that told
            nothing. What a card does later it raises when it is read. What is to be differentiated
            is launched again behind it.
        instead: serves by the kernel behind this one, which the kind settled makes the next; None
            where the whole call has to ask again.

    Raises:
        Refuted: it does not agree, or it raised, and `instead` is None.
    """
    if refuted(kind, case.problem.function):
        # by another call, while this one had its plan
        if instead is None:
            raise Refuted
        return instead()
    try:
        with _apart():
            answer, found = look()
    except Exception as error:
        if not _is_of_the_kernel(error):
            raise
        serve = partial(raised, case, kind, error, _words(error))
        if instead is None:
            raise Refuted(serve) from error
        return serve(instead)
    if conclude(case, kind, found):
        return answer
    if instead is None:
        raise Refuted
    return instead()


def rehearsed(case: Case, kind: Kind, look: Callable[[], list[Finding]]) -> None:
    """Launch once what a backward is going to, as long as another kernel can serve the forward.

    Found out in the backward itself it would be too late for some: a checkpoint that has kept the
    tensors of one kernel cannot go on with those of another, nor can another repeat dropout.

    Args:
        look: launches; gives what was found of it, nothing where that told nothing.

    Raises:
        Refuted: it does not agree, or it raised.
    """
    if verification() not in ("compose", "always") or _rehearsed.recall(kind):
        return
    # first, as a launch may come back here
    _rehearsed.put(kind, True)
    try:
        with _apart():
            found = look()
            # a queue of launches raises here, and not in the call
            device = case.problem.device
            torch.get_device_module(device).synchronize(device)
    except Exception as error:
        if _is_full(error):
            # nobody has asked for it
            return
        if not _is_of_the_kernel(error):
            raise
        raise Refuted(partial(raised, case, kind, error, _words(error))) from error
    if not found:
        # the next one may tell
        _rehearsed.put(kind, False)
    if not conclude(case, kind, found):
        raise Refuted


@contextmanager
def _apart() -> Iterator[None]:
    """No tensor that is saved here is one of the caller's graph: a checkpoint counts those."""
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with hooks, torch.autograd.set_detect_anomaly(False):
        yield


def _is_of_the_kernel(error: Exception) -> bool:
    """Whether an error speaks against a kernel, and the setting is to serve by another one."""
    if verification() not in ("compose", "always"):
        return False
    if isinstance(error, (*OURS, RecursionError)) or _is_full(error):
        return False
    # an operator that is not there, and an argument that it does not have, are the last two
    of_a_launch = isinstance(error, (RuntimeError, AttributeError, TypeError))
    return of_a_launch and not any(word in str(error) for word in MACHINE)


def _is_full(error: Exception) -> bool:
    out_of_memory = isinstance(error, torch.OutOfMemoryError)
    return out_of_memory or any(word in str(error) for word in FULL)


def _words(error: Exception) -> str:
    """The first lines of an error, in one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return printable(f"{type(error).__name__}: {' '.join(lines[:2])}")[:MOST_WORDS]
