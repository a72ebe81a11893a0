"""Autocast for autograd.Functions, on the device of each call: upstream's decorators mean CUDA."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["custom_amp_decorator", "custom_bwd", "custom_fwd", "has_autocast"]

_DEVICE_TYPES = ("cpu", "npu", "cuda")
"""Where torch.compile may trace what is decorated; every other device serves too."""


def custom_amp_decorator(
    dec: Callable[..., Any], cuda_amp_deprecated: object
) -> Callable[..., Any]:
    """`dec` without its argument `device_type`.

    Args:
        dec: a decorator of `forward` or `backward`, as `torch.amp.custom_fwd` is.
        cuda_amp_deprecated: whether `dec` takes a device_type; if not, it is returned as it is.

    Returns:
        A decorator, used as `@decorator` or `@decorator(**options)`. What it decorates runs under
        `dec` with the device type of the tensors that `forward` was called with: that of the first
        which is not on the CPU.

    Contract: flash-attention 2.8, `custom_amp_decorator`. Wider: every device, not CUDA alone.
    """
    if not cuda_amp_deprecated:
        return dec

    def decorator(function: Callable[..., Any] | None = None, **options: Any) -> Any:
        if function is None:
            return functools.partial(decorator, **options)

        # made before any call, because torch.compile cannot trace how they are made
        known = {kind: dec(function, device_type=kind, **options) for kind in _DEVICE_TYPES}

        @functools.wraps(function)
        def wrapper(ctx: Any, *args: Any, **kwargs: Any) -> Any:
            # backward runs on the device of forward, whatever gradients are there
            if not hasattr(ctx, "amp_device_type"):
                ctx.amp_device_type = _device_type(*args, *kwargs.values())
            kind = ctx.amp_device_type
            decorated = known.get(kind) or dec(function, device_type=kind, **options)
            return decorated(ctx, *args, **kwargs)

        return wrapper

    return decorator


custom_fwd = custom_amp_decorator(torch.amp.custom_fwd, True)
"""`torch.amp.custom_fwd` on the device of the call: `@custom_fwd`, or with cast_inputs=dtype."""

custom_bwd = custom_amp_decorator(torch.amp.custom_bwd, True)
"""`torch.amp.custom_bwd` on the device of the call's forward, which `custom_fwd` decorates."""


def _device_type(*values: Any) -> str:
    types = [value.device.type for value in values if isinstance(value, Tensor)]
    # meta, for one, has no autocast
    known = [kind for kind in types if kind != "cpu" and has_autocast(kind)]
    return known[0] if known else "cpu"


def has_autocast(device_type: str) -> bool:
    """Whether a device has autocast: those that torch.compile is for are known, others asked.

    torch.compile of torch 2.6 and 2.8 cannot trace the asking.
    """
    return device_type in _DEVICE_TYPES or torch.amp.is_autocast_available(device_type)
