"""What happens when no fused kernel serves a call: refuse it, or say so once and compute it.

Both tables end here, through `table.choice`.
"""

from __future__ import annotations

import logging

import torch

from ...errors import UnsupportedError, printable
from .memory import Memo
from .settings import fallback_policy

__all__ = ["permit"]

logger = logging.getLogger("flash_attn_npu")

COMPOSED = "is composed of torch operations, exact but not fused"

_warned: Memo[tuple[str, tuple[str, ...]], bool] = Memo("reasons that were logged", 1024)


def permit(
    function: str,
    device: torch.device,
    reasons: tuple[str, ...],
    *,
    detour: str | None = None,
) -> None:
    """Apply the fallback policy to a call that the first kernels of a table passed over.

    Off an NPU nothing fused is to be expected, so that is said at INFO.

    Args:
        function: the public function, as users know it.
        reasons: why kernels were passed over, one text for each; empty if none was.
        detour: what the call does instead and is still fused; None if it is composed.

    Raises:
        UnsupportedError: the call is composed, and the policy is `error`.
    """
    if not reasons:
        return
    policy = fallback_policy()
    if policy == "error" and detour is None:
        raise UnsupportedError(
            function,
            "; ".join(reasons),
            "calls that a fused kernel serves, under the fallback policy `error`",
            f"change what is named here, or allow composed operations by {_setting('warn')}",
        )
    key = (function, reasons)
    if policy == "allow" or _warned.recall(key):
        return
    _warned.put(key, True)
    level = logging.WARNING if device.type == "npu" else logging.INFO
    logger.log(
        level,
        "flash_attn_npu: `%s` %s: %s (no more of this: %s; an error instead: `error`)",
        function,
        detour or COMPOSED,
        printable("; ".join(reasons)),
        _setting("allow"),
    )


def _setting(policy: str) -> str:
    return f'flash_attn_npu.fallback("{policy}") or FLASH_ATTN_NPU_FALLBACK={policy}'
