"""The oracle of the tests: attention as flash-attn 2.8 defines it, in float64.

Every sequence is one whole matrix and its gradients are autograd's: clarity first, no blocks, no
shortcuts. Written from the mathematics and upstream's documentation, it shares nothing with the
package it judges.

`attention` and `same_precision` solve one sequence; `varlen` and `dense` apply either of them to a
batch. The same maths in the input's own precision is what upstream's error rule measures against
(see `assert_close_to_reference`).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Window = tuple[int | None, int | None]

# What float32 leaves where terms should cancel (the dq of a single key, say). The terms are dot
# products of up to 64 normal values, so up to 60 or so, times another such value or a few.
FLOAT32_NOISE = 512 * torch.finfo(torch.float32).eps


class Result(NamedTuple):
    """Attention's answer; for a batch, `probabilities` holds one matrix per sequence."""

    out: Tensor
    softmax_lse: Tensor
    probabilities: Tensor | list[Tensor]


def normalise_window(window_size: tuple[int, int], causal: bool, max_seqlen_k: int) -> Window:
    """Upstream's reading of `window_size`, in upstream's order; None is an infinite side.

    The length compared with is the call's (seqlen_k, or the max_seqlen_k argument of varlen), not
    the sequence's. So a side may become infinite although it would bind in a short sequence, and
    the side that upstream fills in may bind when seqlen_q exceeds it.
    """
    left, right = (None if side < 0 or side >= max_seqlen_k else side for side in window_size)
    if causal:
        right = 0
    if left is not None and right is None:
        right = max_seqlen_k
    elif left is None and right is not None and right > 0:
        left = max_seqlen_k
    return left, right


def visible_keys(seqlen_q: int, seqlen_k: int, window: Window) -> Tensor:
    """[seqlen_q, seqlen_k], True where the query sees the key: inclusive, bottom-right aligned."""
    left, right = window
    distance = key_minus_diagonal(seqlen_q, seqlen_k)
    visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
    if left is not None:
        visible &= distance >= -left
    if right is not None:
        visible &= distance <= right
    return visible


def key_minus_diagonal(seqlen_q: int, seqlen_k: int) -> Tensor:
    """[seqlen_q, seqlen_k]: how far key j lies after the key that is aligned with query i."""
    diagonal = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
    return torch.arange(seqlen_k)[None, :] - diagonal


def same_precision(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    sink: Tensor | None = None,
    max_seqlen_k: int | None = None,
) -> Result:
    """Attention of one sequence by plain PyTorch operations in the dtype of the input.

    q is [seqlen_q, nheads, headdim], k and v [seqlen_k, nheads_k, headdim]; `dropout_mask`
    [nheads, seqlen_q, seqlen_k] is True where a probability is kept; `sink` [nheads] is one more
    logit in the denominator (and so in the lse). `probabilities` are those before dropout.
    """
    seqlen_q, nheads, _ = q.shape
    seqlen_k, nheads_k, _ = k.shape
    k, v = (x.repeat_interleave(nheads // nheads_k, dim=1) for x in (k, v))
    longest_k = seqlen_k if max_seqlen_k is None else max_seqlen_k
    visible = visible_keys(seqlen_q, seqlen_k, normalise_window(window_size, causal, longest_k))
    scores = _scores(q, k, softmax_scale, softcap, alibi_slopes)
    probabilities, lse = _masked_softmax(scores, visible, sink)
    kept = probabilities
    if dropout_mask is not None:
        kept = probabilities * dropout_mask / (1 - dropout_p)
    out = torch.matmul(kept.to(v.dtype), v.transpose(0, 1)).transpose(0, 1)
    return Result(out, lse, probabilities)


def _scores(
    q: Tensor, k: Tensor, softmax_scale: float | None, softcap: float, alibi_slopes: Tensor | None
) -> Tensor:
    """The logits [nheads, seqlen_q, seqlen_k]: scale, then softcap, then the ALiBi bias."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = torch.matmul(q.transpose(0, 1), k.permute(1, 2, 0)) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        distance = key_minus_diagonal(q.shape[0], k.shape[0]).abs()
        scores = scores - alibi_slopes[:, None, None] * distance
    return scores


def _masked_softmax(scores: Tensor, visible: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax over visible keys and its lse; a row without keys gets zeros and +inf."""
    nheads, seqlen_q, seqlen_k = scores.shape
    logits = scores.masked_fill(~visible, float("-inf"))
    if sink is not None:
        column = sink.to(scores.dtype)[:, None, None].expand(nheads, seqlen_q, 1)
        logits = torch.cat((logits, column), dim=-1)
    empty = ~visible.any(dim=-1)
    # an arbitrary finite row instead of all -inf, or NaN would come back through the gradient
    logits = logits.masked_fill(empty[:, None], 0.0)
    probabilities = torch.softmax(logits, dim=-1)[..., :seqlen_k].masked_fill(empty[:, None], 0.0)
    lse = torch.logsumexp(logits, dim=-1).masked_fill(empty, float("inf"))
    return probabilities, lse


def attention(q: Tensor, k: Tensor, v: Tensor, **options) -> Result:
    """The truth about one sequence: `same_precision`'s maths and options, in float64.

    For float64 gradients pass float64 leaves: autograd rounds a gradient to its leaf's dtype.
    """
    for name in ("alibi_slopes", "sink"):
        if options.get(name) is not None:
            options[name] = options[name].double()
    return same_precision(q.double(), k.double(), v.double(), **options)


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Sequence[int],
    cu_seqlens_k: Sequence[int],
    *,
    max_seqlen_k: int,
    alibi_slopes: Tensor | None = None,
    dropout_mask: Sequence[Tensor] | None = None,
    attend: Callable[..., Result] = attention,
    **options,
) -> Result:
    """Packed sequences: `attend` on each, lse [nheads, total_q].

    Rows of q beyond the last sequence belong to nobody: zeros, and +inf in the lse.
    `max_seqlen_k` is the argument of the call, which windows are compared with.
    """
    pieces = []
    for index in range(len(cu_seqlens_q) - 1):
        rows = slice(cu_seqlens_q[index], cu_seqlens_q[index + 1])
        keys = slice(cu_seqlens_k[index], cu_seqlens_k[index + 1])
        if alibi_slopes is not None:
            per_sequence = alibi_slopes.ndim == 2
            options["alibi_slopes"] = alibi_slopes[index] if per_sequence else alibi_slopes
        if dropout_mask is not None:
            options["dropout_mask"] = dropout_mask[index]
        pieces.append(attend(q[rows], k[keys], v[keys], max_seqlen_k=max_seqlen_k, **options))

    tail = q.shape[0] - cu_seqlens_q[-1]
    # no rows of q, to tie the result to the graph even when there is no sequence at all
    nothing = q[:0]
    out_tail = q.new_zeros(tail, *q.shape[1:])
    lse_tail = q.new_full((q.shape[1], tail), float("inf"))
    out = torch.cat([nothing, *(p.out for p in pieces), out_tail])
    lse = torch.cat([nothing[..., 0].T, *(p.softmax_lse for p in pieces), lse_tail], dim=1)
    return Result(out, lse, [p.probabilities for p in pieces])


def dense(q: Tensor, k: Tensor, v: Tensor, **options) -> Result:
    """[batch, seqlen, nheads, headdim]: equal lengths; lse is [batch, nheads, seqlen_q]."""
    batch, seqlen_q, nheads, _ = q.shape
    seqlen_k = k.shape[1]
    result = varlen(
        *(x.flatten(0, 1) for x in (q, k, v)),
        [index * seqlen_q for index in range(batch + 1)],
        [index * seqlen_k for index in range(batch + 1)],
        max_seqlen_k=seqlen_k,
        **options,
    )
    lse = result.softmax_lse.reshape(nheads, batch, seqlen_q).transpose(0, 1)
    return Result(result.out.reshape(q.shape), lse, result.probabilities)


def with_gradients(
    function: Callable[..., Result],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    **options,
) -> tuple[Result, tuple[Tensor, ...]]:
    """`function(q, k, v, **options)` and its gradients (dq, dk, dv) for `dout`.

    With `out_dtype` they are what an exact backward makes of an `out` that was stored in that
    dtype: it takes rowsum(dout * out) from it, so the difference reaches every gradient. As the
    gradient of the lse is the probabilities, it acts like a gradient of the lse.
    """
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    result = function(*leaves, **options)
    outputs, gradients = [result.out], [dout]
    if out_dtype is not None:
        lost = result.out.detach() - result.out.detach().to(out_dtype)
        outputs.append(result.softmax_lse)
        gradients.append((dout * lost).sum(dim=-1).transpose(-1, -2))
    return result, torch.autograd.grad(outputs, leaves, gradients, materialize_grads=True)


def assert_close_to_reference(
    actual: Tensor,
    reference: Tensor,
    same_precision: Tensor,
    name: str,
    inherent: Tensor | None = None,
    loudness: float = 1.0,
    loudest: float = 0.0,
) -> None:
    """Upstream's rule: at most twice the error of plain PyTorch in the same precision, plus tiny.

    Tiny is for where plain PyTorch is exact by luck: one epsilon of the dtype at the largest value
    of the reference, for an answer that is rounded once, and `FLOAT32_NOISE`. `inherent` is the
    best answer that the interface allows, where that is not the reference: its error is added,
    and it is what is rounded. `loudness` is how much larger than normal the values are that terms
    which should cancel are multiplied by: a backward takes rowsum(dout * out) off products of dout
    and v, and what is left of a single key, say, is multiplied by that key. `loudest` is the
    largest softmax_lse, for a gradient: it is handed over in float32, and half of what that cannot
    tell apart is a relative error of every probability, as exp is taken of a score less it.
    """
    _assert_comparable(actual, reference, name)
    reference = reference.double()
    if reference.numel() == 0:
        return
    error = (actual.detach().cpu().double() - reference).abs()
    plain_error = (same_precision.double() - reference).abs().max().item()
    largest, lost = reference.abs().max().item(), 0.0
    if inherent is not None:
        largest = max(largest, inherent.abs().max().item())
        lost = (inherent - reference).abs().max().item()
    tiny = torch.finfo(actual.dtype).eps * largest + FLOAT32_NOISE * loudness + lost
    tiny += torch.finfo(torch.float32).eps / 2 * loudest * largest
    allowed = 2 * plain_error + tiny
    assert error.max().item() <= allowed, (
        f"{name}: off by {error.max().item():.3g} at {_where_largest(error)}, "
        f"allowed {allowed:.3g} "
        f"(plain PyTorch in {actual.dtype} is off by {plain_error:.3g}, tiny is {tiny:.3g})"
    )


def assert_lse_close(actual: Tensor, reference: Tensor, name: str = "softmax_lse") -> None:
    """softmax_lse is float32 whatever the inputs: float32 accuracy, and +inf in the same places.

    64 epsilons at the largest value, for a dot product accumulated over up to 64 terms.
    """
    assert actual.dtype == torch.float32, f"{name}: {actual.dtype}, expected torch.float32"
    _assert_comparable(actual, reference, name)
    finite = reference.isfinite()
    if not finite.any():
        return
    reference = reference.double().masked_fill(~finite, 0.0)
    error = (actual.detach().cpu().double().masked_fill(~finite, 0.0) - reference).abs()
    allowed = 64 * torch.finfo(torch.float32).eps * max(1.0, reference.abs().max().item())
    assert error.max().item() <= allowed, (
        f"{name}: off by {error.max().item():.3g} at {_where_largest(error)}, allowed {allowed:.3g}"
    )


def _assert_comparable(actual: Tensor, reference: Tensor, name: str) -> None:
    """Same shape, and the same NaN and infinities in the same places."""
    assert actual.shape == reference.shape, (
        f"{name}: shape {tuple(actual.shape)}, expected {tuple(reference.shape)}"
    )
    actual = actual.detach().cpu().double()
    # finite values become 0, special ones stay: what is compared is the pattern
    special = [x.masked_fill(x.isfinite(), 0.0) for x in (actual, reference.detach().double())]
    wrong = (special[0] != special[1]) & ~(special[0].isnan() & special[1].isnan())
    assert not wrong.any(), (
        f"{name}: {int(wrong.sum())} of {wrong.numel()} values are NaN or infinite where they "
        f"should not be, or the reverse; first at {tuple(wrong.nonzero()[0].tolist())}: "
        f"{actual[wrong][0].item()}, expected {reference[wrong][0].item()}"
    )


def _where_largest(error: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
