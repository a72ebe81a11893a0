"""From the facts of a call to a validated problem, or to an error that names the argument."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...errors import ArgumentError
from ..ground import arguments
from ..ground.lengths import Lengths
from .ask import Ask, Facts, Options, Packed
from .attention import DTYPES, Problem, default_scale

__all__ = ["describe"]


def describe(ask: Ask) -> Problem:
    """The problem that is asked, validated.

    q is (batch, seqlen_q, nheads, headdim), k and v (batch, seqlen_k, nheads_k, headdim); packed,
    they are (total, nheads, headdim).
    """
    if ask.packed is None:
        _check_tensors(ask, "(batch, seqlen, nheads, headdim)", rank=4)
        shape = _dense(ask.q.shape, ask.k.shape)
    else:
        _check_tensors(ask, "(total, nheads, headdim)", rank=3)
        shape = _ragged(ask.q, ask.k, ask.packed)
    _check_options(ask.options)
    _check_sink(ask)
    _check_slopes(ask, shape.batch)
    return _problem(ask, shape)


class _Shape(NamedTuple):
    """How long the sequences are, and how they lie."""

    batch: int
    rows_q: int
    rows_k: int
    lengths_q: Lengths | None
    lengths_k: Lengths | None
    max_seqlen_q: int
    max_seqlen_k: int


def _dense(shape_q: tuple[int, ...], shape_k: tuple[int, ...]) -> _Shape:
    (batch, seqlen_q), seqlen_k = shape_q[:2], shape_k[1]
    if shape_k[0] != batch:
        raise ArgumentError(
            "k",
            f"batch {shape_k[0]}",
            f"the batch of q, {batch}",
            "pass one row of k and v for each row of q",
        )
    rows = (batch * seqlen_q, batch * seqlen_k)
    return _Shape(batch, *rows, None, None, seqlen_q, seqlen_k)


def _ragged(q: Facts, k: Facts, packed: Packed) -> _Shape:
    _check_lengths("q", q, packed.q, packed.max_seqlen_q)
    _check_lengths("k", k, packed.k, packed.max_seqlen_k)
    if len(packed.q.seqlens) != len(packed.k.seqlens):
        raise ArgumentError(
            "cu_seqlens_k",
            f"{len(packed.k.seqlens)} sequences",
            f"as many as in cu_seqlens_q, {len(packed.q.seqlens)}",
            "pass one k sequence for each q sequence, of length 0 where there is none",
        )
    return _Shape(len(packed.q.seqlens), q.shape[0], k.shape[0], *packed)


def _problem(ask: Ask, shape: _Shape) -> Problem:
    options, headdim = ask.options, ask.q.shape[-1]
    left, right = _normalised_window(options.causal, options.window_size, shape.max_seqlen_k)
    scale = options.softmax_scale
    # 1e-30 is what clients pass to ask for softmax_lse: it drops nothing
    dropout_p = options.dropout_p if 1.0 - options.dropout_p < 1.0 else 0.0
    # checkpointing runs a forward twice, without and with gradients: one kernel must serve both, as
    # each draws masks of its own
    needs_grad = ask.needs_grad or dropout_p > 0
    return Problem(
        ask=ask,
        dtype=ask.q.dtype,
        device=ask.q.device,
        nheads=ask.q.shape[-2],
        nheads_k=ask.k.shape[-2],
        headdim=headdim,
        headdim_v=ask.v.shape[-1],
        **shape._asdict(),
        softmax_scale=default_scale(headdim) if scale is None else scale,
        left=left,
        right=right,
        softcap=max(options.softcap, 0.0),
        alibi=ask.alibi_slopes is not None,
        dropout_p=dropout_p,
        deterministic=options.deterministic,
        s_dmask=options.return_attn_probs and dropout_p > 0,
        # torch_npu's own autograd has no deterministic backward; ours needs softmax_lse
        uses_lse=ask.uses_lse or (options.deterministic and needs_grad),
        needs_grad=needs_grad,
        sink=ask.sink is not None,
    )


def _normalised_window(
    causal: bool, window_size: tuple[int, int], max_seqlen_k: int
) -> tuple[int | None, int | None]:
    """The window as flash-attn 2 applies it.

    A side at least as long as the keys is unlimited, causal closes the right side, and beside a
    limited side an unlimited one counts max_seqlen_k. The last two lines matter only where
    there are more queries than keys, and there they decide which rows see nothing.
    """
    left, right = (side if 0 <= side < max_seqlen_k else None for side in window_size)
    if causal:
        right = 0
    if left is not None and right is None:
        right = max_seqlen_k
    return left, right


def _check_tensors(ask: Ask, layout: str, rank: int) -> None:
    q, k, v = ask.q, ask.k, ask.v
    for argument, facts in (("q", q), ("k", k), ("v", v)):
        if len(facts.shape) != rank:
            raise ArgumentError(
                argument,
                f"shape {tuple(facts.shape)}",
                f"{rank} dimensions, {layout}",
                f"reshape {argument}; packed sequences go to the varlen functions, padded "
                "batches to the others",
            )
        arguments.same(argument, "dtype", facts.dtype, q.dtype)
        arguments.same(argument, "device", facts.device, q.device)
        if argument != "v" or not ask.narrow:
            arguments.same(argument, "headdim", facts.shape[-1], q.shape[-1])
    if q.dtype not in DTYPES:
        allowed = ", ".join(str(dtype) for dtype in DTYPES)
        raise ArgumentError(
            "q", q.dtype, allowed, "convert q, k and v, e.g. with .to(torch.bfloat16)"
        )
    if tuple(k.shape[:-1]) != tuple(v.shape[:-1]):
        raise ArgumentError(
            "v",
            f"shape {tuple(v.shape)}",
            f"the shape of k, {tuple(k.shape)}",
            "pass one value for each key",
        )
    nheads, nheads_k = q.shape[-2], k.shape[-2]
    if nheads and (nheads_k == 0 or nheads % nheads_k):
        raise ArgumentError(
            "k",
            f"{nheads_k} heads",
            f"a number of heads that divides the {nheads} heads of q",
            "use as many key heads as query heads, or a divisor of it (GQA, MQA)",
        )


def _check_lengths(side: str, facts: Facts, lengths: Lengths, max_seqlen: int) -> None:
    if lengths.total > facts.shape[0]:
        remedy = f"let cu_seqlens_{side} end at the number of rows that hold tokens"
        if lengths.total == facts.shape[1]:
            remedy = f"heads first? pass {side}.transpose(0, 1), (total, nheads, headdim)"
        raise ArgumentError(
            f"cu_seqlens_{side}",
            f"a last entry of {lengths.total}",
            f"at most {facts.shape[0]}, the rows of {side}",
            remedy,
        )
    if max_seqlen < lengths.longest:
        raise ArgumentError(
            f"max_seqlen_{side}",
            max_seqlen,
            f"at least {lengths.longest}, the longest sequence in cu_seqlens_{side}",
            f"pass max_seqlen_{side}={lengths.longest}",
        )


def _check_options(options: Options) -> None:
    if not 0.0 <= options.dropout_p < 1.0:
        raise ArgumentError(
            "dropout_p",
            options.dropout_p,
            "a probability p with 0 <= p < 1",
            "pass 0.0 for no dropout",
        )


def _check_sink(ask: Ask) -> None:
    if ask.sink is None:
        return
    nheads = ask.q.shape[-2]
    if tuple(ask.sink.shape) != (nheads,):
        raise ArgumentError(
            "sink",
            f"shape {tuple(ask.sink.shape)}",
            f"({nheads},), one logit for each query head",
            "pass one sink logit for each query head",
        )
    arguments.same("sink", "device", ask.sink.device, ask.q.device)
    if not ask.sink.dtype.is_floating_point:
        allowed = "a floating dtype"
        raise ArgumentError("sink", ask.sink.dtype, allowed, "pass sink.float()")


def _check_slopes(ask: Ask, batch: int) -> None:
    slopes, nheads = ask.alibi_slopes, ask.q.shape[-2]
    if slopes is None:
        return
    if tuple(slopes.shape) not in ((nheads,), (batch, nheads)) or slopes.dtype != torch.float32:
        raise ArgumentError(
            "alibi_slopes",
            f"a {slopes.dtype} tensor of shape {tuple(slopes.shape)}",
            f"a torch.float32 tensor of shape ({nheads},) or ({batch}, {nheads})",
            "pass one float32 slope for each query head",
        )
    arguments.same("alibi_slopes", "device", slopes.device, ask.q.device)
