"""Questions to the attention functions, as data, and how one is asked and judged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .. import flash_attn_interface as interface
from .._core.attention import call
from .._core.problems.ask import Options
from .._flash_attn_3 import flash_attn_interface as version_3
from .truth import Given, Solved, judged, solve

__all__ = ["Question", "tensors"]

Figures = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Question:
    """One call of flash_attn_func (dense) or flash_attn_varlen_func, forward and backward.

    lengths: of the queries of each sequence, all alike where dense; lengths_k: of the keys.
    headdim_v: of v, if smaller than that of q and k, which FlashAttention 3's function takes.
    """

    lengths: tuple[int, ...] = (70, 33)
    lengths_k: tuple[int, ...] | None = None
    dense: bool = False
    heads: tuple[int, int] = (2, 2)
    headdim: int = 64
    dtype: torch.dtype = torch.float16
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: bool = False
    sink: bool = False
    deterministic: bool = False
    lse: bool = False
    grad: bool = True
    tail: int = 0
    headdim_v: int = 0

    def ask(self, device: torch.device) -> Figures:
        """Ask the device, and compare with the truth."""
        q, k, v, dout = tensors(self)
        slopes = torch.linspace(0.05, 0.6, self.heads[0]) if self.alibi else None
        sink = torch.linspace(-1.0, 2.0, self.heads[0]) if self.sink else None
        leaves = [x.to(device).requires_grad_(self.grad) for x in (q, k, v)]
        answer = self.call(leaves, _moved(slopes, device), _moved(sink, device))
        out, lse = answer[:2] if isinstance(answer, tuple) else (answer, None)
        grads: tuple[Tensor, ...] = ()
        if self.grad:
            grads = torch.autograd.grad(out, leaves, dout.to(device))
        inputs = (q, k, v, dout)
        exact, plain = (
            self._solved(tuple(x.to(dtype) for x in inputs), slopes, sink)
            for dtype in (torch.float64, self.dtype)
        )
        figures = {"out": judged(out, exact.out, plain.out)}
        if lse is not None:
            figures["softmax_lse"] = judged(_packed_lse(lse), exact.lse, None)
        for name, grad in zip(("dq", "dk", "dv"), grads, strict=False):
            figures[name] = judged(grad, getattr(exact, name), getattr(plain, name))
        return figures

    def again(self, device: torch.device) -> Any:
        """A function that asks once more without comparing, for the clock."""
        q, k, v, _ = tensors(self)
        given = [x.to(device) for x in (q, k, v)]
        slopes = torch.linspace(0.05, 0.6, self.heads[0]).to(device) if self.alibi else None
        return lambda: self.call(given, slopes, None)

    def call(self, given: list[Tensor], slopes: Tensor | None, sink: Tensor | None) -> Any:
        """The answer to packed tensors on the device, packed again if it was dense."""
        q, k, v = given
        options: dict[str, Any] = {
            "causal": self.causal,
            "window_size": self.window,
            "softcap": self.softcap,
            "deterministic": self.deterministic,
            "return_attn_probs": self.lse,
        }
        ends_q, ends_k = self._ends(q.device)
        lengths = (ends_q, ends_k, max(self.lengths), max(self._lengths_k()))
        if self.dense:
            batch = len(self.lengths)
            q, k, v = (x.view(batch, -1, *x.shape[1:]) for x in (q, k, v))
        if sink is not None:
            # what transformers' s_aux becomes; flash-attention itself has none
            packed = None if self.dense else lengths
            answer: Any = call.attend("sink", (q, k, v), packed, Options(**options), slopes, sink)
        elif self.headdim_v:
            answer = version_3.flash_attn_varlen_func(q, k, v, *lengths, **options)
        elif self.dense:
            answer = interface.flash_attn_func(q, k, v, alibi_slopes=slopes, **options)
        else:
            answer = interface.flash_attn_varlen_func(
                q, k, v, *lengths, alibi_slopes=slopes, **options
            )
        if not self.dense:
            return answer
        return tuple(map(_flat, answer)) if isinstance(answer, tuple) else _flat(answer)

    def _lengths_k(self) -> tuple[int, ...]:
        return self.lengths if self.lengths_k is None else self.lengths_k

    def _ends(self, device: torch.device) -> tuple[Tensor, Tensor]:
        ends = ([0, *accumulate(lengths)] for lengths in (self.lengths, self._lengths_k()))
        ends_q, ends_k = (torch.tensor(x, dtype=torch.int32, device=device) for x in ends)
        return ends_q, ends_k

    def _solved(self, inputs: tuple[Tensor, ...], slopes: Any, sink: Any) -> Solved:
        q, k, v, dout = inputs
        left, right = (
            None if side < 0 or side >= max(self._lengths_k()) else side for side in self.window
        )
        right = 0 if self.causal else right
        if left is not None and right is None and self.window != (-1, -1):
            right = max(self._lengths_k())
        elif left is None and right:
            left = max(self._lengths_k())
        given = Given(self.headdim**-0.5, left, right, self.softcap, slopes, sink)
        parts, at_q, at_k = [], 0, 0
        for length, length_k in zip(self.lengths, self._lengths_k(), strict=True):
            rows, keys = slice(at_q, at_q + length), slice(at_k, at_k + length_k)
            parts.append(solve(q[rows], k[keys], v[keys], dout[rows], given))
            at_q, at_k = at_q + length, at_k + length_k
        if self.tail:
            nothing = (torch.zeros_like(x[at:]) for x, at in ((q, at_q), (k, at_k), (v, at_k)))
            zero_q, zero_k, zero_v = nothing
            blind = q.new_full((q.shape[1], zero_q.shape[0]), math.inf)
            parts.append(Solved(zero_q, blind, zero_q, zero_k, zero_v))
        return Solved(
            *(
                torch.cat([getattr(part, name) for part in parts], dim=1 if name == "lse" else 0)
                for name in Solved._fields
            )
        )


def tensors(question: Question) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, dout on the host, packed; the same at every call."""
    generator = torch.Generator().manual_seed(1 + sum(question.lengths) + question.headdim)
    lengths_k = question.lengths if question.lengths_k is None else question.lengths_k
    rows_q, rows_k = sum(question.lengths) + question.tail, sum(lengths_k) + question.tail
    heads, heads_k = question.heads
    width, width_v = question.headdim, question.headdim_v or question.headdim
    shapes = (
        (rows_q, heads, width),
        (rows_k, heads_k, width),
        (rows_k, heads_k, width_v),
        (rows_q, heads, width_v),
    )
    q, k, v, dout = (
        torch.randn(*shape, generator=generator).to(question.dtype) for shape in shapes
    )
    return q, k, v, dout


def _packed_lse(lse: Tensor) -> Tensor:
    """(nheads, rows), also of a dense (batch, nheads, seqlen)."""
    return lse.transpose(0, 1).flatten(1) if lse.dim() == 3 else lse


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, 1) if x.dim() == 4 else x


def _moved(x: Tensor | None, device: torch.device) -> Tensor | None:
    return None if x is None else x.to(device)
