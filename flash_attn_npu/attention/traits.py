"""What the dispatcher must know of the operators of `ops`: the shapes they return, their gradients.

The formulas call the backward operators, so that compiled graphs and checkpointing see them too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError, explain
from ..first_order import first_order
from ..settings import fallback, fallback_policy
from . import checks
from .dispatch import decided, decision
from .result import ROUNDING, accumulator, rounded_up

__all__ = [
    "backward",
    "differentiate",
    "differentiate_varlen",
    "forward",
    "save",
    "varlen_backward",
    "varlen_forward",
]

# fmt: off


def forward(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool,
    window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: Tensor | None,
    return_softmax: bool, sink: Tensor | None = None, deterministic: bool = False,
    function: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes of dense attention."""
    checks.together(q, {"k": k, "v": v, "alibi_slopes": alibi_slopes, "sink": sink}, {})
    batch, seqlen_q, nheads, _ = q.shape
    probs = return_softmax and 1.0 - dropout_p < 1.0
    return _shapes(q, (batch, nheads, seqlen_q), batch, seqlen_q, k.shape[1], probs)


def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool,
    window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, return_softmax: bool = False,
    block_table: Tensor | None = None, leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None, zero_tensors: bool = False, num_splits: int = 0,
    sink: Tensor | None = None, deterministic: bool = False, function: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes of packed attention."""
    checks.together(
        q, {"k": k, "v": v, "alibi_slopes": alibi_slopes, "sink": sink},
        {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "block_table": block_table,
         "leftpad_k": leftpad_k, "seqused_k": seqused_k},
    )
    total_q, nheads, _ = q.shape
    batch = cu_seqlens_q.shape[0] - 1
    probs = return_softmax and 1.0 - dropout_p < 1.0
    return _shapes(q, (nheads, total_q), batch, max_seqlen_q, max_seqlen_k, probs)


def _shapes(
    q: Tensor, lse_shape: tuple[int, ...], batch: int, seqlen_q: int, seqlen_k: int, probs: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s_dmask: tuple[int, ...] = (0,)
    if probs:
        s_dmask = (batch, q.shape[-2], rounded_up(seqlen_q), rounded_up(seqlen_k))
    return (
        q.new_empty(q.shape),
        q.new_empty(lse_shape, dtype=accumulator(q.dtype)),
        q.new_empty(s_dmask),
        torch.empty(2, dtype=torch.int64, device="cpu"),
    )


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, dropout_p: float,
    softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int,
    softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
    rng_state: Tensor | None = None, function: str = "",
) -> Tensor:
    """Shape of the row sums of a dense backward."""
    checks.together(
        q, {"dout": dout, "k": k, "v": v, "out": out, "softmax_lse": softmax_lse, "dq": dq,
            "dk": dk, "dv": dv, "alibi_slopes": alibi_slopes}, {"rng_state": rng_state},
    )
    batch, seqlen_q, nheads, _ = q.shape
    return q.new_empty(batch, nheads, rounded_up(seqlen_q), dtype=accumulator(q.dtype))


def varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float,
    softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int,
    softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
    rng_state: Tensor | None = None, zero_tensors: bool = False, function: str = "",
) -> Tensor:
    """Shape of the row sums of a packed backward."""
    checks.together(
        q, {"dout": dout, "k": k, "v": v, "out": out, "softmax_lse": softmax_lse, "dq": dq,
            "dk": dk, "dv": dv, "alibi_slopes": alibi_slopes},
        {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "rng_state": rng_state},
    )
    total_q, nheads, _ = q.shape
    padded = total_q + ROUNDING * (cu_seqlens_q.shape[0] - 1)
    return q.new_empty(nheads, padded, dtype=accumulator(q.dtype))


# fmt: on


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep what the formula needs of a forward operator's call."""
    out, lse, s_dmask, rng_state = output
    tensors = [value if isinstance(value, Tensor) else None for value in inputs]
    ctx.save_for_backward(*tensors, out, lse, rng_state)
    ctx.inputs = [None if isinstance(value, Tensor) else value for value in inputs]
    # the backward may run in another thread, or behind the block that set the policy
    ctx.policy, ctx.decision = fallback_policy(), decision(*inputs[:3])
    ctx.mark_non_differentiable(lse, s_dmask, rng_state)


def differentiate(ctx: Any, dout: Tensor, *_: Any) -> tuple[Any, ...]:
    """The gradient of dense attention."""
    inputs, out, lse, rng_state = _restored(ctx)
    q, k, v, *options, slopes, _return, sink, deterministic, function = inputs
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    with _as_decided(ctx, dout, q, k, v):
        torch.ops.flash_attn_npu._flash_attn_backward(
            *(dout, q, k, v, out, lse, *grads, *options, slopes, deterministic, rng_state),
            f"{function} (backward)",
        )
    dsink = None if sink is None else _sink_grad(sink, dout, out, lse.transpose(1, 2))
    once = first_order(function, (*grads, dsink), dout, q, k, v, sink)
    return _positioned(inputs, once)


def differentiate_varlen(ctx: Any, dout: Tensor, *_: Any) -> tuple[Any, ...]:
    """The gradient of packed attention."""
    inputs, out, lse, rng_state = _restored(ctx)
    (q, k, v, *lengths), options, slopes = inputs[:7], inputs[7:13], inputs[13]
    sink, deterministic, function = inputs[-3:]
    _refuse_parts(block_table=inputs[15], leftpad_k=inputs[16], seqused_k=inputs[17])
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    with _as_decided(ctx, dout, q, k, v):
        torch.ops.flash_attn_npu._flash_attn_varlen_backward(
            *(dout, q, k, v, out, lse, *grads, *lengths, *options, slopes, deterministic),
            *(rng_state, False, f"{function} (backward)"),
        )
    dsink = None if sink is None else _sink_grad(sink, dout, out, lse.t())
    once = first_order(function, (*grads, dsink), dout, q, k, v, sink)
    return _positioned(inputs, once)


@contextmanager
def _as_decided(ctx: Any, *tensors: Tensor) -> Iterator[None]:
    """The policy and the decision of the forward hold inside, for these tensors of its backward."""
    found = None if ctx.decision is None else ctx.decision.backward
    with fallback(ctx.policy), decided(found, *tensors):
        yield


def _refuse_parts(**parts: Tensor | None) -> None:
    """The backward operator knows packed keys only; over all of them it would be wrong."""
    for argument, value in parts.items():
        if value is not None:
            raise UnsupportedError(
                explain(
                    argument,
                    "a backward",
                    "the forward alone, as in upstream's operator",
                    "pass block_table to flash_attn_varlen_func, or pack the keys that are used",
                )
            )


def _restored(ctx: Any) -> tuple[list[Any], Tensor, Tensor, Tensor]:
    *tensors, out, lse, rng_state = ctx.saved_tensors
    inputs = [
        value if tensor is None else tensor
        for tensor, value in zip(tensors, ctx.inputs, strict=True)
    ]
    return inputs, out, lse, rng_state


def _positioned(inputs: list[Any], grads: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """The gradients of q, k, v and sink at their places: the first three, the third to last."""
    *first, dsink = grads
    between = (None,) * (len(inputs) - 6)
    return (*first, *between, dsink, None, None)


def _sink_grad(sink: Tensor, dout: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """The sink takes the share exp(sink - lse) of each row, and gives nothing to the output."""
    delta = (dout.to(lse.dtype) * out).sum(-1)
    share = torch.exp(sink.to(lse.dtype) - lse)
    # a row of no sequence has no share, whatever its dout holds
    given = torch.where(share > 0, share * delta, 0.0)
    return -given.flatten(0, -2).sum(0).to(sink.dtype)
