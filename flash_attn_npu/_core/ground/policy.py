"""What happens when no fused kernel serves a call: refuse it, or say so once and compute it.

Both tables end here, through `table.choice`.
"""

from __future__ import annotations

import logging
from typing import NoReturn

import torch

from ...errors import UnsupportedError, printable
from .absent import absent
from .memory import Memo
from .settings import fallback_policy

__all__ = ["permit", "refuse"]

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
    meant = absent(policy)
    if (policy == "error" or (meant and device.type == "npu")) and detour is None:
        refuse(function, reasons, policy)
    key = (function, reasons)
    if policy == "allow" or meant or _warned.recall(key):
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


def refuse(function: str, reasons: tuple[str, ...], policy: str) -> NoReturn:
    """End a call that no fused kernel serves, as a policy demands."""
    raise UnsupportedError(
        function,
        "; ".join(reasons),
        f"calls that a fused kernel serves, under the fallback policy `{policy}`",
        f"change what is named here, or allow composed operations by {_setting('warn')}",
    )


def _setting(policy: str) -> str:
    return f'flash_attn_npu.fallback("{policy}") or FLASH_ATTN_NPU_FALLBACK={policy}'
