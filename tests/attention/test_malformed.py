"""Hundreds of malformed calls, drawn with a seed: each error names an argument of its function."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_npu.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from tests.helpers import every_function as every

OURS = (ArgumentError, ArgumentTypeError, UnsupportedError)
CALLS = 60
OPERANDS = ("q", "k", "v", "kv", "qkv", "k_cache", "v_cache", "dout", "out", "dq", "dk", "dv")
SUBCLASSES = ("jagged", "DTensor")

Spoil = Callable[[Any], Any]


def nested(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor([x, x], layout=torch.jagged)


def dtensor_like(x: Tensor) -> Tensor:
    return x.detach().as_subclass(type("DTensor", (Tensor,), {}))


ANYTHING: dict[str, Spoil] = {
    "None": lambda _: None,
    "string": lambda _: "x",
    "bytes": lambda _: b"x",
    "object": lambda _: object(),
    "dictionary": lambda _: {},
    "list": lambda _: ["x"],
    "complex": lambda _: 1j,
}
TENSORS: dict[str, Spoil] = {
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "jagged": nested,
    "complex tensor": lambda x: x.to(torch.complex64),
    "bool tensor": lambda x: x.bool(),
    "double": lambda x: x.double(),
    "bytes tensor": lambda x: x.to(torch.uint8),
    "one more dimension": lambda x: x[None],
    "one dimension less": lambda x: x[0],
    "scalar": lambda x: x.flatten()[0],
    "nothing": lambda x: x[:0],
    "no heads": lambda x: x[..., :0],
    "longer": lambda x: torch.cat((x, x)),
    "half": lambda x: x[..., : x.shape[-1] // 2],
    "negative": lambda x: -x - 1,
    "huge": lambda x: x + 10**6,
    "DTensor": dtensor_like,
    "tuple": lambda x: (x,),
}
NUMBERS: dict[str, Spoil] = {
    "nan": lambda _: float("nan"),
    "inf": lambda _: float("inf"),
    "minus one": lambda _: -1,
    "huge": lambda _: 2**40,
    "beyond int64": lambda _: 2**70,
    "two": lambda _: torch.zeros(2),
    "meta": lambda _: torch.zeros((), device="meta"),
    "pair": lambda _: (1, 2),
    "three": lambda _: (1, 2, 3),
    "pair of words": lambda _: ("a", "b"),
}


BINDING = {
    "p_dropout": "dropout_p",
    "is_causal": "causal",
    "is_rotary_interleaved": "rotary_interleaved",
    "max_seqlen": "max_seqlen_q",
}
"""What the operators behind a function call its parameters."""


def named(name: str, error: Exception) -> bool:
    """Whether the error is ours and names an argument of the function, or the binding's."""
    names = every.annotations(name)
    if isinstance(error, OURS):
        words = re.split(r", | and ", error.argument or "")
        return all(word in names for word in words)
    said = str(error)
    if "::" in said and "Expected a value of type" in said:
        # the operator of that name, whose parameters have the names of the function
        return any(f"argument '{BINDING.get(x, x)}'" in said for x in names)
    return "Overflow" in said or "out of range" in said.lower() or "int too big" in said


@pytest.mark.parametrize("name", every.FUNCTIONS)
def test_every_error_names_an_argument(name: str) -> None:
    draw = random.Random(name)
    cpu = torch.device("cpu")
    makers = [every.right, every.paged] if every.has_pages(name) else [every.right]
    torch.manual_seed(0)
    wrong = []
    for _ in range(CALLS):
        call = draw.choice(makers)(name, cpu)
        # a call of the same shapes was served before, so that memory could answer
        argument = draw.choice([x for x in call if x != "function"])
        value = call[argument]
        pool = ANYTHING | (TENSORS if isinstance(value, Tensor) else NUMBERS)
        kind = draw.choice(list(pool))
        if (kind == "jagged" and argument not in OPERANDS) or ("::" in name and kind in SUBCLASSES):
            continue  # a subclass with a dispatcher of its own never gets to the operator
        try:
            call[argument] = pool[kind](value)
        except (RuntimeError, IndexError, NotImplementedError):
            continue  # there is no such tensor
        try:
            every.run(name, call)
        except Exception as error:
            if not named(name, error):
                wrong.append(f"{argument} {kind}: {type(error).__name__}: {str(error)[:110]}")
    assert wrong == []
