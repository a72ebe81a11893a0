"""Ascend's fused training kernel, `torch_npu.npu_fusion_attention`, under flash-attn's rules.

Contract: torch_npu's operator documentation. `direct` is differentiable through torch_npu's own
autograd; `forward` and `backward` are the same without it, the backward from softmax_lse alone:
the kernel recomputes probabilities as exp(score - softmax_max) / softmax_sum, so softmax_max =
softmax_lse and softmax_sum = 1 give the gradient, also of a merge over several blocks of keys.

What the installed operators lack is made up for here: statistics of packed sequences are read in
the order in which they come, and a sink that the kernel does not take is added to its answer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ground.chip import soc_name
from ...ground.memory import Memo
from ...ground.schemas import has
from ...ground.second_derivatives import once, watch
from ...ground.settings import alibi_offset
from ...problems.attention import Problem
from ...problems.results import Forward, Inputs, Saved
from ..kernel import Kernel
from ..sinks import counting, take_share
from . import singles, statistics
from .determinism import deterministically
from .packets import behind
from .selection import Rows

__all__ = ["KERNEL", "UNLIMITED", "Seen", "causal_mask", "differentiates", "fusion_attention"]

UNLIMITED = 2147483647
MASK_SIZE = 2048
"""Side of the compressed mask that the sparse modes demand."""

FORWARD, FORWARD_2 = "npu_fusion_attention", "npu_fusion_attention_v2"
BACKWARD = "npu_fusion_attention_grad"

_masks: Memo[torch.device, Tensor] = Memo("causal masks", 64, nbytes=64 * MASK_SIZE**2)
_prepared_calls: Memo[Problem, tuple[Rows, Callable[..., Any]]] = Memo(
    "calls prepared for npu_fusion_attention", 256, nbytes=1 << 26
)


def causal_mask(device: torch.device) -> Tensor:
    """The compressed mask, True above the diagonal; one per device, 4 MiB."""
    mask = _masks.recall(device)
    if mask is None or torch._C._len_torch_dispatch_stack():
        # it outlives this call, and a backward cannot save a tensor made in inference mode
        with torch.inference_mode(False):
            ones = torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.bool, device=device)
            mask = torch.triu(ones, diagonal=1)
        # under a mode it may be a fake, which must not outlive the mode
        if not torch._C._len_torch_dispatch_stack():
            _masks.put(device, mask)
    return mask


def fusion_attention() -> Callable[..., Any]:
    """torch_npu's operator, as it is called now."""
    import torch_npu

    return torch_npu.npu_fusion_attention  # type: ignore[no-any-return]


def direct(problem: Problem) -> Callable[..., Any]:
    """A differentiable function (q, k, v, alibi_slopes, sink) -> the public result."""
    rows, kernel = _prepared(problem)
    if rows.untouched and not (problem.uses_lse or problem.alibi or problem.sink):
        return _plain(problem, rows, once(problem.function) if problem.needs_grad else None)
    return _differentiable(problem, kernel)


def _differentiable(problem: Problem, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A function (q, k, v, alibi_slopes, sink) -> what the public function returns."""
    rows, _ = _prepared(problem)
    first = once(problem.function)

    def run(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, sink: Tensor | None) -> Any:
        alone = singles.answer(problem, rows, (q, k, v), sink)
        out, top, total, *_ = kernel(rows.take_q(q), rows.take_k(k), rows.take_k(v), slopes, sink)
        watch(out, first)
        out = rows.restore(out, None if alone is None else alone.out)
        if not problem.uses_lse:
            return out
        lse = _lse(problem, rows, top.detach(), total.detach())
        lse = rows.restore_lse(lse, None if alone is None else alone.softmax_lse.detach())
        return out, lse, q.new_empty(0)

    return run


class Seen(NamedTuple):
    """What the kernel was given and answered in one call, which may be other rows than asked for.

    softmax_lse: (batch, nheads, seqlen_q) or (nheads, total_q) of its rows.
    shifts: how far from its place in q and in k a sequence lies there; None if it does not.
    given_q, given_k: its rows of a tensor laid out as q, or as k, of the call.
    asked: the rows of the call of a tensor laid out as its q.
    """

    out: Tensor
    softmax_lse: Tensor
    seed: int
    offset: int
    shifts: Callable[[int], tuple[int, int] | None]
    given_q: Callable[[Tensor], Tensor]
    given_k: Callable[[Tensor], Tensor]
    asked: Callable[[Tensor], Tensor]


def observed(problem: Problem) -> Callable[..., tuple[Any, Seen]]:
    """As `direct`, with what the kernel answered beside the public result."""
    rows, kernel = _prepared(problem)

    def observe(*tensors: Any) -> tuple[Any, Seen]:
        answered: list[Any] = []

        def listening(*given: Any) -> Any:
            answered.extend(kernel(*given))
            return answered

        answer = _differentiable(problem, listening)(*tensors)
        out, top, total, _, seed, offset, _ = answered
        lse = _lse(problem, rows, top.detach(), total.detach())
        maps = (rows.shifts, rows.take_q, rows.take_k, rows.restore)
        return answer, Seen(out, lse, seed, offset, *maps)

    return observe


def differentiates(problem: Problem) -> bool:
    """Whether torch_npu's autograd of the kernel is asked about a sink.

    It is not where the gradient operator of packed sequences is documented without (Ascend 950),
    or where the kernel takes no sink.
    """
    return not problem.sink or (_operator(problem) == FORWARD and _takes_sink(problem))


def offset_of(problem: Problem) -> int:
    """The seqlen_k - seqlen_q that ALiBi is told, 0 for none: see `settings.alibi_offset`."""
    told = alibi_offset() and problem.varlen
    if not told or soc_name(problem.device).startswith("Ascend950"):
        return 0
    return problem.seeing_offset or 0


def _takes_sink(problem: Problem) -> bool:
    """Whether the kernel is given the sink: otherwise it is added to what the kernel answers.

    It takes one with float16 and bfloat16; one beside alibi_slopes is not documented.
    """
    fits = problem.sink and problem.dtype != torch.float32 and not problem.alibi
    return fits and has(_operator(problem), "sink")


def _operator(problem: Problem) -> str:
    """Only the second has ALiBi, and on an Ascend 950 the first drops the sink without a word."""
    dropped = problem.sink and soc_name(problem.device).startswith("Ascend950")
    return FORWARD_2 if problem.alibi or dropped else FORWARD


def _reads_statistics(problem: Problem) -> bool:
    """Whether softmax_lse is asked for, by the caller or by what is done behind the kernel."""
    return problem.uses_lse or not differentiates(problem)


def _in_rows(problem: Problem) -> bool:
    """Whether statistics of packed sequences come in rows: see `statistics`."""
    operator = _operator(problem)
    # the second passes the argument on beside a sink only
    passed_on = operator != FORWARD_2 or _takes_sink(problem)
    return _reads_statistics(problem) and passed_on and has(operator, "softmax_layout")


def _plain(problem: Problem, rows: Rows, first: Tensor | None) -> Callable[..., Tensor]:
    """The kernel with nothing around it; positional arguments, which torch parses faster."""
    import torch_npu

    mode, mask, before, after = _sparsity(problem)
    # fmt: off
    given = (
        problem.nheads, _layout(problem), None, None, mask, problem.softmax_scale,
        1.0 - problem.dropout_p, before, after, 0, None, rows.ends_q, rows.ends_k, mode,
    )
    # fmt: on
    operator = torch_npu.npu_fusion_attention
    fast = behind(operator)

    def run(q: Tensor, k: Tensor, v: Tensor, slopes: None, sink: None) -> Tensor:
        # tools that watch operators put their own in its place
        call = fast if torch_npu.npu_fusion_attention is operator else fusion_attention()
        return call(q, k, v, *given)[0]  # type: ignore[no-any-return]

    # `watch` written out, which costs less
    def watched(q: Tensor, k: Tensor, v: Tensor, slopes: None, sink: None) -> Tensor:
        call = fast if torch_npu.npu_fusion_attention is operator else fusion_attention()
        out: Tensor = call(q, k, v, *given)[0]
        node: Any = out.grad_fn
        if node is not None:
            node._register_hook_dict(first)
        return out

    return run if first is None else watched


def forward(problem: Problem, inputs: Inputs) -> Forward:
    """Attention without autograd."""
    rows, kernel = _prepared(problem)
    q, k, v, slopes, sink = inputs[:5]
    out, top, total, _, seed, offset, _ = kernel(
        rows.take_q(q), rows.take_k(k), rows.take_k(v), slopes, sink
    )
    alone = singles.answer(problem, rows, (q, k, v), sink)
    lse = top.new_empty(0)
    if _reads_statistics(problem):
        lse = _lse(problem, rows, top, total)
        if sink is not None and not _takes_sink(problem):
            take_share(out, lse, sink)
            lse = counting(lse, sink)
        lse = rows.restore_lse(lse, None if alone is None else alone.softmax_lse)
    return Forward(
        rows.restore(out, None if alone is None else alone.out),
        lse,
        q.new_empty(0),
        torch.tensor(
            [seed, offset] if problem.dropout_p else [0, 0], dtype=torch.int64, device="cpu"
        ),
    )


def backward(
    problem: Problem, dout: Tensor, saved: Saved, grads: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Write dq, dk, dv into `grads`, where they lie."""
    rows, _ = _prepared(problem)
    lse = rows.take_lse(saved.softmax_lse)
    arguments = _grad_arguments(problem, rows, saved.rng_state)
    if problem.varlen and saved.alibi_slopes is None and has(BACKWARD, "softmax_layout"):
        arguments["softmax_layout"] = "TND"
        lse = lse.t()
    elif rows.ends_q:
        lse = statistics.by_sequence(lse, rows.ends_q)
    top = lse[..., None].expand(*lse.shape, statistics.REPEATED).contiguous()
    arguments |= {
        "softmax_max": top,
        "softmax_sum": torch.ones_like(top),
        "attention_in": rows.take_q(saved.out).contiguous(),
    }
    inputs = (rows.take_q(saved.q), rows.take_k(saved.k), rows.take_k(saved.v))
    with deterministically() if problem.deterministic else nullcontext():
        dq, dk, dv = _grad_kernel(problem, rows, saved.alibi_slopes)(
            *inputs, rows.take_q(dout), problem.nheads, _layout(problem), **arguments
        )[:3]
    alone = singles.gradients(problem, rows, dout, saved)
    rows.write_q(grads[0], dq, alone[0])
    rows.write_k(grads[1], dk, alone[1])
    rows.write_k(grads[2], dv, alone[2])


def _prepared(problem: Problem) -> tuple[Rows, Callable[..., Any]]:
    known = _prepared_calls.recall(problem)
    if known is None:
        rows = Rows(problem)
        known = rows, _forward_kernel(problem, rows)
        _prepared_calls.put(problem, known)
    return known


def _forward_kernel(problem: Problem, rows: Rows) -> Callable[..., Any]:
    """A function (q, k, v, slopes, sink) of rows that see keys -> the kernel's seven results."""
    import torch_npu

    if rows.nothing:
        return _nothing
    operator, sunk = _operator(problem), _takes_sink(problem)
    second = operator == FORWARD_2
    mode, mask, before, after = _sparsity(problem)
    shared: dict[str, Any] = {
        "scale": problem.softmax_scale,
        "keep_prob": 1.0 - problem.dropout_p,
        "actual_seq_qlen": rows.ends_q,
        "actual_seq_kvlen": rows.ends_k,
        "sparse_mode": mode,
        "atten_mask": mask,
        "pre_tokens" if second else "pre_tockens": before,
        "next_tokens" if second else "next_tockens": after,
    }
    if problem.alibi:
        shared |= _bias(problem)
    if problem.varlen and _in_rows(problem):
        shared["softmax_layout"] = "TND"
    heads, layout = problem.nheads, _layout(problem)

    def run(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, sink: Tensor | None) -> Any:
        given = dict(shared)
        if slopes is not None:
            # slopes have no gradient; torch_npu's autograd would give them unwritten memory
            given["pse"] = rows.take_slopes(slopes.detach()).contiguous()
        if sunk and sink is not None:
            given["sink"] = sink.float()
        if second:
            return torch_npu.npu_fusion_attention_v2(q, k, v, heads, layout, **given)
        return torch_npu.npu_fusion_attention(q, k, v, heads, layout, **given)

    return run


def _nothing(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Any:
    """What the kernel would answer if it took no rows."""
    top = q.new_empty(*q.shape[:2], 1, dtype=torch.float32)
    # all three have a gradient, of zeros
    out = q[..., : v.shape[-1]] + k[:0].sum() + v[:0].sum()
    return out, top, top, None, 0, 0, 0


def _grad_kernel(problem: Problem, rows: Rows, slopes: Tensor | None) -> Callable[..., Any]:
    import torch_npu

    if rows.nothing:
        return lambda q, k, v, *_, **arguments: (q, k, v)
    if slopes is None:
        return torch_npu.npu_fusion_attention_grad  # type: ignore[no-any-return]
    pse = rows.take_slopes(slopes).contiguous()

    def run(*tensors: Any, **arguments: Any) -> Any:
        arguments["pre_tokens"] = arguments.pop("pre_tockens")
        arguments["next_tokens"] = arguments.pop("next_tockens")
        return torch_npu.npu_fusion_attention_grad_v2(
            *tensors, pse=pse, **arguments, **_bias(problem)
        )

    return run


def _grad_arguments(problem: Problem, rows: Rows, rng_state: Tensor | None) -> dict[str, Any]:
    mode, mask, before, after = _sparsity(problem)
    arguments: dict[str, Any] = {
        "scale_value": problem.softmax_scale,
        "keep_prob": 1.0 - problem.dropout_p,
        "pre_tockens": before,
        "next_tockens": after,
        "sparse_mode": mode,
        "atten_mask": mask,
        "actual_seq_qlen": rows.ends_q,
        "actual_seq_kvlen": rows.ends_k,
    }
    if problem.dropout_p and rng_state is not None:
        seed, offset = rng_state.tolist()
        arguments |= {"seed": seed, "offset": offset, "numels": problem.nheads * rows.pairs}
    return arguments


def _layout(problem: Problem) -> str:
    return "TND" if problem.varlen else "BSND"


def _sparsity(problem: Problem) -> tuple[int, Tensor | None, int, int]:
    """(sparse_mode, atten_mask, tokens before, tokens after); no mode works without its mask."""
    before = UNLIMITED if problem.left is None else problem.left
    after = UNLIMITED if problem.right is None else problem.right
    if not (problem.causal or problem.windowed):
        return 0, None, UNLIMITED, UNLIMITED
    return 3 if problem.causal else 4, causal_mask(problem.device), before, after


def _bias(problem: Problem) -> dict[str, Any]:
    """Type 2 adds -slope * |j + kv_start - i - q_start|, i and j from the top left."""
    bias: dict[str, Any] = {"pse_type": 2}
    first = offset_of(problem)
    if first:
        bias |= {"q_start_idx": [first], "kv_start_idx": [0]}
    return bias


def _lse(problem: Problem, rows: Rows, top: Tensor, total: Tensor) -> Tensor:
    lse = top[..., 0] + torch.log(total[..., 0])
    if rows.ends_q is None:
        return lse
    if rows.nothing or _in_rows(problem):
        return lse.t().contiguous()
    return statistics.by_row(lse, rows.ends_q)


# the offsets of torch_npu's generator count what was drawn, and are never negative
KERNEL = Kernel(forward, backward, direct, draws=lambda offset: offset >= 0, observed=observed)
