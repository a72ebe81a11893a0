"""THE TABLE: for each property of a problem and each kernel, native or refused, and why.

Nothing else in the package says what a kernel can do: dispatch, the warnings, compat_matrix.md
and the tests that reach every cell are all read from here. The fused kernel's limits are those
of torch_npu's operator documentation and of CANN's own checks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..kernels.soc import soc_name
from ..settings import alibi_offset
from .problem import Problem

__all__ = ["BLOCKWISE", "FUSION", "INFER", "TABLE", "Cell", "Row", "refusals"]

INFER = "npu_fused_infer_attention_score"
FUSION = "npu_fusion_attention"
BLOCKWISE = "blockwise"

MAX_HEADS = 256
MAX_HEADDIM = 768
MAX_SEQUENCES = 20_000
MAX_TOKENS = 1_000_000
MAX_PAGE = 512
PAGE_UNIT = 16
MAX_CACHED_SEQUENCES = 4096
MAX_GROUP = 64
MAX_PAGE_WIDTH = 65_535


@dataclass(frozen=True)
class Cell:
    """One kernel's answer to one property: native, or refused for a reason."""

    refusal: str | None = None

    @property
    def verdict(self) -> str:
        return "native" if self.refusal is None else "refused"


NATIVE = Cell()
ROUNDED_BIAS = Cell("it takes a bias in the dtype of q only, which rounds that of alibi_slopes")


@dataclass(frozen=True)
class Row:
    """Something that a problem may have, and what each kernel does with it.

    A kernel serves a problem if none of the rows that are present refuses it. INFER is asked
    only where the keys lie in a cache; for the others they are gathered first.
    """

    name: str
    present: Callable[[Problem], bool]
    fusion: Cell = NATIVE
    blockwise: Cell = NATIVE
    infer: Cell = NATIVE

    def cell(self, kernel: str) -> Cell:
        return {FUSION: self.fusion, BLOCKWISE: self.blockwise, INFER: self.infer}[kernel]


def _offset_allowed(problem: Problem) -> bool:
    return (
        alibi_offset() and problem.varlen and not soc_name(problem.device).startswith("Ascend950")
    )


TABLE: tuple[Row, ...] = (
    Row(
        "no query sees a key",
        lambda p: not p.has_work,
        fusion=Cell("there is nothing to compute"),
        infer=Cell("there is nothing to compute"),
    ),
    Row(
        "tensors outside an Ascend NPU",
        lambda p: p.device.type != "npu",
        fusion=Cell("it runs on Ascend NPUs only"),
        infer=Cell("it runs on Ascend NPUs only"),
    ),
    Row(
        "Ascend 310P and 200I",
        lambda p: soc_name(p.device).startswith(("Ascend310", "Ascend200")),
        fusion=Cell("the chip does not have it"),
        infer=Cell("the chip does not have it"),
    ),
    Row("float16", lambda p: p.dtype == torch.float16),
    Row("bfloat16", lambda p: p.dtype == torch.bfloat16),
    Row(
        "float32",
        lambda p: p.dtype == torch.float32,
        infer=Cell("it takes float16 and bfloat16"),
    ),
    Row(
        "float64",
        lambda p: p.dtype == torch.float64,
        fusion=Cell("it takes float16, bfloat16 and float32"),
        infer=Cell("it takes float16 and bfloat16"),
    ),
    Row("dense layout", lambda p: not p.varlen),
    Row("varlen layout", lambda p: p.varlen),
    Row(
        f"varlen, more than {MAX_SEQUENCES} sequences",
        lambda p: p.varlen and p.batch > MAX_SEQUENCES,
        fusion=Cell(f"it takes at most {MAX_SEQUENCES} packed sequences"),
    ),
    Row(
        f"varlen, more than {MAX_TOKENS} tokens",
        lambda p: p.varlen and max(p.total_q, p.total_k) > MAX_TOKENS,
        fusion=Cell(f"it takes at most {MAX_TOKENS} packed tokens"),
    ),
    Row(
        f"dense, a seqlen above {MAX_TOKENS}",
        lambda p: not p.varlen and max(p.max_seqlen_q, p.max_seqlen_k) > MAX_TOKENS,
        fusion=Cell(f"it takes sequences of at most {MAX_TOKENS} tokens"),
    ),
    Row("varlen, sequences of length 0", lambda p: p.varlen and p.with_empty),
    Row("varlen, rows past the last sequence", lambda p: p.tail_q > 0 or p.tail_k > 0),
    Row("queries that see no key", lambda p: p.has_work and p.most_blind > 0),
    Row("MHA", lambda p: p.nheads == p.nheads_k),
    Row("GQA and MQA", lambda p: p.nheads > p.nheads_k),
    Row(
        f"more than {MAX_HEADS} heads",
        lambda p: p.nheads > MAX_HEADS,
        fusion=Cell(f"it takes at most {MAX_HEADS} query heads"),
        infer=Cell(f"it takes at most {MAX_HEADS} query heads"),
    ),
    Row("headdim above upstream's 256", lambda p: 256 < p.headdim <= MAX_HEADDIM),
    Row(
        f"headdim above {MAX_HEADDIM}",
        lambda p: p.headdim > MAX_HEADDIM,
        fusion=Cell(f"it takes a headdim of at most {MAX_HEADDIM}"),
    ),
    Row("causal", lambda p: p.causal),
    Row("window_size", lambda p: p.windowed),
    Row(
        "varlen, window_size (0, 0), with gradient or dropout",
        lambda p: p.varlen and p.left == p.right == 0 and p.needs_grad,
        fusion=Cell("its packed backward demands a window_size with left + right > 0"),
    ),
    Row("softmax_lse (return_attn_probs)", lambda p: p.uses_lse),
    Row("dropout_p", lambda p: p.dropout_p > 0, infer=Cell("it has no dropout_p")),
    Row(
        "S_dmask (dropout_p with return_attn_probs)",
        lambda p: p.s_dmask,
        fusion=Cell("it does not return probabilities, as return_attn_probs asks for"),
    ),
    Row(
        "backward of a dropout mask drawn by blockwise",
        lambda p: p.mask_from == BLOCKWISE,
        fusion=Cell("it can repeat its own dropout masks only, not that of rng_state"),
    ),
    Row(
        "backward of a dropout mask drawn by npu_fusion_attention",
        lambda p: p.mask_from == FUSION,
        blockwise=Cell("it can repeat its own dropout masks only, not that of rng_state"),
    ),
    Row("deterministic", lambda p: p.deterministic),
    Row(
        "softcap",
        lambda p: p.softcap > 0,
        fusion=Cell("no Ascend kernel has softcap"),
        infer=Cell("no Ascend kernel has softcap"),
    ),
    Row(
        "alibi_slopes, equal lengths",
        lambda p: p.alibi and p.common_offset == 0,
        infer=ROUNDED_BIAS,
    ),
    Row(
        "alibi_slopes, lengths that differ by a common offset",
        lambda p: p.alibi and bool(p.common_offset) and not _offset_allowed(p),
        fusion=Cell("its alibi_slopes are documented for seqlen_q = seqlen_k only"),
        infer=ROUNDED_BIAS,
    ),
    Row(
        "alibi_slopes, lengths that differ otherwise",
        lambda p: p.alibi and p.common_offset is None,
        fusion=Cell("its alibi_slopes know no offset for each sequence"),
        infer=ROUNDED_BIAS,
    ),
    Row(
        "alibi_slopes, sequences of length 0",
        lambda p: p.alibi and p.with_empty,
        fusion=Cell("with alibi_slopes it takes no sequence of length 0"),
    ),
    Row(
        "alibi_slopes, varlen, softmax_lse",
        lambda p: p.alibi and p.varlen and p.uses_lse,
        fusion=Cell("with alibi_slopes it returns packed statistics in one block per sequence"),
    ),
    Row("sink (transformers' s_aux)", lambda p: p.sink, infer=Cell("its sink is not used yet")),
    Row(
        "sink, float32",
        lambda p: p.sink and p.dtype == torch.float32,
        fusion=Cell("it takes a sink with float16 and bfloat16 only"),
    ),
    Row(
        "sink, softmax_lse or a deterministic backward",
        lambda p: p.sink and p.uses_lse,
        fusion=Cell("whether its statistics count the sink is not documented"),
    ),
    Row(
        "sink, alibi_slopes",
        lambda p: p.sink and p.alibi,
        fusion=Cell("alibi_slopes and a sink are not documented together"),
    ),
    Row(
        "sink, Ascend 950",
        lambda p: p.sink and soc_name(p.device).startswith("Ascend950"),
        fusion=Cell("torch_npu drops the sink there"),
    ),
    Row("keys in a cache", lambda p: p.pages is not None),
    Row(
        f"keys in a cache, more than {MAX_CACHED_SEQUENCES} sequences",
        lambda p: p.pages is not None and p.batch > MAX_CACHED_SEQUENCES,
        infer=Cell(f"every CANN takes at most {MAX_CACHED_SEQUENCES} lengths"),
    ),
    Row(
        f"keys in a cache, more than {MAX_GROUP} query heads for a key head",
        lambda p: p.pages is not None and p.nheads > MAX_GROUP * max(p.nheads_k, 1),
        infer=Cell(f"every CANN takes at most {MAX_GROUP} query heads for a key head"),
    ),
    Row(
        "keys in a cache, headdim other than 64 and 128",
        lambda p: p.pages is not None and p.headdim not in (64, 128),
        infer=Cell("for packed queries every CANN takes a headdim of 64 and 128 only"),
    ),
    Row(
        f"keys in a cache, pages of no multiple of 16 up to {MAX_PAGE}",
        lambda p: p.pages is not None and p.pages.size is None,
        infer=Cell(f"it takes pages of a multiple of 16, up to {MAX_PAGE}"),
    ),
    Row(
        "keys in a cache that is not contiguous",
        lambda p: p.pages is not None and not p.pages.contiguous,
        infer=Cell("it takes a contiguous k_cache and v_cache only"),
    ),
    Row(
        "keys in a cache, cache_leftpad",
        lambda p: p.pages is not None and p.pages.padded,
        infer=Cell("it takes no cache_leftpad: its pages start at their first position"),
    ),
    Row(
        "keys in a cache, shared pages in a full cache",
        lambda p: p.pages is not None and p.pages.shared,
        infer=Cell("it wants as many pages as the sequences of block_table use together"),
    ),
    Row(
        f"keys in a cache, nheads_k * headdim above {MAX_PAGE_WIDTH}",
        lambda p: p.pages is not None and p.nheads_k * p.headdim > MAX_PAGE_WIDTH,
        infer=Cell(f"a position of its pages holds at most {MAX_PAGE_WIDTH} numbers"),
    ),
)


def refusals(kernel: str, problem: Problem) -> tuple[str, ...]:
    """Why `kernel` may not serve `problem`; empty if it may."""
    return tuple(
        cell.refusal
        for row in TABLE
        if (cell := row.cell(kernel)).refusal is not None and row.present(problem)
    )
