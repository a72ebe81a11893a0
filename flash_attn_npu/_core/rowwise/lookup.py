"""Rotations at positions in a tensor, by a kernel that looks the rows of the tables up itself.

That they are rotated otherwise is no loss that anybody is told of: `rotation` does that then.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ..ground.memory import Memo
from ..kernels.ascend.lookup import side_by_side
from ..problems.rowwise import MROPE, Lookup, Tables, Turn
from ..table.choice import begin, plan
from ..table.rowwise import MAX_MROPE_WIDTH
from ..verification.kinds import busy

__all__ = ["turned_at"]

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
    if device.type != "npu" or turn.conjugate or any(map(busy, (*xs, cos, sin))):
        return None
    dims = 2 if turn.cu_seqlens is None else 1
    folds = _folds(xs, dims)
    parts = xs
    if folds > 1:
        parts = tuple([x.reshape(*x.shape[:dims], folds, -1, x.shape[-1]) for x in xs])
        dims += 1
    found = plan(_problem(parts, cos, sin, turn, dims))
    if found.name != MROPE or sum(x.numel() for x in xs) > found.kernel.at_once:
        return None
    joined = side_by_side(cos, sin)
    if joined is None:
        return None
    begin(found)
    at = rows()
    at = at if folds == 1 else at[..., None].expand(*at.shape, folds)
    tables = Tables(cos, sin, joined)
    turned: list[Tensor] = found.kernel.forward(found.problem, parts, tables, _on(at, device))
    if folds == 1:
        return turned
    return [out.view(x.shape) for out, x in zip(turned, xs, strict=True)]


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
        differentiated=torch.is_grad_enabled() and any(t.requires_grad for t in (*xs, cos, sin)),
    )


def _on(rows: Tensor, device: torch.device) -> Tensor:
    """(tokens,) int64 on the device."""
    rows = rows.flatten()
    if rows.device.type != "cpu" or rows.numel() > MOST_ROWS:
        return rows.to(device, torch.int64)
    key = (tuple(rows.tolist()), device)
    there = _rows.recall(key)
    if there is None:
        # it outlives this call
        with torch.inference_mode(False):
            there = torch.tensor(key[0], dtype=torch.int64, device="cpu").to(device)
        _rows.put(key, there)
    return there
