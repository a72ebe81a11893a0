"""npu_rotary_mul and its gradient; npu_apply_rotary_pos_emb, which writes into its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..machine.fused_call import Given, Kernel, builder, on_host
from . import rotary_rules as rules

Outputs = tuple[torch.Tensor, ...]


def _turned(x: torch.Tensor, mode: str) -> torch.Tensor:
    """A quarter turn of every pair: (-x2, x1)."""
    if mode == "half":
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def _table(given: Given, name: str) -> torch.Tensor:
    """cos or sin as the kernel reads it: torch_npu casts it to the dtype of the input."""
    return given[name].to(given["input"].dtype).double()


def _rotary_mul(given: Given, outputs: Outputs) -> None:
    x = given["input"].double()
    turned = _turned(x, given["rotary_mode"])
    outputs[0].copy_(x * _table(given, "r1") + turned * _table(given, "r2"))


def _rotary_mul_backward(given: Given, outputs: Outputs) -> None:
    """Without a table that requires a gradient nobody writes dcos and dsin."""
    dx, dcos, dsin = outputs
    mode, x = given["rotary_mode"], given["input"].double()
    dy = given["grad"].to(given["input"].dtype).double()
    # The turn back is the transpose, so minus the turn
    dx.copy_(dy * _table(given, "r1") - _turned(dy * _table(given, "r2"), mode))
    if given["requires_grad"] & {"r1", "r2"}:
        dcos.copy_((dy * x).sum_to_size(dcos.shape))
        dsin.copy_((dy * _turned(x, mode)).sum_to_size(dsin.shape))


def _applied(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """In float16 the kernel rounds both products and their sum, in the others the sum alone."""
    along, across = x.double() * cos.double(), _turned(x.double(), "half") * sin.double()
    if x.dtype == torch.float16:
        return along.half() + across.half()
    return along + across


def _apply_kernel(real: Kernel) -> Kernel:
    def kernel(given: Given, *args: Any, **kwargs: Any) -> Any:
        results = real(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            hosted = on_host(given)
            rules.check_applied(hosted)
            rotated = [_applied(hosted[n], hosted["cos"], hosted["sin"]) for n in ("query", "key")]
            for name, values in zip(("query", "key"), rotated, strict=True):
                hosted[name].copy_(values)
        return results

    return kernel


BUILDERS: dict[str, Callable[[Kernel], Kernel]] = {
    "npu_apply_rotary_pos_emb": _apply_kernel,
    "npu_rotary_mul": builder(rules.check_rotary, _rotary_mul),
    "npu_rotary_mul_backward": builder(rules.check_rotary_backward, _rotary_mul_backward),
}
