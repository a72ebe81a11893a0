"""From the facts of a call to a validated problem, or to an error that names the argument."""

from __future__ import annotations

import torch

from ..errors import ArgumentError, explain
from . import checks
from .lengths import Lengths
from .problem import DTYPES, Facts, Options, Problem, default_scale

__all__ = ["dense_problem", "varlen_problem"]


def dense_problem(function: str, q: Facts, k: Facts, v: Facts, options: Options) -> Problem:
    """Describe q (batch, seqlen_q, nheads, headdim) against k, v (batch, seqlen_k, ...)."""
    _check_tensors(q, k, v, "(batch, seqlen, nheads, headdim)", rank=4)
    batch, seqlen_q = q.shape[:2]
    if k.shape[0] != batch:
        raise ArgumentError(
            explain(
                "k",
                f"batch {k.shape[0]}",
                f"the batch of q, {batch}",
                "pass one row of k and v for each row of q",
            )
        )
    seqlen_k = k.shape[1]
    return _problem(
        function,
        q,
        k,
        options,
        batch=batch,
        rows=(batch * seqlen_q, batch * seqlen_k),
        lengths=(None, None),
        max_seqlens=(seqlen_q, seqlen_k),
    )


def varlen_problem(
    function: str,
    q: Facts,
    k: Facts,
    v: Facts,
    lengths_q: Lengths,
    lengths_k: Lengths,
    max_seqlens: tuple[int, int],
    options: Options,
) -> Problem:
    """Describe q (total_q, nheads, headdim) against k, v (total_k, nheads_k, headdim), packed."""
    _check_tensors(q, k, v, "(total, nheads, headdim)", rank=3)
    _check_lengths("q", q, lengths_q, max_seqlens[0])
    _check_lengths("k", k, lengths_k, max_seqlens[1])
    if len(lengths_q.seqlens) != len(lengths_k.seqlens):
        raise ArgumentError(
            explain(
                "cu_seqlens_k",
                f"{len(lengths_k.seqlens)} sequences",
                f"as many as in cu_seqlens_q, {len(lengths_q.seqlens)}",
                "pass one k sequence for each q sequence, of length 0 where there is none",
            )
        )
    return _problem(
        function,
        q,
        k,
        options,
        batch=len(lengths_q.seqlens),
        rows=(q.shape[0], k.shape[0]),
        lengths=(lengths_q, lengths_k),
        max_seqlens=max_seqlens,
    )


def _problem(
    function: str,
    q: Facts,
    k: Facts,
    options: Options,
    *,
    batch: int,
    rows: tuple[int, int],
    lengths: tuple[Lengths | None, Lengths | None],
    max_seqlens: tuple[int, int],
) -> Problem:
    headdim = q.shape[-1]
    _check_options(options, batch, q)
    left, right = _normalised_window(options.causal, options.window_size, max_seqlens[1])
    scale = options.softmax_scale
    # 1e-30 is what clients pass to ask for softmax_lse: it drops nothing
    dropout_p = options.dropout_p if 1.0 - options.dropout_p < 1.0 else 0.0
    return Problem(
        function=function,
        dtype=q.dtype,
        device=q.device,
        nheads=q.shape[-2],
        nheads_k=k.shape[-2],
        headdim=headdim,
        batch=batch,
        rows_q=rows[0],
        rows_k=rows[1],
        lengths_q=lengths[0],
        lengths_k=lengths[1],
        max_seqlen_q=max_seqlens[0],
        max_seqlen_k=max_seqlens[1],
        softmax_scale=default_scale(headdim) if scale is None else scale,
        left=left,
        right=right,
        softcap=max(options.softcap, 0.0),
        alibi=options.alibi_slopes is not None,
        dropout_p=dropout_p,
        deterministic=options.deterministic,
        s_dmask=options.return_attn_probs and dropout_p > 0,
        uses_lse=options.uses_lse,
        # checkpointing runs a forward twice, without and with gradients: one kernel must serve
        # both, as each draws masks of its own
        needs_grad=options.needs_grad or dropout_p > 0,
        sink=options.sink is not None,
        mask_from=options.mask_from,
        pages=options.pages,
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


def _check_tensors(q: Facts, k: Facts, v: Facts, layout: str, rank: int) -> None:
    for argument, facts in (("q", q), ("k", k), ("v", v)):
        if len(facts.shape) != rank:
            raise ArgumentError(
                explain(
                    argument,
                    f"shape {tuple(facts.shape)}",
                    f"{rank} dimensions, {layout}",
                    f"reshape {argument}; packed sequences go to the varlen functions, padded "
                    "batches to the others",
                )
            )
        checks.same(argument, "dtype", facts.dtype, q.dtype)
        checks.same(argument, "device", facts.device, q.device)
        checks.same(argument, "headdim", facts.shape[-1], q.shape[-1])
    if q.dtype not in DTYPES:
        allowed = ", ".join(str(dtype) for dtype in DTYPES)
        raise ArgumentError(
            explain("q", q.dtype, allowed, "convert q, k and v, e.g. with .to(torch.bfloat16)")
        )
    if tuple(k.shape) != tuple(v.shape):
        raise ArgumentError(
            explain(
                "v",
                f"shape {tuple(v.shape)}",
                f"the shape of k, {tuple(k.shape)}",
                "pass one value for each key",
            )
        )
    nheads, nheads_k = q.shape[-2], k.shape[-2]
    if nheads and (nheads_k == 0 or nheads % nheads_k):
        raise ArgumentError(
            explain(
                "k",
                f"{nheads_k} heads",
                f"a number of heads that divides the {nheads} heads of q",
                "use as many key heads as query heads, or a divisor of it (GQA, MQA)",
            )
        )


def _check_lengths(side: str, facts: Facts, lengths: Lengths, max_seqlen: int) -> None:
    if lengths.total > facts.shape[0]:
        remedy = f"let cu_seqlens_{side} end at the number of rows that hold tokens"
        if lengths.total == facts.shape[1]:
            remedy = f"heads first? pass {side}.transpose(0, 1), (total, nheads, headdim)"
        raise ArgumentError(
            explain(
                f"cu_seqlens_{side}",
                f"a last entry of {lengths.total}",
                f"at most {facts.shape[0]}, the rows of {side}",
                remedy,
            )
        )
    if max_seqlen < lengths.longest:
        raise ArgumentError(
            explain(
                f"max_seqlen_{side}",
                max_seqlen,
                f"at least {lengths.longest}, the longest sequence in cu_seqlens_{side}",
                f"pass max_seqlen_{side}={lengths.longest}",
            )
        )


def _check_options(options: Options, batch: int, q: Facts) -> None:
    if not 0.0 <= options.dropout_p < 1.0:
        raise ArgumentError(
            explain(
                "dropout_p",
                options.dropout_p,
                "a probability p with 0 <= p < 1",
                "pass 0.0 for no dropout",
            )
        )
    nheads = q.shape[-2]
    if options.sink is not None:
        if tuple(options.sink.shape) != (nheads,):
            raise ArgumentError(
                explain(
                    "sink",
                    f"shape {tuple(options.sink.shape)}",
                    f"({nheads},), one logit for each query head",
                    "pass one sink logit for each query head",
                )
            )
        checks.same("sink", "device", options.sink.device, q.device)
        if not options.sink.dtype.is_floating_point:
            allowed = "a floating dtype"
            raise ArgumentError(explain("sink", options.sink.dtype, allowed, "pass sink.float()"))
    slopes = options.alibi_slopes
    if slopes is None:
        return
    if tuple(slopes.shape) not in ((nheads,), (batch, nheads)) or slopes.dtype != torch.float32:
        raise ArgumentError(
            explain(
                "alibi_slopes",
                f"a {slopes.dtype} tensor of shape {tuple(slopes.shape)}",
                f"a torch.float32 tensor of shape ({nheads},) or ({batch}, {nheads})",
                "pass one float32 slope for each query head",
            )
        )
    checks.same("alibi_slopes", "device", slopes.device, q.device)
