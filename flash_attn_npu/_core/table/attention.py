"""THE TABLE: for each property of a problem and each kernel, native or refused, and why.

Nothing else in the package says what a kernel can do: plans, the warnings, compat_matrix.md and
the tests that reach every cell are all read from here. Only `attention_forward_varlen` launches
past it: its contract is the kernel's. The fused kernel's limits are those of torch_npu's operator
documentation and of CANN's own checks. The candidates, first choice first, stand at the end.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..ground.chip import soc_name
from ..ground.settings import consistent
from ..kernels.ascend import filling, fusion_attention, infer_attention, infer_sink
from ..kernels.composed import attention as composed
from ..kernels.composed import widening
from ..kernels.host import attention as host
from ..problems.attention import FEW_SINGLES, Problem
from ..problems.cache import MAX_PAGE
from ..verification.checks import ATTENTION as CHECK
from . import installed
from .installed import FUSION, INFER, INFER_2
from .rule import Candidate, Rule, Table

__all__ = ["BLOCKWISE", "FUSION", "HOST", "INFER", "INFER_2", "NAMES", "TABLE", "WHOLE"]
__all__ += ["drawn_by"]

AUTOGRAD = "npu_fusion_attention's autograd"
BLOCKWISE = "blockwise"
HOST = "scaled_dot_product_flash_attention_for_cpu"

MAX_HEADS = 256
MAX_HEADDIM = 768
MAX_SEQUENCES = 20_000
MAX_TOKENS = 1_000_000
MAX_CACHED_SEQUENCES = 4096
MAX_GROUP = 64
MAX_PAGE_WIDTH = 65_535
MAX_CACHED_HEADDIM = 512
MAX_FILLED_PAIRS = 1 << 31
"""Of all heads: 32 heads of 8192 queries take about as long, on paper, as the 25 tiles of some 20
launches each that one query over 8192 keys is composed of."""


ROUNDED_BIAS = "it takes a bias in the dtype of q only, which rounds that of alibi_slopes"
"""Why ALiBi is not handed over as a bias."""


def _fills_too_much(problem: Problem) -> bool:
    """Whether rows of zeros, which ALiBi needs for fewer queries than keys, would cost too much."""
    if not filling.fills(problem):
        return False
    asked = problem.nheads * sum(q * k * len(them) for (q, k), them in problem.sequences.items())
    return filling.pairs(problem) > max(MAX_FILLED_PAIRS, 4 * asked)


def _unpacked(problem: Problem) -> bool:
    """Whether the inference kernel gets queries over a cache that are not packed."""
    return problem.pages is not None and not infer_attention.packs_queries(problem)


def _in_rows(problem: Problem) -> bool:
    """Whether the inference kernel reads the rows of a cache, and no pages."""
    return _unpacked(problem) and problem.pages is not None and problem.pages.in_order


def _page(problem: Problem) -> int:
    assert problem.pages is not None
    return problem.pages.size or 0


def _sunk(problem: Problem) -> bool:
    return problem.sink and problem.pages is not None


def _in_bfloat16(problem: Problem) -> bool:
    sink = problem.ask.sink
    return problem.dtype == torch.bfloat16 and sink is not None and sink.dtype == torch.bfloat16


_RULES: tuple[Rule, ...] = (
    Rule(
        "no query sees a key",
        lambda p: p.empty,
        dict.fromkeys((FUSION, INFER, HOST), "there is nothing to compute"),
    ),
    installed.on_ascend((FUSION, INFER)),
    Rule(
        "tensors outside a CPU",
        lambda p: p.device.type != "cpu",
        {HOST: "it runs on a CPU only"},
    ),
    installed.on_large_chips((FUSION, INFER)),
    installed.supported((FUSION, INFER)),
    *installed.rows(installed.ATTENTION),
    Rule("float16", lambda p: p.dtype == torch.float16),
    Rule("bfloat16", lambda p: p.dtype == torch.bfloat16),
    Rule("float32", lambda p: p.dtype == torch.float32, {INFER: "it takes float16 and bfloat16"}),
    Rule(
        "float64",
        lambda p: p.dtype == torch.float64,
        {FUSION: "it takes float16, bfloat16 and float32", INFER: "it takes float16 and bfloat16"},
    ),
    Rule("dense layout", lambda p: not p.varlen),
    Rule("varlen layout", lambda p: p.varlen),
    Rule(
        f"varlen, more than {MAX_SEQUENCES} sequences",
        lambda p: p.varlen and p.batch > MAX_SEQUENCES,
        {FUSION: f"it takes at most {MAX_SEQUENCES} packed sequences"},
    ),
    Rule(
        f"varlen, more than {MAX_TOKENS} tokens",
        lambda p: p.varlen and max(p.total_q, p.total_k) > MAX_TOKENS,
        {FUSION: f"it takes at most {MAX_TOKENS} packed tokens"},
    ),
    Rule(
        f"dense, a seqlen above {MAX_TOKENS}",
        lambda p: not p.varlen and max(p.max_seqlen_q, p.max_seqlen_k) > MAX_TOKENS,
        {FUSION: f"it takes sequences of at most {MAX_TOKENS} tokens"},
    ),
    Rule("varlen, sequences of length 0", lambda p: p.varlen and p.with_empty),
    Rule(f"varlen, more than {FEW_SINGLES} sequences of one token", lambda p: p.many_singles),
    Rule(
        f"varlen, more than {FEW_SINGLES} sequences of one token, with dropout_p",
        lambda p: p.many_singles and p.dropout_p > 0,
        {FUSION: "so many sequences of one token crash it, and beside it their mask is lost"},
    ),
    Rule("varlen, rows past the last sequence", lambda p: p.tail_q > 0 or p.tail_k > 0),
    Rule("queries that see no key", lambda p: not p.empty and p.most_blind > 0),
    Rule("MHA", lambda p: p.nheads == p.nheads_k),
    Rule("GQA and MQA", lambda p: p.nheads > p.nheads_k),
    Rule(
        "GQA and MQA, in a torch that does not share heads on a CPU",
        lambda p: p.nheads > p.nheads_k and not host.shares_heads(),
        {HOST: "in the installed torch it takes as many heads of k and v as of q"},
    ),
    Rule(
        f"more than {MAX_HEADS} heads",
        lambda p: p.nheads > MAX_HEADS,
        {
            FUSION: f"it takes at most {MAX_HEADS} query heads",
            INFER: f"it takes at most {MAX_HEADS} query heads",
        },
    ),
    Rule("headdim above upstream's 256", lambda p: 256 < p.headdim <= MAX_HEADDIM),
    Rule(
        f"headdim above {MAX_HEADDIM}",
        lambda p: p.headdim > MAX_HEADDIM,
        {FUSION: f"it takes a headdim of at most {MAX_HEADDIM}"},
    ),
    Rule(
        "v of a smaller headdim (FlashAttention 3)",
        lambda p: p.headdim_v != p.headdim,
        dict.fromkeys((HOST, INFER), "it takes a v of the headdim of q and k only"),
    ),
    Rule("causal", lambda p: p.causal),
    Rule("window_size", lambda p: p.windowed),
    Rule(
        "varlen, window_size (0, 0), with gradient or dropout",
        lambda p: p.varlen and p.left == p.right == 0 and p.needs_grad,
        {FUSION: "its packed backward demands a window_size with left + right > 0"},
    ),
    Rule("softmax_lse (return_attn_probs)", lambda p: p.uses_lse),
    Rule(
        "dropout_p", lambda p: p.dropout_p > 0, dict.fromkeys((INFER, HOST), "it has no dropout_p")
    ),
    Rule(
        "S_dmask (dropout_p with return_attn_probs)",
        lambda p: p.s_dmask,
        dict.fromkeys(
            (FUSION, HOST), "it does not return probabilities, as return_attn_probs asks for"
        ),
    ),
    Rule(
        "backward of a dropout mask drawn by blockwise",
        lambda p: p.mask_from == BLOCKWISE,
        {FUSION: "it can repeat its own dropout masks only, not that of rng_state"},
    ),
    Rule(
        "backward of a dropout mask drawn by npu_fusion_attention",
        lambda p: p.mask_from == FUSION,
        {BLOCKWISE: "it can repeat its own dropout masks only, not that of rng_state"},
    ),
    Rule("deterministic", lambda p: p.deterministic),
    Rule(
        "deterministic, with gradient",
        lambda p: p.deterministic and p.needs_grad,
        {AUTOGRAD: "torch_npu never asks it for a deterministic backward"},
    ),
    Rule(
        "backward from softmax_lse",
        lambda p: p.ask.backward,
        {AUTOGRAD: "it differentiates a forward of its own"},
    ),
    Rule(
        "softcap",
        lambda p: p.softcap > 0,
        {
            FUSION: "no Ascend kernel has softcap",
            INFER: "no Ascend kernel has softcap",
            HOST: "it has no softcap",
        },
    ),
    Rule("alibi_slopes", lambda p: p.alibi, {INFER: ROUNDED_BIAS}),
    Rule("alibi_slopes, fewer queries than keys", filling.fills),
    Rule(
        "alibi_slopes, so few queries that computing as many as keys would cost more than tiles",
        _fills_too_much,
        {FUSION: "its alibi_slopes are documented for seqlen_q = seqlen_k only"},
    ),
    Rule(
        "alibi_slopes, more queries than keys, those that see no key apart",
        lambda p: p.alibi and p.most_surplus > 0 and not fusion_attention.offset_of(p),
        {FUSION: "its alibi_slopes are documented for seqlen_q = seqlen_k only"},
    ),
    Rule(
        "alibi_slopes, sequences of length 0",
        lambda p: p.alibi and p.with_empty,
        {FUSION: "with alibi_slopes it takes no sequence of length 0"},
    ),
    Rule("alibi_slopes, varlen, softmax_lse", lambda p: p.alibi and p.varlen and p.uses_lse),
    Rule("sink (transformers' s_aux)", lambda p: p.sink),
    Rule("sink, float32", lambda p: p.sink and p.dtype == torch.float32),
    Rule("sink, softmax_lse or a deterministic backward", lambda p: p.sink and p.uses_lse),
    Rule("sink, alibi_slopes", lambda p: p.sink and p.alibi),
    Rule("sink, Ascend 950", lambda p: p.sink and soc_name(p.device).startswith("Ascend950")),
    Rule(
        "sink that the kernel's autograd does not take",
        lambda p: not fusion_attention.differentiates(p),
        {AUTOGRAD: "it is not asked about such a sink"},
    ),
    Rule(
        "keys in a cache, under FLASH_ATTN_NPU_CONSISTENT=1",
        lambda p: p.pages is not None and consistent(),
        {INFER: "one kernel is to serve with a cache and without: keys are copied at each step"},
    ),
    Rule(
        "keys in a cache",
        lambda p: p.pages is not None,
        {AUTOGRAD: "keys are copied out of a cache for the forward alone"},
    ),
    Rule(
        f"keys in a cache, more than {MAX_CACHED_SEQUENCES} sequences",
        lambda p: p.pages is not None and p.batch > MAX_CACHED_SEQUENCES,
        {INFER: f"every CANN takes at most {MAX_CACHED_SEQUENCES} lengths"},
    ),
    Rule(
        f"keys in a cache, more than {MAX_GROUP} query heads for a key head",
        lambda p: p.pages is not None and p.nheads > MAX_GROUP * max(p.nheads_k, 1),
        {INFER: f"every CANN takes at most {MAX_GROUP} query heads for a key head"},
    ),
    Rule(
        "keys in a cache, headdim other than 64 and 128",
        lambda p: p.pages is not None and p.headdim not in infer_attention.PACKED_HEADDIMS,
    ),
    Rule(
        "keys in a cache, headdim other than 64 and 128, queries of unequal lengths",
        lambda p: _unpacked(p) and len({q for q, _ in p.sequences}) > 1,
        {INFER: "for packed queries every CANN takes a headdim of 64 and 128 only"},
    ),
    Rule(
        f"keys in a cache, headdim above {MAX_CACHED_HEADDIM}",
        lambda p: p.pages is not None and p.headdim > MAX_CACHED_HEADDIM,
        {INFER: f"it takes a headdim of at most {MAX_CACHED_HEADDIM}"},
    ),
    Rule(
        "keys in a cache, headdim of no multiple of 16, unless of one query and up to 128",
        lambda p: (
            _unpacked(p)
            and p.headdim % 16 != 0
            and (infer_attention.rows_for(p) > 1 or p.headdim > 128)
        ),
        {INFER: "it takes a headdim of a multiple of 16, or one query and at most 128"},
    ),
    Rule(
        f"keys in a cache, pages of no multiple of 16 up to {MAX_PAGE}",
        lambda p: p.pages is not None and p.pages.size is None and not p.pages.in_order,
        {INFER: f"it takes pages of a multiple of 16, up to {MAX_PAGE}"},
    ),
    Rule(
        "keys in a cache, headdim other than 64 and 128, several queries, pages of no multiple "
        "of 128",
        lambda p: (
            _unpacked(p)
            and not p.pages.in_order
            and infer_attention.rows_for(p) > 1
            and _page(p) % 128 != 0
        ),
        {INFER: "for several queries of this headdim it takes pages of a multiple of 128"},
    ),
    Rule(
        "keys in a cache that is not contiguous",
        lambda p: p.pages is not None and not p.pages.contiguous,
        {INFER: "it takes a contiguous k_cache and v_cache only"},
    ),
    Rule(
        "keys in a cache, cache_leftpad",
        lambda p: p.pages is not None and p.pages.padded,
        {INFER: "it takes no cache_leftpad: its pages start at their first position"},
    ),
    Rule(
        "keys in a cache, shared pages in a full cache",
        lambda p: p.pages is not None and p.pages.shared and not _in_rows(p),
        {INFER: "it wants as many pages as the sequences of block_table use together"},
    ),
    Rule(
        f"keys in a cache, nheads_k * headdim above {MAX_PAGE_WIDTH}",
        lambda p: p.pages is not None and p.nheads_k * p.headdim > MAX_PAGE_WIDTH,
        {INFER: f"a position of its pages holds at most {MAX_PAGE_WIDTH} numbers"},
    ),
    Rule(
        f"keys in a cache, headdim other than 64 and 128, nheads * headdim above {MAX_PAGE_WIDTH}",
        lambda p: _unpacked(p) and p.nheads * p.headdim > MAX_PAGE_WIDTH,
        {INFER: f"its queries hold at most {MAX_PAGE_WIDTH} numbers, unless they are packed"},
    ),
    Rule("keys in a cache, a sink", _sunk),
    installed.row(installed.SINK_IN_CACHE),
    Rule(
        "keys in a cache, a sink, softmax_lse",
        lambda p: _sunk(p) and p.uses_lse,
        {INFER_2: "whether its softmax_lse counts a sink is not documented"},
    ),
    Rule(
        "keys in a cache, a sink, another dtype than bfloat16",
        lambda p: _sunk(p) and not _in_bfloat16(p),
        {INFER_2: "it takes a sink in bfloat16, beside q, k and v in bfloat16"},
    ),
    Rule(
        "keys in a cache, a sink, headdim other than 64 and 128 or rows that are no pages",
        lambda p: _sunk(p) and _unpacked(p),
        {INFER_2: "beside packed queries only it takes a sink"},
    ),
    Rule(
        "keys in a cache, a sink, queries that see no key of their sequence",
        lambda p: _sunk(p) and infer_sink.hides_keys_from_a_query(p),
        {INFER_2: "what it gives such a query beside a sink is not documented"},
    ),
)


def _in_both_versions(rule: Rule) -> Rule:
    """What the inference kernel refuses, its second version, asked beside a sink, does too."""
    if INFER not in rule.refused:
        return rule
    return replace(rule, refused={**rule.refused, INFER_2: rule.refused[INFER]})


TABLE = tuple(map(_in_both_versions, _RULES))


CANDIDATES = (
    Candidate(
        FUSION, filling.KERNEL, AUTOGRAD, detour=f"gathers its keys for {FUSION}", check=CHECK
    ),
    Candidate(HOST, host.KERNEL, shortcut=True),
    Candidate(BLOCKWISE, composed.KERNEL),
)
OVER_PAGES = (Candidate(INFER, infer_attention.KERNEL, check=CHECK), *CANDIDATES)
SINK_OVER_PAGES = (
    Candidate(INFER_2, infer_sink.KERNEL, shortcut=True, check=CHECK),
    *OVER_PAGES,
)
NARROW = (CANDIDATES[0], Candidate(BLOCKWISE, widening.KERNEL))
NAMES = (*(candidate.name for candidate in CANDIDATES), INFER, INFER_2)
"""Of all kernels, the columns of compat_matrix.md."""


def _candidates(problem: Problem) -> tuple[Candidate, ...]:
    if problem.headdim_v != problem.headdim:
        return NARROW
    if problem.pages is None:
        return CANDIDATES
    return SINK_OVER_PAGES if problem.sink else OVER_PAGES


def drawn_by(offset: int) -> str | None:
    """The kernel that drew the dropout mask of this offset in rng_state."""
    for candidate in CANDIDATES:
        if candidate.kernel.draws is not None and candidate.kernel.draws(offset):
            return candidate.name
    return None


WHOLE = Table(TABLE, _candidates)
