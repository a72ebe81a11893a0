"""What of torch_npu each fused call needs.

From this the rows of all tables are made that ask the installed torch_npu, and the part of
compat_matrix.md that says what is fused with which torch_npu. The first entry of a call is the
operator, the others are all the arguments that are passed to it by name or by position, but for
those of a need of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..._version import OLDEST_TORCH_NPU
from ..ground.chip import soc_name
from ..ground.schemas import lacks
from ..ground.versions import too_old
from ..problems.rowwise import (
    ADD_LAYER_NORM,
    ADD_RMS_NORM,
    CROSS_ENTROPY,
    GEGLU,
    MROPE,
    RMS_NORM,
    ROTARY_MUL,
    SWIGLU,
    Lookup,
)
from ..problems.transfer import APPEND, GATHER, Append, Gather
from .rule import Rule

__all__ = ["ATTENTION", "CACHE", "FUSION", "INFER", "INFER_2", "NEEDS", "ROWWISE", "SINK_IN_CACHE"]
__all__ += ["Need", "on_ascend", "on_large_chips", "row", "rows", "supported"]

INFER = "npu_fused_infer_attention_score"
INFER_2 = f"{INFER}_v2"
FUSION = "npu_fusion_attention"


class Need(NamedTuple):
    """What of torch_npu a kind of call needs.

    feature: the kind, in a user's words.
    kernel: the one that refuses it if something is missing.
    calls: (operator, argument, ...) of everything that is called.
    applies: whether a problem is of this kind.
    otherwise: how it is served as a fused call all the same, None where it is composed then.
    """

    feature: str
    kernel: str
    calls: tuple[tuple[str, ...], ...]
    applies: Callable[[Any], bool] = lambda problem: True
    otherwise: str | None = None


_TENSORS = ("query", "key", "value")
_SHARED = (
    *("head_num", "input_layout", "atten_mask", "keep_prob"),
    *("actual_seq_qlen", "actual_seq_kvlen", "sparse_mode"),
)
_BY_POSITION = ("pse", "padding_mask", "inner_precise", "prefix")
_SAVED = (
    *("dy", "scale_value", "softmax_max", "softmax_sum", "attention_in"),
    *("seed", "offset", "numels"),
)
_TOCKENS = ("pre_tockens", "next_tockens")
_OVER_KEYS = (
    *("atten_mask", "block_table", "num_key_value_heads", "pre_tokens", "next_tokens"),
    *("input_layout", "sparse_mode", "block_size"),
)
_BIASED = ("pse", "pre_tokens", "next_tokens", "pse_type", "q_start_idx", "kv_start_idx")

SINK_IN_CACHE = Need(
    "keys in a cache, a sink",
    INFER_2,
    (
        (
            *(INFER_2, *_TENSORS, *_OVER_KEYS, "learnable_sink"),
            *("actual_seq_qlen", "actual_seq_kvlen", "num_query_heads", "softmax_scale"),
        ),
    ),
    lambda p: p.sink and p.pages is not None,
    otherwise="fused, the sink added to what the kernel answers",
)

ATTENTION = (
    Need(
        "attention",
        FUSION,
        (
            (FUSION, *_TENSORS, *_SHARED, *_BY_POSITION, *_TOCKENS, "scale"),
            (f"{FUSION}_grad", *_TENSORS, *_SHARED, *_TOCKENS, *_SAVED),
        ),
        lambda p: not p.alibi,
    ),
    Need(
        "alibi_slopes",
        FUSION,
        (
            (f"{FUSION}_v2", *_TENSORS, *_SHARED, *_BIASED, "scale"),
            (f"{FUSION}_grad_v2", *_TENSORS, *_SHARED, *_BIASED, *_SAVED),
        ),
        lambda p: p.alibi,
    ),
    Need(
        "softmax_lse of packed sequences",
        FUSION,
        ((FUSION, "softmax_layout"), (f"{FUSION}_grad", "softmax_layout")),
        otherwise="fused, its statistics put into rows behind the kernel",
    ),
    Need(
        "sink (transformers' s_aux)",
        FUSION,
        ((FUSION, "sink"),),
        otherwise="fused, the sink added to what the kernel answers",
    ),
    Need(
        "sink, Ascend 950",
        FUSION,
        ((f"{FUSION}_v2", "sink", "softmax_layout"),),
        otherwise="fused, the sink added to what the kernel answers",
    ),
    Need(
        "keys in a cache",
        INFER,
        (
            (
                *(INFER, *_TENSORS, *_OVER_KEYS, "num_heads", "scale", "softmax_lse_flag"),
                *("actual_seq_lengths", "actual_seq_lengths_kv"),
            ),
        ),
    ),
    SINK_IN_CACHE,
)

ROWWISE = (
    Need("rotary", ROTARY_MUL, ((ROTARY_MUL, "input", "r1", "r2", "rotary_mode"),)),
    Need(
        "rotary at positions in a tensor",
        MROPE,
        (
            (
                MROPE,
                *("positions", "query", "key", "cos_sin_cache", "head_size"),
                *("mrope_section", "rotary_mode"),
            ),
        ),
        lambda p: isinstance(p, Lookup),
    ),
    Need("RMS norm", RMS_NORM, ((RMS_NORM, "input", "gamma", "epsilon"),)),
    Need(
        "RMS norm of a sum",
        ADD_RMS_NORM,
        (
            (ADD_RMS_NORM, "x1", "x2", "gamma", "epsilon"),
            (f"{RMS_NORM}_backward", "dy", "input", "gamma", "rstd"),
        ),
    ),
    Need(
        "layer norm of a sum",
        ADD_LAYER_NORM,
        ((ADD_LAYER_NORM, "x1", "x2", "gamma", "beta", "epsilon", "additional_output"),),
    ),
    Need(
        "swiglu",
        SWIGLU,
        ((SWIGLU, "input", "dim"), (f"{SWIGLU}_backward", "grad_output", "input", "dim")),
    ),
    Need("exact geglu", GEGLU, ((GEGLU, "input", "dim", "approximate", "activate_left"),)),
    Need(
        "cross entropy",
        CROSS_ENTROPY,
        ((CROSS_ENTROPY, "input", "target", "reduction", "label_smoothing"),),
    ),
)

CACHE = (
    Need(
        "new keys in a cache",
        APPEND,
        ((APPEND, "key", "value", "key_cache", "value_cache", "slot_mapping", "cache_mode"),),
        lambda p: isinstance(p, Append),
    ),
    Need(
        "keys gathered from a cache",
        GATHER,
        ((GATHER, "key_cache", "value_cache", "block_tables", "seq_lens", "key", "value"),),
        lambda p: isinstance(p, Gather),
    ),
)

NEEDS = (*ATTENTION, *ROWWISE, *CACHE)


def on_ascend(kernels: tuple[str, ...]) -> Rule:
    """The row that refuses what lies elsewhere."""
    return Rule(
        "tensors outside an Ascend NPU",
        lambda p: p.device.type != "npu",
        dict.fromkeys(kernels, "it runs on Ascend NPUs only"),
    )


def on_large_chips(kernels: tuple[str, ...], why: str = "the chip does not have it") -> Rule:
    """The row that refuses the chips of inference cards."""
    return Rule(
        "Ascend 310P and 200I",
        lambda p: soc_name(p.device).startswith(("Ascend310", "Ascend200")),
        dict.fromkeys(kernels, why),
    )


def supported(kernels: tuple[str, ...]) -> Rule:
    """The row that refuses a torch_npu as a whole."""
    why = f"the installed torch_npu is older than {OLDEST_TORCH_NPU}, the oldest that is supported"
    return Rule(
        f"a torch_npu older than {OLDEST_TORCH_NPU}",
        lambda p: too_old(p.device),
        dict.fromkeys(kernels, why),
    )


def rows(needs: tuple[Need, ...]) -> tuple[Rule, ...]:
    """One row for each need whose calls are composed where something is missing."""
    return tuple(row(need) for need in needs if need.otherwise is None)


def row(need: Need) -> Rule:
    """The row that refuses a need whose calls are not all there."""
    names = " and ".join(call[0] for call in need.calls)
    return Rule(
        f"{need.feature}, a torch_npu without {names}",
        lambda p: need.applies(p) and lacks(p.device, *need.calls),
        {need.kernel: f"the installed torch_npu lacks {names}, or an argument of it"},
    )
