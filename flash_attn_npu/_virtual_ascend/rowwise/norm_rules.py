"""What the documents and tiling sources of CANN forbid the normalizations: never tried on a card.
Each message quotes its rule.
"""

from __future__ import annotations

import torch

from ..machine.fused_call import (
    Given,
    check_contiguous,
    check_dims,
    check_dtype,
    check_not_empty,
    check_one_dtype,
    check_shape,
    is_ascend_310p,
)
from ..machine.refusal import require

_HALF, _BRAIN, _FULL = torch.float16, torch.bfloat16, torch.float32
# (x1, x2, gamma and beta)
_ADD_LAYER_NORM = {
    *((a, b, _FULL) for a, b in ((_FULL, _HALF), (_FULL, _BRAIN), (_HALF, _FULL), (_BRAIN, _FULL))),
    *((dtype, dtype, _FULL) for dtype in (_HALF, _BRAIN, _FULL)),
    *((dtype, dtype, dtype) for dtype in (_HALF, _BRAIN)),
}
_ADD_LAYER_NORM_310P = {(_HALF, _HALF, _HALF), (_FULL, _FULL, _FULL)}
_SMALLEST_ROW_310P = 32


def check_rms_norm(given: Given) -> None:
    x, gamma = given["input"], given["gamma"]
    _check_scale_dtype(x, gamma)
    # Huawei's own test normalizes nothing
    check_not_empty(gamma, "gamma")
    _check_scaled_axes(x, gamma, "input", 1, may_be_empty=True)
    _check_epsilon(given)
    if is_ascend_310p():
        require(bool(x.isfinite().all()), "input must be finite on a 310P")


def check_rms_norm_backward(given: Given) -> None:
    x, gamma, rstd = given["input"], given["gamma"], given["rstd"]
    check_one_dtype(given, ("input", "dy"))
    _check_scale_dtype(x, gamma)
    _check_scaled_axes(x, gamma, "input", 2)
    check_shape(given["dy"], x.shape, "dy")
    _check_statistic(rstd, x, gamma, "rstd")


def check_add_rms_norm(given: Given) -> None:
    x = given["x1"]
    check_one_dtype(given, ("x1", "x2", "gamma"))
    check_shape(given["x2"], x.shape, "x2")
    _check_scaled_axes(x, given["gamma"], "x1", 1)
    _check_epsilon(given)


def check_gemma_rms_norm(given: Given) -> None:
    require(not is_ascend_310p(), "npu_gemma_rms_norm does not exist on a 310P")
    for name in ("input", "gamma"):
        check_contiguous(given[name], name)
    check_one_dtype(given, ("input", "gamma"))
    _check_scaled_axes(given["input"], given["gamma"], "input", 1)
    _check_epsilon(given)


def check_add_layer_norm(given: Given) -> None:
    x, gamma, beta = given["x1"], given["gamma"], given["beta"]
    dtypes = (x.dtype, given["x2"].dtype, gamma.dtype)
    table = _ADD_LAYER_NORM_310P if is_ascend_310p() else _ADD_LAYER_NORM
    require(
        dtypes in table and beta.dtype == gamma.dtype,
        f"no kernel for x1, x2, gamma and beta of {dtypes} and {beta.dtype}",
    )
    check_shape(given["x2"], x.shape, "x2")
    check_shape(beta, gamma.shape, "beta")
    _check_scaled_axes(x, gamma, "x1", 1)
    # torch_npu gives mean one dimension for all that gamma has, the tiling wants x1's number
    require(gamma.dim() == 1, f"gamma must have one dimension, got {tuple(gamma.shape)}")


def check_add_layer_norm_backward(given: Given) -> None:
    given = {**given, "dy": given["dy_opt"], "dsum": given["dsum_opt"]}
    x, gamma = given["x1"], given["gamma"]
    check_one_dtype(given, ("x1", "x2", "gamma", "dy", "dsum"))
    for name in ("x2", "dy", "dsum"):
        if given[name] is not None:
            check_shape(given[name], x.shape, name)
    _check_scaled_axes(x, gamma, "x1", 1)
    for name in ("rstd", "mean"):
        _check_statistic(given[name], x, gamma, name)


def _check_scale_dtype(x: torch.Tensor, gamma: torch.Tensor) -> None:
    check_dtype(x, "input")
    widened = gamma.dtype == _FULL and not is_ascend_310p()
    require(
        gamma.dtype == x.dtype or widened,
        f"gamma must have input's dtype {x.dtype} or float32 (not on a 310P), got {gamma.dtype}",
    )


def _check_scaled_axes(
    x: torch.Tensor, gamma: torch.Tensor, name: str, least: int, *, may_be_empty: bool = False
) -> None:
    check_dims(x, least, 8, name)
    check_dims(gamma, 1, x.dim(), "gamma")
    check_shape(gamma, x.shape[x.dim() - gamma.dim() :], "gamma")
    if not may_be_empty:
        # Later documents allow it, the tiling of released versions does not
        check_not_empty(x, name)
    if is_ascend_310p():
        size = gamma.numel() * gamma.itemsize
        require(
            size >= _SMALLEST_ROW_310P,
            f"the normalized axes must hold at least 32 bytes on a 310P, got {size}",
        )


def _check_epsilon(given: Given) -> None:
    require(given["epsilon"] >= 0, f"epsilon must not be negative, got {given['epsilon']}")


def _check_statistic(
    statistic: torch.Tensor, x: torch.Tensor, gamma: torch.Tensor, name: str
) -> None:
    kept = x.dim() - gamma.dim()
    require(statistic.dtype == _FULL, f"{name} must be float32, got {statistic.dtype}")
    check_shape(statistic, (*x.shape[:kept], *[1] * gamma.dim()), name)
