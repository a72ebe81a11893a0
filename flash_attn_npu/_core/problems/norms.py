"""A call of a norm as a value."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["NormCall"]


class NormCall(NamedTuple):
    """One call: the arguments of `layer_norm_fn`, and what its older sisters have besides.

    x, x1, residual, out, residual_out are (..., hidden); rowscale is (...), or as many values in
    another shape; the other tensors are (hidden,). The tensors come first.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None
    x1: Tensor | None = None
    weight1: Tensor | None = None
    bias1: Tensor | None = None
    rowscale: Tensor | None = None
    layerscale: Tensor | None = None
    out: Tensor | None = None
    residual_out: Tensor | None = None
    eps: float = 1e-6
    dropout_p: float = 0.0
    prenorm: bool = False
    residual_in_fp32: bool = False
    zero_centered_weight: bool = False
    is_rms_norm: bool = False
    out_dtype: torch.dtype | None = None
    rowscale_const: float = 1.0
