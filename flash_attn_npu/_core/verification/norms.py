"""One call of a fused norm, compared on a sample of its rows and on a probe of its own.

As no row depends on another one, the gradient is compared at once, on a launch over the rows that
are looked at: torch_npu's autograd differentiates the call itself later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..problems.norms import NormCall
from ..problems.rowwise import Norm
from . import rows
from .judging import Finding, judge, rms

__all__ = ["compare_norm", "detached"]

LEAST_PROBE = 2.0**-12
"""The square root of an eps that float16 can show."""

WHERE = "(row, place) in the sample"


def compare_norm(
    problem: Norm,
    call: NormCall,
    answer: tuple[Tensor, Tensor],
    probe: Callable[[NormCall], tuple[Tensor, Tensor]],
) -> tuple[list[Finding], bool]:
    """What was found, and whether the values tell anything.

    Args:
        answer: the norm and the sum. probe: computes both of another call.
    """
    with rows.quietly():
        picks = rows.some(tuple(call.x.shape[:-1]))
        x = rows.picked(call.x, picks)
        residual = None if call.residual is None else rows.picked(call.residual, picks)
        weight, bias = (None if t is None else t.detach().cpu() for t in (call.weight, call.bias))
        assert weight is not None
        if call.zero_centered_weight:
            weight = weight.double() + 1
        actual = [rows.picked(part, picks) for part in answer]
        found = _judge_norm(call, (x, weight, bias, residual), actual)
        probed = _probe_of(call, x, residual)
    answered = _probed(probed, probe, problem)
    with rows.quietly():
        other = probed.weight.double() + 1 if call.zero_centered_weight else probed.weight
        sample = (probed.x, other, probed.bias, probed.residual)
        found += _judge_norm(call, sample, [part.detach().cpu() for part in answered[0]])
        if problem.needs_grad:
            found += _judge_norm_gradients(probed, sample, answered)
    return found, bool((x != x[:, :1]).any())


def detached(call: NormCall) -> NormCall:
    """The call with tensors of its own graph."""
    x, weight, bias, residual = (
        None if t is None else t.detach().requires_grad_(t.requires_grad) for t in call[:4]
    )
    assert x is not None
    assert weight is not None
    return call._replace(x=x, weight=weight, bias=bias, residual=residual)


_Sample = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""Rows of x, weight, bias, and rows of the residual."""


def _judge_norm(
    call: NormCall,
    sample: _Sample,
    actual: list[Tensor],
) -> list[Finding]:
    exact = rows.norm(sample, call.eps, call.is_rms_norm, torch.float64)
    plain = rows.norm(sample, call.eps, call.is_rms_norm, call.x.dtype)
    units = (rms(sample[1]) + (0.0 if sample[2] is None else rms(sample[2])), rms(exact[1]))
    names = ("the norm", "the sum")
    parts = zip(names, actual, exact, plain, units, strict=True)
    return [judge(*part, WHERE) for part in parts]


def _probe_of(call: NormCall, x: Tensor, residual: Tensor | None) -> NormCall:
    """The rows again, on the host, made to tell: what a call of a new model does not show.

    They are so small that eps counts, if float16 can show its square root, and about 1 otherwise;
    weights are not all 1, nor biases 0.
    """
    size = _size(x, residual)
    if size > 0:
        shrink = (call.eps**0.5 if call.eps >= LEAST_PROBE**2 else 1.0) / size
        x, residual = x * shrink, None if residual is None else residual * shrink
    weight = _varied(call.weight.detach().cpu())
    bias = None if call.bias is None else _varied(call.bias.detach().cpu())
    return call._replace(x=x, weight=weight, bias=bias, residual=residual)


def _size(x: Tensor, residual: Tensor | None) -> float:
    return rms(x if residual is None else x.double() + residual.double())


def _varied(parameter: Tensor) -> Tensor:
    return parameter + rows.waves(parameter) / 2


def _probed(
    call: NormCall, probe: Callable[[NormCall], tuple[Tensor, Tensor]], problem: Norm
) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    """(the norm, the sum) of a probe, and the gradients of x, weight, bias and residual."""
    needs_grad = problem.needs_grad
    with torch.inference_mode(False), torch.set_grad_enabled(needs_grad):
        x, weight, bias, residual = (
            None if t is None else t.to(problem.device).requires_grad_(needs_grad) for t in call[:4]
        )
        assert x is not None
        assert weight is not None
        y, total = probe(call._replace(x=x, weight=weight, bias=bias, residual=residual))
        if not needs_grad:
            return (y, total), []
        leaves = [t for t in (x, weight, bias, residual) if t is not None]
        grads = torch.autograd.grad((y, total), leaves, _douts(_units(call), y, total))
        return (y, total), list(grads)


def _units(call: NormCall) -> tuple[float, float]:
    """The size of the gradients of a probe, on the host: of the norm, and of x.

    Those of x are as many times larger as its rows are small, more than float16 holds.
    """
    weight = call.weight.double() + 1 if call.zero_centered_weight else call.weight
    larger = rms(weight) / max(_size(call.x, call.residual), call.eps**0.5)
    unit = 1 / max(1.0, larger) if call.x.dtype == torch.float16 else 1.0
    return unit, unit * larger


def _douts(units: tuple[float, float], y: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the norm and of the sum, which add alike to that of x."""
    return rows.waves(y) * units[0], rows.waves(total) * units[1]


def _judge_norm_gradients(
    call: NormCall,
    sample: _Sample,
    answered: tuple[tuple[Tensor, Tensor], list[Tensor]],
) -> list[Finding]:
    (y, total), gradients = answered
    units = _units(call)
    douts = [dout.cpu() for dout in _douts(units, y, total)]

    def solved(dtype: torch.dtype) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [None if t is None else t.detach().to(dtype) for t in sample]
            wanted = [t.requires_grad_() for t in leaves if t is not None]
            given: Any = tuple(leaves)
            answer = rows.norm(given, call.eps, call.is_rms_norm, dtype)
            weights = [d.to(a.dtype) for d, a in zip(douts, answer, strict=True)]
            return torch.autograd.grad(answer, wanted, weights)

    exact, plain = solved(torch.float64), solved(call.x.dtype)
    of_each = {"dx": units[1], "dweight": units[0], "dbias": units[0], "dresidual": units[1]}
    names = [name for name, t in zip(of_each, sample, strict=True) if t is not None]
    parts = zip(names, gradients, exact, plain, strict=True)
    return [judge(name, a.cpu(), e, p, of_each[name], WHERE) for name, a, e, p in parts]
