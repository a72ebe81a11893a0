"""Every attention function and operator, and a right call of each, by its own parameter names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import flash_attn_npu
from flash_attn_npu import flash_attn_interface

OPERATORS = torch.ops.flash_attn_npu_shim
NAMESPACE = "flash_attn_npu_shim::"
EXTENSION = flash_attn_interface.flash_attn_gpu

FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        name: getattr(flash_attn_interface, name)
        for name in flash_attn_interface.__all__
        if name.endswith(("_func", "_with_kvcache", "_forward", "_backward"))
        and not name.startswith("_wrapped")
    },
    **{f"flash_attn_gpu.{name}": getattr(EXTENSION, name) for name in EXTENSION.__all__},
    "attention_forward_varlen": flash_attn_npu.attention_forward_varlen,
    **{
        name: getattr(OPERATORS, name.removeprefix(NAMESPACE)).default
        for name in sorted(torch._C._dispatch_get_all_op_names())
        if name.startswith(f"{NAMESPACE}_flash_attn")
    },
}
"""What clients can call; whatever is added to a module's names is in."""

Call = dict[str, Any]


def annotations(name: str) -> dict[str, str]:
    """The type of each parameter, as the signature or the operator's schema spells it."""
    function = FUNCTIONS[name]
    if isinstance(function, torch._ops.OpOverload):
        return {x.name: str(x.type) for x in function._schema.arguments}
    parameters = inspect.signature(function).parameters.values()
    return {x.name: str(x.annotation) for x in parameters}


def optional(name: str) -> set[str]:
    """Parameters that a call may leave out."""
    function = FUNCTIONS[name]
    if isinstance(function, torch._ops.OpOverload):
        return {x.name for x in function._schema.arguments if x.has_default_value()}
    parameters = inspect.signature(function).parameters.values()
    return {x.name for x in parameters if x.default is not x.empty}


def _numbers() -> Call:
    return {
        **dict.fromkeys(("dropout_p", "p_dropout"), 0.0),
        **dict.fromkeys(("causal", "is_causal"), True),
        **dict.fromkeys(("rotary_interleaved", "is_rotary_interleaved"), False),
        "softmax_scale": 0.5,
        "window_size": (3, 0),
        "window_size_left": 3,
        "window_size_right": 0,
        "softcap": 2.0,
        "return_softmax": False,
        "deterministic": False,
        "zero_tensors": False,
        "num_splits": 0,
        "return_attn_probs": True,
        "return_softmax_lse": True,
        **dict.fromkeys(("max_seqlen", "max_seqlen_q", "max_seqlen_k"), 6),
    }


def _dense(heads: int) -> tuple[int, ...]:
    return 2, 5, heads, 8


def _packed(heads: int) -> tuple[int, ...]:
    return 9, heads, 8


def _cache() -> Call:
    return {
        "q": torch.randn(2, 1, 4, 8),
        "k": torch.randn(2, 1, 2, 8),
        "v": torch.randn(2, 1, 2, 8),
        "k_cache": torch.randn(3, 12, 2, 8),
        "v_cache": torch.randn(3, 12, 2, 8),
        "rotary_cos": torch.rand(12, 4),
        "rotary_sin": torch.rand(12, 4),
        "cache_seqlens": torch.tensor([4, 7], dtype=torch.int32),
        "cache_batch_idx": torch.tensor([2, 0], dtype=torch.int32),
        "cache_leftpad": torch.tensor([1, 0], dtype=torch.int32),
        "alibi_slopes": torch.rand(4),
    }


def _attention(varlen: bool) -> Call:
    shape = _packed if varlen else _dense
    q, k, v, dout, out = (torch.randn(shape(heads)) for heads in (4, 2, 2, 4, 4))
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    return {
        "q": q,
        "k": k,
        "v": v,
        "dout": dout,
        "out": out,
        "kv": torch.stack((k, v), -3),
        "qkv": torch.randn(*shape(4)[:-2], 3, 4, 8),
        "softmax_lse": torch.rand((4, 9) if varlen else (2, 4, 5)) + 3,
        **{f"d{x}": torch.empty(shape(heads)) for x, heads in (("q", 4), ("k", 2), ("v", 2))},
        **dict.fromkeys(("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k"), cu_seqlens),
        "alibi_slopes": torch.rand(4),
        "sink": torch.randn(4),
        "seqused_k": torch.tensor([3, 5], dtype=torch.int32),
        "leftpad_k": torch.tensor([1, 0], dtype=torch.int32),
        "rng_state": torch.zeros(2, dtype=torch.int64),
    }


def right(name: str, device: torch.device) -> Call:
    """A call that is served, every tensor parameter with a tensor of its own where it may."""
    names = annotations(name)
    values = _cache() if "k_cache" in names else _attention(any("cu_seq" in x for x in names))
    on_device = {x: y.clone().to(device) for x, y in values.items()}
    if name == "attention_forward_varlen":
        return {x: on_device[x] for x in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")}
    return {x: y for x, y in (on_device | _numbers()).items() if x in names}


def paged(name: str, device: torch.device) -> Call:
    """The same over pages, for a function that has a block_table."""
    call = right(name, device)
    k, v = ("k_cache", "v_cache") if "k_cache" in call else ("k", "v")
    for x in (k, v):
        call[x] = torch.randn(5, 4, 2, 8).to(device)
    call.pop("cache_batch_idx", None)
    table = torch.tensor([[3, 1], [2, 4]], dtype=torch.int32)
    return call | {"block_table": table.to(device)}


def has_pages(name: str) -> bool:
    return "block_table" in annotations(name) and name != "attention_forward_varlen"


def tensors(name: str, call: Call) -> list[str]:
    return [x for x in annotations(name) if isinstance(call.get(x), Tensor)]


def run(name: str, call: Call) -> Any:
    """The call; parameters without a default that it does not give are None."""
    required = [x for x in annotations(name) if x not in optional(name)]
    return FUNCTIONS[name](**dict.fromkeys(required) | call)
