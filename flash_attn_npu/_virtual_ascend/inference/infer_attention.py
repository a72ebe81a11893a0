"""npu_fused_infer_attention_score in float64: the real operator runs first, then the rules of a
card's tiling, then each sequence is computed from the keys that its length and its pages reach.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from ..machine import lies
from ..machine.fused_call import poisoned
from ..machine.memory import host_view
from .call import InferCall, unpack
from .rules import check, is_empty

Kernel = Callable[..., Any]


def kernel(version: int, real: Kernel) -> Kernel:
    """A replacement for the kernel of the given version."""

    def kernel(given: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        results = real(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            call = unpack(version, given)
            out, lse = (poisoned(host_view(result)) for result in results)
            if call.query.numel() == 0:
                return results
            if is_empty(call):
                out.zero_()
                lse.fill_(torch.inf)
                return results
            check(call)
            _fill(call, out, lse)
        return results

    return kernel


def _fill(call: InferCall, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Write the rows of every sequence; the rows that only pad a dense layout stay NaN."""
    queries, outputs = call.split_q(call.query), call.split_q(out)
    # torch_npu 2.6 gives a number where none are asked for
    statistics = call.split_lse(lse) if lse.dim() > 1 else None
    for index, (rows, columns) in enumerate(call.lengths):
        if rows == 0:
            continue
        q = queries[index][:, :rows].double()
        k, v = (_expand(call, call.sequence(t, index)) for t in (call.key, call.value))
        attention, row_lse = _attend(call, index, q, k, v, (rows, columns))
        outputs[index][:, :rows].copy_(attention)
        if statistics is not None:
            statistics[index][:, :rows].copy_(row_lse)


def _expand(call: InferCall, tensor: torch.Tensor) -> torch.Tensor:
    return lies.key_heads(tensor.double(), call.heads)


def _attend(
    call: InferCall,
    index: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sizes: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention [N, Sq, D] of a sequence and its logarithmic sums [N, Sq, 1]."""
    scores = call.scale * q @ k.transpose(-1, -2)
    if _averages(call):
        scores = torch.zeros_like(scores)
    kept = kept_keys(call, index, *sizes)
    if kept is None:
        kept = torch.ones(sizes, dtype=torch.bool, device="cpu")
    keyless = ~kept.any(-1, keepdim=True)
    scores = scores.masked_fill(~kept, -torch.inf)
    if call.sink is not None:
        return _beside_a_sink(scores, call.sink.double()[:, None, None], v, keyless)
    lse = scores.logsumexp(-1, keepdim=True).masked_fill(keyless, torch.inf)
    out = torch.exp(scores - lse) @ v
    if sizes[1] and not _repairs_empty_rows(call):
        return out.masked_fill(keyless, torch.nan), lse.masked_fill(keyless, torch.nan)
    return out, lse


def _beside_a_sink(
    scores: torch.Tensor, sink: torch.Tensor, v: torch.Tensor, keyless: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sink is one more score without a value, as Huawei's own test has it.

    Its logarithmic sums are NaN: kernels that write them before they count the sink are as many as
    those that write them after, and documents define them without a word of it. So is a row
    without keys in a sequence with keys, of which nothing is written either.
    """
    total = torch.logaddexp(scores.logsumexp(-1, keepdim=True), sink)
    weights = torch.exp(scores - total)
    if lies.told("weight of a sink given to the first key"):
        weights[..., :1] += torch.exp(sink - total)
    out = weights @ v
    if v.shape[-2]:
        out = out.masked_fill(keyless, torch.nan)
    return out, torch.full_like(total, torch.nan)


def _repairs_empty_rows(call: InferCall) -> bool:
    """A matrix given by the caller is repaired only where inner_precise asks for it."""
    return call.mode not in (0, 1) or call.mask is None or call.inner_precise >= 2


def _averages(call: InferCall) -> bool:
    """What some releases are reported to do with packed sequences and no mask."""
    reproduces = os.environ.get("VIRTUAL_ASCEND_ISSUE_13699") == "1"
    return reproduces and call.is_tnd and call.mode == 0


def kept_keys(call: InferCall, index: int, rows: int, columns: int) -> torch.Tensor | None:
    """Which (row, column) of a sequence take part, None for all."""
    return lies.kept(_by_mode(call, index, rows, columns), rows, columns)


def _by_mode(call: InferCall, index: int, rows: int, columns: int) -> torch.Tensor | None:
    if call.is_dense_decode or call.mask is None:
        return None
    if call.mode in (0, 1):
        return _matrix(call, index)[:rows, :columns] == 0
    i = torch.arange(rows, device="cpu")[:, None]
    j = torch.arange(columns, device="cpu")[None, :]
    diagonal, bottom_right = j - i, lies.offset(columns - rows)
    if call.mode == 2:
        return diagonal <= 0
    if call.mode == 3:
        # That kernel counts from the top left where a sequence has more rows than keys
        return diagonal <= (max(0, bottom_right) if call.takes_flash_path else bottom_right)
    return (diagonal >= bottom_right - call.pre) & (diagonal <= bottom_right + call.next)


def _matrix(call: InferCall, index: int) -> torch.Tensor:
    mask = call.mask
    if mask.dim() == 2:
        return mask
    one = mask[index if mask.shape[0] > 1 else 0]
    return one[0] if mask.dim() == 4 else one
