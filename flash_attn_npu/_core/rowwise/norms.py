"""Autograd of the norms, and `normalize`, through which every public norm function passes.

The gradient keeps the rounded sum, a statistic or two per row, dropout masks and parameters: no
copies in float32. The arithmetic is `kernels.composed.norms`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ground.dense_arguments import refuse_transforms, truth
from ..ground.functions import FORWARD, PLAIN, refuse_tangents
from ..ground.records import replaced
from ..ground.second_derivatives import first_order
from ..kernels.composed import norm_blocks, norm_checks, norms
from ..kernels.composed.norms import Normed, Saved
from ..problems.buffers import share
from ..problems.norms import NormCall
from ..problems.rowwise import LAYER_NORM
from ..table.choice import Plan, begin, choose, recall
from ..verification.kinds import Refuted
from . import few_norms
from .answers import Answer, arranged, in_buffers
from .keys import PLAIN_TORCH
from .small import is_few, is_small

__all__ = [
    "RENAMED",
    "compose",
    "gradients",
    "keep",
    "normalize",
    "normed",
    "serve",
    "unaliased",
]

X0 = {"x": "x0", "eps": "epsilon"}
X0_PARALLEL = {**X0, "weight": "weight0", "bias": "bias0"}
RENAMED: Mapping[str, Mapping[str, str]] = {
    "dropout_add_layer_norm": X0,
    "dropout_add_rms_norm": X0,
    "dropout_add_layer_norm_parallel_residual": X0_PARALLEL,
    "dropout_add_rms_norm_parallel_residual": X0_PARALLEL,
    "layer_norm": {"eps": "epsilon"},
    "rms_norm": {"eps": "epsilon"},
    "layer_norm_linear_fn": {"weight": "norm_weight", "bias": "norm_bias"},
}
"""What public functions call the fields of NormCall where they call them otherwise."""

_compiling = torch.compiler.is_compiling
_grad_enabled = torch.is_grad_enabled
_transforming = torch._C._are_functorch_transforms_active


def normed(function: str, fields: tuple[Any, ...], masked: bool) -> Any:
    """`normalize`, as `layer_norm_fn` returns it.

    Args:
        fields: those of NormCall, in their order; to make one of them takes longer than to read it.
    """
    if masked is not False:
        masked = truth("return_dropout_mask", masked)
    key = _key(function, fields)
    try:
        found = None if key is None else recall(key)
    except TypeError:
        # an option that cannot be a key: the checks name it
        key = found = None
    if found is not None and not masked:
        if found.direct is not None:
            # nobody was passed over, so there is no policy to ask
            found.tally.calls += 1
            call = NormCall(*fields)
            try:
                y, total = _fused(found, call)
            except Refuted as refuted:
                return refuted.answer(lambda: normed(function, fields, masked))
            return y if total is None else (y, total)
        if found.few is not None and not _transforming():
            begin(found)
            return found.few(fields)
    call = fields if isinstance(fields, NormCall) else NormCall(*fields)
    answer = _normalized(function, call, masked, key, found)
    return arranged(answer, call.weight1 is not None, call.prenorm, masked)


def normalize(function: str, call: NormCall, masked: bool = False) -> Answer:
    """Serve one call of the public function of this name.

    Args:
        masked: the masks of its dropout are asked for.

    Raises:
        ArgumentError, ArgumentTypeError: an argument does not fit, under the function's name for
            it; nothing was written.
    """
    key = _key(function, call)
    try:
        found = None if key is None else recall(key)
    except TypeError:
        key = found = None
    return _normalized(function, call, masked, key, found)


def _normalized(
    function: str, call: NormCall, masked: bool, key: Hashable, found: Plan | None
) -> Answer:
    if found is None:
        norm_checks.check(call, RENAMED.get(function, {}))
        if any(isinstance(getattr(call, name), Tensor) for name in norm_checks.FLAGS):
            # it may change under the same key
            key = None
        found = choose(norms.problem_of(function, call), key)
        if key is not None and found.direct is None and is_few(call.x):
            steps = few_norms.steps_of(call, found.problem.needs_grad)
            found.few = None if steps is None else partial(few_norms.serve, steps)
    elif found.direct is None:
        begin(found)
    else:
        # nobody was passed over, so there is no policy to ask
        found.tally.calls += 1
    if found.direct is not None:
        try:
            y, total = _fused(found, call)
        except Refuted as refuted:
            return refuted.answer(lambda: normalize(function, call, masked))
        return Answer(y, None, total, None, None)
    if key is None or _transforming():
        refuse_transforms(RENAMED.get(function, {}).get("x", "x"))
    needs_grad = found.problem.needs_grad
    if key is not None and is_few(call.x):
        return _few(call, needs_grad, found.few)
    answer = None if needs_grad else _unrecorded(call, masked)
    if answer is not None:
        return answer
    prenorm = call.prenorm or call.residual_out is not None
    inner = replaced(unaliased(call), out=None, residual_out=None, prenorm=prenorm)
    return in_buffers(call, _few(inner, needs_grad) if is_small(call.x) else _recorded(inner))


def _unrecorded(call: NormCall, masked: bool) -> Answer | None:
    """The answer to a call that needs no gradient, in its buffers; None where that cannot be."""
    if torch.compiler.is_compiling():
        return None
    without = call.out is None and call.residual_out is None
    hidden = norm_blocks.with_hidden_mask(call) if without and not masked else None
    if hidden is not None:
        return _answer(call, hidden, (None, None))
    masks = norms.draw_masks(call)
    if without:
        return _answer(call, norm_blocks.forward(call, *masks), masks)
    written = norm_blocks.in_blocks(call, *masks)
    return None if written is None else _answer(call, written, masks)


def _few(call: NormCall, needs_grad: bool, few: Callable[..., Any] | None = None) -> Answer:
    """The answer to a small call without buffers.

    Args:
        few: `few_norms.serve` with the steps of this call, if they are known.
    """
    if few is None:
        steps = few_norms.steps_of(call, needs_grad)
        if steps is None and needs_grad:
            return _recorded(call)
        few = None if steps is None else partial(few_norms.serve, steps)
    masks = norms.draw_masks(call)
    if few is None:
        return _answer(call, norms.forward(call, *masks), masks)
    found = few(call, masks)
    results = list(found) if isinstance(found, tuple) else [found]
    y1 = None if call.weight1 is None else results[1]
    return Answer(results[0], y1, results[-1] if call.prenorm else None, *masks)


def _recorded(call: NormCall) -> Answer:
    """The answer to a call without buffers, whose gradient is `gradients`."""
    results = _Normalize.apply(*call)  # type: ignore[no-untyped-call]
    return _answered(call, results)


def _answer(call: NormCall, normed: Normed, masks: tuple[Tensor | None, Tensor | None]) -> Answer:
    return Answer(normed.y, normed.y1, normed.total if call.prenorm else None, *masks)


def unaliased(call: NormCall) -> NormCall:
    """`call` with an x of its own, if a result is to be written over x: the gradient needs it."""
    if torch.compiler.is_compiling():
        return call
    buffers = [buffer for buffer in (call.out, call.residual_out) if buffer is not None]
    over_x = any(share(buffer, call.x) for buffer in buffers)
    return call._replace(x=call.x.clone()) if over_x else call


def _key(function: str, fields: tuple[Any, ...]) -> Hashable:
    """`key_of` written out; None for calls with buffers, whose memory is looked at."""
    if _compiling():
        return None
    # fmt: off
    (
        x, weight, bias, residual, x1, weight1, bias1, rowscale, layerscale, out, residual_out,
    ) = fields[:11]
    # fmt: on
    options: Any = fields[11:]
    if not (out is residual_out is None and type(options[0]) is type(options[1]) is float):
        return None
    if type(x) not in PLAIN or type(weight) not in PLAIN:
        return None
    grad = _grad_enabled()
    try:
        # fmt: off
        facts: tuple[Any, ...] = (
            function, grad, options, x.shape, x.dtype, x.device, x.layout, grad and x.requires_grad,
            weight.shape, weight.dtype, weight.device, weight.layout, grad and weight.requires_grad,
        )
        # fmt: on
        rest: tuple[Any, ...] = (bias, residual)
        if not (x1 is weight1 is bias1 is rowscale is layerscale is None):
            rest = bias, residual, x1, weight1, bias1, rowscale, layerscale
        for one in rest:
            if one is None:
                facts += (None,)
            elif type(one) in PLAIN:
                facts += (one.shape, one.dtype, one.device, one.layout, grad and one.requires_grad)
            else:
                return None
    except RuntimeError:
        # a nested tensor has no shape
        return None
    return facts


def compose(function: str, call: NormCall) -> None:
    """Ask the table about a norm in a function with a backward of its own: it will be composed."""
    choose(replaced(norms.problem_of(function, call), within=True))


def _fused(found: Plan, call: NormCall) -> tuple[Tensor, Tensor | None]:
    """y, and the sum if prenorm."""
    assert found.direct is not None
    # torch's own layer norm has derivatives of every kind
    if FORWARD._current_level >= 0 and found.name != LAYER_NORM:
        named = RENAMED.get(found.problem.function, {})
        given = {field: getattr(call, field) for field in ("x", "weight", "bias", "residual")}
        refuse_tangents(PLAIN_TORCH, **{named.get(f, f): tensor for f, tensor in given.items()})
    total_dtype = norms.total_dtype(call) if call.prenorm else call.x.dtype
    y, total = found.direct(call, total_dtype, norms.out_dtype(call))
    if call.prenorm and call.residual is None and total.dtype == call.x.dtype:
        # it is x, which must not change with the result
        total = total.clone()
    return y, total if call.prenorm else None


class _Normalize(torch.autograd.Function):
    """Autograd of `normalize`; its arguments are the fields of NormCall, without buffers.

    The results are those of Answer that there are: torch 2.6 cannot trace a None among them, nor
    2.8 a NamedTuple.
    """

    @staticmethod
    def forward(ctx: Any, *fields: Any) -> tuple[Tensor, ...]:
        call = NormCall(*fields)
        ctx.two, ctx.prenorm = call.weight1 is not None, call.prenorm
        answer = serve(ctx, call)
        return tuple([result for result in tuple(answer) if result is not None])

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *others: Any) -> Any:
        dy1 = others[0] if ctx.two else None
        dtotal = others[int(ctx.two)] if ctx.prenorm else None
        return gradients(ctx, ctx.saved_tensors, norms.TENSORS, dy, dy1, dtotal)


def _answered(call: NormCall, results: tuple[Tensor, ...]) -> Answer:
    """The results of `_Normalize` for `call`, each in its place."""
    drawn = call.dropout_p != 0
    there = (call.weight1 is not None, call.prenorm, drawn, drawn and call.x1 is not None)
    left = list(results[1:])
    return Answer(results[0], *[left.pop(0) if one else None for one in there])


def serve(ctx: Any, call: NormCall, *others: Tensor | None) -> Answer:
    """The forward of an autograd.Function: draw masks, compute, save for `gradients`.

    Buffers in `call` are not looked at. `others` are saved behind the fields of `norms.Saved`.
    """
    masks = norms.draw_masks(call)
    normed = norm_blocks.forward(call, *masks)
    keep(ctx, call, normed, masks, *others)
    return _answer(call, normed, masks)


def keep(
    ctx: Any,
    call: NormCall,
    normed: Normed,
    masks: tuple[Tensor | None, Tensor | None],
    *others: Tensor | None,
) -> None:
    """Save what `gradients` needs, and `others` behind it."""
    x = None if call.layerscale is None else call.x
    assert normed.rstd is not None
    # fmt: off
    saved = Saved(
        normed.total, normed.mean, normed.rstd, call.weight, call.weight1, call.rowscale,
        call.layerscale, *masks, x,
    )
    # fmt: on
    ctx.save_for_backward(*saved, *others)
    ctx.terms = norms.terms_of(call)
    ctx.dtypes = {field: given.dtype for field, given in norms.tensors_of(call).items()}


def gradients(
    ctx: Any,
    saved_tensors: tuple[Tensor, ...],
    order: tuple[str, ...],
    dy: Tensor,
    dy1: Tensor | None,
    dtotal: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """What `backward` returns, in the dtypes of the arguments.

    Args:
        saved_tensors: those of ctx, which may be read once only: checkpointing forgets them then.
        order: the fields of NormCall that are the first arguments of `forward`.
    """
    needed = ctx.needs_input_grad
    # torch 2.6 and 2.8 trace strict=False as True
    pairs = zip(order, needed[: len(order)], strict=True)
    known = ctx.dtypes
    dtypes = {field: known[field] for field, needs in pairs if needs and field in known}
    saved = Saved(*saved_tensors[: len(Saved._fields)])
    if not torch.is_grad_enabled():
        grads = norm_blocks.backward(saved, ctx.terms, dtypes, dy, dy1, dtotal)
        once: Any = [grads.get(name) for name in order]
    else:
        with torch.no_grad():
            grads = norm_blocks.backward(saved, ctx.terms, dtypes, dy, dy1, dtotal)
        rounded = [grads.get(name) for name in order]
        once = first_order("a norm", rounded, dy, dy1, dtotal, *saved_tensors)
    return *once, *[None for _ in needed[len(order) :]]
