"""What is raised can be caught as what flash-attn raises, and tells its four answers apart."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import flash_attn_npu
from flash_attn_npu import errors

CLASSES = [name for name in errors.__all__ if name[0].isupper()]
each_class = pytest.mark.parametrize("name", CLASSES)


@each_class
def test_the_classes_are_at_the_top(name: str) -> None:
    assert getattr(flash_attn_npu, name) is getattr(errors, name)
    assert name in flash_attn_npu.__all__


@pytest.mark.parametrize(
    ("name", "caught"),
    [
        ("ArgumentError", (ValueError, RuntimeError)),
        ("ArgumentTypeError", (TypeError,)),
        ("UnsupportedError", (NotImplementedError, RuntimeError)),
        ("ActivationError", (RuntimeError,)),
    ],
)
def test_what_catches_them(name: str, caught: tuple[type[Exception], ...]) -> None:
    assert all(issubclass(getattr(errors, name), kind) for kind in caught)


def test_a_client_that_expects_the_extension_to_refuse() -> None:
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(RuntimeError, match=r"^k: got "):
        flash_attn_npu.flash_attn_func(q, q[..., :2, :], q[..., :2, :])


@each_class
@pytest.mark.parametrize(
    "again", [lambda x: x, copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_the_four_answers_are_attributes(name: str, again: Callable[[Any], Any]) -> None:
    error = getattr(errors, name)("q", torch.float16, "int8", "convert it")
    error = again(error)
    assert (error.argument, error.came) == ("q", "torch.float16")
    assert (error.allowed, error.remedy) == ("int8", "convert it")
    assert str(error) == "q: got torch.float16; allowed: int8; to fix it: convert it"
    # plain text, so that a process without this package can show it
    assert type(error.args[0]) is str


def test_parts_of_a_packed_argument_are_named_once() -> None:
    qkv = torch.zeros(1, 4, 3, 2, 8, dtype=torch.int32)
    with pytest.raises(errors.ArgumentError, match=r"^qkv: .*to fix it: convert qkv, e\.g\. with"):
        flash_attn_npu.flash_attn_qkvpacked_func(qkv)
    kv = torch.zeros(1, 4, 2, 2, 8)
    with pytest.raises(
        errors.ArgumentError, match=r"^kv: .*: pass one row of kv for each row of q"
    ):
        flash_attn_npu.flash_attn_kvpacked_func(torch.zeros(2, 4, 2, 8), kv)
