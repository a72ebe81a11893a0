"""The normalizations of torch_npu in float64, rounded where the kernels' sources round."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..machine.fused_call import Given, Kernel, builder, is_ascend_310p
from . import norm_rules as rules

Outputs = tuple[torch.Tensor, ...]


def _axes(gamma: torch.Tensor) -> list[int]:
    """The normalized axes, counted from the last."""
    return list(range(-gamma.dim(), 0))


def _leading(x: torch.Tensor, gamma: torch.Tensor) -> list[int]:
    return list(range(x.dim() - gamma.dim()))


def _sum_leading(values: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    axes = _leading(values, gamma)
    return values.sum(axes) if axes else values


def _rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return values.to(dtype).double()


def _inverse_rms(x: torch.Tensor, given: Given) -> torch.Tensor:
    mean = x.square().mean(_axes(given["gamma"]), keepdim=True)
    return torch.rsqrt(mean + given["epsilon"])


def _rms_norm(given: Given, outputs: Outputs) -> None:
    y, rstd = outputs
    x = given["input"].double()
    inverse = _inverse_rms(x, given)
    y.copy_(x * inverse * given["gamma"].double())
    rstd.copy_(inverse)


def _gemma_rms_norm(given: Given, outputs: Outputs) -> None:
    _rms_norm({**given, "gamma": 1 + given["gamma"].double()}, outputs)


def _rms_norm_backward(given: Given, outputs: Outputs) -> None:
    dx, dgamma = outputs
    dy, x, gamma, rstd = (given[name].double() for name in ("dy", "input", "gamma", "rstd"))
    normalized, scaled = x * rstd, dy * gamma
    mean = (scaled * normalized).mean(_axes(gamma), keepdim=True)
    dx.copy_((scaled - normalized * mean) * rstd)
    dgamma.copy_(_sum_leading(dy * normalized, gamma))


def _add_rms_norm(given: Given, outputs: Outputs) -> None:
    """In float16 the kernel normalizes the rounded sum, in bfloat16 the exact one, and in both it
    rounds before it multiplies by gamma.
    """
    y, rstd, total = outputs
    dtype = given["x1"].dtype
    x = given["x1"].double() + given["x2"].double()
    total.copy_(x)
    if dtype == torch.float16:
        x = _rounded(x, dtype)
    inverse = _inverse_rms(x, given)
    y.copy_(_rounded(x * inverse, dtype) * given["gamma"].double())
    if not is_ascend_310p():
        rstd.copy_(inverse)


def _add_layer_norm(given: Given, outputs: Outputs) -> None:
    y, mean, rstd, total = outputs
    gamma, beta = given["gamma"].double(), given["beta"].double()
    x = given["x1"].double() + given["x2"].double()
    center = x.mean(_axes(gamma), keepdim=True)
    variance = (x - center).square().mean(_axes(gamma), keepdim=True)
    inverse = torch.rsqrt(variance + given["epsilon"])
    y.copy_((x - center) * inverse * gamma + beta)
    if given["additional_output"]:
        total.copy_(x)
    if not is_ascend_310p():
        mean.copy_(center)
        rstd.copy_(inverse)


def _add_layer_norm_backward(given: Given, outputs: Outputs) -> None:
    """dx1 and dx2 are one tensor."""
    dx, _, dgamma, dbeta = outputs
    gamma, rstd, mean = (given[name].double() for name in ("gamma", "rstd", "mean"))
    x = given["x1"].double() + given["x2"].double()
    zeros = torch.zeros_like(x)
    dy, dsum = (
        zeros if given[name] is None else given[name].double() for name in ("dy_opt", "dsum_opt")
    )
    normalized, scaled, axes = (x - mean) * rstd, dy * gamma, _axes(gamma)
    along = (scaled * normalized).mean(axes, keepdim=True)
    dx.copy_(rstd * (scaled - scaled.mean(axes, keepdim=True) - normalized * along) + dsum)
    dgamma.copy_(_sum_leading(dy * normalized, gamma))
    dbeta.copy_(_sum_leading(dy, gamma))


BUILDERS: dict[str, Callable[[Kernel], Kernel]] = {
    "npu_add_layer_norm": builder(rules.check_add_layer_norm, _add_layer_norm),
    "npu_add_layer_norm_backward": builder(
        rules.check_add_layer_norm_backward, _add_layer_norm_backward
    ),
    "npu_add_rms_norm": builder(rules.check_add_rms_norm, _add_rms_norm),
    "npu_gemma_rms_norm": builder(rules.check_gemma_rms_norm, _gemma_rms_norm),
    "npu_rms_norm": builder(rules.check_rms_norm, _rms_norm),
    "npu_rms_norm_backward": builder(rules.check_rms_norm_backward, _rms_norm_backward),
}
