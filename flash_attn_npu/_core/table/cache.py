"""THE THIRD TABLE: what the operators refuse that move keys and values into a cache and out of it.

Limits are those of the documents of aclnnScatterPaKvCache and aclnnGatherPaKvCache, and of what
their kernels copy: whole units of 32 bytes. What no row names is one launch; the rest is one for
keys and one for values, exactly the same, and nothing that a user is told of.
"""

from __future__ import annotations

import torch

from ..kernels.ascend import transfer as fused
from ..kernels.composed import transfer as composed
from ..problems.rowwise import TORCH
from ..problems.transfer import APPEND, GATHER, Append, Gather, Transfer
from ..verification.checks import CACHE as CHECK
from . import installed
from .rule import Candidate, Rule, Table

__all__ = ["ALL", "TABLE", "WHOLE"]

ALL = (APPEND, GATHER)
COPY_UNIT = 32
MAX_TOKEN_BYTES = 148 * 1024


TABLE: tuple[Rule, ...] = (
    installed.on_ascend(ALL),
    installed.on_large_chips(ALL),
    Rule("new keys and values in a cache", lambda p: isinstance(p, Append)),
    Rule("keys and values copied out of a cache", lambda p: isinstance(p, Gather)),
    installed.supported(ALL),
    *installed.rows(installed.CACHE),
    Rule("no position", lambda p: p.empty, dict.fromkeys(ALL, "it takes no empty tensor")),
    Rule(
        "a cache of float32 or float64",
        lambda p: p.dtype not in (torch.float16, torch.bfloat16),
        dict.fromkeys(ALL, "on every chip it takes float16 and bfloat16"),
    ),
    Rule(
        "a cache that is not contiguous",
        lambda p: not p.contiguous,
        dict.fromkeys(ALL, "it takes a contiguous k_cache and v_cache only"),
    ),
    Rule(
        f"positions of no multiple of {COPY_UNIT} bytes",
        lambda p: p.token_bytes % COPY_UNIT != 0,
        dict.fromkeys(ALL, f"its kernel copies units of {COPY_UNIT} bytes"),
    ),
    Rule(
        f"positions of more than {MAX_TOKEN_BYTES} bytes",
        lambda p: p.token_bytes > MAX_TOKEN_BYTES,
        dict.fromkeys(ALL, f"it takes positions of at most {MAX_TOKEN_BYTES} bytes"),
    ),
    Rule(
        "2**31 numbers and more, in a cache or out of it",
        lambda p: p.huge,
        dict.fromkeys(ALL, "its kernel counts them in int32"),
    ),
    Rule(
        "new keys and values neither of which is contiguous",
        lambda p: p.strided,
        {APPEND: "copied before it they would cost a launch more than it spares"},
    ),
    Rule(
        "keys that do not start at the first position (cache_leftpad)",
        lambda p: p.padded,
        {GATHER: "it starts at the first position of a page"},
    ),
    Rule(
        "keys in a cache, with gradient",
        lambda p: p.needs_grad,
        {GATHER: "it has no gradient"},
    ),
)

APPENDS = (
    Candidate(APPEND, fused.APPEND, shortcut=True, check=CHECK),
    Candidate(TORCH, composed.APPEND),
)
GATHERS = (
    Candidate(GATHER, fused.GATHER, shortcut=True, check=CHECK),
    Candidate(TORCH, composed.GATHER),
)


def _candidates(problem: Transfer) -> tuple[Candidate, ...]:
    return APPENDS if isinstance(problem, Append) else GATHERS


WHOLE = Table(TABLE, _candidates)
