"""Checks of single arguments: each returns the plain Python value or raises a named error.

They run before anything is computed or remembered, so that a wrong argument has no effect at all.
What equals a legal value is that value: plans are looked up by equality, so a first call must not
be stricter than a second.
"""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, NamedTuple

import torch

from ..errors import ArgumentError, ArgumentTypeError, explain

__all__ = [
    "Plain",
    "at_least",
    "flag",
    "longest",
    "plain",
    "real",
    "require_tensors",
    "same",
    "window",
]


LARGEST_WINDOW = (1 << 31) - 1
"""A longer side limits nothing, and operators take 64 bits at most."""


def require_tensors(**tensors: Any) -> None:
    """Raise ArgumentTypeError for the first argument that is not a torch.Tensor."""
    for argument, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise ArgumentTypeError(
                explain(argument, _named(value), "a torch.Tensor", f"pass a tensor as {argument}")
            )


def flag(argument: str, value: Any) -> bool:
    """`value` as a bool; so are numbers equal to 0 or 1, numpy's among them."""
    if isinstance(value, bool):
        return value
    if not isinstance(value, (torch.Tensor, str)) and _is_scalar(value) and value in (0, 1):
        return bool(value)
    raise ArgumentTypeError(
        explain(argument, _named(value), "True or False", f"pass {argument}=True or False")
    )


def real(argument: str, value: Any) -> float:
    """`value` as a finite float; a host tensor with one element is taken too."""
    if isinstance(value, torch.Tensor) and value.numel() == 1 and value.device.type == "cpu":
        value = value.item()
    if isinstance(value, Real):
        number = float(value)
        if number == number and abs(number) != float("inf"):
            return number
        raise ArgumentError(
            explain(argument, number, "a finite number", f"pass a finite {argument}")
        )
    raise ArgumentTypeError(
        explain(argument, _named(value), "a number", f"pass {argument} as a Python float")
    )


def at_least(least: int, **sizes: Any) -> None:
    """Raise ArgumentError for the first that is no integer, or a smaller one."""
    for argument, value in sizes.items():
        if not hasattr(value, "__index__") or value < least:
            raise ArgumentError(
                explain(
                    argument,
                    _named(value),
                    f"an int of at least {least}",
                    f"pass another {argument}",
                )
            )


def same(argument: str, what: str, came: object, expected: object) -> None:
    """Raise ArgumentError unless the dtype, device or headdim of the argument is that of q."""
    if came != expected:
        remedy = f"{argument} = {argument}.to(q.{what})" if what != "headdim" else "pad the shorter"
        raise ArgumentError(
            explain(argument, f"{what} {came}", f"the {what} of q, {expected}", remedy)
        )


def window(argument: str, value: Any) -> tuple[int, int]:
    """`value` as two integers (left, right); a negative one means unlimited."""
    if (
        isinstance(value, (tuple, list))
        and len(value) == 2
        and all(isinstance(side, Real) and side == side // 1 for side in value)
    ):
        left, right = (min(max(int(side), -1), LARGEST_WINDOW) for side in value)
        return left, right
    raise ArgumentTypeError(
        explain(
            argument,
            repr(value) if isinstance(value, (tuple, list, int, str)) else _named(value),
            "a pair of integers (left, right), -1 for no limit",
            f"pass {argument}=(left, right), e.g. (-1, -1) for no window",
        )
    )


def longest(argument: str, value: Any, known: int) -> int:
    """A maximum length as an int; `known` for a tensor on a device, which a look would copy."""
    if type(value) is int:
        return value
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_floating_point():
        return int(value.item()) if value.device.type == "cpu" else known
    raise ArgumentTypeError(
        explain(
            argument,
            _named(value),
            "an int, or an integer tensor with one element",
            f"pass {argument} as the longest sequence length, {known}",
        )
    )


class Plain(NamedTuple):
    """The options of a call as plain Python values."""

    dropout_p: float
    softmax_scale: float | None
    causal: bool
    window_size: tuple[int, int]
    softcap: float
    deterministic: bool
    return_attn_probs: bool


def plain(
    dropout_p: Any,
    softmax_scale: Any,
    causal: Any,
    window_size: Any,
    softcap: Any,
    deterministic: Any,
    return_attn_probs: Any,
) -> Plain:
    """Check the options of a call, one by one."""
    return Plain(
        real("dropout_p", dropout_p),
        None if softmax_scale is None else real("softmax_scale", softmax_scale),
        flag("causal", causal),
        window("window_size", window_size),
        real("softcap", softcap),
        flag("deterministic", deterministic),
        flag("return_attn_probs", return_attn_probs),
    )


def _is_scalar(value: Any) -> bool:
    # numpy's bool is no number to Python
    return isinstance(value, Real) or type(value).__name__ in ("bool", "bool_")


def _named(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    return f"{value!r} ({type(value).__name__})" if len(repr(value)) < 60 else type(value).__name__
