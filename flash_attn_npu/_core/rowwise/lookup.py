"""Rotations at positions in a tensor, by a kernel that looks the rows of the tables up itself.

That they are rotated otherwise is no loss that anybody is told of: `rotation` does that then.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ..ground.functions import FORWARD, listed
from ..ground.memory import Memo
from ..kernels.ascend.lookup import keep, kept, side_by_side
from ..problems.rowwise import MROPE, Lookup, Tables, Turn
from ..table.choice import begin, plan
from ..table.rowwise import MAX_MROPE_WIDTH
from ..verification.kinds import busy

__all__ = ["keep", "turned_at"]

MOST_ROWS = 4096
"""Positions on the host that are remembered on the device, for the next layer of the step."""


_rows: Memo[Hashable, Tensor] = Memo(
    "positions that are rotated", 16, nbytes=1 << 20, contents=True
)


def turned_at(
    xs: tuple[Tensor, ...], cos: Tensor, sin: Tensor, turn: Turn, rows: Callable[[], Any]
) -> list[Tensor] | None:
    """xs rotated at rows of the tables, as new tensors; None where no kernel looks rows up.

    Args:
        xs: one or two of (*tokens, *heads, headdim), alike but for their heads.
        rows: gives one for each token, on the host or on a device.
    """
    device = xs[0].device
    if device.type != "npu" or turn.conjugate or FORWARD._current_level >= 0:
        return None
    if any(map(busy, (*xs, cos, sin))):
        return None
    dims = 2 if turn.cu_seqlens is None else 1
    folds = _folds(xs, dims)
    parts = xs
    if folds > 1:
        parts = tuple([x.reshape(*x.shape[:dims], folds, -1, x.shape[-1]) for x in xs])
        dims += 1
    pair = kept(cos, sin)
    found = plan(_problem(parts, cos, sin, turn, dims)._replace(whole=pair is not None))
    if found.name != MROPE or sum(x.numel() for x in xs) > found.kernel.at_once:
        return None
    begin(found)
    at = rows()
    at = _on(at if folds == 1 else at[..., None].expand(*at.shape, folds), device)
    if pair is None:
        tables, at = _of_rows(cos, sin, at)
    else:
        tables = Tables(cos, sin, side_by_side(pair, cos, sin))
    turned: list[Tensor] = found.kernel.forward(found.problem, parts, tables, at)
    if folds == 1:
        return turned
    return [out.view(x.shape) for out, x in zip(turned, xs, strict=True)]


def _of_rows(cos: Tensor, sin: Tensor, at: Tensor) -> tuple[Tables, Tensor]:
    """Tables of these rows alone, and where in them each lies: so all calls have the same bits."""
    # index_select refuses a negative row; cos[at] would count it from the end
    cos, sin = cos.index_select(0, at), sin.index_select(0, at)
    return Tables(cos, sin, torch.cat((cos, sin), dim=-1)), _counted(len(at), at.device)


def _counted(tokens: int, device: torch.device) -> Tensor:
    """0, 1, ... on the device."""
    if tokens > MOST_ROWS:
        return torch.arange(tokens, device=device)
    there = _rows.recall((tokens, device))
    if there is None:
        # it outlives this call
        with torch.inference_mode(False):
            there = torch.arange(tokens, device="cpu").to(device)
        _rows.put((tokens, device), there)
    return there


def _folds(xs: tuple[Tensor, ...], dims: int) -> int:
    """Into how many tokens each is cut, so that none of two has too many heads; 1 if none can."""
    heads, headdim = [x.shape[dims:-1].numel() for x in xs], xs[0].shape[-1]
    if max(heads) * headdim <= MAX_MROPE_WIDTH or len(xs) == 1:
        return 1
    fitting = (
        folds
        for folds in range(2, min(heads) + 1)
        if not any(n % folds for n in heads) and max(heads) // folds * headdim <= MAX_MROPE_WIDTH
    )
    return next(fitting, 1)


def _problem(xs: tuple[Tensor, ...], cos: Tensor, sin: Tensor, turn: Turn, dims: int) -> Lookup:
    """dims: how many dimensions of xs are tokens."""
    x = xs[0]
    tokens = x.shape[:dims].numel()
    return Lookup(
        function=turn.function,
        device=x.device,
        dtype=x.dtype,
        table_dtype=torch.promote_types(cos.dtype, sin.dtype),
        empty=not all(t.numel() for t in (*xs, cos)),
        nheads=max(t.shape[dims:-1].numel() for t in xs),
        headdim=x.shape[-1],
        rotary_dim=2 * cos.shape[-1],
        interleaved=bool(turn.interleaved),
        pair=len(xs) == 2,
        several=tokens > 1,
        whole=False,
        differentiated=torch.is_grad_enabled() and any(t.requires_grad for t in (*xs, cos, sin)),
    )


def _on(rows: Tensor, device: torch.device) -> Tensor:
    """(tokens,) int64 on the device."""
    rows = rows.flatten()
    if rows.device.type != "cpu" or rows.numel() > MOST_ROWS:
        return rows.to(device, torch.int64)
    key = (tuple(listed(rows)), device)
    there = _rows.recall(key)
    if there is None:
        # it outlives this call
        with torch.inference_mode(False):
            there = torch.tensor(key[0], dtype=torch.int64, device="cpu").to(device)
        _rows.put(key, there)
    return there
