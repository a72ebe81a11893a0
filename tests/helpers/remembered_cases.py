"""Calls that fill memos, and variants of each with one attribute changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flash_attn_npu
from flash_attn_npu import flash_attn_interface as interface
from flash_attn_npu._core.rowwise.lookup import keep
from flash_attn_npu._integrations.stand_ins import npu_flash_attn_varlen_func
from flash_attn_npu.layers.rotary import apply_rotary_emb
from flash_attn_npu.ops.triton.layer_norm import layer_norm_fn, rms_norm_fn

flash = pytest.importorskip("transformers.modeling_flash_attention_utils")

Variant = dict[str, Any]
INFERENCE = torch.inference_mode


class Maker:
    """The tensors of one variant."""

    def __init__(self, variant: Variant) -> None:
        self.variant, self.leaves = variant, {}
        self.device = torch.device(variant.get("device", "npu"))

    def tensor(self, name: str, *shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
        dtype = self.variant.get(f"{name}.dtype", self.variant.get("dtype", dtype))
        made = torch.randn(shape, generator=torch.Generator().manual_seed(len(self.leaves)))
        made = made.to(dtype).to(self.device)
        if name in self.variant.get("strided", ()):
            made = torch.stack([made, made], -1)[..., 0]
        self.leaves[name] = made.requires_grad_(name in self.variant.get("grad", ()))
        return made

    def options(self, **defaults: Any) -> dict[str, Any]:
        return defaults | self.variant.get("options", {})

    def ints(self, name: str, values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        values = self.variant.get(name, values)
        known = f"{name} {values} {self.device}"
        if known not in TENSORS:
            TENSORS[known] = torch.tensor(values, dtype=dtype, device=self.device)
        return TENSORS[known]


def packed(make: Maker) -> Any:
    q, k, v = (make.tensor(name, 12, 2, 64) for name in "qkv")
    cu_q, cu_k = make.ints("cu_q", [0, 5, 12]), make.ints("cu_k", [0, 2, 12])
    options = make.options(causal=True, max_seqlen_q=9, max_seqlen_k=12)
    if options.pop("alibi", False):
        options["alibi_slopes"] = make.tensor("alibi", 2, dtype=torch.float32)
    function = options.pop("function", flash_attn_npu.flash_attn_varlen_func)
    return function(q, k, v, cu_q, cu_k, **options)


def sunk(make: Maker) -> Any:
    q, k, v = (make.tensor(name, 12, 2, 64) for name in "qkv")
    sink, cu = make.tensor("sink", 2), make.ints("cu", [0, 5, 12])
    options = make.options(causal=True)
    return npu_flash_attn_varlen_func(q, k, v, cu, cu, s_aux=sink, **options)


def biased(make: Maker) -> Any:
    q, k, v = (make.tensor(name, 12, 2, 64) for name in "qkv")
    cu, slopes = make.ints("cu", [0, 5, 12]), make.tensor("slopes", 2, dtype=torch.float32)
    options = make.options(causal=True, return_attn_probs=True, alibi_slopes=slopes)
    return flash_attn_npu.flash_attn_varlen_func(q, k, v, cu, cu, 9, 9, **options)


def longer(make: Maker) -> Any:
    q, k, v = (make.tensor(name, 12 + 2 * (name != "q"), 2, 64) for name in "qkv")
    cu_q, cu_k = make.ints("cu_q", [0, 5, 12]), make.ints("cu_k", [0, 5, 14])
    slopes = make.tensor("slopes", 2, dtype=torch.float32)
    options = make.options(causal=True, alibi_slopes=slopes)
    return flash_attn_npu.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 9, 9, **options)


def huawei(make: Maker) -> Any:
    q, k, v = (make.tensor(name, 12, 2, 64) for name in "qkv")
    cu_q, cu_k = make.ints("cu_q", [0, 5, 12]), make.ints("cu_k", [0, 5, 12])
    return flash_attn_npu.attention_forward_varlen(q, k, v, cu_q, cu_k, **make.options(causal=True))


def pages(make: Maker) -> Any:
    q = make.tensor("q", 4, 2, 64)
    k, v = (make.tensor(name, 4, 16, 2, 64) for name in "kv")
    cu_q, cu_k = make.ints("cu_q", [0, 2, 4]), make.ints("cu_k", [0, 9, 18])
    table = make.ints("table", [[3], [1]])
    options = make.options(causal=True, max_seqlen_q=4, max_seqlen_k=16)
    return flash_attn_npu.flash_attn_varlen_func(q, k, v, cu_q, cu_k, block_table=table, **options)


def cached(make: Maker) -> Any:
    q = make.tensor("q", 2, 1, 2, 64)
    k, v = (make.tensor(name, 4, 16, 2, 64) for name in "kv")
    given = {
        "cache_seqlens": make.ints("cache_seqlens", [9, 5]),
        "cache_batch_idx": make.ints("rows", [3, 1]),
    }
    return flash_attn_npu.flash_attn_with_kvcache(q, k, v, **given, **make.options(causal=True))


def appended(make: Maker) -> Any:
    """New keys, and all of them gathered, from pages of a table that names none where none is."""
    q, new_k, new_v = (make.tensor(name, 2, 2, 2, 64) for name in ("q", "new_k", "new_v"))
    k, v = (make.tensor(name, 4, 16, 2, 64) for name in "kv")
    given = {
        "cache_seqlens": make.ints("cache_seqlens", [9, 15]),
        "block_table": make.ints("table", [[3, -1], [1, 2]]),
    }
    options = make.options(causal=True, softcap=3.0)
    return flash_attn_npu.flash_attn_with_kvcache(q, k, v, new_k, new_v, **given, **options), k, v


def norm(make: Maker) -> Any:
    x, weight = make.tensor("x", 4, 64), make.tensor("weight", 64)
    options = make.options()
    if options.pop("residual", False):
        options["residual"] = make.tensor("residual", 4, 64)
    return options.pop("function", rms_norm_fn)(x, weight, options.pop("bias", None), **options)


def rotation(make: Maker) -> Any:
    x = make.tensor("x", 2, 5, 2, 64)
    cos, sin = make.tensor("cos", 9, 32), make.tensor("sin", 9, 32)
    return apply_rotary_emb(x, cos, sin, **make.options())


def looked_up(make: Maker) -> Any:
    """Rows of tables that all variants of one dtype share: a caller's, then an embedding's."""
    x, at = make.tensor("x", 2, 1, 2, 64), make.ints("at", [4, 7])
    cos, sin = (TENSORS[name].to(x.device, x.dtype) for name in ("cos", "sin"))
    first = apply_rotary_emb(x.clone(), cos, sin, seqlen_offsets=at, **make.options())
    keep(cos, sin)
    return first, apply_rotary_emb(x, cos, sin, seqlen_offsets=at, **make.options())


def buffers(make: Maker) -> Any:
    """dq and dk between each other's elements, which is right, or `apart` other elements off."""
    q, k, v, dout = (make.tensor(name, 2, 5, 2, 64) for name in ("q", "k", "v", "dout"))
    options = (0.0, 0.125, make.variant.get("causal", True), -1, -1, 0.0, None)
    out, lse, _, rng = interface._flash_attn_forward(q, k, v, *options, False)
    width = make.variant.get("width", 2)
    strides = (5 * 64 * 2 * width, 64 * 2 * width, 64 * width, width)
    space = torch.zeros(q.numel() * width + 8, dtype=q.dtype, device=q.device)
    dq = space.as_strided(q.shape, strides)
    dk = space.as_strided(q.shape, strides, make.variant.get("apart", 1))
    dv = torch.zeros_like(v)
    interface._flash_attn_backward(dout, q, k, v, out, lse, dq, dk, dv, *options, False, rng)
    return dq, dk, dv


MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


def masked(make: Maker) -> Any:
    mask, queries = TENSORS["mask"], make.variant.get("queries", 6)
    q = make.tensor("q", 2, queries, 2, 64)
    k, v = (make.tensor(name, 2, 6, 2, 64) for name in "kv")
    given = make.options(attn_implementation="flash_attention_2")
    out = flash._flash_attention_forward(q, k, v, mask, queries, True, **given)
    return out * mask[:, -queries:, None, None]


def positioned(make: Maker) -> Any:
    q, k, v = (make.tensor(name, 1, 6, 2, 64) for name in "qkv")
    given = make.options(attn_implementation="flash_attention_2", position_ids=TENSORS["ids"])
    return flash._flash_attention_forward(q, k, v, None, 6, True, **given)


TENSORS: dict[str, Tensor] = {}
"""Tensors that all variants share, so that what is remembered of them could answer."""

GRADIENTS = {f"gradient of {name}": {"grad": (name,)} for name in "qkv"}
MODES = {
    "inference mode": {"mode": INFERENCE},
    "no gradients": {"mode": torch.no_grad, "grad": ("q", "x")},
    "error": {"mode": lambda: flash_attn_npu.fallback("error")},
    "allow": {"mode": lambda: flash_attn_npu.fallback("allow")},
}
DTYPES = {
    "bfloat16": {"dtype": torch.bfloat16},
    "float32": {"dtype": torch.float32},
    "float64": {"dtype": torch.float64},
    "one dtype": {"k.dtype": torch.bfloat16, "weight.dtype": torch.float32},
}
STRIDED = {f"strided {name}": {"strided": (name,)} for name in "qkx"}


def of_options(**values: Any) -> dict[str, Variant]:
    return {f"{name}={value}": {"options": {name: value}} for name, value in values.items()}


COMMON: dict[str, Variant] = {
    "as it is": {},
    "host": {"device": "cpu"},
    **MODES,
    **DTYPES,
    **STRIDED,
}
ATTENTION = COMMON | GRADIENTS | of_options(
    causal=False, window_size=(2, 1), softmax_scale=0.5, deterministic=True, softcap=3.0
)  # fmt: skip
PACKED = (
    ATTENTION
    | of_options(dropout_p=0.5, return_attn_probs=True, alibi=True, max_seqlen_k=13)
    | {
        "the diagonal": {"options": {"window_size": (0, 0)}},
        "the diagonal, with gradient": {"options": {"window_size": (0, 0)}, "grad": ("v",)},
        "other queries": {"cu_q": [0, 3, 12]},
        "other keys": {"cu_k": [0, 5, 12]},
        "a tail": {"cu_q": [0, 5, 11]},
        "more sequences": {"cu_q": [0, 5, 5, 12], "cu_k": [0, 2, 7, 12]},
        "deterministic, with gradient": {"options": {"deterministic": True}, "grad": ("q",)},
        "dropout, with gradient": {"options": {"dropout_p": 0.5}, "grad": ("q",)},
    }
)
SUNK = ATTENTION | {
    "gradient of sink": {"grad": ("sink",)},
    "deterministic, gradient of sink": {"options": {"deterministic": True}, "grad": ("sink",)},
    "the diagonal": {"options": {"window_size": (0, 0)}},
    "the diagonal, gradient of sink": {"options": {"window_size": (0, 0)}, "grad": ("sink",)},
    "float32 sink": {"sink.dtype": torch.float32},
}
BFLOAT16_SUM = {"dtype": torch.bfloat16, "options": {"residual": True}}
SUMMANDS = ("x", "residual", "weight")
NORMS = (
    COMMON
    | {f"gradient of {name}": {"grad": (name,)} for name in ("x", "weight")}
    | of_options(eps=0.1, prenorm=True, residual=True, dropout_p=0.5, is_rms_norm=False)
    | {
        "zero centered": {"options": {"zero_centered_weight": True}},
        "layer norm": {"options": {"function": layer_norm_fn}},
        "residual in float32": {"options": {"residual": True, "residual_in_fp32": True}},
        "gradient of residual": {"options": {"residual": True}, "grad": ("residual",)},
        "bfloat16 sum": BFLOAT16_SUM,
        **{f"bfloat16 sum, gradient of {x}": BFLOAT16_SUM | {"grad": (x,)} for x in SUMMANDS},
    }
)
TURNS = COMMON | {"gradient of x": {"grad": ("x",)}} | of_options(
    interleaved=True, inplace=True, seqlen_offsets=3
)  # fmt: skip
CACHE = COMMON | of_options(
    causal=False, window_size=(2, 1), softmax_scale=0.5, softcap=3.0, return_softmax_lse=True
)
CACHED = CACHE | {"other lengths": {"cache_seqlens": [4, 9]}, "other rows": {"rows": [0, 2]}}
APPENDED = COMMON | of_options(causal=False, softcap=0.0) | {
    "other lengths": {"cache_seqlens": [4, 16]},
    "other pages": {"table": [[0, -1], [2, 1]]},
    "ids of blocks alone": {"table": [[3, 0], [1, 2]]},
    "strided keys": {"strided": ("new_k",)},
    "strided keys and values": {"strided": ("new_k", "new_v")},
    "a strided cache": {"strided": ("k",)},
}  # fmt: skip
PAGES = ATTENTION | {
    "other pages": {"table": [[0], [1]]},
    "other lengths": {"cu_k": [0, 4, 18]},
    "gathered, inference": {"options": {"softcap": 3.0}, "mode": INFERENCE},
    "gathered, gradient": {"options": {"softcap": 3.0}, "grad": ("k",)},
}
BIASED = {"as it is": {}} | GRADIENTS | {
    "other lengths": {"cu": [0, 3, 12]},
    "equal lengths": {"cu": [0, 6, 12]},
    "inference mode": MODES["inference mode"],
    "deterministic, with gradient": {"options": {"deterministic": True}, "grad": ("q",)},
    "bfloat16": DTYPES["bfloat16"],
}  # fmt: skip
LONGER = {"as it is": {}} | GRADIENTS | {
    "other queries": {"cu_q": [0, 3, 12]},
    "other keys": {"cu_k": [0, 7, 14]},
    "inference mode": MODES["inference mode"],
    "deterministic, with gradient": {"options": {"deterministic": True}, "grad": ("q",)},
    "bfloat16": DTYPES["bfloat16"],
}  # fmt: skip
HUAWEI = {"as it is": {}, "other": {"cu_q": [0, 3, 12]}} | GRADIENTS | {
    "inference mode": MODES["inference mode"], "not causal": {"options": {"causal": False}},
    "bfloat16": DTYPES["bfloat16"],
}  # fmt: skip
FROM_TRANSFORMERS = {"as it is": {}} | GRADIENTS | {
    "inference mode": MODES["inference mode"], "bfloat16": DTYPES["bfloat16"],
    "no gradients": MODES["no gradients"], **of_options(sliding_window=2, softcap=3.0),
}  # fmt: skip
MASKED = FROM_TRANSFORMERS | {
    "three queries": {"queries": 3},
    "two queries": {"queries": 2},
    "one query": {"queries": 1},
    "three queries, inference": {"queries": 3, "mode": INFERENCE},
}

BUFFERS: dict[str, Variant] = {
    "as it is": {},
    "the same": {"apart": 0},
    "one over the other": {"apart": 2},
    "farther": {"apart": 3},
    "wider": {"width": 3},
    "wider, farther": {"width": 3, "apart": 2},
    "dense": {"width": 1},
    "bfloat16": DTYPES["bfloat16"],
    "host": {"device": "cpu"},
}

CASES: dict[str, tuple[Callable[[Maker], Any], dict[str, Variant], tuple[str, ...]]] = {
    "packed": (
        packed,
        PACKED,
        (
            "plans of calls",
            "calls prepared for npu_fusion_attention",
            "positions of rows that a kernel is given",
            "causal masks",
            "cumulative lengths of a tensor",
            "cumulative lengths by their values",
            "names of chips",
            "version of torch_npu",
            "arguments of torch_npu's operators",
        ),
    ),
    "sink": (sunk, SUNK, ("plans of calls",)),
    "statistics": (biased, BIASED, ("where packed statistics lie",)),
    "longer": (longer, LONGER, ("queries filled up to their keys",)),
    "huawei": (huawei, HUAWEI, ("ends of the sequences of a tensor",)),
    "pages": (pages, PAGES, ("lengths and block tables of a cache", "positions in caches")),
    "buffers": (buffers, BUFFERS, ("whether buffers share memory",)),
    "cache": (cached, CACHED, ("page tables of unpaged caches",)),
    "new keys": (
        appended,
        APPENDED,
        (
            "slots of new keys in caches",
            "lengths of keys that are gathered",
            "block tables without foreign ids",
        ),
    ),
    "norm": (
        norm,
        NORMS,
        ("plans of calls", "C functions of operators"),
    ),
    "rotation": (rotation, TURNS, ("plans of calls", "devices that are NPUs")),
    "rows of tables": (
        looked_up,
        {name: v for name, v in TURNS.items() if name != "seqlen_offsets=3"}
        | {"other rows": {"at": [0, 8]}, "the first row": {"at": [0, 0]}},
        (
            "cos and sin side by side, by cos",
            "cos and sin side by side, by sin",
            "positions that are rotated",
        ),
    ),
    "mask": (masked, MASKED, ("attention masks of transformers",)),
    "position ids": (positioned, FROM_TRANSFORMERS, ("position ids of transformers",)),
}
