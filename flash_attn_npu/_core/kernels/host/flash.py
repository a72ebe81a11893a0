"""Torch's own flash attention for a CPU, over any band, with ALiBi, and for every precision.

It is what `scaled_dot_product_attention` runs there. Tensors here are (batch, nheads, seqlen,
headdim), views into the caller's; fewer heads of k and v are shared without being repeated.

float16 is computed in float32, which is faster on a CPU and closer; and so is every backward of a
half precision: the kernel adds up dk and dv in the dtype of k, which is off by more than upstream's
bound. The copies are made for a few heads at a time, and for some rows of long ones.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from ...ground.functions import outside_transforms
from ...ground.processor import multiplies_bf16
from ...problems.results import accumulator
from .copies import Copies
from .decoding import many_keys, one_query
from .parts import COPIED_BYTES, Biases, Part, Rows, Rule, Sums, Triple, dense, parts
from .steps import Step, backward_steps, forward_steps, left_of, pieces, whole_step

__all__ = [
    "attend",
    "attend_backward",
    "attend_step",
    "attend_whole",
    "forward_dtype",
    "launch",
    "shares_heads",
    "split_scale",
    "with_silence",
]

FEWEST_KEYS = 16
"""With fewer the kernel's maximum passes over NaN, and a row of them counts as one without keys."""

LONG = 512
"""Queries, and keys, of a backward that strips are faster for."""

LEAST = torch.finfo(torch.float32).min
"""The softmax_lse of a row that has seen no key yet: of -inf the difference is NaN."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def launch(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out, softmax_lse (batch, nheads, seqlen_q)) of queries that all see a key."""
    if causal and scale <= 0:
        # the kernel multiplies its -inf by the scale
        q, scale = (-q, -scale) if scale else (q * 0.0, 1.0)
    if q.shape[2] == 1 and q.shape[1] != k.shape[1] and bias is None:
        # of one query the heads that share keys are the rows of one product
        batch, heads, _, headdim = q.shape
        rows = q.view(batch, k.shape[1], heads // k.shape[1], headdim)
        out, lse = _forward(rows, k, v, 0.0, False, scale=scale)
        out, lse = out.reshape(q.shape), lse.reshape(batch, heads, 1)
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
    with outside_transforms():
        return _shares_heads()


def _shares_heads() -> bool:
    q = torch.ones(1, 4, 2, 8, device="cpu")
    # what a kernel that does not know would read are twos
    k = torch.full((1, 4, 1, 8), 2.0, device="cpu")
    k[:, :2] = torch.tensor([0.0, 1.0], device="cpu")[:, None, None]
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
    dtype = forward_dtype(inputs, out.dtype, rule)
    whole = attend_whole(inputs, dtype, rule)
    if whole is not None:
        out.copy_(whole[0])
        lse.copy_(whole[1])
        return
    if blind:
        out[:, :, :blind] = 0
        lse[:, :, :blind] = math.inf
    (factor, scale), copies = split_scale(rule.scale, inputs[0].dtype), Copies(dtype)
    for part in parts(inputs[0], inputs[1], rule, dtype):
        if part.size:
            _attend_by_pieces(part, inputs, (out, lse), rule, dtype)
            continue
        q, k, v = part.of(inputs, (), copies)
        q = q * factor if factor != 1 else q
        biases = Biases(rule, part, q)
        for step in forward_steps(band, biases.streams):
            rows, keys, bias = slice(*step.rows), slice(*step.keys), biases.of(step)
            given, values = (q[:, :, rows], k[:, :, keys]), v[:, :, keys]
            found, total = attend_step(given, values, scale, step, bias)
            part.q(out)[:, :, rows].copy_(found)
            if rule.told:
                total = with_silence(total, given, step, scale, bias)
            part.q(lse)[:, :, rows].copy_(total)


def attend_whole(inputs: Triple, dtype: torch.dtype, rule: Rule) -> tuple[Tensor, Tensor] | None:
    """(out, softmax_lse) by one launch over tensors as they are; None if it takes more than one.

    Args:
        dtype: of what is computed, by `forward_dtype`.
    """
    same = rule.slopes is None and inputs[0].dtype == dtype
    step = whole_step(rule.band) if same else None
    if step is None or not step.rows[1]:
        return None
    factor, scale = split_scale(rule.scale, dtype)
    q, k, v = dense(inputs[0]), dense(inputs[1]), dense(inputs[2])
    q = q * factor if factor != 1 else q
    found, total = attend_step((q, k), v, scale, step, None)
    return found, with_silence(total, (q, k), step, scale) if rule.told else total


def attend_step(
    given: tuple[Tensor, Tensor], values: Tensor, scale: float, step: Step, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(out, softmax_lse) of a step, by the faster way."""
    if given[0].shape[2] == 1 and bias is None and many_keys(given[1]):
        return one_query(*given, values, scale)
    return launch(*given, values, scale, step.causal, bias)


def _attend_by_pieces(
    part: Part, inputs: Triple, answer: tuple[Tensor, Tensor], rule: Rule, dtype: torch.dtype
) -> None:
    """`attend` of a part that is copied by pieces; what they answer is merged by softmax_lse."""
    q, k, v = (Rows(x, dtype, part.size) for x in part.grads(inputs))
    out, lse = (part.q(x) for x in answer)
    biases = Biases(rule, part, inputs[0])
    for (first, last), steps in pieces(rule.band, biases.streams, part.size):
        once = all(one.rows[1] <= other.rows[0] for one, other in pairwise(steps))
        if not once:
            held = torch.zeros_like(out[:, :, first:last], dtype=dtype)
            total = torch.full_like(lse[:, :, first:last], LEAST)
        for step in steps:
            given, bias = (q[step.rows], k[step.keys]), biases.of(step)
            found, more = attend_step(given, v[step.keys], rule.scale, step, bias)
            if rule.told or not once:
                more = with_silence(more, given, step, rule.scale, bias)
            if once:
                rows = slice(*step.rows)
                out[:, :, rows], lse[:, :, rows] = found, more
            else:
                rows = slice(step.rows[0] - first, step.rows[1] - first)
                _merge((held[:, :, rows], total[:, :, rows]), (found, more))
        if not once:
            out[:, :, first:last] = held
            lse[:, :, first:last] = total.masked_fill_(total == LEAST, math.inf)


def _merge(held: tuple[Tensor, Tensor], more: tuple[Tensor, Tensor]) -> None:
    """Add (out, softmax_lse) of other keys, +inf for none, to `held`, LEAST for none."""
    (out, lse), (found, total) = held, more
    total = total.masked_fill(total == math.inf, LEAST)
    ahead = total - lse
    out.mul_(torch.sigmoid(-ahead)[..., None]).addcmul_(found, torch.sigmoid(ahead)[..., None])
    torch.logaddexp(lse, total, out=lse)


def forward_dtype(inputs: Triple, out: torch.dtype, rule: Rule) -> torch.dtype:
    """What a forward is computed in: bfloat16 as it is, where copies would cost much.

    Not if a sink is to come: it rescales the output, which is rounded once. Nor if softmax_lse is
    told: of bfloat16 the kernel takes a quicker exp, and the sum is off by 5e-5 of itself.
    """
    q, k = inputs[:2]
    wide, group = accumulator(q.dtype), q.shape[1] // k.shape[1]
    numbers = max(group * q.shape[2], k.shape[2]) * q.shape[3]
    costs = q.shape[2] == 1 or numbers * wide.itemsize > COPIED_BYTES
    taken = q.dtype == torch.bfloat16 and out == q.dtype and multiplies_bf16()
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
        # of a backward only, and of no import
        from .strips import backward_by_strips

        backward_by_strips(inputs, answer, grads, rule)
        return
    dtype = accumulator(inputs[0].dtype)
    (factor, scale), copies = split_scale(rule.scale, inputs[0].dtype), Copies(dtype)
    for part in parts(inputs[0], inputs[1], rule, dtype):
        if part.size:
            _backward_by_pieces(part, inputs, answer, grads, rule)
            continue
        q, k, v, dout, out = part.of(inputs, answer[:2], copies)
        given = (q * factor if factor != 1 else q, k, v)
        biases = Biases(rule, part, given[0])
        steps = backward_steps(rule.band, biases.streams)
        sums = Sums(part.grads(grads), rule.band, steps, dtype)
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


def _backward_by_pieces(
    part: Part, inputs: Triple, answer: Triple, grads: Triple, rule: Rule
) -> None:
    """`attend_backward` of a part that is copied by pieces: gradients only add up."""
    dtype = accumulator(inputs[0].dtype)
    q, k, v = (Rows(x, dtype, part.size) for x in part.grads(inputs))
    dout, out = (Rows(part.q(x), dtype, part.size) for x in answer[:2])
    lse, biases = part.q(answer[2]), Biases(rule, part, inputs[0])
    dq, *of_keys = part.grads(grads)
    sums = [torch.zeros_like(x, dtype=dtype) for x in of_keys]
    dq[:, :, : rule.band.blind] = 0
    for (first, last), steps in pieces(rule.band, biases.streams, part.size):
        sum_q = torch.zeros_like(dq[:, :, first:last], dtype=dtype)
        for step in steps:
            given = dout[step.rows], q[step.rows], k[step.keys], v[step.keys], out[step.rows]
            total, bias = lse[:, :, slice(*step.rows)], biases.of(step)
            found = _backward(*given, total, 0.0, step.causal, attn_mask=bias, scale=rule.scale)
            sum_q[:, :, step.rows[0] - first : step.rows[1] - first].add_(found[0])
            for target, more in zip(sums, found[1:], strict=True):
                target[:, :, slice(*step.keys)].add_(more)
        dq[:, :, first:last] = sum_q
    for grad, target in zip(of_keys, sums, strict=True):
        grad.copy_(target)


def _long(q: Tensor, k: Tensor, rule: Rule) -> bool:
    """Whether products of bfloat16, where a sum is one product, are the faster way.

    Of one thread: the kernel shares out heads among several, and strips each of their launches.
    """
    plain = rule.slopes is None and left_of(rule.band) is None
    taken = plain and q.dtype == torch.bfloat16 and multiplies_bf16()
    taken = taken and torch.get_num_threads() == 1
    return taken and min(q.shape[2], k.shape[2]) >= LONG
