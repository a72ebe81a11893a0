"""Operators that write integers on an NPU and move no version counter, heard where they pass.

PyTorch leaves the counter to the kernels of operators on lists, and torch_npu's do not move it; nor
do operators of its own that write to an argument (2.6 to 2.13: their slow routes alone move it).
What was read of the memory that they write is dropped. Nothing else changes, the counters least of
all: autograd would refuse steps that it accepts today.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .locks import Lock

__all__ = ["OPERATORS", "listen"]

OPERATORS = (
    *(f"aten::_foreach_{name}_" for name in ("add", "copy", "mul", "sign", "sub")),
    *(f"aten::_foreach_{name}_" for name in ("clamp_max", "clamp_min", "maximum", "minimum")),
    *(f"aten::{name}" for name in ("fill_diagonal_", "max", "min", "split_with_sizes_copy")),
    *(f"npu::{name}" for name in ("attention_worker_scheduler_", "ffn_worker_scheduler_")),
    *(f"npu::{name}" for name in ("copy_memory_", "one_", "npu_view_copy", "npu_dtype_cast_")),
    *(f"npu::{name}" for name in ("npu_advance_step_flashattn", "_npu_index_add_")),
    *(f"npu::{name}" for name in ("scatter_update_", "npu_scatter_list_")),
    *(f"npu::{name}" for name in ("npu_scatter_nd_update_", "npu_broadcast", "npu_indexing")),
    *(f"npu::{name}" for name in ("npu_reshape", "npu_slice", "npu_sort_v2", "npu_stride_copy")),
    "npu::npu_transpose",
)
"""Those that can write what is remembered: lengths, tables, masks. Others write caches, weights or
statistics, and every call that is heard costs a few microseconds.
"""

_BELOW = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.ADInplaceOrView)
_libraries: dict[str, torch.library.Library] = {}
_lock = Lock()

Forget = Callable[[set[int]], None]
"""Is given the addresses of storages that were written to."""


def listen(forget: Forget) -> None:
    """From now on let `forget` know of each such write by one of `OPERATORS`."""
    with _lock:
        if _libraries:
            return
        for space in ("aten", "npu"):
            _libraries[space] = torch.library.Library(space, "IMPL")
        for name in torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1"):
            packet, _, overload = name.partition(".")
            if packet not in OPERATORS or _counts(name):
                continue
            space, _, packet = packet.partition("::")
            operator = getattr(getattr(getattr(torch.ops, space), packet), overload or "default")
            written = _written(operator)
            if written:
                hearing = _hearing(operator, written, forget)
                _libraries[space].impl(name, hearing, "ADInplaceOrView", with_keyset=True)


def _counts(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "ADInplaceOrView")


def _written(operator: torch._ops.OpOverload) -> dict[str, int]:
    """The arguments that it writes to, and their places."""
    return {
        argument.name: place
        for place, argument in enumerate(operator._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    }


def _hearing(
    operator: torch._ops.OpOverload, written: dict[str, int], forget: Forget
) -> Callable[..., Any]:
    """What calls the operator, and then says which memory was written to."""

    def hearing(keys: torch._C.DispatchKeySet, *args: Any, **given: Any) -> Any:
        try:
            return operator.redispatch(keys & _BELOW, *args, **given)
        finally:
            values = [given.get(name, *args[at : at + 1]) for name, at in written.items()]
            tensors = [x for value in values for x in (value if type(value) is list else [value])]
            storages = {x.untyped_storage().data_ptr() for x in tensors if _may_be_remembered(x)}
            if storages:
                forget(storages)

    return hearing


def _may_be_remembered(x: Any) -> bool:
    # fake tensors have no memory, and are of a type of their own
    return type(x) is Tensor and not x.is_floating_point() and x.device.type == "npu"
