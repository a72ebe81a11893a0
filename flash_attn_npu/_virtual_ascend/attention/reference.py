"""npu_fusion_attention and its gradient in float64, one sequence at a time, as documented.

Conventions: views are [N, S, D]; masked scores are -FLT_MAX and not -inf, as in the kernels,
which is what makes the statistics of rows without keys what they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..machine import lies
from ..machine.randomness import combine, host_generator
from .call import AttentionCall

FLOAT_MAX = torch.finfo(torch.float32).max


class Dropout(NamedTuple):
    """Which of the probabilities of all sequences, in order, are kept."""

    kept: torch.Tensor
    keep_prob: float


def dropout_of(call: AttentionCall, seed: int, offset: int) -> Dropout | None:
    if call.keep_prob >= 1:
        return None
    count = call.heads * sum(rows * columns for rows, columns in call.lengths)
    return Dropout(keep_bits(count, call.keep_prob, seed, offset), call.keep_prob)


def keep_bits(count: int, keep_prob: float, seed: int, offset: int) -> torch.Tensor:
    """A boolean for each element, True where dropout keeps it."""
    generator = host_generator(combine(seed, offset))
    # Whole blocks of the bit mask, as the card generates them
    drawn = torch.rand(-(-count // 128) * 128, generator=generator, device="cpu")
    return drawn[:count] < keep_prob


def kept_keys(call: AttentionCall, index: int) -> torch.Tensor | None:
    """Which (row, column) of a sequence take part, broadcastable to [N, Sq, Skv]; None for all."""
    rows, columns = call.lengths[index]
    return lies.kept(_by_mode(call, index), rows, columns)


def _by_mode(call: AttentionCall, index: int) -> torch.Tensor | None:
    if call.mask is None:
        return None
    rows, columns = call.lengths[index]
    if call.mode in (0, 1):
        return _mask_of_sequence(call, index) == 0
    i = torch.arange(rows, device="cpu")[:, None]
    j = torch.arange(columns, device="cpu")[None, :]
    diagonal = j - i
    if call.mode == 2:
        return diagonal <= 0
    bottom_right = lies.offset(columns - rows)
    if call.mode == 3:
        return diagonal <= bottom_right
    return (diagonal >= bottom_right - call.pre) & (diagonal <= bottom_right + call.next)


def _mask_of_sequence(call: AttentionCall, index: int) -> torch.Tensor:
    mask, lengths = call.mask, call.lengths
    rows, columns = lengths[index]
    if not call.is_tnd:
        if mask.dim() == 2:
            return mask
        return mask[index if mask.shape[0] > 1 else 0]
    if mask.shape == (sum(r for r, _ in lengths), sum(c for _, c in lengths)):
        top = sum(r for r, _ in lengths[:index])
        left = sum(c for _, c in lengths[:index])
        return mask[top : top + rows, left : left + columns]
    return mask[:rows, :columns]


def bias_of(call: AttentionCall, index: int) -> torch.Tensor | float:
    """The position bias of a sequence, broadcastable to [N, Sq, Skv]."""
    if call.pse is None:
        return 0.0
    rows, columns = call.lengths[index]
    if call.pse_type in (2, 3):
        slopes = call.pse.double()
        slopes = (slopes[index] if slopes.dim() == 2 else slopes)[:, None, None]
        i = torch.arange(rows, device="cpu")[:, None] + call.q_start
        j = torch.arange(columns, device="cpu")[None, :] + call.kv_start
        distance = (j - i).abs().double()
        return -slopes * (distance if call.pse_type == 2 else distance.sqrt())
    if call.is_tnd:
        return _flat_bias(call, index)
    return call.pse[index if call.pse.shape[0] > 1 else 0].double()


def _flat_bias(call: AttentionCall, index: int) -> torch.Tensor:
    lengths = call.lengths
    heads = call.heads
    per_row = call.pse.numel() == heads * sum(rows * columns for rows, columns in lengths)
    height = [rows if per_row else 1 for rows, _ in lengths]
    sizes = [heads * h * columns for h, (_, columns) in zip(height, lengths, strict=True)]
    piece = call.pse.reshape(-1).split(sizes)[index]
    return piece.view(heads, height[index], lengths[index][1]).double()


def scores(call: AttentionCall, index: int, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Scaled, biased and masked scores [N, Sq, Skv]."""
    product = q @ k.transpose(-1, -2)
    bias = bias_of(call, index)
    inside, outside = (bias, 0.0) if call.pse_type == 1 else (0.0, bias)
    result = call.scale * (product + inside) + outside
    kept = kept_keys(call, index)
    return result if kept is None else result.masked_fill(~kept, -FLOAT_MAX)


def expand_kv(call: AttentionCall, tensor: torch.Tensor) -> torch.Tensor:
    return lies.key_heads(tensor.double(), call.heads)


def forward(
    call: AttentionCall, dropout: Dropout | None, outputs: tuple[torch.Tensor, ...]
) -> None:
    """Fill attention, softmax_max and softmax_sum (host views of what the operator allocated)."""
    views = zip(
        call.split_q(call.query),
        call.split_kv(call.key),
        call.split_kv(call.value),
        call.split_q(outputs[0]),
        call.split_statistics(outputs[1]),
        call.split_statistics(outputs[2]),
        _dropout_pieces(call, dropout),
        strict=True,
    )
    for index, (q, k, v, out, maximum, total, kept) in enumerate(views):
        if k.shape[1] == 0 or q.shape[1] == 0:
            for target in (out, maximum, total):
                target.zero_()
            continue
        attention, row_max, row_sum = _forward_one(call, index, (q, k, v), kept)
        out.copy_(attention)
        maximum.copy_(row_max.expand(maximum.shape))
        total.copy_(row_sum.expand(total.shape))


def _forward_one(
    call: AttentionCall,
    index: int,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    kept: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = tensors[0].double(), expand_kv(call, tensors[1]), expand_kv(call, tensors[2])
    s = scores(call, index, q, k)
    row_max = s.amax(-1, keepdim=True)
    if call.sink is not None:
        row_max = torch.maximum(row_max, call.sink.double()[:, None, None])
    row_max = row_max.float().double()
    p = torch.exp(s - row_max)
    row_sum = p.sum(-1, keepdim=True)
    if call.sink is not None:
        row_sum = row_sum + torch.exp(call.sink.double()[:, None, None] - row_max)
    p = p / row_sum
    out = (p if kept is None else p * kept / call.keep_prob) @ v
    if repairs_empty_rows(call):
        keyless = (s == -FLOAT_MAX).all(-1, keepdim=True)
        out = out.masked_fill(keyless, 0.0)
        row_max = row_max.masked_fill(keyless, -FLOAT_MAX)
        row_sum = row_sum.masked_fill(keyless, FLOAT_MAX)
    return out, row_max, row_sum


def repairs_empty_rows(call: AttentionCall) -> bool:
    """Whether rows without keys give zeros and not the mean of the values."""
    return call.mask is not None and (call.mode in (3, 4) or call.inner_precise == 2)


def backward(
    call: AttentionCall,
    dropout: Dropout | None,
    saved: tuple[torch.Tensor, ...],
    outputs: tuple[torch.Tensor, ...],
    sink_gradient: torch.Tensor | None,
) -> None:
    """Fill dq, dk and dv from (dy, softmax_max, softmax_sum, attention_in) as given."""
    dy, maximum, total, attention = saved
    for target in outputs[1:]:
        for view in call.split_kv(target):
            view.zero_()
    views = zip(
        call.split_q(dy),
        call.split_statistics(maximum),
        call.split_statistics(total),
        call.split_q(attention),
        _dropout_pieces(call, dropout),
        strict=True,
    )
    targets = (call.split_q(outputs[0]), call.split_kv(outputs[1]), call.split_kv(outputs[2]))
    for index, piece in enumerate(views):
        rows, columns = call.lengths[index]
        if rows == 0 or columns == 0:
            targets[0][index].zero_()
            continue
        *gradients, sink = _backward_one(call, index, piece)
        for target, gradient in zip(targets, gradients, strict=True):
            target[index].copy_(gradient)
        if sink_gradient is not None and sink is not None:
            sink_gradient.add_(sink)


def _backward_one(
    call: AttentionCall, index: int, piece: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor | None, ...]:
    dy, maximum, total, attention, kept = piece
    dy = dy.double()
    q = call.split_q(call.query)[index].double()
    k = expand_kv(call, call.split_kv(call.key)[index])
    v = expand_kv(call, call.split_kv(call.value)[index])
    row_max, row_sum = maximum[..., :1].double(), total[..., :1].double()
    p = torch.exp(scores(call, index, q, k) - row_max) / row_sum
    dp = dy @ v.transpose(-1, -2)
    dropped = p
    if kept is not None:
        dp = dp * kept / call.keep_prob
        dropped = p * kept / call.keep_prob
    row_dot = (dy * attention.double()).sum(-1, keepdim=True)
    ds = p * (dp - row_dot)
    dk = call.scale * ds.transpose(-1, -2) @ q
    dv = dropped.transpose(-1, -2) @ dy
    dsink = None
    if call.sink is not None:
        share = torch.exp(call.sink.double()[:, None, None] - row_max) / row_sum
        dsink = -(share * row_dot).sum((1, 2))
    return call.scale * ds @ k, _group(call, dk), _group(call, dv), dsink


def _group(call: AttentionCall, gradient: torch.Tensor) -> torch.Tensor:
    """Sum the gradients of the query heads that share a key head."""
    return lies.summed_by_key_head(gradient, call.kv_heads)


def _dropout_pieces(call: AttentionCall, dropout: Dropout | None) -> list[torch.Tensor | None]:
    if dropout is None:
        return [None] * len(call.lengths)
    shapes = [(call.heads, rows, columns) for rows, columns in call.lengths]
    pieces = dropout.kept.split([h * r * c for h, r, c in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
