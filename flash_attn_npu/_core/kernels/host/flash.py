"""Torch's own flash attention for a CPU, over any band, with ALiBi, and for every precision.

It is what `scaled_dot_product_attention` runs there. Tensors here are (batch, nheads, seqlen,
headdim), views into the caller's; fewer heads of k and v are shared without being repeated.

float16 is computed in float32, which is faster on a CPU and closer; and so is every backward of a
half precision: the kernel adds up dk and dv in the dtype of k, which is off by more than upstream's
bound. The copies are made for a few heads at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...ground.processor import multiplies_bf16
from ...problems.results import accumulator
from ..bands import Band
from .decoding import many_keys, one_query
from .steps import SMALLEST_BLOCK, Step, backward_steps, forward_steps, left_of
from .strips import Spaces, Strips, streams, strip_backward

__all__ = [
    "COPIED_BYTES",
    "Rule",
    "attend",
    "attend_backward",
    "dense",
    "launch",
    "shares_heads",
    "split_scale",
    "with_silence",
]

COPIED_BYTES = 1 << 22
"""Of the float32 copy of one tensor, unless one head for each thread takes more."""

FEWEST_KEYS = 16
"""With fewer the kernel's maximum passes over NaN, and a row of them counts as one without keys."""

LONG, LONG_CAUSAL = 1024, 512
"""Queries, and keys, of a backward that strips are faster for, or of one that is not causal and has
a single sequence: it pays for its spaces alone."""

STREAM_ROWS = 1 << 12
"""Rows of streams that share strips: short ones are few launches then."""

BIAS_BYTES = 1 << 23
"""Of the bias of one launch, unless one head takes more."""

Triple = tuple[Tensor, Tensor, Tensor]

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Rule(NamedTuple):
    """What is asked.

    slopes: of ALiBi, (batch or 1, nheads), or None.
    told: softmax_lse is not for the backward only.
    """

    band: Band
    scale: float
    slopes: Tensor | None = None
    told: bool = False


def dense(x: Tensor) -> Tensor:
    """The kernel reads whole rows: it assumes that the last dimension lies together, and that rows
    and heads, which may be rows to it, do not reach into each other."""
    width = x.shape[-1]
    together = x.stride(-1) == 1 or width == 1
    apart = all(
        stride == 0 or stride >= width or size == 1
        for stride, size in zip(x.stride()[1:3], x.shape[1:3], strict=True)
    )
    return x if together and apart else x.contiguous()


def launch(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out, softmax_lse (batch, nheads, seqlen_q)) of queries that all see a key."""
    if causal and scale <= 0:
        # the kernel multiplies its -inf by the scale
        q, scale = (-q, -scale) if scale else (q * 0.0, 1.0)
    if q.shape[2] == 1 and q.shape[1] != k.shape[1] and bias is None:
        # of one query the heads that share keys are the rows of one product
        rows = q.squeeze(2).unflatten(1, (k.shape[1], -1))
        out, lse = _forward(rows, k, v, 0.0, False, scale=scale)
        out, lse = out.flatten(1, 2).unsqueeze(2), lse.flatten(1, 2).unsqueeze(2)
    else:
        out, lse = _forward(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    if k.shape[2] < FEWEST_KEYS and (lse == 0).any():
        lost = _lost(q.detach(), k.detach(), causal, bias) & (lse == 0)
        return out.masked_fill(lost[..., None], math.nan), lse.masked_fill(lost, math.nan)
    return out, lse


def _lost(q: Tensor, k: Tensor, causal: bool, bias: Tensor | None) -> Tensor:
    """(batch, nheads, seqlen_q), True where the score of a visible key is NaN."""
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2)
    if bias is not None:
        scores = scores.masked_fill(bias == -math.inf, 0.0)
    return (scores.tril() if causal else scores).isnan().any(-1)


def split_scale(scale: float, dtype: torch.dtype) -> tuple[float, float]:
    """What q is multiplied by, and the scale of the launches then.

    The forward multiplies scores by it, the backward lets its product do so: of large scores in
    float32 a backward would see others, unless the scale rounds nothing.
    """
    rounds = math.frexp(abs(scale))[0] not in (0.0, 0.5)
    return (scale, 1.0) if rounds and dtype.itemsize > 2 else (1.0, scale)


@cache
def shares_heads() -> bool:
    """Whether the installed torch's kernel knows of fewer heads of k and v: asked of it, once."""
    q = torch.ones(1, 4, 2, 8, device="cpu")
    # what a kernel that does not know would read are twos
    k = torch.full((1, 4, 1, 8), 2.0, device="cpu")
    k[:, :2] = torch.tensor([0.0, 1.0])[:, None, None]
    try:
        out, _ = _forward(q, k[:, :2], k[:, :2], 0.0, False)
    except RuntimeError:
        return False
    read: list[float] = out[0, :, 0, 0].tolist()
    return read == [0.0, 0.0, 1.0, 1.0]


def with_silence(
    lse: Tensor, inputs: tuple[Tensor, Tensor], step: Step, scale: float, bias: Tensor | None = None
) -> Tensor:
    """softmax_lse of a launch, +inf where all scores of a row are -inf: the kernel says 0 there.

    Args:
        inputs: q and k as they were launched.
    """
    if not (lse == 0).any():
        return lse
    # with ones for values a row adds up to 1, unless nothing was added
    q, k = inputs
    total, _ = launch(q, k, torch.ones_like(k), scale, step.causal, bias)
    return lse.masked_fill(total[..., 0] == 0, math.inf)


def attend(inputs: Triple, out: Tensor, lse: Tensor, rule: Rule) -> None:
    """Fill out and softmax_lse (batch, nheads, seqlen_q): zeros and +inf where no key is seen."""
    band, blind = rule.band, rule.band.blind
    if blind:
        out[:, :, :blind] = 0
        lse[:, :, :blind] = math.inf
    dtype = _forward_dtype(inputs, out, rule)
    factor, scale = split_scale(rule.scale, inputs[0].dtype)
    for part in _parts(inputs[0], inputs[1], rule, dtype):
        q, k, v = part.inputs(inputs, dtype)
        q = q * factor if factor != 1 else q
        biases = _Biases(rule, part, q)
        for step in forward_steps(band, biases.streams):
            rows, keys, bias = slice(*step.rows), slice(*step.keys), biases.of(step)
            given, values = (q[:, :, rows], k[:, :, keys]), v[:, :, keys]
            if q.shape[2] == 1 and bias is None and many_keys(given[1]):
                found, total = one_query(*given, values, scale)
            else:
                found, total = launch(*given, values, scale, step.causal, bias)
            part.q(out)[:, :, rows].copy_(found)
            if rule.told:
                total = with_silence(total, given, step, scale, bias)
            part.q(lse)[:, :, rows].copy_(total)


def _forward_dtype(inputs: Triple, out: Tensor, rule: Rule) -> torch.dtype:
    """What a forward is computed in: bfloat16 as it is, where copies would cost much.

    Not if a sink is to come: it rescales the output, which is rounded once. Nor if softmax_lse is
    told: of bfloat16 the kernel takes a quicker exp, and the sum is off by 5e-5 of itself.
    """
    q, k = inputs[:2]
    wide, group = accumulator(q.dtype), q.shape[1] // k.shape[1]
    numbers = max(group * q.shape[2], k.shape[2]) * q.shape[3]
    costs = q.shape[2] == 1 or numbers * wide.itemsize > COPIED_BYTES
    taken = q.dtype == torch.bfloat16 and out.dtype == q.dtype and multiplies_bf16()
    plain = rule.slopes is None and not rule.told
    return q.dtype if taken and costs and plain else wide


def attend_backward(
    inputs: Triple, answer: tuple[Tensor, Tensor, Tensor], grads: Triple, rule: Rule
) -> None:
    """Fill dq, dk and dv, from what a forward answered, or a merge of several, or with a sink.

    Args:
        answer: dout, out and softmax_lse.
    """
    if _long(inputs[0], inputs[1], rule):
        _by_strips(inputs, answer, grads, rule)
        return
    dtype = accumulator(inputs[0].dtype)
    factor, scale = split_scale(rule.scale, inputs[0].dtype)
    for part in _parts(inputs[0], inputs[1], rule, dtype):
        q, k, v = part.inputs(inputs, dtype)
        given = (q * factor if factor != 1 else q, k, v)
        dout, out = (dense(part.q(x).to(dtype)) for x in answer[:2])
        biases = _Biases(rule, part, given[0])
        steps = backward_steps(rule.band, biases.streams)
        sums = _Sums(part.grads(grads), rule.band, steps, dtype)
        for step in steps:
            rows, keys = slice(*step.rows), slice(*step.keys)
            found = _backward(
                dout[:, :, rows],
                given[0][:, :, rows],
                *(x[:, :, keys] for x in given[1:]),
                out[:, :, rows],
                part.q(answer[2])[:, :, rows],
                0.0,
                step.causal,
                attn_mask=biases.of(step),
                scale=scale,
            )
            if factor != 1:
                found[0].mul_(factor)
            sums.add(step, found)
        sums.write()


def _long(q: Tensor, k: Tensor, rule: Rule) -> bool:
    """Whether products of bfloat16, where a sum is one product, are the faster way.

    Of one thread: the kernel shares out heads among several, and strips each of their launches.
    """
    plain = rule.slopes is None and left_of(rule.band) is None
    taken = plain and q.dtype == torch.bfloat16 and multiplies_bf16()
    taken = taken and torch.get_num_threads() == 1
    long = LONG if rule.band.right is None and q.shape[0] == 1 else LONG_CAUSAL
    return taken and min(q.shape[2], k.shape[2]) >= long


def _by_strips(
    inputs: Triple, answer: tuple[Tensor, Tensor, Tensor], grads: Triple, rule: Rule
) -> None:
    """`attend_backward` of long bfloat16."""
    (_, heads_q, seqlen_q, _), (batch, heads_k) = inputs[0].shape, inputs[1].shape[:2]
    group, spaces = heads_q // heads_k, Spaces()
    room = STREAM_ROWS // (seqlen_q * group)
    for part in _shares(batch, heads_k, group, room):
        heads = part.heads_k.stop - part.heads_k.start
        dout, out, lse = (part.q(x) for x in answer)
        flat = (streams(x, heads) for x in (*part.grads(inputs), dout, out, lse[..., None]))
        q, k, v, dout, out, lse = flat
        given = Strips(q, k, v, dout, out, lse[..., 0], group)
        strip_backward(given, part.grads(grads), rule.band, rule.scale, spaces)


class _Part(NamedTuple):
    """Some of the sequences, and some of the heads."""

    batch: slice
    heads: slice
    heads_k: slice

    def q(self, x: Tensor) -> Tensor:
        return x[self.batch, self.heads]

    def k(self, x: Tensor) -> Tensor:
        return x[self.batch, self.heads_k]

    def inputs(self, inputs: Triple, dtype: torch.dtype) -> Triple:
        q, k, v = self.grads(inputs)
        return dense(q.to(dtype)), dense(k.to(dtype)), dense(v.to(dtype))

    def grads(self, three: Triple) -> Triple:
        return self.q(three[0]), self.k(three[1]), self.k(three[2])


def _parts(q: Tensor, k: Tensor, rule: Rule, dtype: torch.dtype) -> Iterator[_Part]:
    """The whole in one, but where copies or biases would take much memory."""
    batch, heads_k, seqlen_k, headdim = k.shape
    group = q.shape[1] // heads_k
    room = batch * heads_k
    if q.dtype != dtype:
        numbers = max(group * q.shape[2], seqlen_k) * headdim
        # the backward shares out nothing but heads among threads
        few = max(torch.get_num_threads(), COPIED_BYTES // (dtype.itemsize * max(numbers, 1)))
        room = min(room, few)
    if rule.slopes is not None:
        numbers = group * min(SMALLEST_BLOCK, q.shape[2]) * seqlen_k
        room = min(room, BIAS_BYTES // (dtype.itemsize * max(numbers, 1)))
    yield from _shares(batch, heads_k, group, room)


def _shares(batch: int, heads_k: int, group: int, room: int) -> Iterator[_Part]:
    """So many sequences times heads of k at a time, at most."""
    some, few = max(1, room // heads_k), max(1, min(room, heads_k))
    for first in range(0, batch, some):
        for head in range(0, heads_k, few):
            last = min(head + few, heads_k)
            yield _Part(
                slice(first, min(first + some, batch)),
                slice(head * group, last * group),
                slice(head, last),
            )


class _Biases:
    """The biases of the steps of a part; steps of one shape share theirs."""

    def __init__(self, rule: Rule, part: _Part, like: Tensor) -> None:
        self._band = rule.band
        self._slopes, self.streams = None, 0
        # the kernel adds a bias in float32 to whatever is narrower
        dtype = accumulator(like.dtype)
        self._like = like.new_empty(0, dtype=dtype)
        if rule.slopes is not None:
            batch = part.batch if rule.slopes.shape[0] > 1 else slice(None)
            self._slopes = rule.slopes[batch, part.heads, None, None].to(dtype)
            self.streams = self._slopes.numel()
        self._last: tuple[tuple[int, ...], Tensor | None] = ((), None)

    def of(self, step: Step) -> Tensor | None:
        if not step.biased:
            return None
        (first, last), (low, high) = step.rows, step.keys
        shape = (last - first, high - low, low - first)
        if self._last[0] != shape:
            bias = self._band.bias(step.rows, step.keys, self._slopes, self._like)
            self._last = (shape, bias)
        return self._last[1]


class _Sums:
    """Where the gradients of steps add up: in the caller's tensors, if there is one step only."""

    def __init__(self, grads: Triple, band: Band, steps: list[Step], dtype: torch.dtype) -> None:
        self._grads = grads
        self._alone = len(steps) == 1
        seqlens = (band.seqlen_q, band.seqlen_k, band.seqlen_k)
        if not self._alone:
            self._sums = tuple(torch.zeros_like(x, dtype=dtype) for x in grads)
            return
        parts = (steps[0].rows, steps[0].keys, steps[0].keys)
        for grad, seqlen, (first, last) in zip(grads, seqlens, parts, strict=True):
            if first:
                grad[:, :, :first] = 0
            if last < seqlen:
                grad[:, :, last:] = 0

    def add(self, step: Step, found: Triple) -> None:
        parts = (step.rows, step.keys, step.keys)
        targets = self._grads if self._alone else self._sums
        for target, (first, last), more in zip(targets, parts, found, strict=True):
            place = target[:, :, first:last]
            if self._alone:
                place.copy_(more)
            else:
                place.add_(more)

    def write(self) -> None:
        if not self._alone:
            for grad, total in zip(self._grads, self._sums, strict=True):
                grad.copy_(total)
