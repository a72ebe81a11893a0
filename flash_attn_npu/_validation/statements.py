"""Questions whose answer is a statement about a machine, besides being right or wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import flash_attn_interface as interface
from .._core.ground import settings
from .attention import Question, tensors
from .cache import CacheQuestion
from .truth import Given, Solved, judged, solve

__all__ = ["ALL", "BackwardFromLse", "Dropout", "OffsetAlibi"]

Figures = dict[str, dict[str, float]]
Answers = dict[str, bool]


@dataclass(frozen=True)
class OffsetAlibi:
    """The documents promise ALiBi over equal lengths only; CANN's code reads an offset too."""

    def ask(self, device: torch.device) -> Figures:
        """Let the fused kernel try."""
        before = settings._alibi_offset
        settings._alibi_offset = True
        try:
            return Question((40, 40), (60, 60), alibi=True).ask(device)
        finally:
            settings._alibi_offset = before


@dataclass(frozen=True)
class BackwardFromLse:
    """A backward as ring attention calls it, from out and softmax_lse alone."""

    def ask(self, device: torch.device) -> Figures:
        """Ask the device, and compare with the truth."""
        question = Question((70, 70), dense=True)
        q, k, v, dout = (x.view(2, 70, 2, 64) for x in tensors(question))

        def solved(place: int, dtype: torch.dtype) -> Solved:
            one, keys, values, done = (x[place].to(dtype) for x in (q, k, v, dout))
            return solve(one, keys, values, done, Given(64**-0.5, None, 0))

        exact, plain = (
            [solved(place, dtype) for place in range(2)] for dtype in (torch.float64, q.dtype)
        )
        out = torch.stack([one.out for one in exact]).to(q.dtype)
        lse = torch.stack([one.lse for one in exact]).float()
        grads = [torch.full_like(x, math.nan).to(device) for x in (q, k, v)]
        inputs = [x.to(device) for x in (dout, q, k, v, out, lse)]
        interface._flash_attn_backward(
            *(*inputs, *grads, 0.0, 64**-0.5, True, -1, -1, 0.0, None, False)
        )
        return {
            name: judged(
                grad,
                torch.stack([getattr(one, name) for one in exact]),
                torch.stack([getattr(one, name) for one in plain]),
            )
            for name, grad in zip(("dq", "dk", "dv"), grads, strict=True)
        }


@dataclass(frozen=True)
class Dropout:
    """The mask is read off a call whose probabilities are equal and whose values are unit vectors.

    It must drop dropout_p of them, each once in forward and backward alike, and anew at each call.
    """

    dropout_p: float = 0.25

    def ask(self, device: torch.device) -> tuple[Figures, Answers]:
        """Ask the device twice from one seed and once from another."""
        torch.manual_seed(3)
        out, dv, expected = self._asked(device)
        again = self._asked(device)[0]
        torch.manual_seed(3)
        repeated = self._asked(device)[0]
        kept = (out * 64 * (1 - self.dropout_p)).round()
        count = kept.numel()
        spread = math.sqrt(self.dropout_p * (1 - self.dropout_p) / count)
        share = abs(kept.mean().item() - (1 - self.dropout_p))
        scaled = kept / 64 / (1 - self.dropout_p)
        figures = {
            "share kept": {"error": share, "allowed": 6 * spread},
            "out": {"error": (out - scaled).abs().max().item(), "allowed": 1e-4},
            "dv": {"error": (dv - expected).abs().max().item(), "allowed": 2e-2},
        }
        return figures, {
            "torch.manual_seed repeats dropout": bool((repeated == out).all()),
            "dropout differs from call to call": bool((again != out).any()),
        }

    def _asked(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """(out, dv, what dv has to be by the mask that out shows)."""
        zeros = torch.zeros(2, 64, 2, 64, dtype=torch.float16, device=device)
        v = torch.eye(64, dtype=torch.float16)[None, :, None].expand_as(zeros)
        leaf = v.to(device).requires_grad_()
        out: Any = interface.flash_attn_func(zeros, zeros, leaf, dropout_p=self.dropout_p)
        dout = tensors(Question((64, 64)))[3].view(2, 64, 2, 64)
        (dv,) = torch.autograd.grad(out, leaf, dout.to(device))
        found = out.detach().cpu().double()
        expected = torch.einsum("bihj,bihd->bjhd", found, dout.double())
        return found, dv.cpu().double(), expected


@dataclass(frozen=True)
class Repeats:
    """Whether the same call gives the same bits twice."""

    def ask(self, device: torch.device) -> tuple[Figures, Answers]:
        """Compare bits; a deterministic backward that differs is wrong."""
        question = Question((300, 1, 700), causal=True, dtype=torch.bfloat16)
        first, second = (_bits(question, device) for _ in range(2))
        strict = replace(question, deterministic=True)
        third, fourth = (_bits(strict, device) for _ in range(2))
        differs = max((a != b).double().mean().item() for a, b in zip(third, fourth, strict=True))
        return {"share of bits": {"error": differs, "allowed": 0.0}}, {
            "forward repeats": _same(first[:1], second[:1]),
            "backward repeats": _same(first[1:], second[1:]),
            "backward repeats under deterministic": _same(third[1:], fourth[1:]),
        }


@dataclass(frozen=True)
class Layouts:
    """Whether packed and dense sequences, and one alone and among others, give the same bits."""

    def ask(self, device: torch.device) -> tuple[Figures, Answers]:
        """Compare bits; nothing here is wrong, whatever they are."""
        question = Question((130, 130, 130), causal=True, dtype=torch.bfloat16)
        packed = _bits(question, device)
        dense = _bits(replace(question, dense=True), device)
        first = [x[:130] for x in packed]
        alone = _bits(question, device, rows=130)
        return {}, {
            "dense and packed give the same bits": _same(packed[:1], dense[:1]),
            "gradients of dense and packed give the same bits": _same(packed[1:], dense[1:]),
            "a training row does not depend on its batch": _same(first[:1], alone[:1]),
            "a training gradient does not depend on its batch": _same(first[1:], alone[1:]),
        }


@dataclass(frozen=True)
class Kernels:
    """Whether the training and the inference kernel give the same bits for the same question."""

    def ask(self, device: torch.device) -> tuple[Figures, Answers]:
        """Compare bits; nothing here is wrong, whatever they are."""
        cached = CacheQuestion((64, 64), rows=64, causal=True, dtype=torch.bfloat16, heads=(2, 2))
        q, k, v = (x.to(device) for x in cached.tensors()[:3])
        pages = cached.lay(k.cpu(), device), cached.lay(v.cpu(), device)
        inferred = cached.call(q, pages)[0]
        trained: Any = interface.flash_attn_func(q, k, v, causal=True)
        one = replace(cached, seqlens=(64,))
        alone = one.call(q[:1], (one.lay(k[:1].cpu(), device), one.lay(v[:1].cpu(), device)))[0]
        decoded = replace(cached, rows=1).call(q[:, -1:], pages)[0]
        return {}, {
            "training and inference kernels give the same bits": _same([inferred], [trained]),
            "an inference row does not depend on its batch": _same([inferred[:1]], [alone]),
            "a prefill's last row is a decode's": _same([inferred[:, -1:]], [decoded]),
        }


ALL: dict[str, Any] = {
    "does a call repeat itself": Repeats(),
    "do layouts and batches matter": Layouts(),
    "are the two kernels one": Kernels(),
}


def _bits(question: Question, device: torch.device, rows: int | None = None) -> list[Tensor]:
    """out and gradients, packed, on the host; of the first rows alone if told."""
    q, k, v, dout = (x[:rows] for x in tensors(question))
    asked = question if rows is None else replace(question, lengths=question.lengths[:1])
    leaves = [x.to(device).requires_grad_() for x in (q, k, v)]
    out = asked.call(leaves, None, None)
    grads = torch.autograd.grad(out, leaves, dout.to(device))
    return [x.detach().cpu() for x in (out, *grads)]


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(first, second, strict=True))
