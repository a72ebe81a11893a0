"""The part of npu_fused_infer_attention_score's refusals that is about lists of lengths and about
the pages of a cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..machine.refusal import require
from .call import InferCall

_MOST_SEQUENCES = 65536


def check_lengths(call: InferCall) -> None:
    if call.is_tnd:
        _check_packed(call)
        return
    _check_dense("actual_seq_lengths", call.q_lengths, call, call.query)
    _check_dense("actual_seq_lengths_kv", call.kv_lengths, call, call.key)


def _check_dense(
    name: str, lengths: Sequence[int] | None, call: InferCall, tensor: torch.Tensor
) -> None:
    if lengths is None:
        return
    require(
        len(lengths) == 1 or len(lengths) >= call.batch,
        f"{name} needs one entry or at least B {call.batch}, got {len(lengths)}",
    )
    require(min(lengths) >= 0, f"{name} must not be negative, got {list(lengths)}")
    if tensor is call.query and call.is_dense_decode:
        return
    if tensor is call.query or not call.is_paged:
        size = tensor.shape[call.layout.index("S")]
        longest = max(lengths[: max(call.batch, 1)])
        require(longest <= size, f"{name} must not exceed S {size}, got {list(lengths)}")


def _check_packed(call: InferCall) -> None:
    require(
        bool(call.q_lengths) and call.kv_lengths is not None,
        "TND needs actual_seq_lengths and actual_seq_lengths_kv",
    )
    require(
        len(call.q_lengths) == len(call.kv_lengths),
        f"actual_seq_lengths and actual_seq_lengths_kv need the same number of entries, got "
        f"{len(call.q_lengths)} and {len(call.kv_lengths)}",
    )
    require(
        len(call.q_lengths) <= _MOST_SEQUENCES,
        f"at most {_MOST_SEQUENCES} sequences, got {len(call.q_lengths)}",
    )
    _check_cumulative("actual_seq_lengths", call.q_lengths, call.query.shape[0])
    if call.is_paged:
        require(min(call.kv_lengths) >= 0, "actual_seq_lengths_kv must not be negative")
    else:
        _check_cumulative("actual_seq_lengths_kv", call.kv_lengths, call.key.shape[0])


def _check_cumulative(name: str, cumulative: Sequence[int], total: int) -> None:
    before = 0
    for value in cumulative:
        require(value >= before, f"{name} must not decrease, got {list(cumulative)}")
        before = value
    require(before == total, f"the last of {name}, {before}, must equal T {total}")


def check_pages(call: InferCall, old: bool) -> None:
    """The cache's shape, the size of its pages, and the table that leads to them."""
    require(call.kv_lengths is not None, "block_table needs actual_seq_lengths_kv")
    _check_cache(call, old)
    _check_block_size(call, old)
    table = call.block_table
    require(table.dtype == torch.int32, f"block_table must be int32, got {table.dtype}")
    require(
        table.dim() == 2 and table.is_contiguous(), "block_table must be contiguous, [B, pages]"
    )
    require(
        table.shape[0] == call.batch,
        f"block_table needs a row for each of {call.batch} sequences, got {table.shape[0]}",
    )
    require(table.numel() > 0, f"block_table must not be empty, got {tuple(table.shape)}")
    needed = [-(-columns // call.block_size) for _, columns in call.lengths]
    require(
        table.shape[1] >= max(needed),
        f"block_table needs {max(needed)} entries for the longest sequence, got {table.shape[1]}",
    )
    blocks = call.key.shape[0]
    require(
        blocks >= sum(needed),
        f"the cache needs as many blocks as all sequences have, {sum(needed)}, shared or not: got "
        f"{blocks}",
    )
    for index in range(call.batch):
        pages = call.pages(index)
        require(
            bool(((pages >= 0) & (pages < blocks)).all()),
            f"block_table row {index} would read outside the cache of {blocks} blocks: "
            f"{pages.tolist()}",
        )


def _check_cache(call: InferCall, old: bool) -> None:
    shape = tuple(call.key.shape)
    if call.key.dim() == 3:
        require(shape[2] % call.kv_heads == 0, f"num_key_value_heads must divide H of {shape}")
        require(shape[2] <= 65535, f"a cache of 3 dimensions needs H <= 65535, got {shape[2]}")
        page = shape[1]
    else:
        require(
            shape[1] == call.kv_heads,
            f"a cache of 4 dimensions is [blocks, {call.kv_heads}, block_size, D], got {shape}",
        )
        require(
            not old or call.layout in ("BNSD", "TND"),
            "a cache of 4 dimensions goes with BNSD and TND only (old CANN)",
        )
        page = shape[2]
    require(
        call.block_size == page,
        f"block_size {call.block_size} must be the cache's, {page} of {shape}",
    )


def _check_block_size(call: InferCall, old: bool) -> None:
    size = call.block_size
    require(size > 0 and size % 16 == 0, f"block_size must be divisible by 16, got {size}")
    one_row = call.is_dense_decode or max(rows for rows, _ in call.lengths) <= 1
    if old:
        require(
            size <= 512 and (one_row or size % 128 == 0),
            f"block_size must be 128, 256, 384 or 512 (old CANN), got {size}",
        )
    if set(call.head_dims) in ({64}, {128}):
        require(size <= 1024, f"block_size must be at most 1024, got {size}")
    elif call.takes_flash_path or one_row:
        require(size <= 512, f"block_size must be at most 512 for this D, got {size}")
    else:
        require(
            size <= 1024 and size % 128 == 0,
            f"more than one row needs block_size divisible by 128 and at most 1024, got {size}",
        )
