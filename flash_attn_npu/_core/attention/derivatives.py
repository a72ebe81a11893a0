"""What the dispatcher must know of the operators: the shapes they return, their gradients.

The gradient calls the backward operators, so that compiled graphs and checkpointing see them too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedError
from ..ground import arguments
from ..ground.second_derivatives import first_order
from ..ground.settings import fallback, fallback_policy
from ..problems.results import ROUNDING, Forward, accumulator, rounded_up
from .records import (
    NAMESPACE,
    AnyBackward,
    AnyForward,
    Backward,
    DenseForward,
    VarlenBackward,
    VarlenForward,
)

__all__ = [
    "dense_row_sums",
    "dense_shapes",
    "differentiate",
    "save",
    "sink_grad",
    "varlen_row_sums",
    "varlen_shapes",
]


def dense_shapes(call: DenseForward) -> Forward:
    """The results of `_flash_attn_forward`, unwritten."""
    _on_one_device(call)
    batch, seqlen_q, nheads, _ = call.q.shape
    square = (batch, nheads, rounded_up(seqlen_q), rounded_up(call.k.shape[1]))
    return _unwritten(call, (batch, nheads, seqlen_q), square)


def varlen_shapes(call: VarlenForward) -> Forward:
    """The results of `_flash_attn_varlen_forward`, unwritten."""
    _on_one_device(call)
    total_q, nheads, _ = call.q.shape
    batch = call.cu_seqlens_q.shape[0] - 1
    square = (batch, nheads, rounded_up(call.max_seqlen_q), rounded_up(call.max_seqlen_k))
    return _unwritten(call, (nheads, total_q), square)


def _unwritten(call: AnyForward, lse: tuple[int, ...], square: tuple[int, ...]) -> Forward:
    q, probabilities = call.q, call.return_softmax and 1.0 - call.dropout_p < 1.0
    return Forward(
        q.new_empty(q.shape),
        q.new_empty(lse, dtype=accumulator(q.dtype)),
        q.new_empty(square if probabilities else (0,)),
        torch.empty(2, dtype=torch.int64, device="cpu"),
    )


def dense_row_sums(call: Backward) -> Tensor:
    """What `_flash_attn_backward` returns, unwritten."""
    _on_one_device(call)
    batch, seqlen_q, nheads, _ = call.q.shape
    shape = (batch, nheads, rounded_up(seqlen_q))
    return call.q.new_empty(shape, dtype=accumulator(call.q.dtype))


def varlen_row_sums(call: VarlenBackward) -> Tensor:
    """What `_flash_attn_varlen_backward` returns, unwritten."""
    _on_one_device(call)
    total_q, nheads, _ = call.q.shape
    shape = (nheads, total_q + ROUNDING * (call.cu_seqlens_q.shape[0] - 1))
    return call.q.new_empty(shape, dtype=accumulator(call.q.dtype))


_ON_HOST_TOO = (
    "cu_seqlens_q",
    "cu_seqlens_k",
    "block_table",
    "leftpad_k",
    "seqused_k",
    "rng_state",
)


def _on_one_device(call: AnyForward | AnyBackward) -> None:
    tensors = {name: x for name, x in call._asdict().items() if isinstance(x, Tensor)}
    host = {name: tensors.pop(name) for name in _ON_HOST_TOO if name in tensors}
    arguments.together(tensors.pop("q"), tensors, host)


def save(ctx: Any, call: AnyForward, output: tuple[Tensor, ...]) -> None:
    """Keep what the gradient needs of a forward operator's call."""
    out, lse, s_dmask, rng_state = output
    tensors: dict[str, Any] = {
        name: x for name, x in call._asdict().items() if isinstance(x, Tensor)
    }
    ctx.save_for_backward(*tensors.values(), out, lse, rng_state)
    nothing: dict[str, Any] = dict.fromkeys(tensors)
    ctx.call = call._replace(**nothing)
    ctx.tensors = tuple(tensors)
    # the backward may run in another thread, or behind the block that set the policy
    ctx.policy = fallback_policy()
    ctx.mark_non_differentiable(lse, s_dmask, rng_state)


def differentiate(ctx: Any, dout: Tensor, *_: Any) -> tuple[Any, ...]:
    """The gradients of a forward operator's arguments, one for each field of its record."""
    *tensors, out, lse, rng_state = ctx.saved_tensors
    call: AnyForward = ctx.call._replace(**dict(zip(ctx.tensors, tensors, strict=True)))
    if isinstance(call, VarlenForward):
        _refuse_parts(call)
    q, k, v, sink = call.q, call.k, call.v, call.sink
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    record = VarlenBackward if isinstance(call, VarlenForward) else Backward
    saved = {"out": out, "softmax_lse": lse, "dout": dout, "rng_state": rng_state}
    written = dict(zip(("dq", "dk", "dv"), grads, strict=True))
    shared = {name: x for name, x in call._asdict().items() if name in record._fields}
    function = f"{call.function} (backward)"
    arguments = record(**{**shared, **saved, **written, "function": function})
    with fallback(ctx.policy):
        _operator(arguments)(*arguments)
    dsink = None if sink is None else sink_grad(sink, dout, out, lse)
    dq, dk, dv, dsink = first_order(call.function, (*grads, dsink), dout, q, k, v, sink)
    given = {"q": dq, "k": dk, "v": dv, "sink": dsink}
    return tuple(given.get(name) for name in call._fields)


def _operator(call: Backward | VarlenBackward) -> Any:
    return getattr(getattr(torch.ops, NAMESPACE), call._field_defaults["function"])


def _refuse_parts(call: VarlenForward) -> None:
    """The backward operator knows packed keys only; over all of them it would be wrong."""
    for argument in ("block_table", "leftpad_k", "seqused_k"):
        if getattr(call, argument) is not None:
            raise UnsupportedError(
                argument,
                "a backward",
                "the forward alone, as in upstream's operator",
                "pass block_table to flash_attn_varlen_func, or pack the keys that are used",
            )


def sink_grad(sink: Tensor, dout: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """The sink takes the share exp(sink - lse) of each row, and gives nothing to the output."""
    rows = lse.transpose(-1, -2)
    delta = (dout.to(rows.dtype) * out).sum(-1)
    share = torch.exp(sink.to(rows.dtype) - rows)
    # a row of no sequence has no share, whatever its dout holds
    given = torch.where(share > 0, share * delta, 0.0)
    return -given.flatten(0, -2).sum(0).to(sink.dtype)
