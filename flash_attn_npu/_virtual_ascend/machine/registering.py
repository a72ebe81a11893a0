"""How a kernel takes an operator over, so that torch_npu's own can still be asked.

From torch 2.9 on a kernel that was replaced can be held (torch.library.get_kernel). Before, an
operator of torch_npu is taken over one key above, BackendSelect, which every call passes below
autograd; torch_npu's kernel stays where it is. Operators of aten are replaced in any case.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["HOLDS_KERNELS", "original", "register", "register_above"]

Kernel = Callable[..., Any]

HOLDS_KERNELS = hasattr(torch.library, "get_kernel")
_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
_OVERRIDES = "allow_override" in inspect.signature(torch.library.Library.impl).parameters


def original(op: torch._ops.OpOverload) -> Kernel:
    """torch_npu's own kernel, as it was before anything replaced it."""
    if HOLDS_KERNELS:
        kernel = torch.library.get_kernel(op, "PrivateUse1")
        return lambda *args, **kwargs: kernel.call_boxed(_KEYS, *args, **kwargs)
    return lambda *args, **kwargs: op.redispatch(_KEYS, *args, **kwargs)


def register(library: torch.library.Library, op: torch._ops.OpOverload, kernel: Kernel) -> None:
    """Let the kernel answer for tensors of the card."""
    name = op.name()
    namespace = name.partition("::")[0]
    if namespace == "npu" and not HOLDS_KERNELS:
        library.impl(name, _of_the_card(op, kernel), "BackendSelect", with_keyset=True)
    elif _OVERRIDES:
        library.impl(name, kernel, "PrivateUse1", allow_override=True)
    elif namespace == "aten":
        # what else there is was registered in Python, by torch, and cannot be taken over twice
        library.impl(name, kernel, "PrivateUse1")


def register_above(
    library: torch.library.Library, op: torch._ops.OpOverload, kernel: Kernel
) -> None:
    """Let the kernel answer for tensors of the card above autograd, as its parts have gradients."""
    override = {"allow_override": True} if _OVERRIDES else {}
    library.impl(op.name(), kernel, "AutogradPrivateUse1", **override)


def _of_the_card(op: torch._ops.OpOverload, kernel: Kernel) -> Kernel:
    select = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)

    def choose(keys: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        # a fake tensor of the card has its key too, and answers without memory
        fake = keys.has(torch._C.DispatchKey.Meta)
        if keys.has(torch._C.DispatchKey.PrivateUse1) and not fake:
            return kernel(*args, **kwargs)
        return op.redispatch(keys - select, *args, **kwargs)

    return choose
