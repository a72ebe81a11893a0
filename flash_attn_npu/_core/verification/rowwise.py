"""Fused rotations, norms, gates and losses whose first calls are compared before they are believed.

As no row depends on another one, a gradient is compared at once, on a launch of its own over the
rows that are looked at: norms and losses are differentiated by torch_npu's autograd later.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels.kernel import Kernel
from ..problems.norms import NormCall
from ..problems.rowwise import Gate, Geglu, Lookup, Loss, Norm, Rotation, Tables
from . import rows
from .judging import Finding, judge, rms
from .kinds import MISSED, Case, Check, Kind, Refuted, busy, conclude, refuted, unsettled
from .norms import compare_norm

__all__ = ["CHECK"]


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
    "pair",
    "several",
    "whole",
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
        with rows.quietly():
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
            with rows.quietly():
                found = sample.judged(turned)
            if self.agrees(found, sample.tells):
                return turned
            out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            self.case.instead().forward(problem, x, cos, sin, out)
            return out

        return observed


class _Turn:
    """A sample of a rotation, read before it may be done in place."""

    def __init__(self, problem: Rotation | Lookup, x: Tensor, cos: Tensor, sin: Tensor) -> None:
        with rows.quietly():
            self.problem, self.picks = problem, rows.some(tuple(x.shape[:-1]))
            lead = (*x.shape[:-1], cos.shape[-1])
            self.x = rows.picked(x[..., : problem.rotary_dim], self.picks)
            self.cos, self.sin = (rows.picked(t.expand(lead), self.picks) for t in (cos, sin))
            # one table for all rows would hide that it is taken from another row
            differ = bool((self.sin != self.sin[:1]).any())
            self.tells = differ and bool((self.x != 0).any())

    def judged(self, turned: Tensor) -> list[Finding]:
        actual = rows.picked(turned[..., : self.problem.rotary_dim], self.picks)
        given = (self.x, self.cos, self.sin, self.problem.interleaved)
        exact, plain = (rows.rotated(*given, d) for d in (torch.float64, actual.dtype))
        return [judge("the rotation", actual, exact, plain, rms(self.x), WHERE)]


WHERE = "(row, place) in the sample"


class _Lookup(_Watch):
    wraps = ("forward",)

    def forward(
        self, problem: Lookup, xs: tuple[Tensor, ...], tables: Tables, looked_up: Tensor
    ) -> list[Tensor]:
        turned: list[Tensor] = self.kernel.forward(problem, xs, tables, looked_up)
        if self.idle(xs[0]):
            return turned
        with rows.quietly():
            # of cos and sin themselves: the joined table may be wrong
            cos, sin = (t.index_select(0, looked_up)[:, None] for t in tables[:2])
            shape = (len(looked_up), -1, problem.headdim)
            samples = [_Turn(problem, x.reshape(shape), cos, sin) for x in xs]
            found = [
                finding
                for sample, out in zip(samples, turned, strict=True)
                for finding in sample.judged(out.view(shape))
            ]
            # a token alone is not to be turned as if it were the first
            first = tables.sin[:1].cpu()
            alone = not problem.several and bool((samples[0].sin != first).any())
        if self.agrees(found, all(s.tells or (alone and bool((s.x != 0).any())) for s in samples)):
            return turned
        composed: list[Tensor] = self.case.instead().forward(problem, xs, tables, looked_up)
        return composed


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

            found, telling = compare_norm(problem, call, (y, total), probe)
            if not self.agrees(found, telling):
                raise Refuted
            return y, total

        return observed


class _Gate(_Watch):
    wraps = ("forward", "backward", "direct")

    def direct(self, problem: Gate) -> Callable[[Tensor, Tensor], Tensor]:
        return partial(self.forward, problem)

    def forward(self, problem: Gate, x: Tensor, y: Tensor) -> Tensor:
        gated: Tensor = self.kernel.forward(problem, x, y)
        if self.idle(x):
            return gated
        with rows.quietly():
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
        with rows.quietly():
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


class _Geglu(_Watch):
    wraps = ("forward",)

    def forward(self, problem: Geglu, both: Tensor) -> Tensor:
        gated: Tensor = self.kernel.forward(problem, both)
        if self.idle(both):
            return gated
        with rows.quietly():
            picks = rows.some(tuple(both.shape[:-1]))
            halves, actual = (rows.picked(t, picks) for t in (both, gated))
            exact, plain = (rows.geglu(halves, d) for d in (torch.float64, actual.dtype))
            y, gate = halves.chunk(2, -1)
            found = [judge("geglu", actual, exact, plain, rms(y) * rms(gate), WHERE)]
        if self.agrees(found, not torch.equal(y, gate)):
            return gated
        composed: Tensor = self.case.instead().forward(problem, both)
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
            with rows.quietly():
                picks = _rows_with_labels(labels, ignore_index)
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
            told = (classes != ignore_index)[:, None] & (some != some[:, :1])
            if not self.agrees(found, bool(told.any())):
                raise Refuted
            return answer

        return observed


def _rows_with_labels(labels: Tensor, ignored: int) -> rows.Picks:
    """Rows that are looked at, and one that is ignored, whose neighbours often are too."""
    there = labels.detach().cpu() != ignored
    seen, others = there.nonzero()[:, 0], (~there).nonzero()[:1, 0]
    (picks,) = rows.some((len(seen),))
    return (torch.cat((seen[picks], others)),)


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
        (actual,) = torch.autograd.grad(loss, leaf, rows.waves(loss))
        dy = rows.waves(loss).cpu()

        def solved(dtype: torch.dtype) -> Tensor:
            other = logits.detach().to(dtype).clone().requires_grad_()
            wanted = rows.cross_entropy(other, labels, ignored, 0.0, dtype)
            return torch.autograd.grad(wanted, other, dy.to(dtype))[0]

        exact, plain = solved(torch.float64), solved(logits.dtype)
    return [judge("dlogits", actual.cpu(), exact, plain, 1.0, WHERE)]


_WATCHES: dict[type, Any] = {
    Rotation: _Rotation,
    Lookup: _Lookup,
    Norm: _Norm,
    Gate: _Gate,
    Geglu: _Geglu,
    Loss: _Loss,
}

CHECK = Check(lambda case: (_kind(case),), _watched)
