"""What `ops.layer_norm` and `ops.rms_norm` share: autograd classes, and two calls of `normalize`.

Masks are uint8 here, and all ones without dropout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ...errors import ArgumentError
from ..ground.dense_arguments import number, refuse_transforms, require_dense, truth, whole
from ..ground.records import replaced
from ..ground.second_derivatives import first_order
from ..kernels.composed import norm_blocks, norm_checks, norms
from ..kernels.composed.norms import Saved
from ..problems.norms import NormCall
from .answers import Answer
from .norms import X0, compose, gradients, keep, normalize, normed, serve

__all__ = [
    "DropoutAddLayerNormFn",
    "DropoutAddLayerNormParallelResidualFn",
    "DropoutAddLayerNormSubsetFn",
    "Subsets",
    "dropout_add",
    "dropout_add_parallel_residual",
    "dropout_add_subset",
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


class Subsets(NamedTuple):
    """Which rows take part: of x0, and of the result."""

    x0_subset: Tensor | None
    out_subset: Tensor | None
    out_numrows: int


def dropout_add(function: str, fields: tuple[Any, ...], return_dropout_mask: bool) -> Any:
    """z, followed by the sum if prenorm, and by the mask.

    Args:
        fields: those of NormCall, in their order.
    """
    if not truth("return_dropout_mask", return_dropout_mask):
        return normed(function, fields, False)
    call = NormCall(*fields)
    return _arranged(call, normalize(function, call, True), True)


def dropout_add_parallel_residual(
    function: str, fields: tuple[Any, ...], return_dropout_mask: bool
) -> Any:
    """z0 and z1, followed by the sum if prenorm, and by two masks; fields as in `dropout_add`."""
    return_dropout_mask = truth("return_dropout_mask", return_dropout_mask)
    call = NormCall(*fields)
    if call.weight1 is not None and not return_dropout_mask:
        return normed(function, fields, False)
    answer = normalize(function, call, return_dropout_mask)
    return _arranged_parallel(call, answer, return_dropout_mask)


def dropout_add_subset(call: NormCall, subsets: Subsets, return_dropout_mask: bool) -> Any:
    """As `dropout_add`, of some rows."""
    _check_subset_call(call, subsets, X0)
    return_dropout_mask = truth("return_dropout_mask", return_dropout_mask)
    refuse_transforms("x0")
    # fmt: off
    return DropoutAddLayerNormSubsetFn.apply(  # type: ignore[no-untyped-call]
        call.x, call.residual, call.weight, call.bias, call.layerscale, subsets.x0_subset,
        subsets.out_subset, call.dropout_p, call.eps, call.rowscale_const, subsets.out_numrows,
        call.residual_in_fp32, call.prenorm, call.is_rms_norm, return_dropout_mask,
    )
    # fmt: on


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
        norm_checks.check(call, GAMMA)
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
        norm_checks.check(call, GAMMA_PARALLEL)
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
        # fmt: off
        given = NormCall(
            x0, gamma, beta, residual, layerscale=colscale, eps=epsilon, dropout_p=dropout_p,
            prenorm=prenorm, residual_in_fp32=residual_in_fp32, is_rms_norm=is_rms_norm,
            rowscale_const=rowscale_const,
        )
        # fmt: on
        _check_subset_call(given, Subsets(x0_subset, out_subset, out_numrows), GAMMA)
        x = x0.reshape(-1, x0.shape[-1]) if x0_subset is None else _spread(x0, x0_subset)
        ctx.residual_shape = None if residual is None else residual.shape
        added = None if residual is None else residual.reshape(x.shape)
        call = replaced(given, x=x, residual=added)
        compose("DropoutAddLayerNormSubsetFn", call)
        mask, _ = norms.draw_masks(given)
        spread = mask
        if mask is not None:
            spread = mask.view(x.shape) if x0_subset is None else _spread(mask, x0_subset)
        normed = norm_blocks.forward(call, spread, None)
        if prenorm:
            # before it is saved, so that autograd notices a change of what is returned
            normed = replaced(normed, total=_like_x0(normed.total, x0.shape))
        keep(ctx, call, normed, (spread, None), x0_subset, out_subset)
        ctx.prenorm, ctx.x0_shape = prenorm, x0.shape
        z = normed.y if out_subset is None else _gathered(normed.y, out_subset, out_numrows)
        answer = Answer(_like_x0(z, x0.shape), None, normed.total, mask, None)
        return _arranged(given, answer, return_dmask)

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
    hidden = saved.weight.shape[0]
    saved = replaced(saved, total=saved.total.view(-1, hidden))
    dz = dz.reshape(-1, hidden)
    dtotal = None if dtotal is None else dtotal.reshape(-1, hidden)
    dy = dz if out_subset is None else _spread(dz, out_subset)
    order = ("x", "residual", "weight", "bias", "layerscale")
    needs = zip(order, ctx.needs_input_grad[: len(order)], strict=True)
    wanted = [field for field, needed in needs if needed]
    grads = norms.backward(saved, ctx.terms, wanted, dy, None, dtotal)
    if "x" in grads and x0_subset is not None:
        absent_and_rows = grads["x"].new_zeros(1 + ctx.x0_shape[:-1].numel(), dz.shape[-1])
        absent_and_rows.index_add_(0, x0_subset.flatten().long(), grads["x"])
        grads["x"] = absent_and_rows[1:]
    if "x" in grads:
        grads["x"] = grads["x"].view(ctx.x0_shape)
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


def _like_x0(rows: Tensor, x0_shape: torch.Size) -> Tensor:
    """(rows, hidden) with the dimensions that x0 has behind its first."""
    inner = x0_shape[1:-1].numel()
    if len(x0_shape) == 1:
        shape: tuple[int, ...] = (rows.numel(),)
    else:
        shape = (rows.shape[0] // inner if inner else x0_shape[0], *x0_shape[1:])
    # what an autograd.Function returns must be no view, else nobody may write to it
    whole: Tensor = torch.ops.aten._unsafe_view.default(rows, shape)
    return whole


def _check_subset_call(call: NormCall, subsets: Subsets, renamed: Mapping[str, str]) -> None:
    """Raise for the first argument that does not fit; `call` has x0 and residual as they came."""
    x0, residual = call.x, call.residual
    given = {"residual": residual, **subsets._asdict()}
    del given["out_numrows"]
    require_dense(x0=x0, **{name: value for name, value in given.items() if value is not None})
    if x0.dim() == 0:
        _refuse("x0", "a tensor without dimensions", "(..., hidden)", "reshape x0")
    rows = _check_subsets(x0, residual, subsets)
    if type(call.rowscale_const) is not float:
        number("rowscale_const", call.rowscale_const)
    # what the others are compared with has the shape that is computed in, and no memory
    shape = (rows, x0.shape[-1])
    stand_in = None if residual is None else residual.new_empty(()).expand(shape)
    compared = replaced(call, x=x0.new_empty(()).expand(shape), residual=stand_in)
    norm_checks.check(compared, renamed)


def _check_subsets(x0: Tensor, residual: Tensor | None, subsets: Subsets) -> int:
    """How many rows are computed."""
    x0_subset, out_subset, out_numrows = subsets
    hidden, x0_rows = x0.shape[-1], x0.shape[:-1].numel()
    rows = x0_rows if x0_subset is None else x0_subset.numel()
    for name, subset, most in (
        ("x0_subset", x0_subset, x0_rows),
        ("out_subset", out_subset, out_numrows),
    ):
        if subset is None:
            continue
        if subset.dtype not in (torch.int32, torch.int64) or subset.numel() != rows:
            _refuse(
                name,
                f"a {subset.dtype} tensor of shape {tuple(subset.shape)}",
                f"a torch.int32 or torch.int64 tensor of {rows} elements, one for each row",
                "number the rows that take part from 1, and pass 0 for the others",
            )
        if subset.device != x0.device:
            _refuse(name, subset.device, f"{x0.device}, as x0", f"pass {name}.to(x0.device)")
        if name == "out_subset":
            _check_out_numrows(out_numrows, rows)
        _check_numbers(name, subset, most)
    if residual is not None and (
        residual.shape[-1:] != x0.shape[-1:] or residual.numel() != rows * hidden
    ):
        allowed = f"(..., {hidden}) with {rows} rows"
        _refuse("residual", f"shape {tuple(residual.shape)}", allowed, "pass a row for each token")
    _check_whole("x0_subset", rows, x0)
    if out_subset is not None:
        _check_whole("out_numrows", out_numrows, x0)
    return rows


def _check_out_numrows(out_numrows: int, rows: int) -> None:
    whole("out_numrows", out_numrows)
    if out_numrows > rows:
        _refuse(
            "out_numrows",
            out_numrows,
            f"0 to {rows}, the elements of out_subset, each of which can fill one row",
            "pass out_subset.max()",
        )


def _check_numbers(name: str, subset: Tensor, most: int) -> None:
    """Raise for a number of a row that does not exist, where that can be read."""
    if subset.device.type != "cpu" or torch.compiler.is_compiling() or not subset.numel():
        return
    least, largest = (int(end) for end in subset.aminmax())
    if least < 0 or largest > most:
        allowed = f"0 to {most}, the rows of {'x0' if name == 'x0_subset' else 'out_numrows'}"
        wrong = least if least < 0 else largest
        _refuse(name, f"a row {wrong}", allowed, "number the rows from 1, 0 means none")
    if name == "out_subset" and bool((subset[subset > 0].bincount() > 1).any()):
        _refuse(name, "a row twice", "each row once", "number the rows that take part from 1")


def _check_whole(name: str, rows: int, x0: Tensor) -> None:
    """Raise unless so many rows can be given x0's dimensions behind its first."""
    inner = x0.shape[1:-1].numel()
    if rows % inner if inner else rows:
        _refuse(
            name,
            f"{rows} rows",
            f"a multiple of {inner}: results have x0's shape {tuple(x0.shape)} but for its first",
            f"pass x0 as (rows, {x0.shape[-1]})",
        )


def _refuse(name: str, came: object, allowed: str, remedy: str) -> NoReturn:
    raise ArgumentError(name, came, allowed, remedy)
