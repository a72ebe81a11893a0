"""What the calls of the clients must give, by plain PyTorch operations in the dtype of the input.

Run on float64 inputs these functions are the truth, run on the inputs as they are they are the
measure of upstream's rule: an answer may be off by twice as much as plain PyTorch in the same
precision. `assert_gives` and `assert_gradients` apply it. Attention is that of `reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tests.helpers import reference

Function = Callable[..., Any]


def assert_gives(actual: Any, function: Function, *inputs: Any, **options: Any) -> None:
    """`actual` (a tensor, or several) is what `function` makes of the inputs, and contiguous."""
    truth, plain = _both(function, inputs, options)
    actual = (actual,) if isinstance(actual, Tensor) else actual
    for number, (got, exact, rough) in enumerate(zip(actual, truth, plain, strict=True)):
        reference.assert_close_to_reference(got, exact, rough, f"{function.__name__} {number}")
        # clients call .view on what they get
        assert got.is_contiguous()


def assert_gradients(
    actual: Sequence[Tensor], douts: Any, function: Function, *inputs: Tensor, **options: Any
) -> None:
    """`actual` are the gradients of the floating inputs, given those of the results."""

    def gradients(*inputs: Any, **options: Any) -> tuple[Tensor, ...]:
        given = [x for x in inputs if _is_float(x)]
        leaves = [x.detach().clone().requires_grad_() for x in given]
        fresh = iter(leaves)
        results = function(*(next(fresh) if _is_float(x) else x for x in inputs), **options)
        results = (results,) if isinstance(results, Tensor) else results
        into = [dout.cpu().to(x.dtype) for dout, x in zip(outs, results, strict=True)]
        return torch.autograd.grad(results, leaves, into)

    outs = (douts,) if isinstance(douts, Tensor) else douts
    truth, plain = _both(gradients, inputs, options)
    for number, (got, exact, rough) in enumerate(zip(actual, truth, plain, strict=True)):
        name = f"gradient {number} of {function.__name__}"
        reference.assert_close_to_reference(got, exact, rough, name)


def assert_lse(
    actual: Tensor, *inputs: Tensor, lengths: Sequence[int] = (), **options: Any
) -> None:
    """`actual` is the softmax_lse of dense attention, or of packed attention over `lengths`."""
    wide = [x.detach().cpu().double() for x in inputs]
    if lengths:
        ends = [*accumulate(lengths, initial=0)]
        exact = reference.varlen(*wide, ends, ends, max_seqlen_k=max(lengths), **options)
    else:
        exact = reference.dense(*wide, **options)
    reference.assert_lse_close(actual, exact.softmax_lse)


def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """(batch, seqlen, nheads, headdim); the options are those of `reference.same_precision`."""
    return reference.dense(q, k, v, attend=reference.same_precision, **options).out


def packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths_q: Sequence[int],
    lengths_k: Sequence[int] | None = None,
    **options: Any,
) -> Tensor:
    """(total, nheads, headdim): one sequence after the other."""
    lengths_k = lengths_q if lengths_k is None else lengths_k
    ends = ([*accumulate(lengths, initial=0)] for lengths in (lengths_q, lengths_k))
    options.setdefault("max_seqlen_k", max(lengths_k))
    return reference.varlen(q, k, v, *ends, attend=reference.same_precision, **options).out


def rotated(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Sequence[int] | None = None,
    interleaved: bool = False,
) -> Tensor:
    """(..., seqlen, nheads, headdim) with token i at row positions[i] of the tables."""
    rows = list(range(x.shape[-3])) if positions is None else list(positions)
    cos, sin = (table[rows, None, :].to(x.dtype) for table in (cos, sin))
    turned, rest = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return torch.cat((turned, rest), dim=-1)


def tables(rows: int, rotary_dim: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin of rotary embedding, (rows, rotary_dim / 2), in float32."""
    frequencies = base ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angles = torch.arange(rows, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis."""
    centred = x - x.mean(-1, keepdim=True)
    normal = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight
    return normal if bias is None else normal + bias


def rms_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean of squares + eps) * weight + bias over the last axis."""
    normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    return normal if bias is None else normal + bias


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(the norm of x + residual, x + residual)."""
    return layer_norm(x + residual, weight, bias, eps), x + residual


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(the norm of x + residual, x + residual)."""
    return rms_norm(x + residual, weight, bias, eps), x + residual


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """lse - logit of the label for each row, 0 where the label is ignored."""
    ignored = labels == ignore_index
    picked = logits.gather(1, labels.masked_fill(ignored, 0)[:, None])[:, 0]
    return (torch.logsumexp(logits, -1) - picked).masked_fill(ignored, 0.0)


def swiglu(x: Tensor, y: Tensor) -> Tensor:
    """silu(x) * y."""
    return x * torch.sigmoid(x) * y


def mlp(x: Tensor, weight1: Tensor, weight2: Tensor, bias1: Tensor, bias2: Tensor) -> Tensor:
    """Two linear layers with the tanh approximation of GELU between them."""
    hidden = functional.gelu(functional.linear(x, weight1, bias1), approximate="tanh")
    return functional.linear(hidden, weight2, bias2)


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _on_host(x: Any, dtype: torch.dtype | None = None) -> Any:
    if not isinstance(x, Tensor):
        return x
    return x.detach().cpu().to(dtype) if _is_float(x) else x.cpu()


def _both(function: Function, inputs: Sequence[Any], options: Any) -> tuple[Any, Any]:
    answers = []
    for dtype in (torch.float64, None):
        answer = function(
            *(_on_host(x, dtype) for x in inputs),
            **{name: _on_host(x, dtype) for name, x in options.items()},
        )
        answers.append((answer,) if isinstance(answer, Tensor) else answer)
    return answers[0], answers[1]
