"""Questions to rotations, norms, gates and losses, each with its float64 answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._core.problems.rowwise import Turn
from .._core.rowwise.gates import geglu
from .._core.rowwise.rotation import rotate_alike
from ..ops.activations import swiglu
from ..ops.triton.cross_entropy import cross_entropy_loss
from ..ops.triton.layer_norm import layer_norm_fn
from ..ops.triton.rotary import apply_rotary
from .truth import judged

__all__ = ["Gate", "Geglu", "Loss", "Norm", "Rotation"]

Figures = dict[str, dict[str, float]]
EPS = 1e-5


def _drawn(seed: int, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def _compared(
    ours: Callable[..., Tensor],
    formula: Callable[..., Tensor],
    inputs: list[Tensor],
    device: torch.device,
    *,
    grad: bool = True,
) -> Figures:
    """Forward and gradients of ours on the device, against the formula in float64 and plainly."""
    answers = []
    for function, where, dtype in (
        (ours, device, None),
        (formula, torch.device("cpu"), torch.float64),
        (formula, torch.device("cpu"), None),
    ):
        leaves = [x.detach().to(where, dtype or x.dtype).requires_grad_(grad) for x in inputs]
        out = function(*leaves)
        dout = torch.linspace(-1, 1, out.numel()).view(out.shape).to(where, out.dtype)
        grads = torch.autograd.grad(out, leaves, dout) if grad else ()
        answers.append([out, *grads])
    names = ["out", *(f"gradient {place}" for place in range(len(inputs)))]
    return {
        name: judged(actual, exact.detach(), plain.detach())
        for name, actual, exact, plain in zip(names, *answers, strict=False)
    }


@dataclass(frozen=True)
class Rotation:
    """apply_rotary of (batch, seqlen, nheads, headdim).

    places: at positions in a tensor, one for each sequence. pair: with the first head once more as
    a tensor of its own, as a step of decoding rotates q and k.
    """

    dtype: torch.dtype = torch.float16
    table: torch.dtype | None = None
    heads: int = 4
    headdim: int = 64
    rotary_dim: int = 64
    interleaved: bool = False
    seqlen: int = 40
    places: tuple[int, ...] | None = None
    pair: bool = False
    grad: bool = False

    def ask(self, device: torch.device) -> Figures:
        """Ask the device, and compare with the truth."""
        starts = self.places or (0, 0)
        (x,) = _drawn(7, self.dtype, (len(starts), self.seqlen, self.heads, self.headdim))
        position = torch.arange(max(starts) + self.seqlen)[:, None] * 0.01
        angle = position * torch.arange(1, self.rotary_dim // 2 + 1)
        table = self.table or self.dtype
        cos, sin = angle.cos().to(table), angle.sin().to(table)
        rows = torch.tensor(starts)[:, None] + torch.arange(self.seqlen)

        def formula(x: Tensor) -> Tensor:
            x = torch.cat((x, x[:, :, :1]), 2) if self.pair else x
            half = self.rotary_dim // 2
            c, s = (t.to(x.dtype)[rows][:, :, None] for t in (cos, sin))
            if self.interleaved:
                first, second = x[..., : 2 * half : 2], x[..., 1 : 2 * half : 2]
            else:
                first, second = x[..., :half], x[..., half : 2 * half]
            turned = (first * c - second * s, first * s + second * c)
            whole = (
                torch.stack(turned, -1).flatten(-2) if self.interleaved else torch.cat(turned, -1)
            )
            return torch.cat((whole, x[..., 2 * half :]), dim=-1)

        tables = cos.to(device), sin.to(device)
        offsets = torch.tensor(starts).to(device) if self.places else 0

        def ours(x: Tensor) -> Tensor:
            turned = x
            # tables that have come before may be looked up by the kernel itself
            for _ in range(2 if self.places else 1):
                if self.pair:
                    turn = Turn(offsets, interleaved=self.interleaved)
                    turned = torch.cat(rotate_alike((x, x[:, :, :1]), *tables, turn), 2)
                    continue
                turned = apply_rotary(x, *tables, offsets, interleaved=self.interleaved)
            return turned

        return _compared(ours, formula, [x], device, grad=self.grad)


@dataclass(frozen=True)
class Norm:
    """layer_norm_fn of (rows, columns); options are further arguments of it.

    scaled: with rowscale. branch: with x1. second: with weight1.
    """

    rms: bool = True
    dtype: torch.dtype = torch.bfloat16
    columns: int = 256
    residual: torch.dtype | None = None
    bias: bool = False
    weight: torch.dtype | None = None
    grad: bool = False
    scaled: bool = False
    branch: bool = False
    second: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def ask(self, device: torch.device) -> Figures:
        """Ask the device, and compare with the truth."""
        rows = (33, self.columns)
        x, residual, x1 = _drawn(9, self.dtype, rows, rows, rows)
        weight, bias, weight1 = (
            1 + t / 4 for t in _drawn(11, self.weight or self.dtype, *[(self.columns,)] * 3)
        )
        given: dict[str, Tensor] = {"x": x, "weight": weight}
        if self.bias:
            given["bias"] = bias
        if self.residual is not None:
            given["residual"] = residual.to(self.residual)
        if self.branch:
            given["x1"] = x1
        if self.second:
            given["weight1"] = weight1
        names = list(given)
        scale = torch.linspace(0.5, 1.5, rows[0]).to(self.dtype) if self.scaled else None

        def ours(*tensors: Tensor) -> Tensor:
            named = {"bias": None, **dict(zip(names, tensors, strict=True))}
            if scale is not None:
                named["rowscale"] = scale.to(device)
            if self.options.get("out"):
                named["out"] = torch.empty_like(tensors[0])
            answer: Any = layer_norm_fn(**named, eps=EPS, is_rms_norm=self.rms)  # type: ignore[arg-type]
            return torch.cat(answer[:2]) if isinstance(answer, tuple) else answer

        def formula(*tensors: Tensor) -> Tensor:
            named = dict(zip(names, tensors, strict=True))
            total = (
                named["x"] if scale is None else named["x"] * scale.to(named["x"].dtype)[:, None]
            )
            for more in ("x1", "residual"):
                total = total + named[more] if more in named else total
            if not self.rms:
                total = total - total.mean(-1, keepdim=True)
            normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS)
            first = normed * named["weight"] + named.get("bias", torch.zeros(()).to(normed.dtype))
            if "weight1" in named:
                return torch.cat((first, normed * named["weight1"])).to(named["x"].dtype)
            return first.to(named["x"].dtype)

        return _compared(ours, formula, list(given.values()), device, grad=self.grad)


@dataclass(frozen=True)
class Gate:
    """swiglu of the two halves of one tensor, or of two tensors."""

    dtype: torch.dtype = torch.bfloat16
    columns: int = 128
    halves: bool = True
    grad: bool = True

    def ask(self, device: torch.device) -> Figures:
        """Ask the device, and compare with the truth."""
        (both,) = _drawn(13, self.dtype, (17, 2 * self.columns))

        def ours(both: Tensor) -> Tensor:
            x, y = both.chunk(2, dim=-1)
            gated: Tensor = swiglu(x, y) if self.halves else swiglu(x.clone(), y.clone())
            return gated

        def formula(both: Tensor) -> Tensor:
            x, y = both.chunk(2, dim=-1)
            return x * torch.sigmoid(x) * y

        return _compared(ours, formula, [both], device, grad=self.grad)


@dataclass(frozen=True)
class Geglu:
    """y * gelu(gate) of one tensor, as GatedMlp computes it."""

    dtype: torch.dtype = torch.bfloat16
    shape: tuple[int, ...] = (17, 128)
    grad: bool = False

    def ask(self, device: torch.device) -> Figures:
        """Ask the device, and compare with the truth."""
        (both,) = _drawn(15, self.dtype, self.shape)

        def formula(both: Tensor) -> Tensor:
            y, gate = both.chunk(2, dim=-1)
            return y * torch.nn.functional.gelu(gate)

        return _compared(geglu, formula, [both], device, grad=self.grad)


@dataclass(frozen=True)
class Loss:
    """cross_entropy_loss of (rows, classes); precomputed: with precomputed_lse."""

    dtype: torch.dtype = torch.float32
    rows: int = 37
    classes: int = 300
    precomputed: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def ask(self, device: torch.device) -> Figures:
        """Ask the device, and compare with the truth."""
        (logits,) = _drawn(17, self.dtype, (self.rows, self.classes))
        labels = torch.arange(self.rows) * 7 % self.classes
        smoothing = self.options.get("label_smoothing", 0.0)
        scale = self.options.get("logit_scale", 1.0)
        square = self.options.get("lse_square_scale", 0.0)

        def ours(logits: Tensor) -> Tensor:
            more = dict(self.options)
            if self.precomputed:
                more["precomputed_lse"] = torch.logsumexp(logits.detach().float() * scale, -1)
            # inplace_backward writes where the logits lie
            mine = logits.clone() if more.get("inplace_backward") else logits
            return cross_entropy_loss(mine, labels.to(device), **more)[0]

        def formula(logits: Tensor) -> Tensor:
            # the loss is held in float32 whatever the logits
            x = (logits if logits.dtype == torch.float64 else logits.float()) * scale
            lse = torch.logsumexp(x, -1)
            picked = x.gather(-1, labels[:, None])[:, 0]
            loss = lse - (1 - smoothing) * picked - smoothing * x.mean(-1)
            total: Tensor = loss + square * lse.square()
            return total

        return _compared(ours, formula, [logits], device)
