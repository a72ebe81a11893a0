"""A call of a kernel that a graph is going to hold, made up while it is traced, and compared then.

What runs in a graph runs unseen. So before an operator is traced, the same kind of call is served
once outside of the graph, with values that show a mistake.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ground.settings import verification
from ..kernels.kernel import Kernel
from ..problems.norms import NormCall
from ..problems.rowwise import Loss, Norm, Rotation
from . import rows
from .kinds import Case, Check, Refuted, missed, refuted, unsettled

__all__ = ["PROBLEMS", "found_wrong"]

TOKENS, HEADS, HIDDEN, CLASSES = 37, 3, 256, 96

PROBLEMS: dict[str, Callable[..., Any]] = {kind.__name__: kind for kind in (Rotation, Norm, Loss)}
"""What is compared here, by its name. Attention, in a graph too, is compared as it is called."""


def found_wrong(check: Check, case: Case, kernel: Kernel) -> tuple[str, ...]:
    """Why a graph must not hold this kernel for a problem of `PROBLEMS`; empty if it may."""
    # under a mode of torch there are no values
    seen = torch._C._len_torch_dispatch_stack() == 0 and verification() != "off"
    if not seen or missed(case.name):
        return missed(case.name)
    device = case.problem.device
    if any(unsettled(kind, device) for kind in check.kinds(case)):
        watched, _ = check.over(case, kernel)
        # one that cannot be made tells nothing: of memory, or of the machine
        with contextlib.suppress(RuntimeError), torch.inference_mode(False), torch.enable_grad():
            try:
                _served(watched, case.problem)
            except Refuted as found:
                found.answer(lambda: None)
    # the first of a kind that raised may be said of that kind alone
    if verification() in ("compose", "always"):
        for kind in check.kinds(case):
            why = refuted(kind, case.problem.function)
            if why:
                return why
    return missed(case.name)


def _served(kernel: Kernel, problem: Any) -> None:
    assert kernel.direct is not None
    _CALLS[type(problem)](kernel.direct(problem), problem)


def _rotated(run: Callable[..., Any], problem: Rotation) -> None:
    heads = (1,) * (problem.head_dims - 1) + (HEADS,)
    x = _values(problem, problem.dtype, 2, TOKENS, *heads, problem.rotary_dim)
    table = (2, TOKENS, *(1 for _ in heads), problem.rotary_dim // 2)
    cos = _values(problem, problem.table_dtype, *table)
    with torch.no_grad():
        run(x, cos, cos.flip(1))


def _normed(run: Callable[..., Any], problem: Norm) -> None:
    def given(dtype: torch.dtype | None, *shape: int) -> Tensor | None:
        return None if dtype is None else _values(problem, dtype, *shape)

    x = _values(problem, problem.dtype, TOKENS, HIDDEN)
    weight = _values(problem, problem.weight_dtype, HIDDEN)
    call = NormCall(
        x.requires_grad_(problem.needs_grad),
        weight.requires_grad_(problem.needs_grad),
        given(problem.bias_dtype, HIDDEN),
        given(problem.residual_dtype, TOKENS, HIDDEN),
        is_rms_norm=problem.rms,
        zero_centered_weight=problem.zero_centered,
    )
    run(call, problem.residual_dtype or problem.dtype, problem.out_dtype)


def _lost(run: Callable[..., Any], problem: Loss) -> None:
    logits = _values(problem, problem.dtype, TOKENS, CLASSES)
    labels = torch.arange(TOKENS, device="cpu").mul(5).remainder(CLASSES).to(problem.device)
    run(logits.requires_grad_(problem.needs_grad), labels, -100)


def _values(problem: Any, dtype: torch.dtype, *shape: int) -> Tensor:
    like = torch.empty(shape, dtype=torch.float32, device="cpu")
    return rows.waves(like).to(problem.device, dtype)


_CALLS: dict[type, Callable[..., None]] = {Rotation: _rotated, Norm: _normed, Loss: _lost}
