"""Descriptions of one rotation, norm, gate or loss: what the table asks about, and no tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "ADD_LAYER_NORM",
    "ADD_RMS_NORM",
    "CROSS_ENTROPY",
    "GEGLU",
    "LAYER_NORM",
    "MROPE",
    "RMS_NORM",
    "ROTARY_MUL",
    "SWIGLU",
    "TORCH",
    "Gate",
    "Geglu",
    "Lookup",
    "Loss",
    "Norm",
    "Problem",
    "Rotation",
    "Tables",
    "Turn",
]

ROTARY_MUL = "npu_rotary_mul"
MROPE = "npu_mrope"
ADD_RMS_NORM = "npu_add_rms_norm"
RMS_NORM = "npu_rms_norm"
ADD_LAYER_NORM = "npu_add_layer_norm"
LAYER_NORM = "layer_norm"
SWIGLU = "npu_swiglu"
GEGLU = "npu_geglu"
CROSS_ENTROPY = "npu_cross_entropy_loss"
TORCH = "torch"


class Rotation(NamedTuple):
    """`apply_rotary`: a rotation of rotary_dim dimensions of nheads heads of each token.

    head_dims: how many dimensions of x the heads have.
    just_in_time: the device compiles operators just in time.
    """

    function: str
    device: torch.device
    dtype: torch.dtype
    table_dtype: torch.dtype
    empty: bool
    nheads: int
    rotary_dim: int
    interleaved: bool
    head_dims: int = 1
    just_in_time: bool = False


class Lookup(NamedTuple):
    """A rotation of one tensor or two whose rows of the tables are those of a tensor.

    table_dtype: what cos and sin promote to.
    nheads: of the tensor that has more.
    pair: there are two.
    several: there is more than one token.
    whole: it is looked up in whole tables that are known, not in the rows of these tokens.
    differentiated: something in it has a gradient.
    """

    function: str
    device: torch.device
    dtype: torch.dtype
    table_dtype: torch.dtype
    empty: bool
    nheads: int
    headdim: int
    rotary_dim: int
    interleaved: bool
    pair: bool
    several: bool
    whole: bool
    differentiated: bool


class Norm(NamedTuple):
    """`layer_norm_fn`: a sum of tensors and its norm.

    weight_dtype, bias_dtype, residual_dtype: None where the argument is not given.
    branches: how many tensors besides the residual are added.
    outputs: how many pairs of weight and bias are applied.
    scaled: rowscale or layerscale.
    buffers: out or residual_out.
    within: part of a function with a backward of its own.
    """

    function: str
    device: torch.device
    dtype: torch.dtype
    out_dtype: torch.dtype
    weight_dtype: torch.dtype
    bias_dtype: torch.dtype | None
    residual_dtype: torch.dtype | None
    empty: bool
    rms: bool
    zero_centered: bool
    branches: int
    outputs: int
    scaled: bool
    dropout: bool
    buffers: bool
    needs_grad: bool
    compiling: bool
    within: bool = False


class Gate(NamedTuple):
    """`swiglu`: silu(x) * y.

    halves: x and y are the two halves, in this order, of the rows of one contiguous tensor.
    whole: the size and the strides of that tensor.
    row_bytes: the size of a row of x.
    mixed: x and y differ in dtype.
    differentiated: the call itself is, and not a function around it.
    grad_dtype: of the gradient of the result, None for a forward.
    """

    function: str
    device: torch.device
    dtype: torch.dtype
    empty: bool
    halves: bool
    row_bytes: int
    mixed: bool
    differentiated: bool
    grad_dtype: torch.dtype | None = None
    whole: tuple[tuple[int, ...], tuple[int, ...]] | None = None


class Geglu(NamedTuple):
    """`geglu`: the first half of each row times the exact gelu of the second.

    dims: of the tensor.
    """

    function: str
    device: torch.device
    dtype: torch.dtype
    empty: bool
    dims: int
    differentiated: bool


class Loss(NamedTuple):
    """`cross_entropy_loss` of rows of logits.

    precomputed: precomputed_lse is given and used.
    parallel: the classes are spread over a process group.
    needs_grad: the logits have a gradient.
    """

    function: str
    device: torch.device
    dtype: torch.dtype
    rows: int
    empty: bool
    label_smoothing: float
    logit_scale: float
    lse_square_scale: float
    precomputed: bool
    parallel: bool
    inplace_backward: bool
    needs_grad: bool
    compiling: bool = False


Problem = Rotation | Lookup | Norm | Gate | Geglu | Loss


class Turn(NamedTuple):
    """How `apply_rotary` rotates: its arguments behind the tables, and the function to report."""

    seqlen_offsets: int | Tensor = 0
    cu_seqlens: Tensor | None = None
    max_seqlen: int | Tensor | None = None
    interleaved: bool = False
    inplace: bool = False
    conjugate: bool = False
    function: str = "apply_rotary"


class Tables(NamedTuple):
    """cos and sin of a rotation, (seqlen_ro, rotary_dim / 2), and both side by side in one."""

    cos: Tensor
    sin: Tensor
    joined: Tensor
