"""One attention problem, described once and validated: what is asked, without the tensors.

The description holds facts only (shapes, dtypes, lengths, options), so it hashes, and what is
decided from it can be remembered. Tensors travel beside it. Everything a kernel reads here is
already in flash-attn's conventions: bottom-right alignment and inclusive window bounds, where
query i of a sequence sees key j if  i + seqlen_k - seqlen_q - left <= j <= i + seqlen_k -
seqlen_q + right.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from ..errors import ArgumentError, explain
from .lengths import Lengths

__all__ = [
    "Facts",
    "Options",
    "Pages",
    "Problem",
    "default_scale",
    "dense_problem",
    "varlen_problem",
]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""float32 and float64 go beyond upstream, which takes the half precisions only."""


class Facts(NamedTuple):
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor | Facts) -> Facts:
        return cls(tensor.shape, tensor.dtype, tensor.device)


class Pages(NamedTuple):
    """How the keys of a problem lie in a cache.

    size: positions of a page, as a kernel may see the cache without copying it; None if it
        cannot. A row of an unpaged cache counts as so many pages.
    contiguous: the cache is.
    padded: the keys of some sequence do not start at its first position.
    shared: the sequences use more pages together than the cache has.
    """

    size: int | None
    contiguous: bool
    padded: bool
    shared: bool


class Options(NamedTuple):
    """The arguments of a call that are not read, as plain Python values.

    uses_lse: softmax_lse is returned, or given to a backward.
    needs_grad: a backward is or will be asked for.
    mask_from: the kernel that drew the dropout mask a backward has to repeat.
    """

    dropout_p: float
    softmax_scale: float | None
    causal: bool
    window_size: tuple[int, int]
    softcap: float
    alibi_slopes: Facts | None
    deterministic: bool
    return_attn_probs: bool
    uses_lse: bool
    needs_grad: bool
    sink: Facts | None = None
    mask_from: str | None = None
    pages: Pages | None = None


@dataclass(frozen=True, eq=False)
class Problem:
    """A validated attention problem.

    `left` and `right` are the window after flash-attn's normalisation, None for unlimited;
    plain causal attention is (None, 0). `lengths_q` and `lengths_k` are None for dense layouts
    (batch, seqlen, nheads, headdim); with them q is (rows_q, nheads, headdim), and rows past the
    last cumulative length belong to no sequence.
    """

    function: str
    dtype: torch.dtype
    device: torch.device
    nheads: int
    nheads_k: int
    headdim: int
    seqlens_q: tuple[int, ...]
    seqlens_k: tuple[int, ...]
    rows_q: int
    rows_k: int
    lengths_q: Lengths | None
    lengths_k: Lengths | None
    max_seqlen_q: int
    max_seqlen_k: int
    softmax_scale: float
    left: int | None
    right: int | None
    softcap: float
    alibi: bool
    dropout_p: float
    deterministic: bool
    s_dmask: bool
    uses_lse: bool
    needs_grad: bool
    sink: bool
    mask_from: str | None
    pages: Pages | None

    @property
    def varlen(self) -> bool:
        return self.lengths_q is not None

    @property
    def batch(self) -> int:
        return len(self.seqlens_q)

    @property
    def causal(self) -> bool:
        """Plain causal attention; with a finite `left` it is a window."""
        return self.left is None and self.right == 0

    @property
    def windowed(self) -> bool:
        return not self.causal and (self.left is not None or self.right is not None)

    @cached_property
    def blind_rows(self) -> tuple[int, ...]:
        """Per sequence, how many queries see no key: always the first ones.

        The left bound never empties a row, and the last query sees the last key.
        """
        return tuple(
            seqlen_q
            if seqlen_k == 0
            else max(0, seqlen_q - seqlen_k - (seqlen_q if self.right is None else self.right))
            for seqlen_q, seqlen_k in zip(self.seqlens_q, self.seqlens_k, strict=True)
        )

    @cached_property
    def has_work(self) -> bool:
        """Whether any query sees any key."""
        return self.nheads > 0 and self.headdim > 0 and self.seeing_rows > 0

    @cached_property
    def seeing_rows(self) -> int:
        return sum(self.seqlens_q) - sum(self.blind_rows)

    @cached_property
    def common_offset(self) -> int | None:
        """seqlen_k - seqlen_q if it is the same for all sequences, else None."""
        offsets = {k - q for q, k in zip(self.seqlens_q, self.seqlens_k, strict=True)}
        return offsets.pop() if len(offsets) == 1 else None

    @property
    def tail_q(self) -> int:
        """Rows of q past the last sequence."""
        return self.rows_q - sum(self.seqlens_q)

    @property
    def tail_k(self) -> int:
        """Rows of k and v past the last sequence."""
        return self.rows_k - sum(self.seqlens_k)


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
        seqlens=((seqlen_q,) * batch, (seqlen_k,) * batch),
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
        seqlens=(lengths_q.seqlens, lengths_k.seqlens),
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
    seqlens: tuple[tuple[int, ...], tuple[int, ...]],
    rows: tuple[int, int],
    lengths: tuple[Lengths | None, Lengths | None],
    max_seqlens: tuple[int, int],
) -> Problem:
    headdim = q.shape[-1]
    _check_options(options, len(seqlens[0]), q)
    left, right = _normalised_window(options.causal, options.window_size, max_seqlens[1])
    scale = options.softmax_scale
    return Problem(
        function=function,
        dtype=q.dtype,
        device=q.device,
        nheads=q.shape[-2],
        nheads_k=k.shape[-2],
        headdim=headdim,
        seqlens_q=seqlens[0],
        seqlens_k=seqlens[1],
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
        # 1e-30 is what clients pass to ask for softmax_lse: it drops nothing
        dropout_p=options.dropout_p if 1.0 - options.dropout_p < 1.0 else 0.0,
        deterministic=options.deterministic,
        s_dmask=options.return_attn_probs and 1.0 - options.dropout_p < 1.0,
        uses_lse=options.uses_lse,
        needs_grad=options.needs_grad,
        sink=options.sink is not None,
        mask_from=options.mask_from,
        pages=options.pages,
    )


def default_scale(headdim: int) -> float:
    """headdim ** -0.5, the softmax_scale that None stands for."""
    return headdim**-0.5 if headdim else 1.0


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
        _check_same(argument, "dtype", facts.dtype, q.dtype)
        _check_same(argument, "device", facts.device, q.device)
        _check_same(argument, "headdim", facts.shape[-1], q.shape[-1])
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


def _check_same(argument: str, what: str, came: object, expected: object) -> None:
    if came != expected:
        remedy = f"{argument} = {argument}.to(q.{what})" if what != "headdim" else "pad the shorter"
        raise ArgumentError(
            explain(argument, f"{what} {came}", f"the {what} of q, {expected}", remedy)
        )


def _check_lengths(side: str, facts: Facts, lengths: Lengths, max_seqlen: int) -> None:
    if lengths.total > facts.shape[0]:
        raise ArgumentError(
            explain(
                f"cu_seqlens_{side}",
                f"a last entry of {lengths.total}",
                f"at most {facts.shape[0]}, the rows of {side}",
                f"let cu_seqlens_{side} end at the number of rows that hold tokens",
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
        _check_same("sink", "device", options.sink.device, q.device)
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
    _check_same("alibi_slopes", "device", slopes.device, q.device)
