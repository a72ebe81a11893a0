"""`--simulate`: the program runs on a card that is not there."""

from __future__ import annotations

import sys

__all__ = ["MARK", "simulate"]

MARK = "simulated"
"""What stands before everything that we say of such a run."""


def simulate() -> str | None:
    """Start the simulated card in this process, for good; None, or why it cannot be."""
    from .. import _virtual_ascend

    reason = _virtual_ascend.start()
    if reason is not None:
        return f"--simulate: {reason}"
    try:
        _virtual_ascend.enable()
    except RuntimeError as error:
        # of torch_npu, as of a chip that it does not know
        return f"--simulate: {error}"
    print(f"flash_attn_npu: {MARK}: {_virtual_ascend.description()}", file=sys.stderr)
    return None
