"""npu_mrope: rows of one table of cos and sin, looked up by position, rotate queries and keys.

By the documents of aclnnRopeWithSinCosCache and its kernel, which reads rows of both where they
lie, in units of 32 bytes. Positions of several kinds (mrope_section) are not simulated.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..attention.call import is_ascend_950
from ..machine.fused_call import (
    Given,
    Kernel,
    builder,
    check_dims,
    check_not_empty,
    check_one_dtype,
    check_shape,
    is_ascend_310p,
)
from ..machine.refusal import require

Outputs = tuple[torch.Tensor, ...]

_BLOCK_BYTES = 32
_MOST_BLOCKS_APART = 65535
# What a release of CANN takes whose kernel holds all heads of a token at once: sglang's limit
_MOST_WIDTH = 4096
_ROTATED = ("query", "key")


def _check(given: Given) -> None:
    # Newer documents list the 950, older ones do not
    require(not is_ascend_310p() and not is_ascend_950(), "it exists on an A2 and A3 only")
    positions, table, head_size = (given[n] for n in ("positions", "cos_sin_cache", "head_size"))
    check_one_dtype(given, (*_ROTATED, "cos_sin_cache"))
    for name in (*_ROTATED, "cos_sin_cache"):
        check_dims(given[name], 2, 2, name)
        check_not_empty(given[name], name)
    _check_modes(given)
    _check_width(head_size, table.dtype, "head_size")
    _check_width(table.shape[-1], table.dtype, "rotary_dim")
    require(table.shape[-1] <= head_size, f"rotary_dim must be at most head_size {head_size}")
    tokens = len(given["query"])
    require(positions.dtype == torch.int64, f"positions must be int64, got {positions.dtype}")
    check_shape(positions, (tokens,), "positions")
    within = bool(((positions >= 0) & (positions < len(table))).all())
    require(within, f"positions must be rows of cos_sin_cache, which has {len(table)}")
    for name in _ROTATED:
        _check_rows(given[name], tokens, head_size, name)


def _check_modes(given: Given) -> None:
    mode, section = given["rotary_mode"], given["mrope_section"]
    require(mode in ("half", "interleave"), f"rotary_mode must be half or interleave, got {mode!r}")
    plain = section is None or list(section) == [0, 0, 0]
    require(plain, f"mrope_section {section} is not simulated")
    require(given.get("cache_mode", "default") == "default", "cache_mode is not simulated")


def _check_width(width: int, dtype: torch.dtype, name: str) -> None:
    unit = 16 if dtype == torch.float32 else 32
    require(width > 0 and width % unit == 0, f"{name} must be a multiple of {unit}, got {width}")


def _check_rows(x: torch.Tensor, tokens: int, head_size: int, name: str) -> None:
    width = x.shape[1]
    require(len(x) == tokens, f"{name} must have query's {tokens} tokens, got {len(x)}")
    require(width % head_size == 0, f"{name} must have whole heads of {head_size}, got {width}")
    require(width <= _MOST_WIDTH, f"{name} may have {_MOST_WIDTH} numbers of a token, got {width}")
    require(
        x.stride(1) == 1, f"rows of {name} must be dense: a stride between them is all it takes"
    )
    start, apart = x.storage_offset() * x.itemsize, x.stride(0) * x.itemsize
    require(start % _BLOCK_BYTES == 0, f"{name} must start at a multiple of {_BLOCK_BYTES} bytes")
    blocks, rest = divmod(apart - width * x.itemsize, _BLOCK_BYTES)
    require(
        tokens == 1 or (rest == 0 and 0 <= blocks <= _MOST_BLOCKS_APART),
        f"rows of {name} must lie 0 to {_MOST_BLOCKS_APART} whole blocks of {_BLOCK_BYTES} bytes "
        f"apart, got {blocks} and {rest} bytes",
    )


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mode: str) -> torch.Tensor:
    """(tokens, heads, rotary_dim) by cos and sin of (tokens, 1, rotary_dim / 2)."""
    a, b = x.chunk(2, -1) if mode == "half" else (x[..., ::2], x[..., 1::2])
    pairs = (a * cos - b * sin, b * cos + a * sin)
    return torch.cat(pairs, -1) if mode == "half" else torch.stack(pairs, -1).flatten(-2)


def _mrope(given: Given, outputs: Outputs) -> None:
    rows = given["cos_sin_cache"].double()[given["positions"], None]
    cos, sin = rows.chunk(2, -1)
    for name, out in zip(_ROTATED, outputs, strict=True):
        heads = given[name].double().unflatten(-1, (-1, given["head_size"]))
        head, rest = heads[..., : rows.shape[-1]], heads[..., rows.shape[-1] :]
        turned = _turned(head, cos, sin, given["rotary_mode"])
        out.copy_(torch.cat((turned, rest), -1).flatten(1))


BUILDERS: dict[str, Callable[[Kernel], Kernel]] = {"npu_mrope": builder(_check, _mrope)}
