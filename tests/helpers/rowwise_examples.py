"""For each row of the row-wise table one call of a public function that has the property."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flash_attn_npu._core.table.rowwise import MAX_LOSS_ROWS, MAX_ROTARY_DIM, MAX_ROTARY_HEADS
from flash_attn_npu.layers.rotary import apply_rotary_emb
from flash_attn_npu.ops.activations import swiglu, swiglu_bwd, swiglu_fwd
from flash_attn_npu.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn_npu.ops.triton.layer_norm import layer_norm_fn, layer_norm_linear_fn
from tests.helpers.old_torch import TORCH

__all__ = ["EXAMPLES"]

Example = Callable[[torch.device], Any]
HALF = torch.bfloat16


def tensor(
    device: torch.device, *shape: int, dtype: torch.dtype = HALF, grad: bool = False
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    drawn = torch.randn(shape, generator=generator)
    return drawn.to(device, dtype).requires_grad_(grad)


def rotated(
    shape: tuple[int, ...] = (2, 3, 4, 64), dtype: torch.dtype = HALF, tables: torch.dtype = HALF
) -> Example:
    def run(device: torch.device) -> Any:
        cos = tensor(device, shape[1], shape[-1] // 2, dtype=tables)
        return apply_rotary_emb(tensor(device, *shape, dtype=dtype), cos, cos.clone())

    return run


def normed(
    *,
    rms: bool = True,
    bias: bool = False,
    residual: bool = True,
    dtype: torch.dtype = HALF,
    weight_dtype: torch.dtype | None = None,
    grad: bool = False,
    more: Callable[[torch.Tensor], dict[str, Any]] = lambda x: {},
) -> Example:
    """more: other arguments for a call with this x of (2, 3, 64)."""

    def run(device: torch.device) -> Any:
        x = tensor(device, 2, 3, 64, dtype=dtype, grad=grad)
        weight = tensor(device, 64, dtype=weight_dtype or dtype)
        given = {"residual": x.detach().clone()} if residual else {}
        return layer_norm_fn(
            x, weight, weight.clone() if bias else None, is_rms_norm=rms, **given, **more(x)
        )

    return run


def linear(device: torch.device) -> Any:
    x = tensor(device, 2, 3, 64)
    weight = tensor(device, 64)
    return layer_norm_linear_fn(x, weight, None, tensor(device, 64, 64), None, is_rms_norm=True)


def gated(width: int = 32, second: torch.dtype = HALF) -> Example:
    def run(device: torch.device) -> Any:
        return swiglu(tensor(device, 5, width), tensor(device, 5, width, dtype=second))

    return run


def gate_differentiated(device: torch.device) -> Any:
    return swiglu_fwd(tensor(device, 5, 32, grad=True), tensor(device, 5, 32))


def gate_gradient(device: torch.device) -> Any:
    x = tensor(device, 5, 32)
    return swiglu_bwd(x, x.clone(), tensor(device, 5, 32, dtype=torch.float32))


def lost(
    *, rows: int = 4, dtype: torch.dtype = torch.float32, grad: bool = False, **options: Any
) -> Example:
    def run(device: torch.device) -> Any:
        logits = tensor(device, rows, 8, dtype=dtype, grad=grad)
        labels = torch.arange(rows, device=device) % 8
        given = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in options.items()
        }
        return cross_entropy_loss(logits, labels, **given)

    return run


def lost_in_parallel(device: torch.device) -> Any:
    """In a group of this process alone."""
    if device.type == "npu" and TORCH < (2, 8):
        pytest.skip("before 2.8 gloo takes no tensors of a card")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return lost(process_group=dist.group.WORLD)(device)
    finally:
        dist.destroy_process_group()


EXAMPLES: dict[str, Example] = {
    "no element": rotated(shape=(0, 3, 4, 64)),
    "float64": rotated(dtype=torch.float64, tables=torch.float64),
    f"rotary_dim of {MAX_ROTARY_DIM} and above": rotated(shape=(1, 2, 1, MAX_ROTARY_DIM)),
    f"{MAX_ROTARY_HEADS} heads and more": rotated(shape=(1, 2, MAX_ROTARY_HEADS, 2)),
    "no residual": normed(residual=False),
    "norm of mixed dtypes": normed(weight_dtype=torch.float32),
    "layer norm of mixed dtypes, but for a float32 residual without gradient": normed(
        rms=False, bias=True, weight_dtype=torch.float32
    ),
    "layer norm without bias": normed(rms=False),
    "RMS norm with bias": normed(bias=True),
    "norm with x1": normed(more=lambda x: {"x1": x.clone()}),
    "norm with weight1": normed(more=lambda x: {"weight1": x[0, 0].clone()}),
    "norm with rowscale or layerscale": normed(more=lambda x: {"rowscale": x[..., 0].clone()}),
    "norm with dropout_p": normed(more=lambda x: {"dropout_p": 0.5}),
    "norm in layer_norm_linear_fn, of a subset of rows, or by an autograd class": linear,
    "float16": normed(dtype=torch.float16),
    "norm with out or residual_out": normed(more=lambda x: {"out": torch.empty_like(x)}),
    "swiglu of unequal dtypes": gated(second=torch.float32),
    "swiglu_fwd that is differentiated itself": gate_differentiated,
    "gradient of swiglu in another dtype": gate_gradient,
    "swiglu of rows of no multiple of 64 bytes": gated(width=33),
    "cross entropy of float16 and bfloat16": lost(dtype=HALF),
    f"cross entropy of more than {MAX_LOSS_ROWS} rows": lost(rows=MAX_LOSS_ROWS + 1),
    "label_smoothing with gradient": lost(label_smoothing=0.1, grad=True),
    "label_smoothing outside [0, 1)": lost(label_smoothing=1.0),
    "logit_scale": lost(logit_scale=0.5),
    "lse_square_scale": lost(lse_square_scale=1e-4),
    "precomputed_lse": lost(precomputed_lse=torch.ones(4)),
    "cross entropy over a process group": lost_in_parallel,
    "inplace_backward": lost(inplace_backward=True, grad=True),
    # what the table serves, with each operator
    "rotation": rotated(),
    "rotation of float32 tables": rotated(tables=torch.float32),
    "sum and RMS norm": normed(),
    "RMS norm with gradient": normed(residual=False, grad=True),
    "sum and layer norm, with gradient": normed(rms=False, bias=True, grad=True),
    "layer norm": normed(rms=False, bias=True, residual=False),
    "swiglu": gated(),
    "cross entropy": lost(),
    "label_smoothing": lost(label_smoothing=0.1),
}
