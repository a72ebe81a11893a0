"""Whether a graph of the device is being captured: what is launched then runs later, or never."""

from __future__ import annotations

import torch

__all__ = ["capturing"]


def capturing() -> bool:
    """Whether the current stream of an NPU is being captured."""
    # a name that torch lacks costs some microseconds
    npu = vars(torch).get("npu")
    asked = getattr(npu, "is_current_stream_capturing", None)
    return asked is not None and bool(asked())
