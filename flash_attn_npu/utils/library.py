"""Mirror of `flash_attn.utils.library`: one decorator that registers an operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

__all__ = ["triton_op"]


def triton_op(
    name: str,
    fn: Callable[..., Any] | None = None,
    *,
    mutates_args: str | Iterable[str],
    schema: str | None = None,
    allow_decomposition: bool = True,
) -> Callable[..., Any]:
    """Register a function of tensors as the operator `name`, "namespace::operator".

    Args:
        fn: the implementation, which must be traceable by make_fx: it serves fake tensors too.
            A decorator is returned if it is None.
        mutates_args: the names of the arguments that are written, or "unknown".
        schema: the operator's schema; inferred from fn's annotations if None.
        allow_decomposition: torch.compile sees the operations inside, not the operator.

    Returns:
        The operator, a `torch.library.CustomOpDef`.

    Contract: flash-attention 2.8, `triton_op`. No Triton is needed.
    """
    if allow_decomposition:
        # fn is positional only there
        given = () if fn is None else (fn,)
        return torch.library.triton_op(name, *given, mutates_args=mutates_args, schema=schema)

    def register(function: Callable[..., Any]) -> Any:
        operator = torch.library.custom_op(name, function, mutates_args=mutates_args, schema=schema)
        operator.register_fake(function)
        return operator

    return register if fn is None else register(fn)
