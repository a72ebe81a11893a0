"""What the documents forbid the rotary operators: never tried on a card. The kernels guess the
layout from the shapes, so a call is allowed if any reading of its shapes keeps every rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from ..attention.call import is_ascend_950
from ..machine.fused_call import (
    DTYPES,
    Given,
    check_dtype,
    check_not_empty,
    check_one_dtype,
    check_shape,
    is_ascend_310p,
)
from ..machine.refusal import require

_LAYOUTS = ("BNSD", "BSND", "SBND")
_BLOCK_BYTES = 32
# The most that a card of these generations has: the strictest of what the documents may mean
_VECTOR_CORES = 48
_MOST_STRIDE_BLOCKS = 65535
_APPLIED_BUFFER = 192 * 1024


class Reading(NamedTuple):
    """Shapes taken for one layout; table_b and table_n are the sizes that cos and sin have."""

    layout: str
    b: int
    s: int
    n: int
    d: int
    table_b: int
    table_n: int
    itemsize: int

    @property
    def broadcasts_all(self) -> bool:
        return self.table_b == self.table_n == 1


Obstacle = Callable[[Reading, Given], "str | None"]


def check_rotary(given: Given) -> None:
    x = given["input"]
    require(given["rotate"] is None, "rotate is not simulated")
    _check_tensors(given, x)
    if is_ascend_950():
        _check_broadcast(x, given)
        return
    _check_any(given, x, _forward_obstacle)


def check_rotary_backward(given: Given) -> None:
    x = given["input"]
    require(not is_ascend_310p(), "the gradient does not exist on a 310P")
    _check_tensors(given, x)
    check_shape(given["grad"], x.shape, "grad")
    if is_ascend_950():
        _check_broadcast(x, given)
        return
    _check_any(given, x, _backward_obstacle)


def _check_tensors(given: Given, x: torch.Tensor) -> None:
    cos, sin, mode = given["r1"], given["r2"], given["rotary_mode"]
    check_dtype(x, "input")
    check_not_empty(x, "input")
    modes = ("half",) if is_ascend_310p() else ("half", "interleave")
    require(mode in modes, f"rotary_mode must be one of {modes}, got {mode!r} (not simulated)")
    require(x.dim() in (3, 4), f"input must have 3 or 4 dimensions, got {tuple(x.shape)}")
    for name, tensor in (("r1", cos), ("r2", sin)):
        require(tensor.dtype in DTYPES, f"{name} is {tensor.dtype}: torch_npu casts no such dtype")
        require(
            tensor.dim() == x.dim() and tensor.shape[-1] == x.shape[-1],
            f"{name} must have input's dimensions and D {tuple(x.shape)}, got "
            f"{tuple(tensor.shape)}",
        )
    check_shape(sin, cos.shape, "r2")
    _check_width(x.shape[-1])


def _check_width(d: int) -> None:
    require(d % 2 == 0, f"D must be even, got {d}")
    if is_ascend_310p():
        require(d in (32, 64, 96, 128), f"D must be 32, 64, 96 or 128 on a 310P, got {d}")
    elif is_ascend_950():
        require(d <= 1024, f"D must be at most 1024, got {d}")
    else:
        require(d < 896, f"D must be below 896, got {d}")


def _check_broadcast(x: torch.Tensor, given: Given) -> None:
    table = given["r1"]
    fits = all(size in (1, full) for size, full in zip(table.shape, x.shape, strict=True))
    packed = x.dim() == 3 and table.shape[0] != x.shape[0] and not _is_one_row(x, given)
    require(
        fits and not packed,
        f"r1 and r2 {tuple(table.shape)} must broadcast to input {tuple(x.shape)}",
    )


def _is_one_row(x: torch.Tensor, given: Given) -> bool:
    """Packed rows, turned alike by one row of tables: what Huawei's own test of `half` does."""
    one_row = x.dim() == 3 and given["r1"].shape[:2] == (1, 1)
    return one_row and given["rotary_mode"] == "half" and "grad" not in given


def _check_any(given: Given, x: torch.Tensor, obstacle: Obstacle) -> None:
    """Refuse with every reading's obstacle, or with the shapes where there is no reading."""
    found = []
    one_row = _is_one_row(x, given)
    for reading in _readings(x, given["r1"].expand(len(x), -1, -1) if one_row else given["r1"]):
        reason = obstacle(reading, given)
        if reason is None:
            return
        found.append(f"as {reading.layout}: {reason}")
    shapes = f"input {tuple(x.shape)} with r1 and r2 {tuple(given['r1'].shape)}"
    require(False, f"{shapes}: {'; '.join(found) or 'no layout has such shapes'}")


def _readings(x: torch.Tensor, table: torch.Tensor) -> Iterator[Reading]:
    if x.dim() == 3:
        t, n, d = x.shape
        if table.shape[0] == t and table.shape[1] in (1, n):
            yield Reading("TND", 1, t, n, d, 1, table.shape[1], x.itemsize)
        return
    for layout in _LAYOUTS:
        (b, s, n), (table_b, table_s, table_n) = (
            [tensor.shape[layout.index(axis)] for axis in "BSN"] for tensor in (x, table)
        )
        if table_s == s and (table_b, table_n) in ((1, 1), (b, 1), (b, n)):
            yield Reading(layout, b, s, n, x.shape[-1], table_b, table_n, x.itemsize)


def _forward_obstacle(reading: Reading, given: Given) -> str | None:
    if given["rotary_mode"] == "interleave":
        return _interleave_obstacle(reading)
    if reading.b >= 1000 or reading.n >= 1000:
        return f"B and N must be below 1000, got {reading.b} and {reading.n}"
    if is_ascend_310p():
        return _obstacle_310p(reading)
    return _bnsd_obstacle(reading) if reading.layout == "BNSD" else None


def _bnsd_obstacle(reading: Reading) -> str | None:
    heads, rows = reading.b * reading.n, reading.s
    if reading.d // 2 % (_BLOCK_BYTES // reading.itemsize) == 0:
        return None if heads <= rows * 8 else f"B*N {heads} must not exceed S*8, S is {rows}"
    if reading.d >= 80 or heads * 2 <= -(-rows // _VECTOR_CORES):
        return None
    return (
        f"a D {reading.d} below 80 whose half is not 32-byte aligned needs B*N*2 {heads * 2} not "
        f"above ceil(S / cores), S is {rows}"
    )


def _obstacle_310p(reading: Reading) -> str | None:
    if reading.layout == "BNSD":
        heads = reading.b * reading.n
        return None if heads <= reading.s * 8 else f"B*N {heads} must not exceed S*8"
    apart = reading.n if reading.layout in ("BSND", "TND") else reading.b * reading.n
    blocks = (apart - 1) * reading.d * reading.itemsize // _BLOCK_BYTES
    if blocks < _MOST_STRIDE_BLOCKS:
        return None
    return f"{blocks} blocks of 32 bytes between two rows of a head: at most 65534"


def _interleave_obstacle(reading: Reading) -> str | None:
    if not reading.broadcasts_all:
        return "interleave needs r1 and r2 without B and N"
    heads = reading.b * reading.n
    return None if heads < 1000 else f"interleave needs B*N below 1000, got {heads}"


def _backward_obstacle(reading: Reading, given: Given) -> str | None:
    if given["rotary_mode"] == "interleave":
        return _interleave_obstacle(reading)
    if reading.b >= 1000 or reading.n >= 1000:
        return f"B and N must be below 1000, got {reading.b} and {reading.n}"
    shared_over_heads = reading.table_n == 1 < reading.n and reading.table_b == reading.b > 1
    if reading.layout in ("BNSD", "BSND") and shared_over_heads and reading.b >= reading.s:
        return f"r1 and r2 of every sequence need B {reading.b} below S {reading.s}"
    differentiated = given["requires_grad"] & {"r1", "r2"}
    if differentiated and reading.b * reading.n > 1024:
        return f"gradients of r1 and r2 need B*N at most 1024, got {reading.b * reading.n}"
    return None


def check_applied(given: Given) -> None:
    """npu_apply_rotary_pos_emb; what a 950 has beyond the others is not simulated."""
    query, key, cos, sin = (given[name] for name in ("query", "key", "cos", "sin"))
    # BSH is what older torch_npu calls it
    layout, mode = given["layout"].replace("BSH", "BSND"), given["rotary_mode"]
    check_one_dtype(given, ("query", "key", "cos", "sin"))
    require(layout in ("BSND", "TND"), f"layout must be BSND or TND, got {layout!r}")
    require(mode == "half", f"rotary_mode must be half, got {mode!r}")
    require(
        query.dim() == len(layout),
        f"layout {layout} needs {len(layout)} dimensions, got {tuple(query.shape)}",
    )
    for name in ("query", "key", "cos"):
        check_not_empty(given[name], name)
    width = query.shape[-1]
    require(width in (64, 128), f"D must be 64 or 128, got {width}")
    check_shape(key, (*query.shape[:-2], *key.shape[-2:-1], width), "key")
    for name, table in (("cos", cos), ("sin", sin)):
        check_shape(table, (*query.shape[:-2], 1, width), name)
    _check_applied_heads(query, key)


def _check_applied_heads(query: torch.Tensor, key: torch.Tensor) -> None:
    heads, width = query.shape[-2] + key.shape[-2], query.shape[-1]
    require(heads <= 255, f"query and key may have 255 heads together, got {heads}")
    cast = query.dtype == torch.bfloat16
    computed = 4 if cast else query.itemsize
    needed = heads * width * computed * 5 + width * query.itemsize * 4 + cast * width * 8
    require(
        needed <= _APPLIED_BUFFER,
        f"{heads} heads of D {width} need {needed} bytes of buffer: a core has {_APPLIED_BUFFER}",
    )
