"""Attention as operators of torch's dispatcher, with fakes and autograd.

`_flash_attn_forward` and its three siblings take the arguments of the functions of the same name
in flash-attention 2.8, in that order, and a few more behind them: those of `records`. Compiled
graphs, exported programs and selective checkpointing come through here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor

from ..ground.lengths import not_lengths
from ..problems.attention import default_scale
from . import derivatives, serving
from .records import NAMESPACE, Backward, DenseForward, VarlenBackward, VarlenForward

__all__ = ["NAMESPACE", "attend", "number", "register"]

_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    float: "float",
    # symbolic while tracing
    int: "SymInt",
    str: "str",
}


def schema(record: type[Any], returns: str, written: Sequence[str]) -> str:
    """The operator schema of a record: an argument for each field, in order, with its default.

    Args:
        written: fields that the operator writes into.
    """
    arguments = []
    for name, annotation in get_type_hints(record).items():
        kind = _TYPES[annotation]
        if name in written:
            kind = kind.replace("Tensor", f"Tensor({'abc'[written.index(name)]}!)")
        argument = f"{kind} {name}"
        if name in record._field_defaults:
            default = record._field_defaults[name]
            argument += f"='{default}'" if isinstance(default, str) else f"={default}"
        arguments.append(argument)
    return f"({', '.join(arguments)}) -> {returns}"


def register(
    name: str,
    record: type[Any],
    run: Callable[[Any], Any],
    shapes: Callable[[Any], Any],
    returns: str,
    written: Sequence[str] = (),
) -> Any:
    """The operator that a record is: `run` and its fake, `shapes`, take the record."""

    # the dispatcher drops arguments that equal their defaults; the record has them too
    def call(*args: Any, **kwargs: Any) -> Any:
        return run(record(*args, **kwargs))

    def fake(*args: Any, **kwargs: Any) -> Any:
        return shapes(record(*args, **kwargs))

    whole = schema(record, returns, written)
    operator = torch.library.custom_op(
        f"{NAMESPACE}::{name}", call, mutates_args=written, schema=whole
    )
    operator.register_fake(fake)
    return operator


def _register_forward(
    record: type[Any], shapes: Callable[[Any], Any], row_sums: tuple[type[Any], Callable[..., Any]]
) -> None:
    """Register a forward operator, its gradient, and the backward operator that this calls."""
    four = "(Tensor, Tensor, Tensor, Tensor)"
    name = record._field_defaults["function"]
    operator = register(name, record, serving.forward, shapes, four)
    operator.register_autograd(
        derivatives.differentiate,
        setup_context=lambda ctx, inputs, output: derivatives.save(ctx, record(*inputs), output),
    )
    backward, shapes = row_sums
    name = backward._field_defaults["function"]
    register(name, backward, serving.backward, shapes, "Tensor", ("dq", "dk", "dv"))


_register_forward(DenseForward, derivatives.dense_shapes, (Backward, derivatives.dense_row_sums))
_register_forward(
    VarlenForward, derivatives.varlen_shapes, (VarlenBackward, derivatives.varlen_row_sums)
)


def attend(
    function: str,
    inputs: tuple[Tensor, Tensor, Tensor],
    lengths: tuple[Any, ...] | None,
    options: tuple[Any, ...],
    alibi_slopes: Tensor | None,
    sink: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """What a public function returns, through the operators; can be traced."""
    dropout_p, scale, causal, window_size, softcap, deterministic, probs = options
    dropout_p, return_attn_probs = number(dropout_p), number(probs)
    shared = {
        "dropout_p": dropout_p,
        "softmax_scale": default_scale(inputs[0].shape[-1]) if scale is None else number(scale),
        "causal": number(causal),
        "window_size_left": number(window_size[0]),
        "window_size_right": number(window_size[1]),
        "softcap": number(softcap),
        "alibi_slopes": alibi_slopes,
        "return_softmax": return_attn_probs and 1.0 - dropout_p < 1.0,
        "sink": sink,
        "deterministic": number(deterministic),
        "function": function,
    }
    ops = getattr(torch.ops, NAMESPACE)
    if lengths is None:
        out, lse, probs, _ = ops._flash_attn_forward(*inputs, **shared)
    else:
        cu_seqlens_q, cu_seqlens_k, *longest = lengths
        out, lse, probs, _ = ops._flash_attn_varlen_forward(
            *inputs,
            _tensor("cu_seqlens_q", cu_seqlens_q),
            _tensor("cu_seqlens_k", cu_seqlens_k),
            *_longest(*longest),
            block_table=block_table,
            **shared,
        )
    return (out, lse, probs) if return_attn_probs else out


def _longest(max_seqlen_q: Any, max_seqlen_k: Any) -> tuple[Any, Any]:
    """Both as integers; one tensor passed twice is read once."""
    longest_q = number(max_seqlen_q)
    return longest_q, longest_q if max_seqlen_k is max_seqlen_q else number(max_seqlen_k)


def number(value: Any) -> Any:
    """What a graph may hold where the schema has a number: a tensor or a numpy scalar is read."""
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        return value
    # torch 2.6 and 2.8 find no attribute of a tensor that they trace
    readable = isinstance(value, Tensor) or hasattr(value, "item")
    return value.item() if readable else value


def _tensor(argument: str, cu_seqlens: Tensor | Sequence[int] | None) -> Tensor:
    if isinstance(cu_seqlens, Tensor):
        return cu_seqlens
    if cu_seqlens is None:
        raise not_lengths(argument, "None")
    return torch.tensor(cu_seqlens, dtype=torch.int32, device="cpu")
