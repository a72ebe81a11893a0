"""Which Python functions a call runs before and between launches."""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["frames"]


def frames(call: Callable[[], Any]) -> list[str]:
    """The functions of this package that a call runs, and those they call, one after the other."""
    seen = []

    def ours(frame: Any) -> bool:
        path = frame.f_code.co_filename if frame else ""
        return bool(re.search(r"/flash_attn_npu/(?!_virtual_ascend)", path))

    def saw(frame: Any, event: str, _: Any) -> None:
        simulated = "_virtual_ascend" in frame.f_code.co_filename
        if event == "call" and not simulated and (ours(frame) or ours(frame.f_back)):
            seen.append(frame.f_code.co_name)

    collects = gc.isenabled()
    # it may call back functions at any place
    gc.disable()
    sys.setprofile(saw)
    try:
        call()
    finally:
        sys.setprofile(None)
        if collects:
            gc.enable()
    return seen
