"""Checks of single arguments: each returns the plain Python value or raises a named error.

They run before anything is computed or remembered, so that a wrong argument has no effect at all.
What equals a legal value is that value: plans are looked up by equality, so a first call must not
be stricter than a second.
"""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import torch

from ...errors import ArgumentError, ArgumentTypeError

__all__ = [
    "at_least",
    "flag",
    "longest",
    "named",
    "real",
    "require_plain",
    "require_plain_or_none",
    "require_tensors",
    "require_values",
    "same",
    "together",
    "window",
]


LARGEST_WINDOW = (1 << 31) - 1
"""A longer side limits nothing, and operators take 64 bits at most."""


def require_tensors(**tensors: Any) -> None:
    """Raise ArgumentTypeError for the first argument that is not a torch.Tensor."""
    for argument, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise ArgumentTypeError(
                argument, named(value), "a torch.Tensor", f"pass a tensor as {argument}"
            )


def require_plain(**tensors: Any) -> None:
    """`require_tensors`, and each of them dense, with rows that kernels can walk through."""
    require_tensors(**tensors)
    if torch.compiler.is_compiling():
        # the compiler refuses a look at layouts in a backward, and has none but dense tensors
        return
    for argument, tensor in tensors.items():
        if type(tensor).__name__ == "DTensor":
            raise ArgumentTypeError(
                argument,
                "a DTensor",
                "a plain tensor: heads and sequences of other ranks are not seen here",
                f"pass {argument}.to_local(), or wrap the call in "
                "torch.distributed.tensor.experimental.local_map",
            )
        if tensor.is_nested:
            remedy = (
                f"pass {argument}.values(), and its offsets as cu_seqlens, to a varlen function"
            )
            raise ArgumentTypeError(argument, "a nested tensor", "a dense tensor", remedy)
        if tensor.layout is not torch.strided:
            came = f"a {tensor.layout} tensor"
            remedy = f"pass {argument}.to_dense()"
            raise ArgumentTypeError(argument, came, "a dense tensor", remedy)


def require_values(**tensors: Any) -> None:
    """`require_plain`, and each of them with values that can be read on the host."""
    require_plain(**tensors)
    for argument, tensor in tensors.items():
        if tensor.is_meta:
            raise ArgumentError(
                argument,
                "a tensor on meta, which has no values",
                "a tensor with values",
                f"make {argument} on the device of q, or on the host",
            )


def together(q: torch.Tensor, beside: dict[str, Any], host: dict[str, Any]) -> None:
    """Raise ArgumentError for a tensor of `beside` that is not on q's device.

    Those of `host` may be on any device where they have values; all may be None. The dispatcher
    takes the fake of an operator if any tensor is on meta, so fakes have to ask this.
    """
    for argument, tensor in beside.items():
        if tensor is not None:
            same(argument, "device", tensor.device, q.device)
    for argument, tensor in host.items():
        if tensor is not None and tensor.device.type == "meta" != q.device.type:
            same(argument, "device", tensor.device, q.device)


def require_plain_or_none(**tensors: Any) -> None:
    """`require_plain` of those that are not None."""
    require_plain(**{name: value for name, value in tensors.items() if value is not None})


def flag(argument: str, value: Any) -> bool:
    """`value` as a bool; so are numbers equal to 0 or 1, numpy's and 0-d tensors among them."""
    if isinstance(value, bool):
        return value
    number = _number(value)
    if isinstance(number, Real) and number in (0, 1):
        return bool(number)
    raise ArgumentTypeError(
        argument, named(value), "True or False", f"pass {argument}=True or False"
    )


def real(argument: str, value: Any) -> float:
    """`value` as a finite float; numpy's numbers and tensors with one element are taken too."""
    number = _number(value)
    if isinstance(number, Real):
        number = float(number)
        if number == number and abs(number) != float("inf"):
            return number
        raise ArgumentError(argument, number, "a finite number", f"pass a finite {argument}")
    raise ArgumentTypeError(
        argument, named(value), "a number", f"pass {argument} as a Python float"
    )


def at_least(least: int, **sizes: Any) -> None:
    """Raise ArgumentError for the first that is no integer, or a smaller one."""
    for argument, value in sizes.items():
        if not hasattr(value, "__index__") or value < least:
            raise ArgumentError(
                argument, named(value), f"an int of at least {least}", f"pass another {argument}"
            )


def same(argument: str, what: str, came: object, expected: object) -> None:
    """Raise ArgumentError unless the dtype, device or headdim of the argument is that of q."""
    if came != expected:
        remedy = f"{argument} = {argument}.to(q.{what})"
        if what == "headdim":
            remedy = _headdim(argument, came, expected)
        if what == "dtype" and getattr(came, "itemsize", 4) < getattr(expected, "itemsize", 0):
            # the other way round the whole call would be computed in the wider dtype
            remedy = f"q = q.to({argument}.dtype), the narrower one"
        raise ArgumentError(argument, f"{what} {came}", f"the {what} of q, {expected}", remedy)


def _headdim(argument: str, came: Any, expected: Any) -> str:
    if argument != "v":
        return f"pass q and {argument} of one headdim: their products are the scores"
    if came < expected:
        missing = expected - came
        return f"pass torch.nn.functional.pad(v, (0, {missing})), and cut out to out[..., :{came}]"
    return (
        f"pad q and k with {came - expected} zeros as well, and pass "
        f"softmax_scale={expected} ** -0.5 if it is None"
    )


def window(argument: str, value: Any) -> tuple[int, int]:
    """`value` as two integers (left, right); a negative one means unlimited.

    Args:
        value: a tuple, a list, a tensor or an array of two, of any whole numbers.
    """
    pair = value
    if isinstance(value, torch.Tensor):
        require_values(**{argument: value})
    if getattr(value, "shape", None) == (2,):
        pair = value.tolist()
    if isinstance(pair, (tuple, list)) and len(pair) == 2:
        sides = [_number(side) for side in pair]
        if all(isinstance(side, Real) and side == side // 1 for side in sides):
            left, right = (min(max(int(side), -1), LARGEST_WINDOW) for side in sides)
            return left, right
    raise ArgumentTypeError(
        argument,
        repr(value) if isinstance(value, (tuple, list, int, str)) else named(value),
        "a pair of integers (left, right), -1 for no limit",
        f"pass {argument}=(left, right), e.g. (-1, -1) for no window",
    )


def longest(argument: str, value: Any, known: int) -> int:
    """A maximum length as an int; `known` for a tensor on a device, which a look would copy."""
    if type(value) is int:
        return value
    if isinstance(value, torch.Tensor) and value.device.type != "cpu":
        one = not value.is_nested and value.numel() == 1
        number = None if not one or value.is_floating_point() or value.is_complex() else known
    else:
        number = _number(value)
    if isinstance(number, Integral) and not isinstance(number, bool):
        return int(number)
    raise ArgumentTypeError(
        argument,
        named(value),
        "an int, or an integer tensor with one element",
        f"pass {argument} as the longest sequence length, {known}",
    )


def _number(value: Any) -> Any:
    """The Python number in a numpy scalar or a tensor or array of one element; else `value`."""
    if isinstance(value, torch.Tensor):
        strange = value.is_nested or value.is_meta or value.layout is not torch.strided
        return value if strange or value.numel() != 1 else value.item()
    return value.item() if getattr(value, "shape", None) == () else value


def named(value: Any) -> str:
    """What came, in an error."""
    if isinstance(value, torch.Tensor) and value.is_nested:
        return f"a nested {value.dtype} tensor"
    if isinstance(value, torch.Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    return f"{value!r} ({type(value).__name__})" if len(repr(value)) < 60 else type(value).__name__
