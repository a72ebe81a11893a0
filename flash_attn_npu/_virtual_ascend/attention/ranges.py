"""The part of a card's refusals that is about lengths and bands: which pre_tokens, next_tokens and
lists of sequence lengths the tiling of npu_fusion_attention and its gradient accepts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..machine.refusal import require
from .call import AttentionCall
from .reference import kept_keys

_MOST_SEQUENCES = 20000


def check_tnd(call: AttentionCall) -> None:
    """Lists of lengths, and what the sparse modes ask of each sequence."""
    _check_lists(call)
    if call.mask is None:
        return
    check = {0: _check_tnd_mode_0, 1: _check_tnd_mask, 3: _check_tnd_mode_3, 4: _check_tnd_mode_4}
    check.get(call.mode, lambda call: None)(call)


def _check_lists(call: AttentionCall) -> None:
    lists = (call.cumulative_q, call.cumulative_kv)
    require(
        len(lists[0]) == len(lists[1]) and len(lists[0]) > 0,
        "actual_seq_qlen and actual_seq_kvlen need the same number of entries, at least one: got "
        f"{len(lists[0])} and {len(lists[1])}",
    )
    require(
        len(lists[0]) <= _MOST_SEQUENCES,
        f"at most {_MOST_SEQUENCES} sequences, got {len(lists[0])}",
    )
    require(
        call.key.shape[0] == call.value.shape[0],
        f"key and value need the same T, got {call.key.shape[0]} and {call.value.shape[0]}",
    )
    totals = (call.query.shape[0], call.key.shape[0])
    ends = tuple(max(cumulative) for cumulative in lists)
    if totals[0] > ends[0] and totals[1] > ends[1]:
        require(
            lists[0][-1] == 0 and lists[1][-1] == 0,
            "The end of actualSeqQLen & actualSeqKvLen should be 0 in EOD scenario",
        )
    else:
        require(
            totals == ends,
            f"the last cumulative lengths {ends} must equal T of query and key {totals}",
        )
    for cumulative in lists:
        _check_order(_without_end_zeros(cumulative))


def _without_end_zeros(cumulative: Sequence[int]) -> Sequence[int]:
    end = len(cumulative)
    while end and cumulative[end - 1] == 0:
        end -= 1
    return cumulative[:end]


def _check_order(cumulative: Sequence[int]) -> None:
    before = 0
    for value in cumulative:
        require(value >= before, f"cumulative lengths must not decrease, got {list(cumulative)}")
        before = value


def _check_tnd_mode_3(call: AttentionCall) -> None:
    for rows, columns in call.lengths:
        require(
            rows <= columns,
            f"sparse_mode 3 in TND needs Sq <= Skv in every sequence, got {rows} > {columns}",
        )


def _check_tnd_mode_4(call: AttentionCall) -> None:
    require(call.pre >= 0, f"sparse_mode 4 in TND needs pre_tokens >= 0, got {call.pre}")
    require(
        call.next >= 0 or call.pre + call.next >= 0,
        f"sparse_mode 4 in TND needs pre_tokens + next_tokens >= 0, got {call.pre} + {call.next}",
    )
    for rows, columns in call.lengths:
        require(
            rows == 0 or columns == 0 or rows - call.next <= columns,
            f"sparse_mode 4 in TND needs Sq - next_tokens <= Skv, got {rows} - {call.next} > "
            f"{columns}",
        )


def _check_tnd_mode_0(call: AttentionCall) -> None:
    require(call.next >= 0, f"sparse_mode 0 in TND needs next_tokens >= 0, got {call.next}")
    for rows, columns in call.lengths:
        require(
            columns + call.pre >= rows,
            f"sparse_mode 0 in TND needs Skv + pre_tokens >= Sq, got {columns} + {call.pre} < "
            f"{rows}",
        )
    _check_tnd_mask(call)
    _check_agreement(call)


def _check_tnd_mask(call: AttentionCall) -> None:
    for index, (rows, columns) in enumerate(call.lengths):
        if rows and columns:
            kept = kept_keys(call, index)
            require(
                kept.shape[-2:] == (rows, columns) and bool(kept.any(-1).all()),
                "every row of atten_mask must keep at least one key in TND",
            )


def _check_agreement(call: AttentionCall) -> None:
    for index, (rows, columns) in enumerate(call.lengths):
        i = torch.arange(rows, device="cpu")[:, None]
        j = torch.arange(columns, device="cpu")[None, :]
        visited = (j - i >= -call.pre) & (j - i <= call.next)
        kept = kept_keys(call, index)
        require(
            not bool((kept & ~visited).any()),
            "sparse_mode 0: pre_tokens and next_tokens must agree with atten_mask",
        )


def _from_top_left(call: AttentionCall) -> tuple[int, int, int, int]:
    """(pre, next, Sq, Skv), with mode 4's band counted from the top left corner."""
    _, rows, columns = call.dense_sizes()
    shift = rows - columns if call.mode == 4 else 0
    return call.pre + shift, call.next - shift, rows, columns


def check_dense_band(call: AttentionCall) -> None:
    pre, following, rows, columns = _from_top_left(call)
    if rows == 0 or columns == 0:
        return
    band = f"pre_tokens {pre} and next_tokens {following} counted from the top left"
    require(pre >= 0 or following >= 0, f"{band}: both are negative")
    require(
        pre >= 0 or (following >= -pre and -pre < columns),
        f"{band}: a negative pre_tokens needs next_tokens >= |pre_tokens| < Skv {columns}",
    )
    require(
        following >= 0 or (-following <= pre and -following < rows),
        f"{band}: a negative next_tokens needs |next_tokens| <= pre_tokens and < Sq {rows}",
    )
    if call.mode == 0:
        _check_agreement(call)


def check_dense_band_backward(call: AttentionCall) -> None:
    pre, following, rows, columns = _from_top_left(call)
    require(
        -pre <= columns and -following <= rows and call.pre + call.next >= 0,
        f"the gradient needs -pre_tokens {-pre} <= Skv {columns}, -next_tokens {-following} <= "
        f"Sq {rows} and their sum >= 0",
    )


def check_tnd_band_backward(call: AttentionCall) -> None:
    rows, columns = (max(sizes, default=0) for sizes in zip(*call.lengths, strict=True))
    require(
        -call.pre <= columns and -call.next <= rows,
        f"the gradient in TND needs -pre_tokens {-call.pre} <= Skv and -next_tokens "
        f"{-call.next} <= Sq",
    )
    require(
        call.pre + call.next > 0,
        f"the gradient in TND needs pre_tokens + next_tokens > 0, got {call.pre} + {call.next}",
    )
