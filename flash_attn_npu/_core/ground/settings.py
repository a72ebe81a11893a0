"""Every setting of the package: its name, its environment variable, its legal values.

| setting | environment variable | values |
| --- | --- | --- |
| `fallback` | `FLASH_ATTN_NPU_FALLBACK` | `warn` (default), `allow`, `error`, `ascend` |
| `alibi_offset` | `FLASH_ATTN_NPU_ALIBI_OFFSET` | `0` (default), `1` |
| `verify` | `FLASH_ATTN_NPU_VERIFY` | `compose` (default), `refuse`, `warn`, `always`, `off` |
| `consistent` | `FLASH_ATTN_NPU_CONSISTENT` | `0` (default), `1` |

A variable is read once, when the package is imported; a value that is not legal is an error
there and then. Of a name that begins like these and is none (`ground.variables`) a warning tells.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from threading import local
from typing import Literal

from ...errors import ArgumentError, renamed
from .absent import WORD, Absent, absent, default
from .memory import forget_all
from .variables import warn_of_unread

__all__ = [
    "alibi_offset",
    "assumed",
    "consistent",
    "fallback",
    "fallback_policy",
    "policy_here",
    "traced",
    "verification",
    "verifying",
]

POLICIES = ("warn", "allow", "error", WORD)
VERIFICATIONS = ("compose", "refuse", "warn", "always", "off")


def _from_environment(variable: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(variable, allowed[0])
    try:
        if WORD in allowed and absent(value):
            return value
    except ArgumentError as error:
        raise renamed(error, {"policy": variable}) from None
    if value not in allowed:
        raise ArgumentError(
            variable, repr(value), ", ".join(allowed), f"unset it or set {variable}={allowed[0]}"
        )
    return value


warn_of_unread()
_default_policy = _from_environment("FLASH_ATTN_NPU_FALLBACK", POLICIES)
_fallback: ContextVar[str] = ContextVar("flash_attn_npu.fallback", default=_default_policy)


class _Traced(local):
    def __init__(self) -> None:
        # of the class it would not be guarded: a block sets it on the instance
        self.policy = _default_policy


traced = _Traced()
"""The policy of this thread, for code that torch.compile traces, which knows no ContextVar."""

_verification = _from_environment("FLASH_ATTN_NPU_VERIFY", VERIFICATIONS)
_consistent = _from_environment("FLASH_ATTN_NPU_CONSISTENT", ("0", "1")) == "1"
_alibi_offset = _from_environment("FLASH_ATTN_NPU_ALIBI_OFFSET", ("0", "1")) == "1"


def fallback_policy() -> str:
    """What happens to a call that no fused kernel can serve, in this context: see `fallback`."""
    return _fallback.get()


policy_here: Callable[[], str] = _fallback.get
"""`fallback_policy` without a frame of Python, for what asks at every call."""


def assumed() -> Absent:
    """The Ascend that a report speaks of on a machine without one."""
    return absent(_default_policy) or default()


def fallback(
    policy: Literal["warn", "allow", "error", "ascend"],
    *,
    soc: str | None = None,
    torch_npu: str | None = None,
) -> AbstractContextManager[None]:
    """Decide, inside a `with` block, about calls that no fused kernel can serve.

    `warn` computes them exactly from torch operations and logs each reason once; `allow` does
    so without a word; `error` refuses them with the reason (UnsupportedError). There is no way
    to have an argument ignored. The block holds for the thread that entered it; a thread that is
    started inside begins with the policy of the environment. A backward keeps its forward's.

    `ascend` is for machines without a card: it refuses what would not be fused on one, read from
    the same table, and computes the rest here; on a card it means `error`. In the environment it
    may name the card: `ascend:Ascend950PR:2.8.0`. What torch.compile traces row by row (rotations,
    norms, gates and losses) is not judged by it.

    Args:
        soc, torch_npu: of the card that `ascend` is about: such as "Ascend910B3", "2.13.0".

    Raises:
        ArgumentError: policy is none of these words, or names what is not known.
    """
    if policy not in POLICIES:
        raise ArgumentError("policy", repr(policy), ", ".join(POLICIES), "pass one of these words")
    if soc is None and torch_npu is None:
        return _within(policy)
    word = f"{policy}:{soc or ''}:{torch_npu or ''}"
    absent(word if policy == WORD else f"{WORD}:{policy}")
    return _within(word)


@contextmanager
def _within(policy: str) -> Iterator[None]:
    token, before = _fallback.set(policy), traced.policy
    traced.policy = policy
    try:
        yield
    finally:
        _fallback.reset(token)
        traced.policy = before


def alibi_offset() -> bool:
    """Whether the fused kernel may serve ALiBi with a common seqlen_k - seqlen_q other than 0.

    Its documents speak of equal lengths only, so as many queries as keys are computed; CANN's code
    reads the offset, which would save that. Off until an Ascend machine has confirmed it.
    """
    return _alibi_offset


def consistent() -> bool:
    """Whether keys in a cache are attended to by the kernel that serves without one, too.

    Then training, prefill and decode are one kernel's, as reinforcement learning wants it where it
    compares the probabilities of all three. It reads no pages, so the keys that a step looks at
    are copied out of the cache at each step.
    """
    return _consistent


def verification() -> str:
    """What happens to the first call of each kind on an Ascend that no report confirms.

    It is compared with exact arithmetic on a sample. If it does not agree, that is logged as an
    error, and calls of its kind are from there on composed of torch operations (`compose`), refused
    (`refuse`), or served all the same (`warn`). `always` compares every call, and composes; `off`
    compares none.

    If it raises, as where CANN is older than an operator, `compose` and `always` log that and
    compose calls of its kind too; elsewhere the error goes on as it is. One of this package's own,
    of memory that is full, or of a machine at fault always does.
    """
    return _verification


@contextmanager
def verifying(mode: str) -> Iterator[None]:
    """The setting inside a `with` block, for all threads: tests, and those who look for a fault."""
    global _verification
    if mode not in VERIFICATIONS:
        raise ArgumentError("mode", repr(mode), ", ".join(VERIFICATIONS), "pass one of these words")
    before, _verification = _verification, mode
    # what was remembered compares, or does not
    forget_all()
    try:
        yield
    finally:
        _verification = before
        forget_all()
