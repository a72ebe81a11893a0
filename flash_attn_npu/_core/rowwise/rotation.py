"""Rotary embedding: positions looked up, and the rotation that serves.

All rotary functions of the package come through `rotate`, outside of autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ground.chip import compiles_just_in_time, remembers_compiling
from ..ground.dense_arguments import require_local, require_truth
from ..ground.functions import FORWARD, PLAIN, refuse_tangents
from ..ground.storage import blocks, require_writable
from ..kernels.composed.rotation import few, few_of
from ..problems.rowwise import Rotation, Turn
from ..table.choice import Plan, begin, choose, recall
from ..table.rowwise import MAX_MROPE_WIDTH
from .keys import PLAIN_TORCH
from .positions import Part, Positions, check_dense, dense_positions, positions_of
from .small import is_few

__all__ = ["rotate", "rotate_alike"]

_compiling = torch.compiler.is_compiling
_grad_enabled = torch.is_grad_enabled


def rotate(x: Tensor, cos: Tensor, sin: Tensor, fields: tuple[Any, ...]) -> Tensor:
    """What `apply_rotary` promises, reported under the name of the function that a Turn has.

    Args:
        fields: those of a Turn, in their order; to make one of them takes longer than to read it.
    """
    start, cu_seqlens, _, _, inplace, conjugate, _ = fields
    forward = FORWARD._current_level >= 0
    if forward and isinstance(x, Tensor) and x.device.type == "npu":
        refuse_tangents(PLAIN_TORCH, x=x, cos=cos, sin=sin)
    key = None if cu_seqlens is not None else _key(x, cos, sin, fields)
    found = None if key is None else recall(key)
    if found is None or not 0 <= start <= cos.shape[0] - x.shape[1]:
        return _rotated(x, cos, sin, Turn(*fields), key)
    if not inplace:
        small = found.few
        # what torch's own autograd takes down must not be written over
        recorded = _grad_enabled() and (x.requires_grad or cos.requires_grad or sin.requires_grad)
        if small is not None and not recorded and not forward:
            begin(found)
            end = start + x.shape[1]
            if start or end != cos.shape[0]:
                cos, sin = cos[start:end], sin[start:end]
            return small(x, cos, sin, conjugate)  # type: ignore[no-any-return]
        if found.direct is not None and found.problem.rotary_dim == x.shape[-1]:
            # nobody was passed over, so there is no policy to ask
            found.tally.calls += 1
            shared = _shared(cos, sin, Turn(*fields), x.shape)
            return found.direct(x, *shared)  # type: ignore[no-any-return]
    else:
        require_writable(x=x)
    positions = Positions(start, None, x.device)
    looked_up = partial(_lookup, cos, sin, positions, found.problem.head_dims, conjugate)
    return _turned(begin(found), x, inplace, looked_up)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, turn: Turn, key: Hashable) -> Tensor:
    """`rotate` of what no plan is known for, or is wrong in its positions."""
    require_truth(interleaved=turn.interleaved, inplace=turn.inplace, conjugate=turn.conjugate)
    require_local(x=x, cos=cos, sin=sin)
    positions = positions_of(x, cos, sin, turn)
    if turn.inplace:
        require_writable(x=x)
    if x.device.type == "npu":
        whole = _turned_alone(x, cos, sin, turn, positions)
        if whole is not None:
            return whole
    problem = _problem(turn, x, cos, x.dim() - (3 if turn.cu_seqlens is None else 2))
    found = choose(problem, key)
    if key is not None and is_few(x) and found.direct is None:
        how = few_of(problem, x)
        found.few = None if how is None else partial(few, how)
    looked_up = partial(_lookup, cos, sin, positions, found.problem.head_dims, turn.conjugate)
    return _turned(found, x, turn.inplace, looked_up)


def rotate_alike(xs: tuple[Tensor, ...], cos: Tensor, sin: Tensor, turn: Turn) -> list[Tensor]:
    """`rotate` of padded batches of as many tokens, (batch, seqlen, nheads, headdim).

    Rows of the tables are looked up once for all of them.
    """
    problems = []
    for x in xs:
        check_dense(x, cos, sin, turn.seqlen_offsets)
        problems.append(_problem(turn, x, cos, 1))
    positions = dense_positions(xs[0], turn.seqlen_offsets)
    turned = _turned_at(xs, cos, sin, turn, positions)
    if turned is not None:
        return turned
    tokens = _all_tokens(xs[0], turn)
    tables = _lookup(cos, sin, positions, 1, turn.conjugate, tokens)

    def looked_up(part: Part) -> tuple[Tensor, Tensor]:
        part = part[-1:] if tables[0].dim() == 3 else part
        return tables[0][part], tables[1][part]

    plans = [choose(problem) for problem in problems]
    return [_turned(plan, x, False, looked_up) for plan, x in zip(plans, xs, strict=True)]


def _turned_alone(
    x: Tensor, cos: Tensor, sin: Tensor, turn: Turn, positions: Positions
) -> Tensor | None:
    """`_turned_at` of one tensor, written where it lies if that is asked for."""
    heads = len(_all_tokens(x, turn))
    wide = x.shape[heads:].numel() > MAX_MROPE_WIDTH and x.shape[heads] > 1
    parts = x.tensor_split(2, dim=heads) if wide else (x,)
    turned = _turned_at(parts, cos, sin, turn, positions)
    if turned is None:
        return None
    if not turn.inplace:
        return turned[0] if len(turned) == 1 else torch.cat(turned, dim=heads)
    for part, values in zip(parts, turned, strict=True):
        part.copy_(values)
    return x


def _turned_at(
    xs: tuple[Tensor, ...], cos: Tensor, sin: Tensor, turn: Turn, positions: Positions
) -> list[Tensor] | None:
    """xs as new tensors, by a kernel that looks rows up by itself; None where there is none."""
    if isinstance(positions.starts, int) or torch.compiler.is_compiling():
        return None
    if xs[0].device.type != "npu":
        return None
    # of a step on an NPU, and of no import
    from .lookup import turned_at

    rows = partial(positions.rows, _all_tokens(xs[0], turn))
    return turned_at(xs, cos, sin, turn, rows)


def _all_tokens(x: Tensor, turn: Turn) -> Part:
    tokens = x.shape[: 2 if turn.cu_seqlens is None else 1]
    return tuple([slice(0, size) for size in tokens])


def _key(x: Tensor, cos: Tensor, sin: Tensor, fields: tuple[Any, ...]) -> Hashable:
    """`key_of`, written out, for a padded batch that starts at one position; else None.

    Gradients are no matter of a rotation's plan.
    """
    start, _, _, interleaved, inplace, conjugate, function = fields
    if _compiling() or type(start) is not int:
        return None
    if not type(interleaved) is type(inplace) is type(conjugate) is bool:
        return None
    if not (type(x) in PLAIN and type(cos) in PLAIN and type(sin) in PLAIN):
        return None
    try:
        device = x.device
        # fmt: off
        return (
            function, interleaved, x.shape, x.dtype, device, x.layout, cos.shape, cos.dtype,
            cos.device, cos.layout, sin.shape, sin.dtype, sin.device, sin.layout,
            not x.is_cpu and remembers_compiling(device),
        )
        # fmt: on
    except RuntimeError:
        # a nested tensor has no shape
        return None


def _turned(
    found: Plan, x: Tensor, inplace: bool, looked_up: Callable[[Part], tuple[Tensor, Tensor]]
) -> Tensor:
    """x by the kernel of a plan that has begun; block by block of tokens, if it is large.

    Args:
        looked_up: gives the rows of both tables for a block of tokens.
    """
    at_once = found.kernel.at_once
    tokens = x.shape[: x.dim() - found.problem.head_dims - 1]
    direct = None
    if not inplace and found.problem.rotary_dim == x.shape[-1]:
        direct = found.direct
    if direct is not None or torch.compiler.is_compiling() or x.numel() <= at_once:
        tables = looked_up(tuple([slice(0, size) for size in tokens]))
        if direct is not None:
            turned: Tensor = direct(x, *tables)
            return turned
        out = x if inplace else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _turn(found, x, tables, out)
        return out
    out = x if inplace else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for part in blocks(tokens, x.shape[len(tokens) :].numel(), at_once):
        source = x[part]
        _turn(found, source, looked_up(part), source if inplace else out[part])
    return out


def _turn(found: Plan, x: Tensor, tables: tuple[Tensor, Tensor], out: Tensor) -> None:
    """Write x to out, which may be x."""
    rotary_dim = found.problem.rotary_dim
    found.kernel.forward(found.problem, x, *tables, out)
    if out is not x and rotary_dim < x.shape[-1]:
        out[..., rotary_dim:].copy_(x[..., rotary_dim:])


def _problem(turn: Turn, x: Tensor, cos: Tensor, heads: int) -> Rotation:
    rotary_dim = 2 * cos.shape[-1]
    return Rotation(
        function=turn.function,
        device=x.device,
        dtype=x.dtype,
        table_dtype=cos.dtype,
        empty=x.numel() == 0 or rotary_dim == 0,
        nheads=math.prod(x.shape[-1 - heads : -1]),
        rotary_dim=rotary_dim,
        interleaved=turn.interleaved,
        head_dims=heads,
        just_in_time=compiles_just_in_time(x.device),
    )


def _shared(cos: Tensor, sin: Tensor, turn: Turn, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """`_lookup` for a padded batch of this shape that starts at one position: (1, seqlen, ...)."""
    start, seqlen = turn.seqlen_offsets, shape[1]
    reach, half = cos.shape
    if start or seqlen != reach:
        cos, sin = cos[start : start + seqlen], sin[start : start + seqlen]
    if turn.conjugate:
        sin = -sin
    # one view of each, where dimensions one by one would be as many
    heads = (1,) if len(shape) == 4 else (1,) * (len(shape) - 3)
    return cos.view(1, seqlen, *heads, half), sin.view(1, seqlen, *heads, half)


def _lookup(
    cos: Tensor, sin: Tensor, positions: Positions, heads: int, conjugate: bool, part: Part
) -> tuple[Tensor, Tensor]:
    """Rows of both tables, to be broadcast over the heads; for the turn back if conjugate."""
    rows = positions.rows(part)
    if not isinstance(rows, slice):
        flat = rows.flatten().to(cos.device)
        # index_select refuses a negative row; cos[rows] would count it from the end
        cos, sin = (t.index_select(0, flat).unflatten(0, rows.shape) for t in (cos, sin))
    elif torch.compiler.is_compiling() or rows != slice(0, cos.shape[0]):
        cos, sin = cos[rows], sin[rows]
    if conjugate:
        sin = -sin
    for _ in range(heads):
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return cos, sin
