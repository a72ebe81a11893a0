"""The npu namespace: journalling of every call, and where its arithmetic comes from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .attention import fusion_attention
from .inference import infer_attention, paged_cache
from .machine import derivatives, formats, journal, lacks, lies
from .machine.arithmetic import overload
from .machine.refusal import not_simulated
from .machine.registering import original
from .rowwise import gate_ops, loss_op, mrope_op, norm_ops, rotary_op

Kernel = Callable[..., Any]

# Metadata only, nothing to launch
_KEPT = {"get_npu_format", "get_storage_size", "set_op_timeout_ms"}
_INFERENCE = {"npu_fused_infer_attention_score": 1, "npu_fused_infer_attention_score_v2": 2}
_BUILDERS: dict[str, Callable[[Kernel], Kernel]] = {
    "_npu_dropout_gen_mask": fusion_attention.dropout_mask_kernel,
    "npu_gather_pa_kv_cache": paged_cache.gather_kernel,
    "npu_scatter_pa_kv_cache": paged_cache.scatter_kernel,
    **gate_ops.BUILDERS,
    **loss_op.BUILDERS,
    **mrope_op.BUILDERS,
    **norm_ops.BUILDERS,
    **rotary_op.BUILDERS,
}


_LATER = {"rotary_mode": "half", "rotate": None, "sink": None, "softmax_layout": ""}
"""Arguments that older torch_npu lack, by what they are where nobody passes them."""
_CASTS = {f"{start}npu_dtype_cast{end}" for start in ("", "_") for end in ("", "_backward")}
"""What torch's own `to` is made of before torch 2.9: no launch that anybody asked for."""


def kernels() -> dict[str, Kernel]:
    """Every operator of the npu namespace that torch_npu implements."""
    table = {}
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1"):
        op = overload(name) if name.startswith("npu::") else None
        if op is None or op._schema.name.removeprefix("npu::") in _KEPT:
            continue
        if op._schema.name.removeprefix("npu::") in formats.CASTS:
            # torch_npu's adapters call them for every tensor, mostly to find nothing to do
            table[name] = formats.cast(original(op))
        elif op._schema.name.removeprefix("npu::") in _CASTS:
            table[name] = derivatives.KERNELS[op._schema.name.removeprefix("npu::")]
        else:
            table[name] = _journalled(op, _arithmetic(op))
    return table


def _arithmetic(op: torch._ops.OpOverload) -> Kernel:
    """A kernel whose first argument is the call's arguments by name."""
    name = op._schema.name.removeprefix("npu::")
    version = {"2": 2, "3": 3}.get(name[-1], 1)
    if name.startswith("npu_fusion_attention") and op._overloadname == "default":
        backward = "_grad" in name
        build = fusion_attention.backward_kernel if backward else fusion_attention.forward_kernel
        return build(version, original(op))
    if name in _INFERENCE and op._overloadname == "default":
        return infer_attention.kernel(_INFERENCE[name], original(op))
    if name in _BUILDERS:
        return _BUILDERS[name](original(op))
    return _ignoring_names(derivatives.KERNELS.get(name) or not_simulated(f"npu::{name}"))


def _ignoring_names(kernel: Kernel) -> Kernel:
    return lambda given, *args, **kwargs: kernel(*args, **kwargs)


def _journalled(op: torch._ops.OpOverload, kernel: Kernel) -> Kernel:
    name = op._schema.name.removeprefix("npu::")
    arguments = op._schema.arguments
    names = [argument.name for argument in arguments]
    defaults = _LATER | {a.name: a.default_value for a in arguments if a.has_default_value()}

    def launch(*args: Any, **kwargs: Any) -> Any:
        given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
        journal.launched(name, given)
        lacks.launched(name, late=False)
        given = lies.arguments(name, given)
        returned = kernel(given, *args, **kwargs)
        lacks.launched(name, late=True)
        lies.results(name, given, returned, lambda g, **k: kernel(g, *args, **{**kwargs, **k}))
        return returned

    return launch
