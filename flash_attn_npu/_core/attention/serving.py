"""Serve a call: by its plan, or by a record of an operator that has yet to get one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import ArgumentError
from ..ground import arguments
from ..ground.functions import EAGER, FORWARD, refuse_tangents
from ..ground.lengths import host_lengths
from ..ground.second_derivatives import first_order
from ..ground.storage import require_writable
from ..problems.ask import Ask, Facts, Packed
from ..problems.buffers import require_apart
from ..problems.results import ROUNDING, Forward, Inputs, Saved, accumulator, rounded_up
from ..table.attention import drawn_by
from ..table.choice import Plan, begin
from . import paged
from .asking import make_plan
from .derivatives import sink_grad
from .paged import Keys
from .records import AnyBackward, AnyForward, VarlenBackward, VarlenForward, options

__all__ = ["attend", "backward", "forward", "run", "run_over"]

Answer = Tensor | tuple[Tensor, Tensor, Tensor]


def attend(found: Plan, inputs: Inputs) -> Answer:
    """What a public function returns; its backward is served by the same plan."""
    begin(found)
    if found.allowed is not None:
        return found.allowed(*inputs[:5])  # type: ignore[no-any-return]
    ask: Ask = found.problem.ask
    if ask.needs_grad:
        out, lse, s_dmask = _Attention.apply(found, *inputs[:5])  # type: ignore[no-untyped-call]
    else:
        out, lse, s_dmask, _ = run(found, inputs)
    return (out, lse, s_dmask) if ask.options.return_attn_probs else out


class _Attention(torch.autograd.Function):
    """Attention by a plan whose kernel has no autograd of its own."""

    @staticmethod
    def forward(
        ctx: Any,
        found: Plan,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        alibi_slopes: Tensor | None,
        sink: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        answer = run(found, Inputs(q, k, v, alibi_slopes, sink))
        out, lse = answer.out, answer.softmax_lse
        ctx.save_for_backward(q, k, v, out, lse, alibi_slopes, answer.rng_state, sink)
        ctx.found = found
        ctx.mark_non_differentiable(lse, answer.s_dmask)
        return out, lse, answer.s_dmask

    @staticmethod
    def backward(ctx: Any, dout: Tensor, *_: Any) -> tuple[Any, ...]:
        *saved, sink = ctx.saved_tensors
        saved, found = Saved(*saved), ctx.found
        sources = (saved.q, saved.k, saved.v)
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in sources]
        found.backward_tally.calls += 1
        # the forward was asked for by the policy, in the name of the whole call
        _as_one_step()(found, dout, saved, grads)
        dsink = None if sink is None else sink_grad(sink, dout, saved.out, saved.softmax_lse)
        once = first_order(found.problem.function, (*grads, dsink), dout, *sources, sink)
        return (None, *once[:3], None, once[3])


def _backward_of(found: Plan, dout: Tensor, saved: Saved, grads: Sequence[Tensor]) -> None:
    dq, dk, dv = grads
    found.kernel.backward(found.problem, dout, saved, (dq, dk, dv))


_opaque: Any = None


def _as_one_step() -> Any:
    """`_backward_of`, opaque to compiled autograd: it would trace the tiles of every new length."""
    global _opaque
    # torch.compiler.disable imports all of dynamo, without which nothing is traced
    if "torch._dynamo" not in sys.modules:
        return _backward_of
    if _opaque is None:
        _opaque = torch.compiler.disable(_backward_of)
    return _opaque


def run(found: Plan, inputs: Inputs) -> Forward:
    """Attention without autograd, which has begun."""
    answer: Forward = found.kernel.forward(found.problem, inputs)
    return answer


def forward(call: AnyForward) -> Forward:
    """(out, softmax_lse, S_dmask, rng_state) of a forward operator."""
    _refuse_tangents(call)
    packed = None
    arguments.require_plain(q=call.q, k=call.k, v=call.v)
    arguments.require_plain_or_none(alibi_slopes=call.alibi_slopes, sink=call.sink)
    if isinstance(call, VarlenForward):
        packed = _packed(call)
        placement = paged.Placement(call.block_table, call.seqused_k, call.leftpad_k)
        if placement.given:
            keys = paged.read_keys(call.k, call.v, packed.k, placement)
            lengths = None
            if call.alibi_slopes is None:
                lengths = paged.spaced(packed.q, keys, packed.max_seqlen_k)
            if lengths is not None:
                found = make_plan(_ask(call, Packed(*lengths, *packed[2:])))
                return run(begin(found), Inputs(call.q, call.k, call.v, None, call.sink))
            ask = _ask(call, packed._replace(k=keys.lengths), keys)
            return run_over(begin(make_plan(ask)), call.q, keys, call.alibi_slopes, call.sink)
    found = make_plan(_ask(call, packed))
    return run(begin(found), Inputs(call.q, call.k, call.v, call.alibi_slopes, call.sink))


def run_over(
    found: Plan, q: Tensor, keys: Keys, alibi_slopes: Tensor | None, sink: Tensor | None = None
) -> Forward:
    """Attention over keys that are not simply packed, where they lie or gathered; it has begun."""
    if found.kernel.reads_pages:
        inputs = Inputs(q, keys.k, keys.v, alibi_slopes, sink, keys.cache, keys.spans)
    else:
        inputs = Inputs(q, *paged.gather(found.problem.function, keys), alibi_slopes, sink)
    return run(found, inputs)


def backward(call: AnyBackward) -> Tensor:
    """Write dq, dk, dv; returns rowsum(dout * out).

    (batch, nheads, seqlen_q rounded up to 128), or (nheads, total_q + 128 * batch): sequence i
    starts there at the multiple of 128 below cu_seqlens_q[i] + 128 * i.
    """
    _refuse_tangents(call)
    packed = _packed(call) if isinstance(call, VarlenBackward) else None
    arguments.require_plain(
        q=call.q,
        k=call.k,
        v=call.v,
        dq=call.dq,
        dk=call.dk,
        dv=call.dv,
        dout=call.dout,
        out=call.out,
        softmax_lse=call.softmax_lse,
    )
    arguments.require_plain_or_none(alibi_slopes=call.alibi_slopes)
    saved = Saved(
        call.q, call.k, call.v, call.out, call.softmax_lse, call.alibi_slopes, call.rng_state
    )
    assert call.dq is not None
    assert call.dk is not None
    assert call.dv is not None
    found = make_plan(_ask(call, packed))
    _run_backward(found, call.dout, saved, (call.dq, call.dk, call.dv))
    delta = (call.dout.to(accumulator(call.out.dtype)) * call.out).sum(-1).transpose(-1, -2)
    if not isinstance(call, VarlenBackward):
        rounded = delta.new_zeros(*delta.shape[:2], rounded_up(delta.shape[2]))
        rounded[..., : delta.shape[2]] = delta
        return rounded
    return _spread(delta, call.cu_seqlens_q, found.problem.total_q)


def _refuse_tangents(call: AnyForward | AnyBackward) -> None:
    if FORWARD._current_level >= 0:
        refuse_tangents(EAGER, **call._asdict())


def _spread(delta: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    batch = cu_seqlens.shape[0] - 1
    spread = delta.new_zeros(delta.shape[0], delta.shape[1] + ROUNDING * batch)
    starts = cu_seqlens.to(delta.device, torch.int64)
    sequence = torch.arange(batch, device=delta.device)
    shifts = (starts[:-1] + ROUNDING * sequence) // ROUNDING * ROUNDING - starts[:-1]
    places = torch.arange(total, device=delta.device)
    # torch_npu before 2.9 reads repeats on the host
    places += shifts[torch.searchsorted(starts[1:], places, right=True)]
    spread.index_copy_(1, places, delta[:, :total])
    return spread


def _ask(call: AnyForward | AnyBackward, packed: Packed | None, keys: Keys | None = None) -> Ask:
    """What an operator asks: the lse always, and no autograd of a kernel's."""
    k, v = (Facts.of(call.k), Facts.of(call.v)) if keys is None else keys.facts
    ask = Ask(
        call.function,
        Facts.of(call.q),
        k,
        v,
        packed,
        options(call),
        None if call.alibi_slopes is None else Facts.of(call.alibi_slopes),
        sink=None,
        needs_grad=False,
        uses_lse=True,
        pages=None if keys is None else keys.pages,
    )
    if isinstance(call, AnyBackward):
        # softmax_lse counts the sink already
        mask_from = _mask_from(call.dropout_p, call.rng_state)
        return ask._replace(needs_grad=True, mask_from=mask_from, backward=True)
    return ask if call.sink is None else ask._replace(sink=Facts.of(call.sink))


def _packed(call: VarlenForward | VarlenBackward) -> Packed:
    return Packed(
        host_lengths("cu_seqlens_q", call.cu_seqlens_q),
        host_lengths("cu_seqlens_k", call.cu_seqlens_k),
        call.max_seqlen_q,
        call.max_seqlen_k,
    )


def _run_backward(
    found: Plan, dout: Tensor, saved: Saved, grads: tuple[Tensor, Tensor, Tensor]
) -> None:
    q, k, v = saved[:3]
    rows = (found.problem.rows_q,) if found.problem.varlen else (q.shape[0], q.shape[1])
    lse_shape = torch.Size((*rows[:-1], q.shape[-2], rows[-1]))
    saved = saved._replace(softmax_lse=_as_it_lies(saved.softmax_lse, lse_shape))
    expected = {
        "dout": (dout, q.shape, q.dtype),
        "out": (saved.out, q.shape, q.dtype),
        "dq": (grads[0], q.shape, q.dtype),
        "dk": (grads[1], k.shape, q.dtype),
        "dv": (grads[2], v.shape, q.dtype),
        "softmax_lse": (saved.softmax_lse, lse_shape, accumulator(q.dtype)),
    }
    for argument, (tensor, shape, dtype) in expected.items():
        if (tensor.shape, tensor.dtype, tensor.device) != (shape, dtype, q.device):
            raise ArgumentError(
                argument,
                f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)} on {tensor.device}",
                f"a {dtype} tensor of shape {tuple(shape)} on {q.device}",
                f"pass {argument} as the forward returned it, or laid out as its tensor is",
            )
    written = dict(zip(("dq", "dk", "dv"), grads, strict=True))
    require_writable(**written)
    read = {"q": q, "k": k, "v": v, "out": saved.out, "softmax_lse": saved.softmax_lse}
    require_apart(written, {"dout": dout, **read})
    _backward_of(begin(found), dout, saved, grads)


def _as_it_lies(lse: Tensor, shape: torch.Size) -> Tensor:
    """softmax_lse by its memory, as upstream reads it: diffusers passes it permuted."""
    if lse.dim() != len(shape):
        return lse
    turned = lse.transpose(-1, -2)
    permuted = lse.shape != shape or not lse.is_contiguous()
    return turned if permuted and turned.shape == shape and turned.is_contiguous() else lse


def _mask_from(dropout_p: float, rng_state: Tensor | None) -> str | None:
    """Which kernel drew the mask that `rng_state` stands for."""
    if not 1.0 - dropout_p < 1.0:
        return None
    if rng_state is None:
        raise ArgumentError(
            "rng_state",
            None,
            "the rng_state that the forward returned, because dropout_p is not 0",
            "keep the fourth result of the forward and pass it here",
        )
    arguments.require_values(rng_state=rng_state)
    if tuple(rng_state.shape) != (2,) or rng_state.dtype != torch.int64:
        raise ArgumentError(
            "rng_state",
            f"a {rng_state.dtype} tensor of shape {tuple(rng_state.shape)}",
            "the int64 tensor of 2 that the forward returned",
            "keep the fourth result of the forward and pass it here",
        )
    return drawn_by(int(rng_state[1]))
