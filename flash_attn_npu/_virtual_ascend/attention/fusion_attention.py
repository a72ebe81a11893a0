"""npu_fusion_attention and its gradient, all versions: the real operator runs first, then the rules
a card's tiling applies, then the float64 reference fills what the operator allocated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..machine.memory import host_view
from ..machine.refusal import require
from . import reference
from .call import AttentionCall, unpack
from .rules import check_backward, check_forward

Kernel = Callable[..., Any]


def forward_kernel(version: int, real: Kernel) -> Kernel:
    """A replacement for npu_fusion_attention's kernel of the given version."""

    def kernel(given: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        results = real(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            call = unpack(version, given)
            poisoned = _poison(results[:3])
            check_forward(call)
            seed, offset = int(results[4]), int(results[5])
            dropout = reference.dropout_of(call, seed, offset)
            _check_dropout_mask(given, call, dropout)
            if call.query.numel():
                reference.forward(call, dropout, poisoned)
        return results

    return kernel


def backward_kernel(version: int, real: Kernel) -> Kernel:
    """A replacement for npu_fusion_attention_grad's kernel of the given version."""

    def kernel(given: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        saved = [given[name] for name in ("softmax_max", "softmax_sum", "attention_in")]
        require(
            all(tensor is not None for tensor in saved),
            "the gradient needs softmax_max, softmax_sum and attention_in",
        )
        results = real(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            call = unpack(version, given)
            gradients = _poison(results[:3])
            sink_gradient = _sink_gradient(call, results[-1])
            maximum, total, attention = (host_view(tensor) for tensor in saved)
            dy = host_view(given["dy"])
            check_forward(call)
            check_backward(call, dy, (maximum, total), attention)
            _check_numels(given, call)
            dropout = reference.dropout_of(call, int(given["seed"] or 0), int(given["offset"] or 0))
            if call.query.numel():
                given_to_kernel = (dy, maximum, total, attention)
                reference.backward(call, dropout, given_to_kernel, gradients, sink_gradient)
        return results

    return kernel


def dropout_mask_kernel(real: Kernel) -> Kernel:
    """A replacement for _npu_dropout_gen_mask: the bits that the attention operators drop by."""

    def kernel(given: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        packed = real(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            count = 1
            for size in given["size"]:
                count *= size
            kept = reference.keep_bits(count, 1 - given["p"], given["seed"], given["offset"])
            host_view(packed).zero_()[: -(-count // 8)].copy_(pack(kept))
        return packed

    return kernel


def pack(kept: torch.Tensor) -> torch.Tensor:
    """Eight booleans to a byte, the first in the lowest bit."""
    padded = torch.zeros(-(-kept.numel() // 8) * 8, dtype=torch.uint8, device="cpu")
    padded[: kept.numel()] = kept
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device="cpu")
    return (padded.view(-1, 8) * weights).sum(1).to(torch.uint8)


def _check_dropout_mask(
    given: dict[str, Any], call: AttentionCall, dropout: reference.Dropout | None
) -> None:
    mask = given.get("dropout_mask")
    if mask is None or dropout is None:
        return
    expected = pack(dropout.kept)
    require(
        torch.equal(host_view(mask).reshape(-1)[: expected.numel()], expected),
        "dropout_mask must be what (seed, offset) give: the gradient regenerates it from them",
    )


def _check_numels(given: dict[str, Any], call: AttentionCall) -> None:
    """The gradient draws as many bits as it is told; the third version counts them itself."""
    if call.keep_prob >= 1 or "numels" not in given:
        return
    drawn = call.heads * sum(rows * columns for rows, columns in call.lengths)
    require(
        given["numels"] == drawn,
        f"numels must be what the forward returned, {drawn}, got {given['numels']}",
    )


def _poison(outputs: Any) -> tuple[torch.Tensor, ...]:
    """Host views of freshly allocated outputs, NaN so that what nobody computes is seen."""
    return tuple(host_view(output).fill_(torch.nan) for output in outputs)


def _sink_gradient(call: AttentionCall, output: torch.Tensor) -> torch.Tensor | None:
    return host_view(output).zero_() if call.sink is not None and output.numel() else None
