"""Fused rotations, norms, gates and losses whose first calls are compared before they are believed.

As no row depends on another one, a gradient is compared at once, on a launch of its own over the
rows that are looked at: norms and losses are differentiated by torch_npu's autograd later.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..kernels.kernel import Kernel
from ..problems.norms import NormCall
from ..problems.rowwise import Gate, Geglu, Lookup, Loss, Norm, Rotation, Tables
from . import rows
from .judging import Finding, judge, rms
from .kinds import Case, Check, Kind, busy, watched, watching
from .losses import compare_loss
from .norms import compare_norm, detached
from .trying import tried

__all__ = ["CHECK"]

T = TypeVar("T")


def _watched(case: Case, kernel: Kernel) -> tuple[Kernel, tuple[str, ...]]:
    kind = _kind(case)

    def wrapped() -> Kernel:
        watch = _WATCHES[type(case.problem)](case, kernel, kind)
        return kernel._replace(**{name: getattr(watch, name) for name in watch.wraps})

    return watched(case, kernel, (kind,), wrapped)


def _kind(case: Case) -> Kind:
    problem = case.problem
    part = "gradient" if getattr(problem, "grad_dtype", None) is not None else "forward"
    if getattr(problem, "needs_grad", False):
        part = "forward and gradient"
    # a gate's `whole` is the size of a tensor, which is no matter of a kind
    told = {
        name: value
        for name, value in problem._asdict().items()
        if name in _TOLD and not isinstance(value, tuple)
    }
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
    """What all of them have in common."""

    wraps: tuple[str, ...] = ()

    def __init__(self, case: Case, kernel: Kernel, kind: Kind) -> None:
        self.case, self.kernel, self.kind = case, kernel, kind

    def idle(self, tensor: Tensor) -> bool:
        return busy(tensor) or not watching(self.kind, self.case.problem)

    def tried(
        self,
        look: Callable[[], tuple[T, list[Finding], bool]],
        instead: Callable[[], T] | None = None,
    ) -> T:
        """`tried`; look gives, as the third, whether the values tell anything."""

        def told() -> tuple[T, list[Finding]]:
            answer, found, telling = look()
            wrong = any(not finding.agrees for finding in found)
            return answer, found if telling or wrong else []

        return tried(self.case, self.kind, told, instead)


class _Rotation(_Watch):
    wraps = ("forward", "direct")

    def forward(self, problem: Rotation, x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
        if self.idle(x):
            self.kernel.forward(problem, x, cos, sin, out)
            return
        before = x.clone() if out is x else x

        def look() -> tuple[None, list[Finding], bool]:
            sample = _Turn(problem, x, cos, sin)
            self.kernel.forward(problem, x, cos, sin, out)
            return None, sample.judged(out), sample.tells

        def instead() -> None:
            if out is x:
                x.copy_(before)
            self.case.instead().forward(problem, x, cos, sin, out)

        self.tried(look, instead)

    def direct(self, problem: Rotation) -> Callable[..., Tensor]:
        assert self.kernel.direct is not None
        run = self.kernel.direct(problem)

        def observed(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            if self.idle(x):
                idle: Tensor = run(x, cos, sin)
                return idle

            def look() -> tuple[Tensor, list[Finding], bool]:
                turned: Tensor = run(x, cos, sin)
                sample = _Turn(problem, x, cos, sin)
                return turned, sample.judged(turned), sample.tells

            def instead() -> Tensor:
                out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
                self.case.instead().forward(problem, x, cos, sin, out)
                return out

            return self.tried(look, instead)

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
        with rows.quietly():
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
        if self.idle(xs[0]):
            idle: list[Tensor] = self.kernel.forward(problem, xs, tables, looked_up)
            return idle

        def look() -> tuple[list[Tensor], list[Finding], bool]:
            turned: list[Tensor] = self.kernel.forward(problem, xs, tables, looked_up)
            return turned, *_judge_lookup(problem, xs, tables, looked_up, turned)

        def instead() -> list[Tensor]:
            composed: list[Tensor] = self.case.instead().forward(problem, xs, tables, looked_up)
            return composed

        return self.tried(look, instead)


def _judge_lookup(
    problem: Lookup,
    xs: tuple[Tensor, ...],
    tables: Tables,
    looked_up: Tensor,
    turned: list[Tensor],
) -> tuple[list[Finding], bool]:
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
        return found, all(s.tells or (alone and bool((s.x != 0).any())) for s in samples)


class _Norm(_Watch):
    wraps = ("direct",)

    def direct(self, problem: Norm) -> Callable[..., tuple[Tensor, Tensor]]:
        assert self.kernel.direct is not None
        run = self.kernel.direct(problem)

        def observed(
            call: NormCall, total_dtype: torch.dtype, out_dtype: torch.dtype
        ) -> tuple[Tensor, Tensor]:
            def launch(other: NormCall) -> tuple[Tensor, Tensor]:
                answer: tuple[Tensor, Tensor] = run(other, total_dtype, out_dtype)
                return answer

            def look() -> tuple[tuple[Tensor, Tensor], list[Finding], bool]:
                own = detached(call) if problem.needs_grad else call
                answer = launch(own)
                return answer, *compare_norm(problem, own, answer, launch)

            answer = None if self.idle(call.x) else self.tried(look)
            return launch(call) if answer is None or problem.needs_grad else answer

        return observed


class _Gate(_Watch):
    wraps = ("forward", "backward", "direct")

    def direct(self, problem: Gate) -> Callable[[Tensor, Tensor], Tensor]:
        return partial(self.forward, problem)

    def forward(self, problem: Gate, x: Tensor, y: Tensor) -> Tensor:
        if self.idle(x):
            idle: Tensor = self.kernel.forward(problem, x, y)
            return idle

        def look() -> tuple[Tensor, list[Finding], bool]:
            gated: Tensor = self.kernel.forward(problem, x, y)
            with rows.quietly():
                picks = rows.some(tuple(x.shape[:-1]))
                a, b, actual = (rows.picked(t, picks) for t in (x, y, gated))
                exact, plain = (rows.swiglu(a, b, d) for d in (torch.float64, actual.dtype))
                found = [judge("swiglu", actual, exact, plain, rms(a) * rms(b), WHERE)]
            return gated, found, not torch.equal(a, b)

        def instead() -> Tensor:
            composed: Tensor = self.case.instead().forward(problem, x, y)
            return composed

        return self.tried(look, instead)

    def backward(self, problem: Gate, g: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if self.idle(x):
            idle: tuple[Tensor, Tensor] = self.kernel.backward(problem, g, x, y)
            return idle

        def look() -> tuple[tuple[Tensor, Tensor], list[Finding], bool]:
            grads: tuple[Tensor, Tensor] = self.kernel.backward(problem, g, x, y)
            return grads, *_judge_gate_gradients((g, x, y), grads)

        def instead() -> tuple[Tensor, Tensor]:
            composed: tuple[Tensor, Tensor] = self.case.instead().backward(problem, g, x, y)
            return composed

        return self.tried(look, instead)


def _judge_gate_gradients(
    given: tuple[Tensor, Tensor, Tensor], grads: tuple[Tensor, Tensor]
) -> tuple[list[Finding], bool]:
    with rows.quietly():
        picks = rows.some(tuple(given[0].shape[:-1]))
        dout, a, b = (rows.picked(t, picks) for t in given)
        exact, plain = (_gate_gradients(a, b, dout, d) for d in (torch.float64, a.dtype))
        found = [
            judge(name, rows.picked(grad, picks), e, p, rms(dout) * rms(other), WHERE)
            for name, grad, e, p, other in zip(
                ("dx", "dy"), grads, exact, plain, (b, a), strict=True
            )
        ]
        return found, not torch.equal(a, b) and bool((dout != 0).any())


class _Geglu(_Watch):
    wraps = ("forward",)

    def forward(self, problem: Geglu, both: Tensor) -> Tensor:
        if self.idle(both):
            idle: Tensor = self.kernel.forward(problem, both)
            return idle

        def look() -> tuple[Tensor, list[Finding], bool]:
            gated: Tensor = self.kernel.forward(problem, both)
            with rows.quietly():
                picks = rows.some(tuple(both.shape[:-1]))
                halves, actual = (rows.picked(t, picks) for t in (both, gated))
                exact, plain = (rows.geglu(halves, d) for d in (torch.float64, actual.dtype))
                y, gate = halves.chunk(2, -1)
                found = [judge("geglu", actual, exact, plain, rms(y) * rms(gate), WHERE)]
            return gated, found, not torch.equal(y, gate)

        def instead() -> Tensor:
            composed: Tensor = self.case.instead().forward(problem, both)
            return composed

        return self.tried(look, instead)


def _gate_gradients(x: Tensor, y: Tensor, dout: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        leaves = [t.to(dtype).requires_grad_() for t in (x, y)]
        return torch.autograd.grad(rows.swiglu(leaves[0], leaves[1], dtype), leaves, dout.to(dtype))


class _Loss(_Watch):
    wraps = ("direct",)

    def direct(self, problem: Loss) -> Callable[..., tuple[Tensor, Tensor]]:
        assert self.kernel.direct is not None
        run = self.kernel.direct(problem)

        def observed(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
            def launch(logits: Tensor) -> tuple[Tensor, Tensor]:
                answer: tuple[Tensor, Tensor] = run(logits, labels, ignore_index)
                return answer

            def look() -> tuple[tuple[Tensor, Tensor], list[Finding], bool]:
                own = logits.detach().requires_grad_() if problem.needs_grad else logits
                answer = launch(own)
                given = (logits, labels, ignore_index)
                return answer, *compare_loss(problem, given, answer[0], run)

            answer = None if self.idle(logits) else self.tried(look)
            return launch(logits) if answer is None or problem.needs_grad else answer

        return observed


_WATCHES: dict[type, Any] = {
    Rotation: _Rotation,
    Lookup: _Lookup,
    Norm: _Norm,
    Gate: _Gate,
    Geglu: _Geglu,
    Loss: _Loss,
}

CHECK = Check(lambda case: (_kind(case),), _watched)
