"""What a kernel is to the rest of the package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["Kernel"]


class Kernel(NamedTuple):
    """One kernel, for one kind of problem; whether it may serve is a matter of the table.

    Each function takes the problem first. What else it takes and gives is the same for all kernels
    of a kind, so that any of them can stand in for another:

    - attention: forward(problem, Inputs) -> Forward; backward(problem, dout, Saved, (dq, dk, dv))
      writes the three where they lie; direct(problem) -> f(q, k, v, alibi_slopes, sink) -> what the
      public function returns.
    - rotation: forward(problem, x, cos, sin, out) writes the rotated dimensions to out, which may
      be x; direct(problem) -> f(x, cos, sin) -> x rotated, a new tensor.
    - rotation whose rows are looked up: forward(problem, xs, tables, rows) -> xs rotated at these
      rows of the tables, as new tensors.
    - norm: direct(problem) -> f(call, total_dtype, out_dtype) -> the norm and the sum; without it
      the composed norm serves, whose autograd is the flow's.
    - gate: forward(problem, x, y) -> silu(x) * y; backward(problem, g, x, y) -> (dx, dy);
      direct(problem) -> f(x, y) -> silu(x) * y, outside of autograd.
    - exact geglu: forward(problem, both) -> y * gelu(gate) of both = [y, gate].
    - loss: direct(problem) -> f(logits, labels, ignore_index) -> losses and z_losses of the rows;
      without it the composed loss serves, whose autograd is the flow's.

    forward, backward: outside of autograd.
    direct: gives a function with a gradient of its own, where the problem needs one; None where
        forward and backward are to serve.
    reads_pages: attention: it takes keys in a cache as they lie; for the others they are gathered.
    draws: attention: whether the dropout mask of this offset in rng_state is its own, so that its
        backward can repeat it.
    at_once: rotations: how many elements it is given at a time.
    observed: attention: as direct, but its function returns beside the public result what the
        kernel answered: see `verification.attention`.
    """

    forward: Any = None
    backward: Any = None
    direct: Callable[[Any], Callable[..., Any]] | None = None
    reads_pages: bool = False
    draws: Callable[[int], bool] | None = None
    at_once: int = 0
    observed: Callable[[Any], Callable[..., Any]] | None = None
