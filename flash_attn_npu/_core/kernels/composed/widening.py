"""Composed attention for a v of a smaller headdim: zeros behind it, and out without them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...problems.attention import Problem
from ...problems.results import Forward, Inputs, Saved
from . import attention

__all__ = ["KERNEL"]


def forward(problem: Problem, inputs: Inputs) -> Forward:
    """As the composed kernel's."""
    answer = attention.forward(_wide(problem), inputs._replace(v=_widened(problem, inputs.v)))
    return answer._replace(out=answer.out[..., : problem.headdim_v].contiguous())


def backward(
    problem: Problem, dout: Tensor, saved: Saved, grads: tuple[Tensor, Tensor, Tensor]
) -> None:
    """As the composed kernel's."""
    v, out, dout = (_widened(problem, x) for x in (saved.v, saved.out, dout))
    dq, dk, dv = grads
    whole = torch.empty_like(v)
    attention.backward(_wide(problem), dout, saved._replace(v=v, out=out), (dq, dk, whole))
    dv.copy_(whole[..., : problem.headdim_v])


def _wide(problem: Problem) -> Problem:
    return replace(problem, headdim_v=problem.headdim)


def _widened(problem: Problem, x: Tensor) -> Tensor:
    return pad(x, (0, problem.headdim - problem.headdim_v))


KERNEL = attention.KERNEL._replace(forward=forward, backward=backward)
