"""Attention kernels whose first calls are compared before they are believed.

What wraps a kernel is a `Kernel` too. When a kind is settled the plans that were made are
forgotten, so the next ones hold the kernel itself: a kind that is known costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedError
from ..kernels.kernel import Kernel
from ..problems.attention import Problem
from ..problems.results import Forward, Inputs, Saved
from .comparing import Lse, Taken, compare_forward, compare_gradients, compare_sink
from .judging import Finding
from .kinds import Case, Check, Kind, Refuted, busy, conclude, refuted, unsettled, watched, watching
from .reading import Drawn
from .softmax_lse import by_rows, statistics
from .traits import traits
from .truth import sink_terms
from .trying import rehearsed, tried

__all__ = ["CHECK"]

SINK = 4
"""Where the gradient of a sink is among those of torch_npu's node; that of pse is before it."""


def _watched(case: Case, kernel: Kernel) -> tuple[Kernel, tuple[str, ...]]:
    kinds = _kinds(case)

    def wrapped() -> Kernel:
        watch = _Watch(case, kernel, *kinds)
        direct = None if kernel.direct is None else watch.direct
        return kernel._replace(forward=watch.forward, backward=watch.backward, direct=direct)

    return watched(case, kernel, kinds, wrapped)


def _kinds(case: Case) -> tuple[Kind, ...]:
    """Of the forward, and of the gradient if there will be one."""
    problem: Problem = case.problem
    dtype = str(problem.dtype).removeprefix("torch.")
    forward = Kind(case.name, "forward", dtype, problem.headdim, case.rows, traits(problem))
    how = "gradient" if case.autograd else "gradient from softmax_lse"
    if problem.ask.backward:
        return (forward._replace(part="gradient from softmax_lse"),)
    # a call with dropout, too: it may be one of a checkpoint, which comes again with gradients, and
    # by another kernel it would have another mask then
    return (forward, forward._replace(part=how)) if problem.needs_grad else (forward,)


class _Watch:
    """The three functions of a kernel, with a comparison behind each."""

    def __init__(
        self, case: Case, kernel: Kernel, first: Kind, gradient: Kind | None = None
    ) -> None:
        self.case, self.kernel = case, kernel
        self.forward_kind, self.gradient_kind = first, gradient or first

    def forward(self, problem: Problem, inputs: Inputs) -> Forward:
        if busy(inputs.q):
            return _forward(self.kernel, problem, inputs)

        def look() -> tuple[Forward, list[Finding]]:
            answer = _forward(self.kernel, problem, inputs)
            drawn = _drawn(problem, answer.rng_state)
            lse = self._returned(problem, inputs, answer)
            return answer, compare_forward(problem, inputs, answer.out, lse, drawn)

        def instead() -> Forward:
            return _composed(self.case.instead(), problem, inputs)

        if watching(self.forward_kind, problem):
            answer = tried(self.case, self.forward_kind, look, instead)
        else:
            answer = _forward(self.kernel, problem, inputs)
        own = not refuted(self.forward_kind, problem.function)
        if own and problem.needs_grad and self._unsettled(self.gradient_kind):
            try:
                rehearsal = partial(self._rehearsal, problem, inputs, answer)
                rehearsed(self.case, self.gradient_kind, rehearsal)
            except Refuted as found:
                return found.answer(instead)
        return answer

    def backward(
        self, problem: Problem, dout: Tensor, saved: Saved, grads: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        given = (problem, dout, saved, grads)
        if busy(dout):
            self.kernel.backward(*given)
            return

        def look() -> tuple[None, list[Finding]]:
            return None, self._written(*given)

        kind, drawn = self.gradient_kind, _drawn(problem, saved.rng_state)
        draws = self.kernel.draws
        if drawn is not None and draws is not None and not draws(drawn.offset):
            # the forward was served by another one, which alone can repeat its mask
            self.case.instead().backward(*given)
        elif refuted(kind, problem.function):
            # of a call that was served before it was known
            self._backward_instead(*given)
        elif self._unsettled(kind):
            tried(self.case, kind, look, lambda: self._backward_instead(*given))
        else:
            self.kernel.backward(*given)

    def _written(
        self, problem: Problem, dout: Tensor, saved: Saved, grads: tuple[Tensor, Tensor, Tensor]
    ) -> list[Finding]:
        """Gradients where they are wanted, and what was found of them."""
        self.kernel.backward(problem, dout, saved, grads)
        inputs = Inputs(*saved[:3], saved.alibi_slopes)
        taken = Taken(dout, saved.out, *grads, lambda _: (0, 0))
        drawn = _drawn(problem, saved.rng_state)
        return compare_gradients(problem, inputs, taken, by_rows(problem, saved.softmax_lse), drawn)

    def _rehearsal(self, problem: Problem, inputs: Inputs, answer: Forward) -> list[Finding]:
        """Of gradients of one call that nobody asked for, where nobody sees them."""
        q, k, v, slopes, _ = inputs[:5]
        saved = Saved(q, k, v, answer.out, answer.softmax_lse, slopes, answer.rng_state)
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
        return self._written(problem, _probe(answer.out), saved, (grads[0], grads[1], grads[2]))

    def _backward_instead(self, problem: Problem, *given: Any) -> None:
        if not problem.ask.backward:
            self._require_no_dropout()
        self.case.instead().backward(problem, *given)

    def _require_no_dropout(self) -> None:
        """Another kernel cannot repeat the mask that this one drew in the forward."""
        problem: Problem = self.case.problem
        if problem.dropout_p:
            raise UnsupportedError(
                problem.function,
                f"a backward of {self.case.name}, whose gradient was found wrong just now",
                "a backward of what served its forward: another kernel cannot repeat the dropout",
                "take the step again: calls of this kind are composed of torch operations now",
            )

    def direct(self, problem: Problem) -> Callable[..., Any]:
        assert self.kernel.observed is not None
        run = self.kernel.observed(problem)

        def observed(
            q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, sink: Tensor | None
        ) -> Any:
            given = Inputs(q, k, v, slopes, sink)
            if busy(q):
                return run(*given[:5])[0]

            def launch() -> tuple[Any, Any, list[Tensor | None]]:
                if not problem.needs_grad:
                    return *run(*given[:5]), []
                with _as_if_differentiated(problem):
                    leaves = _leaves(problem, given)
                    return *run(*leaves), leaves

            def look() -> tuple[tuple[Any, Any, list[Tensor | None]], list[Finding]]:
                answer, seen, leaves = launch()
                out = answer[0] if isinstance(answer, tuple) else answer
                drawn = Drawn(seen.seed, seen.offset) if problem.dropout_p else None
                found = compare_forward(problem, given, out, statistics(problem, seen), drawn)
                return (answer, seen, leaves), found

            first = None
            if watching(self.forward_kind, problem):
                first = tried(self.case, self.forward_kind, look, None)
            if not problem.needs_grad:
                return (first or run(*given[:5]))[0]
            waits = self._unsettled(self.gradient_kind)
            if waits:
                gradient = partial(_differentiated, problem, given, lambda: first or launch())
                rehearsed(self.case, self.gradient_kind, gradient)
            first = None
            answer, seen = run(*given[:5])
            if waits and _has_node(seen.out):
                _Backward(self, problem, given, seen).wait()
            return answer

        return observed

    def _unsettled(self, kind: Kind) -> bool:
        return unsettled(kind, self.case.problem.device)

    def _returned(self, problem: Problem, inputs: Inputs, answer: Forward) -> Lse:
        """softmax_lse as it was returned; where it was not, that of a second launch."""
        if answer.softmax_lse.numel():
            return by_rows(problem, answer.softmax_lse)
        asking = replace(problem, uses_lse=True)
        return by_rows(problem, self.kernel.forward(asking, inputs).softmax_lse)


class _Backward:
    """The gradient of one call that torch_npu's autograd is going to compute."""

    def __init__(self, watch: _Watch, problem: Problem, inputs: Inputs, seen: Any) -> None:
        self.watch, self.problem, self.seen = watch, problem, seen
        q, k, v, slopes, sink = (None if x is None else x.detach() for x in inputs[:5])
        assert q is not None
        assert k is not None
        assert v is not None
        self.inputs = Inputs(q, k, v, slopes, sink)
        self.versions = self._versions()
        self.node = seen.out.grad_fn
        # the node holds this: what it holds must not hold the node
        self.seen = seen._replace(out=seen.out.detach())

    def wait(self) -> None:
        self.handle = self.node.register_hook(self)
        del self.node

    def __call__(self, grads: tuple[Any, ...], douts: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self.handle.remove()
        watch, problem, dout = self.watch, self.problem, douts[0]
        kind = watch.gradient_kind
        changed = self.versions != self._versions()
        if dout is None or busy(dout) or changed:
            return None
        if refuted(kind, problem.function):
            # found out by a backward of another call, which had begun as this one had
            return self._instead(dout, grads)
        if not watch._unsettled(kind):
            return None
        if conclude(watch.case, kind, _compare(problem, self.inputs, self.seen, grads, dout)):
            return None
        return self._instead(dout, grads)

    def _versions(self) -> tuple[int, ...]:
        tensors = [x for x in self.inputs[:5] if isinstance(x, Tensor)]
        return tuple(0 if x.is_inference() else x._version for x in tensors)

    def _instead(self, dout: Tensor, grads: tuple[Any, ...]) -> tuple[Any, ...]:
        """The gradients, computed again by the kernel that serves from here on."""
        problem, seen = self.problem, self.seen
        self.watch._require_no_dropout()
        with torch.no_grad():
            instead = self.watch.case.instead()
            answer: Forward = instead.forward(problem, self.inputs)
            q, k, v, slopes, _ = self.inputs[:5]
            saved = Saved(q, k, v, answer.out, answer.softmax_lse, slopes)
            written = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
            instead.backward(problem, seen.asked(dout), saved, written)
            dq, dk, dv = written
            parts: tuple[Tensor | None, ...] = (
                *(seen.given_q(dq), seen.given_k(dk), seen.given_k(dv)),
                *grads[3:SINK],
                self._dsink(dout, seen.given_q(answer.out)),
            )
        given = [None if old is None else new for old, new in zip(grads, parts, strict=False)]
        return (*given, *grads[len(parts) :])

    def _dsink(self, dout: Tensor, out: Tensor) -> Tensor | None:
        sink = self.inputs.sink
        if sink is None:
            return None
        deltas = (dout.float() * out.float()).sum(-1).transpose(-1, -2)
        terms = sink_terms(sink.float(), deltas, self.seen.softmax_lse)
        return terms.transpose(-1, -2).flatten(0, -2).sum(0)


def _forward(kernel: Kernel, problem: Problem, inputs: Inputs) -> Forward:
    answer: Forward = kernel.forward(problem, inputs)
    return answer


def _compare(
    problem: Problem, inputs: Inputs, seen: Any, grads: tuple[Any, ...], dout: Tensor
) -> list[Finding]:
    """What was found of the gradients that torch_npu's node gives."""
    drawn = Drawn(seen.seed, seen.offset) if problem.dropout_p else None
    dq, dk, dv = grads[:3]
    taken = Taken(dout, seen.out.detach(), dq, dk, dv, seen.shifts)
    found = compare_gradients(problem, inputs, taken, statistics(problem, seen), drawn)
    if inputs.sink is not None and grads[SINK] is not None:
        of_sink = compare_sink(inputs.sink, grads[SINK], taken, seen.softmax_lse)
        found += [of_sink] if found or not of_sink.agrees else []
    return found


def _differentiated(
    problem: Problem,
    inputs: Inputs,
    launch: Callable[[], tuple[Any, Any, list[Tensor | None]]],
) -> list[Finding]:
    """Of gradients by torch_npu's autograd, of a launch for itself."""
    answer, seen, leaves = launch()
    if not _has_node(seen.out):
        return []
    # not of what the kernel answered: it may have been given more rows, to which no gradient comes
    out = answer[0] if isinstance(answer, tuple) else answer
    found: list[Finding] = []

    def compare(grads: tuple[Any, ...], douts: tuple[Any, ...]) -> None:
        found.extend(_compare(problem, inputs, seen, grads, douts[0]))

    handle = seen.out.grad_fn.register_hook(compare)
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    torch.autograd.grad(out, wanted, _probe(out), allow_unused=True)
    # the node holds it, and it holds the node
    handle.remove()
    return found


def _probe(out: Tensor) -> Tensor:
    """A gradient of the size of out, which is not out itself."""
    return out.detach().flip(-1)


def _leaves(problem: Problem, inputs: Inputs) -> list[Tensor | None]:
    """What a launch is given, for a graph of its own."""
    every = not problem.ask.needs_grad

    def leaf(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        wanted = x.requires_grad or (every and x is not inputs.alibi_slopes)
        # inference tensors cannot be saved for a backward
        return (x.clone() if x.is_inference() else x.detach()).requires_grad_(wanted)

    return [leaf(x) for x in inputs[:5]]


def _has_node(out: Tensor) -> bool:
    """Whether out has a node of the kernel's: it is given no rows where all are single tokens."""
    return out.grad_fn is not None and out.numel() > 0


@contextmanager
def _as_if_differentiated(problem: Problem) -> Iterator[None]:
    """With gradients, and no random number is taken."""
    generators = torch.get_device_module(problem.device)
    before = generators.get_rng_state(problem.device) if problem.dropout_p else None
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        if before is not None:
            generators.set_rng_state(before, problem.device)


def _composed(instead: Kernel, problem: Problem, inputs: Inputs) -> Forward:
    if inputs.cache is not None and not instead.reads_pages:
        k, v = inputs.cache.gather(inputs.spans)
        inputs = Inputs(inputs.q, k, v, inputs.alibi_slopes, inputs.sink)
    return _forward(instead, problem, inputs)


def _drawn(problem: Problem, rng_state: Tensor | None) -> Drawn | None:
    if not problem.dropout_p or rng_state is None:
        return None
    return Drawn(*rng_state.tolist())


CHECK = Check(_kinds, _watched)
