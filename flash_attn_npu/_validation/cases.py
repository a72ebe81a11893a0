"""Every case: for each row of both tables one question, a grid of sizes, and the open questions."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch

from .._core.ground.confirmed import EVERY_CALL
from .._core.problems.attention import FEW_SINGLES
from .._core.problems.cache import MAX_PAGE
from .._core.table import attention as table
from .._core.table import cache as cache_table
from .._core.table import rowwise as rowwise_table
from . import rowwise, statements
from .attention import Question
from .cache import CacheQuestion

__all__ = ["NOT_ASKED", "Case", "cases", "find"]

HALF, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
CACHED = "keys in a cache"
SUNK = f"{CACHED}, a sink"
OTHER = f"{CACHED}, headdim other than 64 and 128"
LOOKED_UP = rowwise_table.LOOKED_UP
STARTS = (17, 4)


class Case(NamedTuple):
    """row: that of the table which it is about; empty for a question about several.

    quick: asked under --quick too.
    """

    name: str
    row: str
    question: Any
    quick: bool = True


NOT_ASKED = {
    f"{CACHED}, under FLASH_ATTN_NPU_CONSISTENT=1": "asked by the setting's own users",
    rowwise_table.CONSISTENT: "asked by the setting's own users",
    "no query sees a key": "no kernel is asked",
    "no element": "no kernel is asked",
    "tensors outside an Ascend NPU": "asked by a report of a CPU",
    "tensors outside a CPU": "asked by a report of a card",
    "GQA and MQA, in a torch that does not share heads on a CPU": "this torch is what it is",
    "Ascend 310P and 200I": "this card is what it is",
    "sink, Ascend 950": "asked by the sink's row on such a card",
    f"{LOOKED_UP}, Ascend 950": "this card is what it is",
    f"varlen, more than {table.MAX_TOKENS} tokens": "exact arithmetic would take hours",
    f"dense, a seqlen above {table.MAX_TOKENS}": "exact arithmetic would take hours",
    "backward of a dropout mask drawn by blockwise": "asked by the question about dropout",
    "backward of a dropout mask drawn by npu_fusion_attention": (
        "asked by the question about dropout"
    ),
    "S_dmask (dropout_p with return_attn_probs)": "asked by the question about dropout",
    f"varlen, more than {FEW_SINGLES} sequences of one token, with dropout_p": (
        "composed of torch operations"
    ),
    "norm with dropout_p": "torch's own dropout",
    "norm in layer_norm_linear_fn, of a subset of rows, or by an autograd class": (
        "composed of torch operations"
    ),
    "RMS norm with gradient under torch.compile": "composed of torch operations",
    "jit_compile=True, rotation by pairs or of a rotary_dim other than 128": (
        "composed of torch operations"
    ),
    "cross entropy under torch.compile, a torch_npu without a fake operator for it": (
        "composed of torch operations"
    ),
    "swiglu of unequal dtypes": "composed of torch operations",
    "swiglu_fwd that is differentiated itself": "composed of torch operations",
    "torch.compile": "the kernels are the same",
    "gradient of swiglu in another dtype": "composed of torch operations",
    "cross entropy over a process group": "needs several processes",
    "no position": "no kernel is asked",
    "2**31 numbers and more, in a cache or out of it": "needs many gigabytes",
    "new keys and values neither of which is contiguous": "moved by torch's own indexing",
    "keys that do not start at the first position (cache_leftpad)": (
        "moved by torch's own indexing"
    ),
    "keys in a cache, with gradient": "moved by torch's own indexing",
}
"""Rows without a case, and why. Those about another torch_npu are not here either."""

PAGED = CacheQuestion()
WIDE = CacheQuestion(headdim=96, page=128)

ATTENTION: dict[str, Any] = {
    "float16": Question(),
    "bfloat16": Question(dtype=BF16),
    "float32": Question(dtype=FP32),
    "float64": Question(dtype=FP64),
    "dense layout": Question((70, 70, 70), dense=True),
    "varlen layout": Question((70, 1, 129)),
    f"varlen, more than {table.MAX_SEQUENCES} sequences": Question(
        (1,) * (table.MAX_SEQUENCES + 1), (2,) * (table.MAX_SEQUENCES + 1), heads=(1, 1), headdim=16
    ),
    "varlen, sequences of length 0": Question((40, 0, 6, 0), (40, 3, 0, 0), lse=True),
    f"varlen, more than {FEW_SINGLES} sequences of one token": Question(
        (50, *[1] * (FEW_SINGLES + 4), 7), causal=True
    ),
    "varlen, rows past the last sequence": Question(tail=3, lse=True),
    "queries that see no key": Question((60, 30), (20, 45), causal=True, lse=True),
    "MHA": Question(heads=(3, 3)),
    "GQA and MQA": Question(heads=(4, 2), causal=True),
    f"more than {table.MAX_HEADS} heads": Question(heads=(table.MAX_HEADS + 1, 1), headdim=8),
    "headdim above upstream's 256": Question(headdim=320),
    f"headdim above {table.MAX_HEADDIM}": Question(headdim=table.MAX_HEADDIM + 1),
    "v of a smaller headdim (FlashAttention 3)": Question(
        (70, 33), (90, 33), headdim=192, headdim_v=128, causal=True
    ),
    "causal": Question((70, 33), (90, 33), causal=True),
    "window_size": Question((70, 33), (90, 33), window=(7, 3)),
    "varlen, window_size (0, 0), with gradient or dropout": Question(window=(0, 0)),
    "softmax_lse (return_attn_probs)": Question(lse=True, causal=True),
    "dropout_p": statements.Dropout(),
    "deterministic": Question(deterministic=True, grad=False),
    "deterministic, with gradient": Question(deterministic=True),
    "backward from softmax_lse": statements.BackwardFromLse(),
    "softcap": Question(softcap=3.0),
    "alibi_slopes": Question(alibi=True, causal=True),
    "alibi_slopes, fewer queries than keys": Question((40, 33), (60, 33), alibi=True),
    "alibi_slopes, so few queries that computing as many as keys would cost more than tiles": (
        Question((1,), (46400,), heads=(1, 1), alibi=True, grad=False)
    ),
    "alibi_slopes, more queries than keys, those that see no key apart": Question(
        (60, 33), (40, 33), alibi=True
    ),
    "alibi_slopes, sequences of length 0": Question((40, 0), alibi=True),
    "alibi_slopes, varlen, softmax_lse": Question(alibi=True, lse=True),
    "sink (transformers' s_aux)": Question(sink=True, causal=True, dtype=BF16),
    "sink, float32": Question(sink=True, dtype=FP32),
    "sink, softmax_lse or a deterministic backward": Question(sink=True, lse=True),
    "sink, alibi_slopes": Question(sink=True, alibi=True),
    "sink that the kernel's autograd does not take": Question(sink=True, alibi=True, causal=True),
    CACHED: PAGED,
    f"{CACHED}, more than {table.MAX_CACHED_SEQUENCES} sequences": CacheQuestion(
        (3,) * (table.MAX_CACHED_SEQUENCES + 1), heads=(1, 1), page=16
    ),
    f"{CACHED}, more than {table.MAX_GROUP} query heads for a key head": CacheQuestion(
        heads=(table.MAX_GROUP + 1, 1)
    ),
    OTHER: WIDE,
    f"{OTHER}, queries of unequal lengths": CacheQuestion(
        headdim=96, page=128, varlen=True, rows=2
    ),
    f"{CACHED}, headdim above {table.MAX_CACHED_HEADDIM}": CacheQuestion(headdim=528),
    f"{CACHED}, headdim of no multiple of 16, unless of one query and up to 128": CacheQuestion(
        headdim=72, page=128, rows=2
    ),
    f"{CACHED}, pages of no multiple of 16 up to {MAX_PAGE}": CacheQuestion(page=5),
    f"{OTHER}, several queries, pages of no multiple of 128": CacheQuestion(headdim=96, rows=2),
    f"{CACHED} that is not contiguous": CacheQuestion(strided=True),
    f"{CACHED}, cache_leftpad": CacheQuestion(leftpad=(0, 3)),
    f"{CACHED}, shared pages in a full cache": CacheQuestion((20, 20), shared=True),
    f"{CACHED}, nheads_k * headdim above {table.MAX_PAGE_WIDTH}": CacheQuestion(
        (5, 9), heads=(256, 256), headdim=257, page=16
    ),
    f"{OTHER}, nheads * headdim above {table.MAX_PAGE_WIDTH}": CacheQuestion(
        (5, 9), heads=(256, 4), headdim=272, page=16
    ),
    SUNK: CacheQuestion((45, 70, 0), dtype=BF16, sink=BF16, lse=False, new=1, causal=True),
    f"{SUNK}, softmax_lse": CacheQuestion(dtype=BF16, sink=BF16),
    f"{SUNK}, another dtype than bfloat16": CacheQuestion(dtype=BF16, sink=FP32, lse=False),
    f"{SUNK}, headdim other than 64 and 128 or rows that are no pages": CacheQuestion(
        headdim=96, dtype=BF16, sink=BF16, lse=False
    ),
    f"{SUNK}, queries that see no key of their sequence": CacheQuestion(
        (9, 45), rows=20, dtype=BF16, sink=BF16, lse=False, causal=True
    ),
}

ROWWISE: dict[str, Any] = {
    "float64": rowwise.Rotation(dtype=FP64),
    f"rotary_dim of {rowwise_table.MAX_ROTARY_DIM} and above": rowwise.Rotation(
        headdim=rowwise_table.MAX_ROTARY_DIM, rotary_dim=rowwise_table.MAX_ROTARY_DIM
    ),
    f"{rowwise_table.MAX_ROTARY_HEADS} heads and more": rowwise.Rotation(
        heads=rowwise_table.MAX_ROTARY_HEADS, headdim=16, rotary_dim=16, seqlen=4
    ),
    f"{LOOKED_UP}, by tables of another dtype": rowwise.Rotation(table=FP32, places=STARTS),
    f"{LOOKED_UP}, of a part of each head": rowwise.Rotation(rotary_dim=32, places=STARTS),
    f"{LOOKED_UP}, a headdim of no multiple of {rowwise_table.MROPE_UNIT} bytes": rowwise.Rotation(
        headdim=80, rotary_dim=80, places=STARTS
    ),
    f"{LOOKED_UP}, nheads * headdim above {rowwise_table.MAX_MROPE_WIDTH}": rowwise.Rotation(
        heads=131, places=STARTS, seqlen=2
    ),
    f"{LOOKED_UP}, with gradient": rowwise.Rotation(dtype=BF16, places=STARTS, grad=True),
    "no residual": rowwise.Norm(),
    "norm of mixed dtypes": rowwise.Norm(residual=FP32),
    "layer norm of mixed dtypes, but for a float32 residual without gradient": rowwise.Norm(
        rms=False, residual=BF16, bias=True, weight=FP32
    ),
    "layer norm without bias": rowwise.Norm(rms=False, residual=BF16),
    "RMS norm with bias": rowwise.Norm(bias=True),
    "norm with x1": rowwise.Norm(branch=True),
    "norm with weight1": rowwise.Norm(second=True),
    "norm with rowscale or layerscale": rowwise.Norm(scaled=True),
    "float16": rowwise.Norm(dtype=HALF, residual=HALF),
    "norm with out or residual_out": rowwise.Norm(options={"out": True}),
    f"swiglu of rows of no multiple of {rowwise_table.SWIGLU_UNIT} bytes": rowwise.Gate(columns=24),
    "exact geglu with gradient": rowwise.Geglu(grad=True),
    f"exact geglu of more than {rowwise_table.MAX_GEGLU_DIMS} dimensions": rowwise.Geglu(
        shape=(1,) * rowwise_table.MAX_GEGLU_DIMS + (64,)
    ),
    "cross entropy of float16 and bfloat16": rowwise.Loss(dtype=BF16),
    f"cross entropy of more than {rowwise_table.MAX_LOSS_ROWS} rows": rowwise.Loss(
        rows=rowwise_table.MAX_LOSS_ROWS + 1, classes=8
    ),
    "label_smoothing with gradient": rowwise.Loss(options={"label_smoothing": 0.1}),
    "label_smoothing outside [0, 1)": rowwise.Loss(options={"label_smoothing": 1.0}),
    "logit_scale": rowwise.Loss(options={"logit_scale": 0.5}),
    "lse_square_scale": rowwise.Loss(options={"lse_square_scale": 1e-3}),
    "precomputed_lse": rowwise.Loss(precomputed=True),
    "inplace_backward": rowwise.Loss(options={"inplace_backward": True}),
}

MOVED: dict[str, Any] = {
    "new keys and values in a cache": CacheQuestion(new=3),
    "keys and values copied out of a cache": CacheQuestion(headdim=528),
    "a cache of float32 or float64": CacheQuestion(dtype=FP32, new=3),
    "a cache that is not contiguous": CacheQuestion(strided=True, new=3),
    f"positions of no multiple of {cache_table.COPY_UNIT} bytes": CacheQuestion(
        heads=(2, 1), headdim=20, new=3
    ),
    f"positions of more than {cache_table.MAX_TOKEN_BYTES} bytes": CacheQuestion(
        (5, 9), heads=(256, 256), headdim=300, page=16, new=3
    ),
}

SERVED: dict[str, Any] = {
    "rotation by halves": rowwise.Rotation(dtype=BF16),
    "rotation by pairs": rowwise.Rotation(interleaved=True),
    "rotation by float32 tables": rowwise.Rotation(table=FP32),
    "rotation at positions in a tensor": rowwise.Rotation(dtype=BF16, places=STARTS, seqlen=1),
    "rotation by pairs at positions in a tensor": rowwise.Rotation(
        interleaved=True, places=STARTS, seqlen=3
    ),
    "rotation of a step": rowwise.Rotation(dtype=BF16, places=STARTS, seqlen=1, pair=True),
    "rotation of a step, float16": rowwise.Rotation(places=STARTS, seqlen=1, pair=True),
    "rotation of a step of one sequence": rowwise.Rotation(
        dtype=BF16, places=(17,), seqlen=1, pair=True
    ),
    "rotation of a step by pairs": rowwise.Rotation(
        dtype=BF16,
        headdim=128,
        rotary_dim=128,
        interleaved=True,
        places=STARTS,
        seqlen=1,
        pair=True,
    ),
    "rotation of some dimensions": rowwise.Rotation(headdim=96, rotary_dim=64),
    "RMS norm with gradient": rowwise.Norm(grad=True),
    "RMS norm of a sum with gradient": rowwise.Norm(residual=BF16, grad=True),
    "RMS norm of a sum": rowwise.Norm(residual=BF16),
    "layer norm of a sum": rowwise.Norm(rms=False, bias=True, residual=BF16, grad=True),
    "layer norm": rowwise.Norm(rms=False, bias=True, grad=True),
    "swiglu": rowwise.Gate(),
    "swiglu of two tensors": rowwise.Gate(halves=False),
    "exact geglu": rowwise.Geglu(),
    "exact geglu, float32": rowwise.Geglu(dtype=FP32),
    "cross entropy": rowwise.Loss(),
}
"""What no row of the second table names, and is served by its fused operators."""

SLOW = ("more than 2", "more than 4")


def cases() -> Iterator[Case]:
    """All of them, the quick ones first."""
    every = [*_rows(), *_open(), *_grid()]
    return iter(sorted(every, key=lambda case: not case.quick))


def find(name: str) -> Case:
    """The case of a name."""
    return next(case for case in cases() if case.name == name)


def _rows() -> Iterator[Case]:
    for prefix, rows in (("attention", ATTENTION), ("rowwise", ROWWISE), ("cache", MOVED)):
        for row, question in rows.items():
            quick = not any(word in row for word in SLOW)
            yield Case(f"{prefix}: {row}", row, question, quick)
    for name, question in SERVED.items():
        yield Case(f"rowwise: {name}", EVERY_CALL, question)


def _open() -> Iterator[Case]:
    """Section 11 of what is known of the kernels, and what users have asked."""
    offset = "alibi_slopes"
    yield Case("open 1: alibi_slopes with q_start_idx", offset, statements.OffsetAlibi())
    empty = Question((40, 6), (40, 0), window=(9, 9), lse=True)
    yield Case("open 2: queries of a sequence without keys", "varlen, sequences of length 0", empty)
    blind = Question((60, 60), (25, 25), dense=True, causal=True, lse=True)
    yield Case("open 3: gradients of rows without keys", "queries that see no key", blind)
    more = CacheQuestion((9, 45), rows=20, causal=True, heads=(2, 2))
    yield Case("open 4: more queries than cached keys", CACHED, more)
    indexed = CacheQuestion((20, 45), page=0, indexed=True, rows=2, causal=True)
    yield Case("open 5: cache_batch_idx over an unpaged cache", CACHED, indexed)
    yield Case("open 6: no mask over a cache", CACHED, CacheQuestion((300, 45), rows=3))
    lse = "softmax_lse (return_attn_probs)"
    yield Case("open 7: statistics of packed sequences", lse, Question((5, 130, 1, 33), lse=True))
    yield Case("open 8: a cache in pages of 256", CACHED, CacheQuestion((300, 45), page=256))
    tail = Question((50, *[1] * 300), causal=True)
    yield Case("users: a tail of sequences of one token", "varlen layout", tail)
    for name, statement in statements.ALL.items():
        yield Case(f"question: {name}", "", statement)


def _grid() -> Iterator[Case]:
    headdims = (40, 64, 80, 96, 128, 192, 256)
    for headdim, dtype in product(headdims, (HALF, BF16)):
        shape = f"headdim {headdim}, {str(dtype).removeprefix('torch.')}"
        question = Question((200, 1, 513), heads=(4, 2), headdim=headdim, dtype=dtype, causal=True)
        yield Case(f"grid: packed, causal, GQA, {shape}", "causal", question, quick=False)
        window = Question((257,) * 2, dense=True, headdim=headdim, dtype=dtype, window=(64, 0))
        yield Case(f"grid: dense, window, {shape}", "window_size", window, quick=False)
        row = CACHED if headdim in (64, 128) else OTHER
        paged = CacheQuestion((1, 700, 130), headdim=headdim, dtype=dtype, page=128, new=1)
        yield Case(f"grid: pages of 128, {shape}", row, paged, quick=False)
    for left in (-1, 127):
        step = CacheQuestion(
            (1, 700, 130), heads=(16, 2), dtype=BF16, page=128, new=1, causal=left < 0,
            window=(left, 0 if left > 0 else -1), sink=BF16, lse=False,
        )  # fmt: skip
        yield Case(f"grid: GPT-OSS in pages of 128, window {left}", SUNK, step, quick=False)
    for length in (1, 2, 127, 128, 129, 1024, 2049, 8192):
        long = Question((length,), heads=(1, 1), dtype=BF16, causal=True, lse=True)
        yield Case(f"grid: one sequence of {length}", "causal", long, quick=False)
        band = Question((length,), heads=(1, 1), dtype=BF16, window=(256, 0))
        yield Case(f"grid: one sequence of {length}, window 256", "window_size", band, quick=False)
    for count in (1, 2, 64, 300, 2048):
        many = Question((3,) * count + (1,) * count, heads=(1, 1), causal=True)
        yield Case(f"grid: {2 * count} short sequences", "varlen layout", many, quick=False)
