"""Norms of sums from the mathematics, by torch's autograd, and what an answer may be off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

EPS = 1e-5
FLOAT32_NOISE = 16 * torch.finfo(torch.float32).eps
RELATIVE = 1e-5
"""What may come on top of twice the error of a plain computation, relative to the largest value."""

Tensors = Mapping[str, Tensor]


class Options(NamedTuple):
    """What is not a tensor; masks are True for what is kept."""

    rms: bool = False
    zero_centered: bool = False
    p: float = 0.0
    mask: Tensor | None = None
    mask1: Tensor | None = None
    constant: float = 1.0


def solve(given: Tensors, options: Options, total: torch.dtype | None = None) -> dict[str, Tensor]:
    """y, y1 and the sum, in the dtypes that torch promotes to: float64 for float64 arguments.

    Args:
        total: the dtype that the sum is kept in; that in which it is computed if None.
    """

    def dropped(values: Tensor, mask: Tensor | None) -> Tensor:
        return values if mask is None else values * mask / (1 - options.p)

    s = given["x"] * options.constant
    if "rowscale" in given:
        s = s * given["rowscale"].unsqueeze(-1)
    s = dropped(s, options.mask)
    if "layerscale" in given:
        s = s * given["layerscale"]
    if "x1" in given:
        s = s + dropped(given["x1"], options.mask1)
    if "residual" in given:
        s = s + given["residual"]
    s = s.to(total or s.dtype)
    if options.rms:
        normal = s / (s**2).mean(dim=-1, keepdim=True).add(EPS).sqrt()
    else:
        centred = s - s.mean(dim=-1, keepdim=True)
        normal = centred / (centred**2).mean(dim=-1, keepdim=True).add(EPS).sqrt()
    results = {"total": s}
    for which in ("", "1"):
        if "weight" + which in given:
            weight = given["weight" + which] + (1 if options.zero_centered else 0)
            results["y" + which] = normal * weight + given.get("bias" + which, 0)
    return results


def judge(results: Tensors, leaves: Tensors, options: Options, **dtypes: torch.dtype) -> None:
    """Results and their gradients are right, contiguous, and in their dtypes.

    Args:
        results: some of y, y1 and total, as computed from `leaves`.
        leaves: the tensors under the names of `layer_norm_fn`.
        dtypes: those of results that have another dtype than x.
    """
    differentiable = {n: leaf for n, leaf in leaves.items() if leaf.requires_grad}
    directions = {name: torch.randn(r.shape).to(r) for name, r in results.items()}
    got = gradients(results, differentiable, directions)
    on_host = options._replace(mask=_host(options.mask, None), mask1=_host(options.mask1, None))
    answers = []
    stored = leaves["residual"].dtype if "residual" in leaves else None
    for dtype, total in ((torch.float64, None), (None, stored)):
        copies = {
            name: _host(leaf.detach(), dtype).requires_grad_(leaf.requires_grad)
            for name, leaf in leaves.items()
        }
        solved = solve(copies, on_host, total)
        ends = {name: _host(d, dtype) for name, d in directions.items()}
        of = {name: copies[name] for name in differentiable}
        answers.append((solved, gradients({n: solved[n] for n in ends}, of, ends, True)))
    (exact, exact_grads), (plain, plain_grads) = answers
    for name, result in results.items():
        assert result.is_contiguous()
        assert result.dtype == dtypes.get(name, leaves["x"].dtype), name
        if result.device.type == "cpu":
            assert_rounded_once(result, exact[name])
        else:
            # a fused operator may see the sum as it was rounded
            assert_close(name, result, exact[name], plain[name])
    for name, leaf in differentiable.items():
        assert got[name].dtype == leaf.dtype
        assert got[name].shape == leaf.shape
        assert_close(name, got[name], exact_grads[name], plain_grads[name])


def gradients(
    results: Tensors, leaves: Tensors, directions: Tensors, unused: bool = False
) -> dict[str, Tensor]:
    """The gradients of all leaves, of the sum of all results in their directions.

    Args:
        unused: leaves that no result depends on have a gradient of zeros.
    """
    ends = [directions[name].to(result.dtype) for name, result in results.items()]
    found = torch.autograd.grad(
        list(results.values()), list(leaves.values()), ends, materialize_grads=unused
    )
    return dict(zip(leaves, found, strict=True))


def assert_rounded_once(got: Tensor, exact: Tensor) -> None:
    """`got` is `exact` but for arithmetic in float32 and one rounding."""
    noise = 1e-12 if got.dtype == torch.float64 else FLOAT32_NOISE
    error = _beyond_rounding(got, exact)
    assert error <= noise * _largest(exact), f"off by {error} more than one rounding"


def assert_close(name: str, got: Tensor, exact: Tensor, plain: Tensor) -> None:
    """At most twice as far from float64 as a plain computation in the dtypes of the arguments.

    Besides, no answer can be closer than one rounding. Where the plain computation overflows, it
    allows nothing.
    """
    error = _beyond_rounding(got, exact)
    plain_error = (plain.double() - exact).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    allowed = 2 * _largest(plain_error) + RELATIVE * _largest(exact)
    assert error <= allowed, f"{name} is off by {error}, {allowed} is allowed"


def _beyond_rounding(got: Tensor, exact: Tensor) -> float:
    error = (_host(got, torch.float64) - exact).abs()
    return _largest((error - 0.51 * torch.finfo(got.dtype).eps * exact.abs()).clamp(min=0))


def _largest(values: Tensor) -> float:
    return float(values.detach().abs().max()) if values.numel() else 0.0


def _host(tensor: Any, dtype: torch.dtype | None) -> Any:
    return None if tensor is None else tensor.cpu().to(dtype or tensor.dtype)
