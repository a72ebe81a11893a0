"""Fused rotations, norms, gates and losses whose first calls are compared before they are believed.

As no row depends on another one, a gradient is compared at once, on a launch of its own over the
rows that are looked at: norms and losses are differentiated by torch_npu's autograd later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..kernels.kernel import Kernel
from ..problems.norms import NormCall
from ..problems.rowwise import Gate, Loss, Norm, Rotation
from . import rows
from .judging import Finding, judge, rms
from .kinds import MISSED, Case, Check, Kind, Refuted, busy, conclude, refuted, unsettled

__all__ = ["CHECK"]

LEAST_PROBE = 2.0**-12
"""The square root of an eps that float16 can show."""


def _watched(case: Case, kernel: Kernel) -> tuple[Kernel, tuple[str, ...]]:
    """The kernel, compared where it has to be, and why it may not serve after all."""
    problem, kind = case.problem, _kind(case)
    if refuted(kind, problem.function):
        return kernel, (MISSED,)
    if not unsettled(kind, problem.device):
        return kernel, ()
    watch = _WATCHES[type(problem)](case, kernel, kind)
    return kernel._replace(**{name: getattr(watch, name) for name in watch.wraps}), ()


def _kind(case: Case) -> Kind:
    problem = case.problem
    part = "gradient" if getattr(problem, "grad_dtype", None) is not None else "forward"
    if getattr(problem, "needs_grad", False):
        part = "forward and gradient"
    told = {name: value for name, value in problem._asdict().items() if name in _TOLD}
    if getattr(problem, "label_smoothing", 0):
        told["label_smoothing"] = True
    words = (
        f"{name} {_word(value)}".strip()
        for name, value in told.items()
        if value not in (None, False)
    )
    dtype = _word(problem.dtype)
    return Kind(case.name, part, dtype, getattr(problem, "rotary_dim", 0), case.rows, tuple(words))


_TOLD = (
    "table_dtype",
    "interleaved",
    "out_dtype",
    "weight_dtype",
    "bias_dtype",
    "residual_dtype",
    "rms",
    "zero_centered",
    "grad_dtype",
    "halves",
)
"""The fields of a problem that a kernel depends on, and the table does not name."""


def _word(value: object) -> str:
    return "" if value is True else str(value).removeprefix("torch.")


class _Watch:
    """What all four have in common."""

    wraps: tuple[str, ...] = ()

    def __init__(self, case: Case, kernel: Kernel, kind: Kind) -> None:
        self.case, self.kernel, self.kind = case, kernel, kind

    def idle(self, tensor: Tensor) -> bool:
        return busy(tensor) or not unsettled(self.kind, self.case.problem.device)

    def agrees(self, found: list[Finding], telling: bool) -> bool:
        wrong = any(not finding.agrees for finding in found)
        told = found if telling or wrong else []
        agrees = conclude(self.kind, self.case.problem.function, self.case.problem.device, told)
        self.case.forget()
        return agrees


class _Rotation(_Watch):
    wraps = ("forward", "direct")

    def forward(self, problem: Rotation, x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
        if self.idle(x):
            self.kernel.forward(problem, x, cos, sin, out)
            return
        before = x.clone() if out is x else x
        sample = _Turn(problem, x, cos, sin)
        self.kernel.forward(problem, x, cos, sin, out)
        with _quietly():
            found = sample.judged(out)
        if not self.agrees(found, sample.tells):
            if out is x:
                x.copy_(before)
            self.case.instead().forward(problem, x, cos, sin, out)

    def direct(self, problem: Rotation) -> Callable[..., Tensor]:
        assert self.kernel.direct is not None
        run = self.kernel.direct(problem)

        def observed(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            turned: Tensor = run(x, cos, sin)
            if self.idle(x):
                return turned
            sample = _Turn(problem, x, cos, sin)
            with _quietly():
                found = sample.judged(turned)
            if self.agrees(found, sample.tells):
                return turned
            out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            self.case.instead().forward(problem, x, cos, sin, out)
            return out

        return observed


class _Turn:
    """A sample of a rotation, read before it may be done in place."""

    def __init__(self, problem: Rotation, x: Tensor, cos: Tensor, sin: Tensor) -> None:
        with _quietly():
            self.problem, self.picks = problem, rows.some(tuple(x.shape[:-1]))
            lead = (*x.shape[:-1], cos.shape[-1])
            self.x = rows.picked(x[..., : problem.rotary_dim], self.picks)
            self.cos, self.sin = (rows.picked(t.expand(lead), self.picks) for t in (cos, sin))
            self.tells = bool((self.sin != 0).any()) and bool((self.x != 0).any())

    def judged(self, turned: Tensor) -> list[Finding]:
        actual = rows.picked(turned[..., : self.problem.rotary_dim], self.picks)
        given = (self.x, self.cos, self.sin, self.problem.interleaved)
        exact, plain = (rows.rotated(*given, d) for d in (torch.float64, actual.dtype))
        return [judge("the rotation", actual, exact, plain, rms(self.x), WHERE)]


WHERE = "(row, place) in the sample"


class _Norm(_Watch):
    wraps = ("direct",)

    def direct(self, problem: Norm) -> Callable[..., tuple[Tensor, Tensor]]:
        assert self.kernel.direct is not None
        run = self.kernel.direct(problem)

        def observed(
            call: NormCall, total_dtype: torch.dtype, out_dtype: torch.dtype
        ) -> tuple[Tensor, Tensor]:
            y, total = run(call, total_dtype, out_dtype)
            if self.idle(call.x):
                return y, total

            def probe(other: NormCall) -> tuple[Tensor, Tensor]:
                again: tuple[Tensor, Tensor] = run(other, total_dtype, out_dtype)
                return again

            found, telling = _compare_norm(problem, call, (y, total), probe)
            if not self.agrees(found, telling):
                raise Refuted
            return y, total

        return observed


def _compare_norm(
    problem: Norm,
    call: NormCall,
    answer: tuple[Tensor, Tensor],
    probe: Callable[[NormCall], tuple[Tensor, Tensor]],
) -> tuple[list[Finding], bool]:
    with _quietly():
        picks = rows.some(tuple(call.x.shape[:-1]))
        x = rows.picked(call.x, picks)
        residual = None if call.residual is None else rows.picked(call.residual, picks)
        weight, bias = (None if t is None else t.detach().cpu() for t in (call.weight, call.bias))
        assert weight is not None
        if call.zero_centered_weight:
            weight = weight.double() + 1
        actual = [rows.picked(part, picks) for part in answer]
        found = _judge_norm(call, (x, weight, bias, residual), actual)
        small = _small(call, x, residual)
    if small is not None:
        answered = _probed(call, small, probe, problem.needs_grad)
        with _quietly():
            sample = (small[0], weight, bias, small[1])
            found += _judge_norm(call, sample, [part.detach().cpu() for part in answered[0]])
            if problem.needs_grad:
                found += _judge_norm_gradients(call, sample, answered)
    return found, bool((x != x[:, :1]).any())


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


def _small(
    call: NormCall, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor | None] | None:
    """The rows again, so small that eps counts; None where that cannot be."""
    size = rms(x if residual is None else x.double() + residual.double())
    if call.eps < LEAST_PROBE**2 or not size > 0:
        return None
    shrink = call.eps**0.5 / size
    return x * shrink, None if residual is None else residual * shrink


def _probed(
    call: NormCall,
    small: tuple[Tensor, Tensor | None],
    probe: Callable[[NormCall], tuple[Tensor, Tensor]],
    needs_grad: bool,
) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    """(the norm, the sum) of other rows, and the gradients of x, weight and bias."""
    device = call.x.device
    with torch.inference_mode(False), torch.set_grad_enabled(needs_grad):
        given = (small[0], call.weight.detach(), call.bias, small[1])
        x, weight, bias, residual = (
            None if t is None else t.detach().to(device).clone().requires_grad_(needs_grad)
            for t in given
        )
        assert x is not None
        assert weight is not None
        changed = call._replace(x=x, weight=weight, bias=bias, residual=residual)
        y, total = probe(changed)
        if not needs_grad:
            return (y, total), []
        leaves = [t for t in (x, weight, bias) if t is not None]
        return (y, total), list(torch.autograd.grad(y, leaves, _dy(y)))


def _dy(y: Tensor) -> Tensor:
    """A gradient for a probe, of all sizes and signs, without a random number."""
    steps = torch.arange(y.numel(), dtype=torch.float32, device="cpu").view(y.shape)
    return torch.cos(steps * 1.7 + 0.3).to(y)


def _judge_norm_gradients(
    call: NormCall,
    sample: _Sample,
    answered: tuple[tuple[Tensor, Tensor], list[Tensor]],
) -> list[Finding]:
    (y, _), gradients = answered
    dy = _dy(y).cpu()

    def solved(dtype: torch.dtype) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [t.detach().to(dtype).requires_grad_() for t in sample[:3] if t is not None]
            parts = (*leaves, *(None,) * (3 - len(leaves)), sample[3])
            out, _ = rows.norm(parts, call.eps, call.is_rms_norm, dtype)  # type: ignore[arg-type]
            return torch.autograd.grad(out, leaves, dy.to(dtype))

    exact, plain = solved(torch.float64), solved(call.x.dtype)
    names = ("dx", "dweight", "dbias")
    unit = 1 / max(rms(sample[0]), call.eps**0.5)
    units = (rms(sample[1]) * unit, 1.0, 1.0)
    parts = zip(names, gradients, exact, plain, units, strict=False)
    return [judge(name, a.cpu(), e, p, u, WHERE) for name, a, e, p, u in parts]


class _Gate(_Watch):
    wraps = ("forward", "backward")

    def forward(self, problem: Gate, x: Tensor, y: Tensor) -> Tensor:
        gated: Tensor = self.kernel.forward(problem, x, y)
        if self.idle(x):
            return gated
        with _quietly():
            picks = rows.some(tuple(x.shape[:-1]))
            a, b, actual = (rows.picked(t, picks) for t in (x, y, gated))
            exact, plain = (rows.swiglu(a, b, d) for d in (torch.float64, actual.dtype))
            found = [judge("swiglu", actual, exact, plain, rms(a) * rms(b), WHERE)]
        if self.agrees(found, not torch.equal(a, b)):
            return gated
        composed: Tensor = self.case.instead().forward(problem, x, y)
        return composed

    def backward(self, problem: Gate, g: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        grads: tuple[Tensor, Tensor] = self.kernel.backward(problem, g, x, y)
        if self.idle(x):
            return grads
        with _quietly():
            picks = rows.some(tuple(x.shape[:-1]))
            a, b, dout = (rows.picked(t, picks) for t in (x, y, g))
            exact, plain = (_gate_gradients(a, b, dout, d) for d in (torch.float64, x.dtype))
            found = [
                judge(name, rows.picked(grad, picks), e, p, rms(dout) * rms(other), WHERE)
                for name, grad, e, p, other in zip(
                    ("dx", "dy"), grads, exact, plain, (b, a), strict=True
                )
            ]
        if self.agrees(found, not torch.equal(a, b) and bool((dout != 0).any())):
            return grads
        composed: tuple[Tensor, Tensor] = self.case.instead().backward(problem, g, x, y)
        return composed


def _gate_gradients(x: Tensor, y: Tensor, dout: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        leaves = [t.to(dtype).requires_grad_() for t in (x, y)]
        return torch.autograd.grad(rows.swiglu(leaves[0], leaves[1], dtype), leaves, dout.to(dtype))


class _Loss(_Watch):
    wraps = ("direct",)

    def direct(self, problem: Loss) -> Callable[..., tuple[Tensor, Tensor]]:
        assert self.kernel.direct is not None
        run, smoothing = self.kernel.direct(problem), problem.label_smoothing

        def observed(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
            answer: tuple[Tensor, Tensor] = run(logits, labels, ignore_index)
            if self.idle(logits):
                return answer
            with _quietly():
                picks = rows.some((logits.shape[0],))
                some, classes = (rows.picked(t, picks) for t in (logits, labels.long()))
                actual = rows.picked(answer[0], picks)
                exact, plain = (
                    rows.cross_entropy(some, classes, ignore_index, smoothing, d)
                    for d in (torch.float64, logits.dtype)
                )
                wrong = classes.masked_fill(classes == ignore_index, 0)
                known = (wrong >= 0) & (wrong < logits.shape[1])
                unit = 1.0 + rms(some)
                found = [judge("the loss", actual[known], exact[known], plain[known], unit, WHERE)]
            if problem.needs_grad:
                found += _probe_loss(run, some, classes, ignore_index, logits.device)
            if not self.agrees(found, bool((some != some[:, :1]).any())):
                raise Refuted
            return answer

        return observed


def _probe_loss(
    run: Callable[..., tuple[Tensor, Tensor]],
    logits: Tensor,
    labels: Tensor,
    ignored: int,
    device: torch.device,
) -> list[Finding]:
    """The gradient of a few rows, by a launch of its own; with one there is no smoothing."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = logits.to(device).requires_grad_()
        loss, _ = run(leaf, labels.to(device), ignored)
        (actual,) = torch.autograd.grad(loss, leaf, _dy(loss))
        dy = _dy(loss).cpu()

        def solved(dtype: torch.dtype) -> Tensor:
            other = logits.detach().to(dtype).clone().requires_grad_()
            wanted = rows.cross_entropy(other, labels, ignored, 0.0, dtype)
            return torch.autograd.grad(wanted, other, dy.to(dtype))[0]

        exact, plain = solved(torch.float64), solved(logits.dtype)
    return [judge("dlogits", actual.cpu(), exact, plain, 1.0, WHERE)]


@contextmanager
def _quietly() -> Iterator[None]:
    """Nothing here is a part of the caller's graph, or of its autocast."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield


_WATCHES: dict[type, Any] = {Rotation: _Rotation, Norm: _Norm, Gate: _Gate, Loss: _Loss}

CHECK = Check(lambda case: (_kind(case),), _watched)
