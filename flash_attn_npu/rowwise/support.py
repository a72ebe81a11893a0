"""THE OTHER TABLE: what each fused operator besides attention refuses, and why.

Limits are those of torch_npu's operator documentation and of CANN's own checks. What no row names
is served. Plain torch operations serve everything, so they have no column.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.soc import soc_name
from .problem import Gate, Norm, Problem, Rotation

__all__ = ["TABLE", "TORCH", "Rule", "candidates", "refusals"]

ROTARY_MUL = "npu_rotary_mul"
ADD_RMS_NORM = "npu_add_rms_norm"
RMS_NORM = "npu_rms_norm"
ADD_LAYER_NORM = "npu_add_layer_norm"
LAYER_NORM = "layer_norm"
SWIGLU = "npu_swiglu"
CROSS_ENTROPY = "npu_cross_entropy_loss"
TORCH = "torch"

RMS_NORMS = (ADD_RMS_NORM, RMS_NORM)
LAYER_NORMS = (ADD_LAYER_NORM, LAYER_NORM)
NORMS = RMS_NORMS + LAYER_NORMS
ALL = (ROTARY_MUL, *NORMS, SWIGLU, CROSS_ENTROPY)
ADDING = (ADD_RMS_NORM, ADD_LAYER_NORM)

MAX_ROTARY_DIM = 896
MAX_ROTARY_HEADS = 1000
MAX_LOSS_ROWS = 200_000
SWIGLU_UNIT = 64


@dataclass(frozen=True)
class Rule:
    """Something that a problem may have, and why these operators then do not serve it."""

    operators: tuple[str, ...]
    name: str
    present: Callable[[Any], bool]
    refusal: str


def _mixed(norm: Norm) -> bool:
    given = (norm.weight_dtype, norm.bias_dtype, norm.residual_dtype, norm.out_dtype)
    half = norm.dtype in (torch.float16, torch.bfloat16)
    return (half and norm.zero_centered) or any(d not in (None, norm.dtype) for d in given)


def _in_float64(problem: Problem) -> bool:
    dtypes: set[torch.dtype | None] = {problem.dtype}
    if isinstance(problem, Norm):
        dtypes |= {problem.residual_dtype, problem.out_dtype}
    return torch.float64 in dtypes


TABLE: tuple[Rule, ...] = (
    Rule(
        ALL,
        "tensors outside an Ascend NPU",
        lambda p: p.device.type != "npu",
        "it runs on Ascend NPUs only",
    ),
    Rule(
        ALL,
        "Ascend 310P and 200I",
        lambda p: soc_name(p.device).startswith(("Ascend310", "Ascend200")),
        "the chip does not have it, or not for every dtype",
    ),
    Rule(ALL, "no element", lambda p: p.empty, "there is nothing to compute"),
    Rule(
        ALL,
        "float64",
        _in_float64,
        "it takes float16, bfloat16 and float32",
    ),
    Rule(
        (ROTARY_MUL,),
        "cos and sin of another dtype than x",
        lambda p: p.table_dtype != p.dtype,
        "it rounds cos and sin to the dtype of x",
    ),
    Rule(
        (ROTARY_MUL,),
        f"rotary_dim of {MAX_ROTARY_DIM} and above",
        lambda p: p.rotary_dim >= MAX_ROTARY_DIM,
        f"it takes a rotary_dim below {MAX_ROTARY_DIM}",
    ),
    Rule(
        (ROTARY_MUL,),
        f"{MAX_ROTARY_HEADS} heads and more",
        lambda p: p.nheads >= MAX_ROTARY_HEADS,
        f"it takes fewer than {MAX_ROTARY_HEADS} heads",
    ),
    Rule(ADDING, "no residual", lambda p: p.residual_dtype is None, "it adds a residual"),
    Rule(
        ADDING,
        "norm of mixed dtypes",
        _mixed,
        "it takes and returns one dtype",
    ),
    Rule(
        (ADD_RMS_NORM,),
        "RMS norm with gradient",
        lambda p: p.needs_grad,
        "it has no backward",
    ),
    Rule(
        (ADD_LAYER_NORM,),
        "layer norm without bias",
        lambda p: p.bias_dtype is None,
        "it takes a bias always",
    ),
    Rule(
        (ADD_LAYER_NORM,),
        "torch.compile",
        lambda p: p.compiling,
        "its backward cannot be traced",
    ),
    Rule(
        RMS_NORMS,
        "RMS norm with bias",
        lambda p: p.bias_dtype is not None,
        "it takes no bias",
    ),
    Rule(NORMS, "norm with x1", lambda p: p.branches > 1, "it adds two tensors at most, no x1"),
    Rule(NORMS, "norm with weight1", lambda p: p.outputs > 1, "it applies one weight, no weight1"),
    Rule(
        NORMS,
        "norm with rowscale or layerscale",
        lambda p: p.scaled,
        "it has no rowscale and layerscale",
    ),
    Rule(NORMS, "norm with dropout_p", lambda p: p.dropout, "it has no dropout_p"),
    Rule(
        NORMS,
        "norm in layer_norm_linear_fn, of a subset of rows, or by an autograd class",
        lambda p: p.within,
        "the function around it has a backward of its own",
    ),
    Rule(
        ADDING,
        "float16",
        lambda p: p.dtype == torch.float16,
        "a sum above 65504 would be lost before the norm",
    ),
    Rule(
        NORMS,
        "norm with out or residual_out",
        lambda p: p.buffers,
        "it takes no out and no residual_out",
    ),
    Rule(
        (SWIGLU,),
        "swiglu of other than halves of one tensor",
        lambda p: not p.halves,
        "it takes the two halves of one tensor, the gate first",
    ),
    Rule(
        (SWIGLU,),
        "swiglu under torch.compile",
        lambda p: p.compiling,
        "where the halves lie is not known while tracing",
    ),
    Rule(
        (SWIGLU,),
        f"swiglu of rows of no multiple of {SWIGLU_UNIT} bytes",
        lambda p: p.row_bytes % SWIGLU_UNIT != 0,
        f"it takes rows of a multiple of {SWIGLU_UNIT} bytes",
    ),
    Rule(
        (CROSS_ENTROPY,),
        "cross entropy of float16 and bfloat16",
        lambda p: p.dtype in (torch.float16, torch.bfloat16),
        "it rounds the loss to the dtype of the logits",
    ),
    Rule(
        (CROSS_ENTROPY,),
        f"cross entropy of more than {MAX_LOSS_ROWS} rows",
        lambda p: p.rows > MAX_LOSS_ROWS,
        f"it takes at most {MAX_LOSS_ROWS} rows",
    ),
    Rule(
        (CROSS_ENTROPY,),
        "label_smoothing",
        lambda p: p.label_smoothing != 0,
        "it takes no label_smoothing without a reduction",
    ),
    Rule((CROSS_ENTROPY,), "logit_scale", lambda p: p.logit_scale != 1, "it has no logit_scale"),
    Rule(
        (CROSS_ENTROPY,),
        "lse_square_scale",
        lambda p: p.lse_square_scale != 0,
        "its lse_square_scale is documented as not supported",
    ),
    Rule(
        (CROSS_ENTROPY,),
        "precomputed_lse",
        lambda p: p.precomputed,
        "it takes no precomputed_lse",
    ),
    Rule(
        (CROSS_ENTROPY,),
        "cross entropy over a process group",
        lambda p: p.parallel,
        "it takes no process_group",
    ),
    Rule(
        (CROSS_ENTROPY,),
        "inplace_backward",
        lambda p: p.inplace_backward,
        "inplace_backward would gain nothing: it keeps as much as the logits",
    ),
)


def candidates(problem: Problem) -> tuple[str, ...]:
    """The operators that are asked for a problem, the fastest first, the most general last."""
    if isinstance(problem, Norm):
        return RMS_NORMS if problem.rms else LAYER_NORMS
    if isinstance(problem, Rotation):
        return (ROTARY_MUL,)
    return (SWIGLU,) if isinstance(problem, Gate) else (CROSS_ENTROPY,)


def refusals(operator: str, problem: Problem) -> tuple[str, ...]:
    """Why `operator` may not serve `problem`; empty if it may."""
    return tuple(
        rule.refusal for rule in TABLE if operator in rule.operators and rule.present(problem)
    )
