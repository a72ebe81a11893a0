"""A simulated Ascend: the real torch_npu wheel over stub CANN libraries, with CPU arithmetic.

start() loads the stubs, enable() imports torch_npu over them and registers the arithmetic. torch
may be there before, if it was kept from loading torch_npu (TORCH_DEVICE_BACKEND_AUTOLOAD=0).
It knows torch_npu and nothing of flash_attn_npu. No Ascend machine confirmed what it computes.
"""

from __future__ import annotations

import os
import warnings
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from .machine import stubs
from .machine.refusal import CardRefusal

if TYPE_CHECKING:
    from .machine.journal import Record
    from .machine.lacks import Lack

__all__ = ["REASON", "CardRefusal", "description", "enable", "lacking", "lying"]
__all__ += ["record", "start"]

REASON: str | None = "virtual_ascend.start() was not called"
_started = False
_enabled: list[object] = []


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
    # enable() imports it, and a child process has no stubs
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    return reason


def enable() -> None:
    """Give the simulated card its arithmetic, in this process and for good."""
    if REASON is not None:
        raise RuntimeError(f"the virtual Ascend is not running: {REASON}")
    if _enabled:
        return
    import torch
    import torch_npu

    from . import operators
    from .machine import arithmetic, registering

    # memory here knows the plain formats only; torch_npu before 2.9 packs weights unless told
    torch.npu.config.allow_internal_format = False
    if tuple(map(int, torch_npu.__version__.split(".")[:2])) < (2, 9):
        # as on Atlas A2; these versions ask it of a library that is a stub here, and then send
        # rotations to operators that are compiled just in time
        torch.npu.set_compile_mode(jit_compile=False)
        # they say once that they allocate what the line above allows only, of a copy's memory
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.empty_like(torch.empty(1, 1, 1, 1, device="npu"))
    libraries: dict[str, torch.library.Library] = {}
    for name, kernel in {**arithmetic.kernels(), **operators.kernels()}.items():
        namespace = name.partition("::")[0]
        if namespace not in libraries:
            libraries[namespace] = torch.library.Library(namespace, "IMPL")
        registering.register(libraries[namespace], arithmetic.overload(name), kernel)
    for name, kernel in arithmetic.composed_kernels().items():
        registering.register_above(libraries["aten"], arithmetic.overload(name), kernel)
    _enabled.extend(libraries.values())


def lying(lie: str) -> AbstractContextManager[None]:
    """Let the card answer wrongly in one way: `with virtual_ascend.lying("scale forgotten"):`."""
    from .machine.lies import lying

    return lying(lie)


def lacking(
    operators: str, words: str = "", *, spared: int = 0, late: bool = False
) -> AbstractContextManager[Lack]:
    """Let operators raise, as under an older CANN: `with virtual_ascend.lacking("npu_swiglu"):`."""
    from .machine.lacks import lacking

    return lacking(operators, words, spared=spared, late=late)


def description() -> str:
    """What a program runs on, for people who read what it prints."""
    import torch
    import torch_npu

    return (
        f"{torch.npu.get_device_name()} by torch_npu {torch_npu.__version__} over stub CANN "
        "libraries: the host computes, as Huawei's documents say, and no card has confirmed it; "
        "times and memory mean nothing"
    )


def record() -> AbstractContextManager[Record]:
    """Collect launches and copies: `with virtual_ascend.record() as rec`."""
    from .machine.journal import record

    return record()
