"""THE OTHER TABLE: what each fused operator besides attention refuses, and why.

Limits are those of torch_npu's operator documentation and of CANN's own checks. What no row names
is served. Plain torch operations serve everything, so they have no column. The candidates, first
choice first, stand at the end.
"""

from __future__ import annotations

import torch

from ..ground.chip import soc_name
from ..ground.schemas import untraceable
from ..ground.settings import consistent
from ..kernels.ascend import lookup
from ..kernels.ascend import rowwise as fused
from ..kernels.composed import gates, rotation
from ..kernels.kernel import Kernel
from ..problems.rowwise import (
    ADD_LAYER_NORM,
    ADD_RMS_NORM,
    CROSS_ENTROPY,
    GEGLU,
    LAYER_NORM,
    MROPE,
    RMS_NORM,
    ROTARY_MUL,
    SWIGLU,
    TORCH,
    Gate,
    Geglu,
    Lookup,
    Norm,
    Problem,
    Rotation,
)
from ..verification.checks import ROWWISE as CHECK
from . import installed
from .rule import Candidate, Rule, Table

__all__ = ["ALL", "TABLE", "TORCH", "WHOLE"]

RMS_NORMS = (ADD_RMS_NORM, RMS_NORM)
LAYER_NORMS = (ADD_LAYER_NORM, LAYER_NORM)
NORMS = RMS_NORMS + LAYER_NORMS
ALL = (ROTARY_MUL, MROPE, *NORMS, SWIGLU, GEGLU, CROSS_ENTROPY)
ADDING = (ADD_RMS_NORM, ADD_LAYER_NORM)

MAX_ROTARY_DIM = 896
MAX_ROTARY_HEADS = 1000
JIT_ROTARY_DIM = 128
CONSISTENT = "what decoding alone does in one launch, under FLASH_ATTN_NPU_CONSISTENT=1"
LOOKED_UP = "rotation at positions in a tensor"
MROPE_UNIT = 64
MAX_MROPE_WIDTH = 4096
MAX_LOSS_ROWS = 200_000
SWIGLU_UNIT = 64
MAX_GEGLU_DIMS = 8


def _mixed(norm: Norm) -> bool:
    given = (norm.weight_dtype, norm.bias_dtype, norm.residual_dtype, norm.out_dtype)
    half = norm.dtype in (torch.float16, torch.bfloat16)
    return (half and norm.zero_centered) or any(d not in (None, norm.dtype) for d in given)


def _mixed_layer(norm: Norm) -> bool:
    """Whether npu_add_layer_norm has no kernel for it: aclnnAddLayerNorm's document lists them."""
    sums_up_in_float32 = norm.residual_dtype == torch.float32 and not norm.needs_grad
    return _mixed(norm) and not sums_up_in_float32


def _in_float64(problem: Problem) -> bool:
    dtypes: set[torch.dtype | None] = {problem.dtype}
    if isinstance(problem, Rotation):
        dtypes |= {problem.table_dtype}
    if isinstance(problem, Norm):
        dtypes |= {problem.residual_dtype, problem.out_dtype}
    return torch.float64 in dtypes


TABLE: tuple[Rule, ...] = (
    installed.on_ascend(ALL),
    installed.on_large_chips(ALL, "the chip does not have it, or not for every dtype"),
    installed.supported(ALL),
    *installed.rows(installed.ROWWISE),
    Rule("no element", lambda p: p.empty, dict.fromkeys(ALL, "there is nothing to compute")),
    Rule("float64", _in_float64, dict.fromkeys(ALL, "it takes float16, bfloat16 and float32")),
    Rule(
        f"rotary_dim of {MAX_ROTARY_DIM} and above",
        lambda p: p.rotary_dim >= MAX_ROTARY_DIM,
        dict.fromkeys((ROTARY_MUL,), f"it takes a rotary_dim below {MAX_ROTARY_DIM}"),
    ),
    Rule(
        f"{MAX_ROTARY_HEADS} heads and more",
        lambda p: p.nheads >= MAX_ROTARY_HEADS,
        dict.fromkeys((ROTARY_MUL,), f"it takes fewer than {MAX_ROTARY_HEADS} heads"),
    ),
    Rule(
        f"jit_compile=True, rotation by pairs or of a rotary_dim other than {JIT_ROTARY_DIM}",
        lambda p: p.just_in_time and (p.interleaved or p.rotary_dim != JIT_ROTARY_DIM),
        dict.fromkeys(
            (ROTARY_MUL,),
            "under torch.npu.set_compile_mode(jit_compile=True) it takes halves of a rotary_dim of "
            f"{JIT_ROTARY_DIM} only",
        ),
    ),
    Rule(
        f"{LOOKED_UP}, by tables of another dtype",
        lambda p: p.table_dtype != p.dtype,
        {MROPE: "it takes one dtype"},
    ),
    Rule(
        f"{LOOKED_UP}, of a part of each head",
        lambda p: p.rotary_dim != p.headdim,
        # ops-transformer 984d8a72: a barrier was missing between queries and keys
        {MROPE: "of a part of each head its kernel mixes queries and keys up in older CANN"},
    ),
    Rule(
        f"{LOOKED_UP}, a headdim of no multiple of {MROPE_UNIT} bytes",
        lambda p: p.headdim * p.dtype.itemsize % MROPE_UNIT != 0,
        {MROPE: f"it takes heads of a multiple of {MROPE_UNIT} bytes"},
    ),
    Rule(
        f"{LOOKED_UP}, nheads * headdim above {MAX_MROPE_WIDTH}",
        lambda p: p.nheads * p.headdim > MAX_MROPE_WIDTH,
        # as sglang says in its rotary_embedding.py: a core holds all heads of a token
        {MROPE: f"older CANN takes {MAX_MROPE_WIDTH} numbers of a token at most"},
    ),
    Rule(
        f"{LOOKED_UP}, with gradient",
        lambda p: p.differentiated,
        {MROPE: "it has no gradient"},
    ),
    Rule(
        f"{LOOKED_UP}, Ascend 950",
        lambda p: soc_name(p.device).startswith("Ascend950"),
        {MROPE: "documents of CANN differ in whether the chip has it"},
    ),
    Rule(
        CONSISTENT,
        lambda p: consistent(),
        dict.fromkeys((MROPE, GEGLU), "training is served otherwise, with other last bits"),
    ),
    Rule(
        "no residual",
        lambda p: p.residual_dtype is None,
        dict.fromkeys(ADDING, "it adds a residual"),
    ),
    Rule("norm of mixed dtypes", _mixed, {ADD_RMS_NORM: "it takes and returns one dtype"}),
    Rule(
        "layer norm of mixed dtypes, but for a float32 residual without gradient",
        _mixed_layer,
        {ADD_LAYER_NORM: "it takes one dtype, but a float32 residual where no gradient is needed"},
    ),
    Rule(
        "RMS norm with gradient under torch.compile",
        lambda p: p.needs_grad and p.compiling,
        dict.fromkeys((ADD_RMS_NORM,), "it has no gradient of its own to trace"),
    ),
    Rule(
        "layer norm without bias",
        lambda p: p.bias_dtype is None,
        dict.fromkeys((ADD_LAYER_NORM,), "it takes a bias always"),
    ),
    Rule(
        "torch.compile",
        lambda p: p.compiling,
        dict.fromkeys((ADD_LAYER_NORM,), "its backward cannot be traced"),
    ),
    Rule(
        "RMS norm with bias",
        lambda p: p.bias_dtype is not None,
        dict.fromkeys(RMS_NORMS, "it takes no bias"),
    ),
    Rule(
        "norm with x1",
        lambda p: p.branches > 1,
        dict.fromkeys(NORMS, "it adds two tensors at most, no x1"),
    ),
    Rule(
        "norm with weight1",
        lambda p: p.outputs > 1,
        dict.fromkeys(NORMS, "it applies one weight, no weight1"),
    ),
    Rule(
        "norm with rowscale or layerscale",
        lambda p: p.scaled,
        dict.fromkeys(NORMS, "it has no rowscale and layerscale"),
    ),
    Rule("norm with dropout_p", lambda p: p.dropout, dict.fromkeys(NORMS, "it has no dropout_p")),
    Rule(
        "norm in layer_norm_linear_fn, of a subset of rows, or by an autograd class",
        lambda p: p.within,
        dict.fromkeys(NORMS, "the function around it has a backward of its own"),
    ),
    Rule(
        "float16",
        lambda p: p.dtype == torch.float16 and p.residual_dtype != torch.float32,
        dict.fromkeys(ADDING, "a sum above 65504 would be lost before the norm"),
    ),
    Rule(
        "norm with out or residual_out",
        lambda p: p.buffers,
        dict.fromkeys(NORMS, "it takes no out and no residual_out"),
    ),
    Rule(
        "swiglu of unequal dtypes",
        lambda p: p.mixed,
        dict.fromkeys((SWIGLU,), "it takes one dtype"),
    ),
    Rule(
        "swiglu_fwd that is differentiated itself",
        lambda p: p.differentiated,
        dict.fromkeys((SWIGLU,), "its gradient would have none of its own"),
    ),
    Rule(
        "gradient of swiglu in another dtype",
        lambda p: p.grad_dtype not in (None, p.dtype),
        dict.fromkeys((SWIGLU,), "its backward takes a gradient in the dtype of x only"),
    ),
    Rule(
        f"swiglu of rows of no multiple of {SWIGLU_UNIT} bytes",
        lambda p: p.row_bytes % SWIGLU_UNIT != 0,
        dict.fromkeys((SWIGLU,), f"it takes rows of a multiple of {SWIGLU_UNIT} bytes"),
    ),
    Rule(
        "exact geglu with gradient",
        lambda p: p.differentiated,
        {GEGLU: "its gradient has none of its own"},
    ),
    Rule(
        f"exact geglu of more than {MAX_GEGLU_DIMS} dimensions",
        lambda p: p.dims > MAX_GEGLU_DIMS,
        {GEGLU: f"it takes {MAX_GEGLU_DIMS} dimensions at most"},
    ),
    Rule(
        "cross entropy of float16 and bfloat16",
        lambda p: p.dtype in (torch.float16, torch.bfloat16),
        dict.fromkeys((CROSS_ENTROPY,), "it rounds the loss to the dtype of the logits"),
    ),
    Rule(
        f"cross entropy of more than {MAX_LOSS_ROWS} rows",
        lambda p: p.rows > MAX_LOSS_ROWS,
        dict.fromkeys((CROSS_ENTROPY,), f"it takes at most {MAX_LOSS_ROWS} rows"),
    ),
    Rule(
        "label_smoothing with gradient",
        lambda p: p.label_smoothing != 0 and p.needs_grad,
        dict.fromkeys((CROSS_ENTROPY,), "with a gradient it takes no label_smoothing"),
    ),
    Rule(
        "label_smoothing outside [0, 1)",
        lambda p: not 0 <= p.label_smoothing < 1,
        dict.fromkeys((CROSS_ENTROPY,), "it takes a label_smoothing from 0 to below 1"),
    ),
    Rule(
        "logit_scale",
        lambda p: p.logit_scale != 1,
        dict.fromkeys((CROSS_ENTROPY,), "it has no logit_scale"),
    ),
    Rule(
        "lse_square_scale",
        lambda p: p.lse_square_scale != 0,
        dict.fromkeys((CROSS_ENTROPY,), "its lse_square_scale is documented as not supported"),
    ),
    Rule(
        "precomputed_lse",
        lambda p: p.precomputed,
        dict.fromkeys((CROSS_ENTROPY,), "it takes no precomputed_lse"),
    ),
    Rule(
        "cross entropy under torch.compile, a torch_npu without a fake operator for it",
        lambda p: p.compiling and untraceable(p.device, CROSS_ENTROPY),
        dict.fromkeys((CROSS_ENTROPY,), "the installed torch_npu cannot trace it"),
    ),
    Rule(
        "cross entropy over a process group",
        lambda p: p.parallel,
        dict.fromkeys((CROSS_ENTROPY,), "it takes no process_group"),
    ),
    Rule(
        "inplace_backward",
        lambda p: p.inplace_backward,
        dict.fromkeys(
            (CROSS_ENTROPY,), "inplace_backward would gain nothing: it keeps as much as the logits"
        ),
    ),
)


ROTATIONS = (
    Candidate(ROTARY_MUL, fused.ROTATION, check=CHECK),
    Candidate(TORCH, rotation.KERNEL),
)
LOOKUPS = (
    Candidate(MROPE, lookup.LOOKUP, shortcut=True, check=CHECK),
    Candidate(TORCH, rotation.LOOKUP),
)
GATES = (Candidate(SWIGLU, fused.GATE, check=CHECK), Candidate(TORCH, gates.KERNEL))
GEGLUS = (
    Candidate(GEGLU, fused.GEGLU, shortcut=True, check=CHECK),
    Candidate(TORCH, gates.GEGLU),
)
LOSSES = (Candidate(CROSS_ENTROPY, fused.LOSS, check=CHECK), Candidate(TORCH, Kernel()))
RMS = (
    Candidate(ADD_RMS_NORM, fused.norm(ADD_RMS_NORM), shortcut=True, check=CHECK),
    Candidate(RMS_NORM, fused.norm(RMS_NORM), check=CHECK),
    Candidate(TORCH, Kernel()),
)
LAYER = (
    Candidate(ADD_LAYER_NORM, fused.norm(ADD_LAYER_NORM), shortcut=True, check=CHECK),
    Candidate(LAYER_NORM, fused.norm(LAYER_NORM), check=CHECK),
    Candidate(TORCH, Kernel()),
)


def _candidates(problem: Problem) -> tuple[Candidate, ...]:
    if isinstance(problem, Norm):
        return RMS if problem.rms else LAYER
    if isinstance(problem, Rotation):
        return ROTATIONS
    if isinstance(problem, Lookup):
        return LOOKUPS
    if isinstance(problem, Geglu):
        return GEGLUS
    return GATES if isinstance(problem, Gate) else LOSSES


WHOLE = Table(TABLE, _candidates)
