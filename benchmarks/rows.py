"""Rotary, norms, losses and padding on the CPU beside the shortest torch expression of the same.

The same numbers: 16-bit tensors are computed in float32 and rounded once, as flash-attn has it.
What an expression may prepare once, such as tables as wide as a head, is prepared before.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from flash_attn_npu.bert_padding import index_first_axis, pad_input, unpad_input
from flash_attn_npu.layers.rotary import apply_rotary_emb
from flash_attn_npu.ops.layer_norm import (
    dropout_add_layer_norm,
    dropout_add_layer_norm_parallel_residual,
)
from flash_attn_npu.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn_npu.ops.triton.layer_norm import layer_norm_fn, rms_norm_fn

from . import costs
from .figures import Call, Figure, Measure, Run
from .speed import BF16, FP32, NAMES, WAYS

HEADDIM = 64
EPS = 1e-6
DROPOUT = 0.1
SCALE = 1e-4


class Pair(NamedTuple):
    """Two functions of the same tensors, and how many of these, from the first, have a gradient."""

    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    tensors: tuple[Tensor, ...]
    leaves: int = 1


Make = Callable[[torch.dtype, tuple[int, int, int]], Pair]
"""A pair for a dtype and a (batch, seqlen, hidden)."""


def of_rows(shape: tuple[int, ...], dtype: torch.dtype, count: int) -> tuple[Tensor, ...]:
    """`count` tensors of this shape, and four weights, which may be biases too."""
    rows = [torch.randn(shape).to(dtype) for _ in range(count)]
    return (*rows, *(torch.randn(shape[-1]).to(dtype) for _ in range(4)))


def rotary(interleaved: bool, dtype: torch.dtype, shape: tuple[int, int, int]) -> Pair:
    x = torch.randn(*shape[:2], shape[2] // HEADDIM, HEADDIM).to(dtype)
    angles = torch.outer(torch.arange(float(shape[1])), 10_000 ** -torch.linspace(0, 1, 32))
    cos, sin = (table.to(dtype) for table in (angles.cos(), angles.sin()))
    wide = [torch.cat((table, table), -1).float()[:, None] for table in (cos, sin)]
    turns = torch.complex(cos.float(), sin.float())[:, None]

    def halves(x: Tensor) -> Tensor:
        given = x.float()
        first, second = given.chunk(2, -1)
        return (given * wide[0] + torch.cat((-second, first), -1) * wide[1]).to(x.dtype)

    def neighbours(x: Tensor) -> Tensor:
        turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * turns
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)

    ours = partial(apply_rotary_emb, cos=cos, sin=sin, interleaved=interleaved)
    return Pair(ours, neighbours if interleaved else halves, (x,))


def rms(residual: bool, dtype: torch.dtype, shape: tuple[int, int, int]) -> Pair:
    x, added, weight, *_ = of_rows(shape, dtype, 2)

    def normed(s: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(s, shape[-1:], weight.float(), EPS).to(dtype)

    if not residual:
        ours = partial(rms_norm_fn, bias=None, eps=EPS)
        return Pair(ours, lambda x, w: normed(x.float(), w), (x, weight), 2)

    def theirs(x: Tensor, weight: Tensor, added: Tensor) -> Any:
        s = x.float() + added
        return normed(s, weight), s.to(dtype)

    def summed(x: Tensor, weight: Tensor, added: Tensor) -> Any:
        return rms_norm_fn(x, weight, None, added, eps=EPS, prenorm=True)

    return Pair(summed, theirs, (x, weight, added), 3)


def layer(residual: bool, dtype: torch.dtype, shape: tuple[int, int, int]) -> Pair:
    x, added, weight, bias, *_ = of_rows(shape, dtype, 2)
    if not residual:

        def normed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            # float32 parameters: torch's kernel would round mean and rstd to 16 bit with others;
            # float32 rows where there is a gradient: it sums up 16-bit ones in 16 bit
            s = x.float() if x.requires_grad else x
            return F.layer_norm(s, shape[-1:], weight.float(), bias.float(), EPS).to(dtype)

        return Pair(partial(layer_norm_fn, eps=EPS), normed, (x, weight, bias), 3)

    def theirs(x: Tensor, weight: Tensor, bias: Tensor, added: Tensor) -> Any:
        s = x.float() + added
        normed = F.layer_norm(s, shape[-1:], weight.float(), bias.float(), EPS)
        return normed.to(dtype), s.to(dtype)

    ours = partial(layer_norm_fn, eps=EPS, prenorm=True)
    return Pair(ours, theirs, (x, weight, bias, added), 4)


def dropped(dtype: torch.dtype, shape: tuple[int, int, int]) -> Pair:
    x, added, weight, bias, *_ = of_rows(shape, dtype, 2)

    def ours(x: Tensor, weight: Tensor, bias: Tensor, added: Tensor) -> Any:
        return dropout_add_layer_norm(x, added, weight, bias, DROPOUT, EPS, prenorm=True)

    def theirs(x: Tensor, weight: Tensor, bias: Tensor, added: Tensor) -> Any:
        s = F.dropout(x.float(), DROPOUT) + added
        normed = F.layer_norm(s, shape[-1:], weight.float(), bias.float(), EPS)
        return normed.to(dtype), s.to(dtype)

    return Pair(ours, theirs, (x, weight, bias, added), 4)


def parallel(dtype: torch.dtype, shape: tuple[int, int, int]) -> Pair:
    *tensors, w0, b0, w1, b1 = of_rows(shape, dtype, 3)

    def ours(x: Tensor, x1: Tensor, added: Tensor, *params: Tensor) -> Any:
        return dropout_add_layer_norm_parallel_residual(
            x, x1, added, *params, 0.0, EPS, prenorm=True
        )

    def theirs(x: Tensor, x1: Tensor, added: Tensor, *params: Tensor) -> Any:
        s, (w0, b0, w1, b1) = x.float() + x1 + added, (p.float() for p in params)
        both = (F.layer_norm(s, shape[-1:], *p, EPS).to(dtype) for p in ((w0, b0), (w1, b1)))
        return *both, s.to(dtype)

    return Pair(ours, theirs, (*tensors, w0, b0, w1, b1), 7)


def loss(options: dict[str, Any], dtype: torch.dtype, shape: tuple[int, int, int]) -> Pair:
    rows = max(16, shape[0] * shape[1] // 16)
    logits = torch.randn(rows, shape[0] * shape[1] * shape[2] // rows).to(dtype)
    labels = torch.randint(logits.shape[1], (rows,))
    smoothing = options.get("label_smoothing", 0.0)

    def theirs(logits: Tensor) -> Any:
        wide = logits.float()
        losses = F.cross_entropy(wide, labels, reduction="none", label_smoothing=smoothing)
        if "lse_square_scale" not in options:
            return losses
        squares = SCALE * wide.logsumexp(-1).square()
        return losses + squares, squares

    def ours(logits: Tensor) -> Any:
        found = cross_entropy_loss(logits, labels, **options)
        return found if "lse_square_scale" in options else found[0]

    return Pair(ours, theirs, (logits,))


def mask_of(shape: tuple[int, int, int]) -> Tensor:
    used = torch.linspace(shape[1] // 4, shape[1], shape[0]).long()
    return (torch.arange(shape[1]) < used[:, None]).int()


def unpadding(dtype: torch.dtype, shape: tuple[int, int, int]) -> Pair:
    mask = mask_of(shape)

    def theirs(x: Tensor) -> Any:
        indices = mask.flatten().nonzero().flatten()
        seqlens = mask.sum(-1, dtype=torch.int32)
        cumulative = F.pad(seqlens.cumsum(0, dtype=torch.int32), (1, 0))
        return x.flatten(0, 1)[indices], indices, cumulative, seqlens.max().item()

    return Pair(partial(unpad_input, attention_mask=mask), theirs, (torch.randn(shape).to(dtype),))


def padding(dtype: torch.dtype, shape: tuple[int, int, int]) -> Pair:
    indices = mask_of(shape).flatten().nonzero().flatten()
    rows = torch.randn(len(indices), shape[2]).to(dtype)
    total = shape[0] * shape[1]

    def theirs(rows: Tensor) -> Tensor:
        padded = rows.new_zeros(total, shape[2])
        padded[indices] = rows
        return padded.view(shape)

    def ours(rows: Tensor) -> Tensor:
        return pad_input(rows, indices, *shape[:2])

    return Pair(ours, theirs, (rows,))


def picking(dtype: torch.dtype, shape: tuple[int, int, int]) -> Pair:
    indices = mask_of(shape).flatten().nonzero().flatten()
    rows = torch.randn(shape[0] * shape[1], shape[2]).to(dtype)
    return Pair(partial(index_first_axis, indices=indices), lambda x: x[indices], (rows,))


MAKES: dict[str, Make] = {
    "rotary": partial(rotary, False),
    "rotary interleaved": partial(rotary, True),
    "rms_norm": partial(rms, False),
    "rms_norm with residual": partial(rms, True),
    "layer_norm": partial(layer, False),
    "layer_norm with residual": partial(layer, True),
    "dropout_add_layer_norm": dropped,
    "parallel residual": parallel,
    "cross entropy": partial(loss, {}),
    "cross entropy smoothing": partial(loss, {"label_smoothing": 0.1}),
    "cross entropy z-loss": partial(loss, {"lse_square_scale": SCALE}),
    "cross entropy inplace": partial(loss, {"inplace_backward": True}),
    "unpad_input": unpadding,
    "pad_input": padding,
    "index_first_axis": picking,
}


def call_of(function: Callable[..., Any], pair: Pair, grad: bool) -> Call:
    if not grad:
        return partial(function, *pair.tensors)
    leaves = [x.detach().requires_grad_() for x in pair.tensors[: pair.leaves]]
    rest = pair.tensors[pair.leaves :]

    def outputs() -> list[Tensor]:
        answer = function(*leaves, *rest)
        every = answer if isinstance(answer, tuple) else (answer,)
        return [one for one in every if isinstance(one, Tensor) and one.requires_grad]

    gradients = [torch.randn_like(one) for one in outputs()]
    return lambda: torch.autograd.grad(outputs(), leaves, gradients)


def timed(name: str, dtype: torch.dtype, size: str, grad: bool, run: Run) -> list[Figure]:
    pair = MAKES[name](dtype, run.sizes.rows if size == "large" else (2, 8, 1024))
    told = f"rowwise {name} {NAMES[dtype]} {size}, {WAYS[grad]}"
    ours, theirs = (call_of(function, pair, grad) for function in (pair.ours, pair.theirs))
    return [run.beside(told, "rowwise", ours, theirs)]


def held(name: str, dtype: torch.dtype, grad: bool, run: Run) -> list[Figure]:
    pair = MAKES[name](dtype, run.sizes.rows)
    peaks = []
    for function in (pair.ours, pair.theirs):
        call = call_of(function, pair, grad)
        call()
        peaks.append(costs.peak_bytes(call))
    told = f"rowwise memory {name} {NAMES[dtype]}, {WAYS[grad]}"
    return [Figure(told, peaks[0] / peaks[1], "x", "rowwise memory", *peaks)]


def host(run: Run) -> list[Figure]:
    """benchmarks/rowwise.py in a child: the simulated card must be there before torch is used."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "rowwise.json"
        quick = ["--quick"] if run.sizes.steps == 1 else []
        costs.in_child(str(costs.ROOT / "benchmarks" / "rowwise.py"), "-o", str(target), *quick)
        ratios = json.loads(target.read_text())
    return [Figure(f"rowwise host, {k}", v, "x", "rowwise host") for k, v in ratios.items()]


def cases(run: Run) -> dict[str, Measure]:
    """Every function in two dtypes and sizes, by the name that `--only` looks for."""
    found: dict[str, Measure] = {}
    dtypes, ways = (BF16, FP32), (False, True)
    for name, dtype, size, grad in product(MAKES, dtypes, ("small", "large"), ways):
        told = f"rowwise {name} {NAMES[dtype]} {size} {WAYS[grad]}"
        found[told] = partial(timed, name, dtype, size, grad)
    for name, dtype, grad in product(MAKES, dtypes, ways):
        found[f"rowwise memory {name} {NAMES[dtype]} {WAYS[grad]}"] = partial(
            held, name, dtype, grad
        )
    return found | {"rowwise host": host}
