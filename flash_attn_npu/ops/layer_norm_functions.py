"""What `ops.layer_norm` and `ops.rms_norm` share: autograd classes, and two calls of `normalize`.

Masks are uint8 here, and all ones without dropout.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from ..attention.checks import require_tensors
from ..errors import ArgumentError, explain
from ..first_order import first_order
from ..kernels import norms
from ..kernels.norms import NormCall, Saved
from .triton.layer_norm_functions import Answer, compose, gradients, keep, normalize, serve

__all__ = [
    "DropoutAddLayerNormFn",
    "DropoutAddLayerNormParallelResidualFn",
    "DropoutAddLayerNormSubsetFn",
    "dropout_add",
    "dropout_add_parallel_residual",
]

GAMMA = {"x": "x0", "weight": "gamma", "bias": "beta", "layerscale": "colscale", "eps": "epsilon"}
GAMMA_PARALLEL = {
    "x": "x0",
    "weight": "gamma0",
    "bias": "beta0",
    "weight1": "gamma1",
    "bias1": "beta1",
    "eps": "epsilon",
}


def dropout_add(function: str, call: NormCall, return_dropout_mask: bool) -> Any:
    """z, followed by the sum if call.prenorm, and by the mask."""
    return _arranged(call, normalize(function, call), return_dropout_mask)


def dropout_add_parallel_residual(function: str, call: NormCall, return_dropout_mask: bool) -> Any:
    """z0 and z1, followed by the sum if call.prenorm, and by two masks."""
    return _arranged_parallel(call, normalize(function, call), return_dropout_mask)


class DropoutAddLayerNormFn(torch.autograd.Function):
    """Autograd of `dropout_add_layer_norm`, with its results; colscale is layerscale."""

    @staticmethod
    def forward(
        ctx: Any,
        x0: Tensor,
        residual: Tensor | None,
        gamma: Tensor,
        beta: Tensor | None,
        rowscale: Tensor | None,
        colscale: Tensor | None,
        dropout_p: float,
        epsilon: float,
        residual_in_fp32: bool = False,
        prenorm: bool = False,
        is_rms_norm: bool = False,
        return_dmask: bool = False,
    ) -> Any:
        """Add and normalise."""
        # fmt: off
        call = NormCall(
            x0, gamma, beta, residual, rowscale=rowscale, layerscale=colscale, eps=epsilon,
            dropout_p=dropout_p, prenorm=prenorm, residual_in_fp32=residual_in_fp32,
            is_rms_norm=is_rms_norm,
        )
        # fmt: on
        norms.check(call, GAMMA)
        compose("DropoutAddLayerNormFn", call)
        ctx.prenorm = prenorm
        return _arranged(call, serve(ctx, call), return_dmask)

    @staticmethod
    def backward(ctx: Any, dz: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
        """The gradients of the tensors, none of rowscale."""
        order = ("x", "residual", "weight", "bias", "rowscale", "layerscale")
        return gradients(ctx, ctx.saved_tensors, order, dz, None, args[0] if ctx.prenorm else None)


class DropoutAddLayerNormParallelResidualFn(torch.autograd.Function):
    """Autograd of `dropout_add_layer_norm_parallel_residual`, with its results."""

    @staticmethod
    def forward(
        ctx: Any,
        x0: Tensor,
        x1: Tensor | None,
        residual: Tensor | None,
        gamma0: Tensor,
        beta0: Tensor | None,
        gamma1: Tensor | None,
        beta1: Tensor | None,
        dropout_p: float,
        epsilon: float,
        residual_in_fp32: bool = False,
        prenorm: bool = False,
        is_rms_norm: bool = False,
        return_dmask: bool = False,
    ) -> Any:
        """Add and normalise."""
        # fmt: off
        call = NormCall(
            x0, gamma0, beta0, residual, x1, gamma1, beta1, eps=epsilon, dropout_p=dropout_p,
            prenorm=prenorm, residual_in_fp32=residual_in_fp32, is_rms_norm=is_rms_norm,
        )
        # fmt: on
        norms.check(call, GAMMA_PARALLEL)
        compose("DropoutAddLayerNormParallelResidualFn", call)
        ctx.prenorm = prenorm
        return _arranged_parallel(call, serve(ctx, call), return_dmask)

    @staticmethod
    def backward(ctx: Any, dz0: Tensor, dz1: Any, *args: Any) -> tuple[Tensor | None, ...]:
        """The gradients of the tensors."""
        order = ("x", "x1", "residual", "weight", "bias", "weight1", "bias1")
        return gradients(ctx, ctx.saved_tensors, order, dz0, dz1, args[0] if ctx.prenorm else None)


class DropoutAddLayerNormSubsetFn(torch.autograd.Function):
    """Autograd of `dropout_add_layer_norm_subset`, with its results; colscale is layerscale."""

    @staticmethod
    def forward(
        ctx: Any,
        x0: Tensor,
        residual: Tensor | None,
        gamma: Tensor,
        beta: Tensor | None,
        colscale: Tensor | None,
        x0_subset: Tensor | None,
        out_subset: Tensor | None,
        dropout_p: float,
        epsilon: float,
        rowscale_const: float,
        out_numrows: int,
        residual_in_fp32: bool = False,
        prenorm: bool = False,
        is_rms_norm: bool = False,
        return_dmask: bool = False,
    ) -> Any:
        """Spread the rows of x0, add, normalise, and gather rows of the result."""
        _check_subsets(x0, residual, x0_subset, out_subset)
        x = x0 if x0_subset is None else _spread(x0, x0_subset)
        ctx.residual_shape = None if residual is None else residual.shape
        # fmt: off
        call = NormCall(
            x, gamma, beta, None if residual is None else residual.reshape(x.shape),
            layerscale=colscale, eps=epsilon, dropout_p=dropout_p, prenorm=prenorm,
            residual_in_fp32=residual_in_fp32, is_rms_norm=is_rms_norm,
            rowscale_const=rowscale_const,
        )
        # fmt: on
        norms.check(call, GAMMA)
        compose("DropoutAddLayerNormSubsetFn", call)
        mask, _ = norms.draw_masks(call._replace(x=x0))
        spread = mask if mask is None or x0_subset is None else _spread(mask, x0_subset)
        normed = norms.forward(call, spread, None)
        keep(ctx, call, normed, (spread, None), x0_subset, out_subset)
        ctx.prenorm, ctx.x0_shape = prenorm, x0.shape
        z = normed.y if out_subset is None else _gathered(normed.y, out_subset, out_numrows)
        answer = Answer(z, None, normed.total, mask, None)
        return _arranged(call._replace(x=x0), answer, return_dmask)

    @staticmethod
    def backward(ctx: Any, dz: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
        """The gradients of the tensors."""
        saved_tensors, dtotal = ctx.saved_tensors, args[0] if ctx.prenorm else None
        with torch.no_grad():
            grads = _subset_gradients(ctx, saved_tensors, dz, dtotal)
        once = first_order("dropout_add_layer_norm_subset", grads, dz, dtotal, *saved_tensors)
        return *once, *(None for _ in ctx.needs_input_grad[len(once) :])


def _subset_gradients(
    ctx: Any, saved_tensors: tuple[Tensor, ...], dz: Tensor, dtotal: Tensor | None
) -> list[Tensor | None]:
    *tensors, x0_subset, out_subset = saved_tensors
    saved = Saved(*tensors)
    dy = dz if out_subset is None else _spread(dz, out_subset).view(saved.total.shape)
    order = ("x", "residual", "weight", "bias", "layerscale")
    needs = zip(order, ctx.needs_input_grad, strict=False)
    wanted = [field for field, needed in needs if needed]
    grads = norms.backward(saved, ctx.terms, wanted, dy, None, dtotal)
    if "x" in grads and x0_subset is not None:
        absent_and_rows = grads["x"].new_zeros(1 + ctx.x0_shape[:-1].numel(), dz.shape[-1])
        absent_and_rows.index_add_(0, x0_subset.flatten().long(), grads["x"])
        grads["x"] = absent_and_rows[1:].view(ctx.x0_shape)
    if "residual" in grads:
        grads["residual"] = grads["residual"].view(ctx.residual_shape)
    return [grads[field].to(ctx.dtypes[field]) if field in grads else None for field in order]


def _arranged(call: NormCall, answer: Answer, return_dropout_mask: bool) -> Any:
    results: tuple[Tensor | None, ...] = (answer.y,)
    if call.prenorm:
        results += (answer.total,)
    if return_dropout_mask:
        results += (_bytes(answer.mask, call.x),)
    return results if len(results) > 1 else answer.y


def _arranged_parallel(call: NormCall, answer: Answer, return_dropout_mask: bool) -> Any:
    results: tuple[Tensor | None, ...] = (answer.y, answer.y1)
    if call.prenorm:
        results += (answer.total,)
    if return_dropout_mask:
        results += (_bytes(answer.mask, call.x), _bytes(answer.mask1, call.x1))
    return results


def _bytes(mask: Tensor | None, x: Tensor | None) -> Tensor | None:
    if mask is not None:
        return mask.to(torch.uint8)
    return None if x is None else torch.ones(x.shape, dtype=torch.uint8, device=x.device)


def _spread(x: Tensor, subset: Tensor) -> Tensor:
    """Row j - 1 of x, (..., hidden), for each j > 0 in `subset`, zeros for each 0, as rows."""
    absent = x.new_zeros(1, x.shape[-1])
    rows = torch.cat((absent, x.reshape(-1, x.shape[-1])))
    return rows.index_select(0, subset.flatten().long())


def _gathered(y: Tensor, subset: Tensor, numrows: int) -> Tensor:
    """Row i of y at row j - 1 of (numrows, hidden), for the i-th j, if j > 0; zeros elsewhere."""
    subset = subset.flatten().long()
    numbers = torch.arange(1, 1 + subset.shape[0], device=subset.device)
    whence = subset.new_zeros(1 + numrows).index_copy(0, subset, numbers)
    return _spread(y, whence[1:])


def _check_subsets(
    x0: Tensor, residual: Tensor | None, x0_subset: Tensor | None, out_subset: Tensor | None
) -> None:
    given = {"x0": x0, "residual": residual, "x0_subset": x0_subset, "out_subset": out_subset}
    require_tensors(**{name: value for name, value in given.items() if value is not None})
    if x0.dim() == 0:
        _refuse("x0", "a tensor without dimensions", "(..., hidden)", "reshape x0")
    hidden = x0.shape[-1]
    rows = x0.shape[:-1].numel() if x0_subset is None else x0_subset.numel()
    for name, subset in (("x0_subset", x0_subset), ("out_subset", out_subset)):
        if subset is not None and (
            subset.dtype not in (torch.int32, torch.int64) or subset.numel() != rows
        ):
            _refuse(
                name,
                f"a {subset.dtype} tensor of shape {tuple(subset.shape)}",
                f"a torch.int32 or torch.int64 tensor of {rows} elements, one for each row",
                "number the rows that take part from 1, and pass 0 for the others",
            )
    if residual is not None and (
        residual.shape[-1:] != x0.shape[-1:] or residual.numel() != rows * hidden
    ):
        allowed = f"(..., {hidden}) with {rows} rows"
        _refuse("residual", f"shape {tuple(residual.shape)}", allowed, "pass a row for each token")


def _refuse(name: str, came: object, allowed: str, remedy: str) -> NoReturn:
    raise ArgumentError(explain(name, came, allowed, remedy))
