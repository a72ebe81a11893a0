"""THE TABLE: for each property of a problem and each kernel, native or refused, and why.

Nothing else in the package says what a kernel can do: dispatch, the warnings, compat_matrix.md
and the tests that reach every cell are all read from here. The fused kernel's limits are those
of torch_npu's operator documentation and of CANN's own checks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .problem import Problem

__all__ = ["BLOCKWISE", "FUSION", "TABLE", "Cell", "Row", "refusals"]

FUSION = "npu_fusion_attention"
BLOCKWISE = "blockwise"

MAX_HEADS = 256
MAX_HEADDIM = 768
MAX_SEQUENCES = 20_000
MAX_TOKENS = 1_000_000


@dataclass(frozen=True)
class Cell:
    """One kernel's answer to one property: native, or refused for a reason."""

    refusal: str | None = None

    @property
    def verdict(self) -> str:
        return "native" if self.refusal is None else "refused"


NATIVE = Cell()


@dataclass(frozen=True)
class Row:
    """Something that a problem may have, and what each kernel does with it.

    A kernel serves a problem if none of the rows that are present refuses it.
    """

    name: str
    present: Callable[[Problem], bool]
    fusion: Cell = NATIVE
    blockwise: Cell = NATIVE

    def cell(self, kernel: str) -> Cell:
        return {FUSION: self.fusion, BLOCKWISE: self.blockwise}[kernel]


TABLE: tuple[Row, ...] = (
    Row(
        "no query sees a key",
        lambda p: not p.has_work,
        fusion=Cell("there is nothing to compute"),
    ),
    Row(
        "tensors outside an Ascend NPU",
        lambda p: p.device.type != "npu",
        fusion=Cell("it runs on Ascend NPUs only"),
    ),
    Row("float16", lambda p: p.dtype == torch.float16),
    Row("bfloat16", lambda p: p.dtype == torch.bfloat16),
    Row("float32", lambda p: p.dtype == torch.float32),
    Row(
        "float64",
        lambda p: p.dtype == torch.float64,
        fusion=Cell("it takes float16, bfloat16 and float32"),
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
        lambda p: p.varlen and max(p.rows_q, p.rows_k) > MAX_TOKENS,
        fusion=Cell(f"it takes at most {MAX_TOKENS} packed tokens"),
    ),
    Row("varlen, sequences of length 0", lambda p: p.varlen and 0 in (*p.seqlens_q, *p.seqlens_k)),
    Row("varlen, rows past the last sequence", lambda p: p.tail_q > 0 or p.tail_k > 0),
    Row("queries that see no key", lambda p: p.has_work and any(p.blind_rows)),
    Row("MHA", lambda p: p.nheads == p.nheads_k),
    Row("GQA and MQA", lambda p: p.nheads > p.nheads_k),
    Row(
        f"more than {MAX_HEADS} heads",
        lambda p: p.nheads > MAX_HEADS,
        fusion=Cell(f"it takes at most {MAX_HEADS} query heads"),
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
        "varlen, window_size (0, 0), with gradient",
        lambda p: p.varlen and p.left == p.right == 0 and p.needs_grad,
        fusion=Cell("its packed backward demands left + right > 0"),
    ),
    Row("softmax_lse (return_attn_probs)", lambda p: p.return_attn_probs),
    Row("dropout_p", lambda p: p.dropout_p > 0),
    Row(
        "dropout_p with return_attn_probs",
        lambda p: p.dropout_p > 0 and p.return_attn_probs,
        fusion=Cell("it does not return the probabilities that S_dmask holds"),
    ),
    Row(
        "softcap",
        lambda p: p.softcap > 0,
        fusion=Cell("no Ascend kernel has softcap"),
    ),
    Row(
        "alibi_slopes",
        lambda p: p.alibi,
        fusion=Cell("its accurate form of ALiBi is not wired yet"),
    ),
    Row(
        "deterministic, with gradient",
        lambda p: p.deterministic and p.needs_grad,
        fusion=Cell("its backward is deterministic only under a global setting"),
    ),
)


def refusals(kernel: str, problem: Problem) -> tuple[str, ...]:
    """Why `kernel` may not serve `problem`; empty if it may."""
    return tuple(
        cell.refusal
        for row in TABLE
        if (cell := row.cell(kernel)).refusal is not None and row.present(problem)
    )
