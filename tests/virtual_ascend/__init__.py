"""A simulated Ascend: the real torch_npu wheel over stub CANN libraries, with CPU arithmetic.

start() before `import torch` loads the stubs, enable() after it registers the arithmetic.
Nothing computed here was confirmed by an Ascend machine.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from . import stubs
from .refusal import CardRefusal

if TYPE_CHECKING:
    from .journal import Record

__all__ = ["REASON", "CardRefusal", "enable", "lying", "record", "start"]

REASON: str | None = "virtual_ascend.start() was not called"
_started = False
_enabled = []


def start() -> str | None:
    """Load the stubs; None if torch_npu can now be imported, else the reason why not."""
    global REASON, _started
    if not _started:
        _started = True
        REASON = _start()
    return REASON


def _start() -> str | None:
    reason = stubs.obstacle()
    if reason is None:
        # A task queue would launch from a thread of its own, behind the journal's back
        os.environ["TASK_QUEUE_ENABLE"] = "0"
        os.environ["ASCEND_LAUNCH_BLOCKING"] = "1"
        try:
            stubs.preload()
        except (OSError, RuntimeError) as error:
            reason = str(error)
    if stubs.wheel_directory() is not None:
        os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "1" if reason is None else "0"
    return reason


def enable() -> None:
    """Give the simulated card its arithmetic, in this process and for good."""
    if REASON is not None:
        raise RuntimeError(f"the virtual Ascend is not running: {REASON}")
    if _enabled:
        return
    import torch
    import torch_npu  # noqa: F401

    from . import arithmetic, operators

    libraries: dict[str, torch.library.Library] = {}
    for name, kernel in {**arithmetic.kernels(), **operators.kernels()}.items():
        namespace = name.partition("::")[0]
        if namespace not in libraries:
            libraries[namespace] = torch.library.Library(namespace, "IMPL")
        libraries[namespace].impl(name, kernel, "PrivateUse1", allow_override=True)
    _enabled.extend(libraries.values())


def lying(lie: str) -> AbstractContextManager[None]:
    """Let the card answer wrongly in one way: `with virtual_ascend.lying("scale forgotten"):`."""
    from .lies import lying

    return lying(lie)


def record() -> AbstractContextManager[Record]:
    """Collect launches and copies: `with virtual_ascend.record() as rec`."""
    from .journal import record

    return record()
