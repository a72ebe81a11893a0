"""Numbers as flash-attn's binding takes them: numpy's, tensors of one element, any pair."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flash_attn_npu
from flash_attn_npu.errors import ArgumentTypeError
from tests.helpers import every_function as every
from tests.helpers.old_torch import TORCH

FORMS: dict[type, list[Callable[[Any], Any]]] = {
    float: [
        np.float64,
        np.float32,
        np.array,
        torch.tensor,
        lambda x: torch.tensor([x]),
        lambda x: torch.tensor(x, dtype=torch.float64),
    ],
    int: [np.int64, np.int32, np.array, torch.tensor, lambda x: torch.tensor(x).int()],
    bool: [int, np.bool_, np.int64, np.array, torch.tensor, lambda x: torch.tensor(int(x))],
    tuple: [
        list,
        np.array,
        torch.tensor,
        lambda pair: torch.tensor(pair, dtype=torch.int32),
        lambda pair: tuple(np.int64(x) for x in pair),
        lambda pair: [torch.tensor(x) for x in pair],
        lambda pair: tuple(torch.tensor(x) for x in pair),
    ],
}
KINDS = {"float": float, "int": int, "SymInt": int, "bool": bool, "tuple": tuple}


def numbers(name: str) -> list[str]:
    """The parameters of a function that its signature says are numbers or pairs of them."""
    words = {
        x: annotation.replace("|", " ").replace("[", " ").split()
        for x, annotation in every.annotations(name).items()
    }
    return [x for x, parts in words.items() if KINDS.keys() & set(parts)]


def flat(answer: Any) -> list[Tensor]:
    return list(answer) if isinstance(answer, (tuple, list)) else [answer]


@pytest.mark.parametrize("name", every.FUNCTIONS)
def test_every_number_in_every_form(name: str, device: torch.device) -> None:
    torch.manual_seed(0)
    call = every.right(name, device)
    plain = dict(call)
    if name == "attention_forward_varlen":
        plain |= {"dropout_p": 0.0, "softmax_scale": 0.5, "causal": True}
    expected = every.run(name, plain)
    for argument in numbers(name):
        if plain.get(argument) is None:
            assert name == "attention_forward_varlen" or argument == "cache_seqlens", argument
            continue
        if isinstance(plain[argument], Tensor):
            continue
        for form in FORMS[type(plain[argument])]:
            answer = every.run(name, plain | {argument: form(plain[argument])})
            for actual, wanted in zip(flat(answer), flat(expected), strict=True):
                assert torch.equal(actual, wanted), (argument, form)


@pytest.mark.parametrize("argument", ["window_size", "softmax_scale"])
def test_a_number_that_changes_in_place(argument: str, device: torch.device) -> None:
    """Nothing is remembered of a tensor that was read for its number."""
    name = "flash_attn_func"
    call = every.right(name, device) | {"softcap": 0.0}
    entries = [torch.tensor(1), torch.tensor(0)]
    pair: Any = tuple(entries) if argument == "window_size" else torch.tensor(0.5)
    every.run(name, call | {argument: pair})
    if argument == "window_size":
        entries[0].fill_(3)
        plain: Any = (3, 0)
    else:
        pair.fill_(0.25)
        plain = 0.25
    answer, wanted = (every.run(name, call | {argument: x}) for x in (pair, plain))
    assert torch.equal(answer[0], wanted[0])


@pytest.mark.parametrize("argument", ["softmax_scale", "softcap", "window_size", "causal"])
def test_a_number_on_the_device_is_read(argument: str, npu: torch.device) -> None:
    call = every.right("flash_attn_varlen_func", npu) | {"softcap": 0.0}
    plain = {"softmax_scale": 0.25, "softcap": 1.5, "window_size": [1, 0], "causal": False}[
        argument
    ]
    answer, wanted = (
        every.run("flash_attn_varlen_func", call | {argument: x})
        for x in (torch.tensor(plain, device=npu), plain)
    )
    assert torch.equal(answer[0], wanted[0])


@pytest.mark.parametrize("argument", ["cache_seqlens", "cache_leftpad"])
@pytest.mark.parametrize("form", [list, tuple, lambda x: [np.int64(i) for i in x]])
def test_lengths_of_a_cache_as_a_list(
    argument: str, form: Callable[[Any], Any], device: torch.device
) -> None:
    torch.manual_seed(0)
    call = every.right("flash_attn_with_kvcache", device)
    given = {x: y.clone() if isinstance(y, Tensor) else y for x, y in call.items()}
    given[argument] = form(call[argument].tolist())
    answer, wanted = (every.run("flash_attn_with_kvcache", x) for x in (given, call))
    assert all(torch.equal(x, y) for x, y in zip(answer, wanted, strict=True))
    assert torch.equal(given["k_cache"], call["k_cache"])


@pytest.mark.parametrize("value", [4, np.int64(4), torch.tensor(4, dtype=torch.int32)])
def test_one_length_for_all_rows_of_a_cache(value: Any, device: torch.device) -> None:
    torch.manual_seed(0)
    call = every.right("flash_attn_with_kvcache", device)
    both = torch.tensor([4, 4], dtype=torch.int32, device=device)
    answer, wanted = (
        every.run("flash_attn_with_kvcache", call | {"cache_seqlens": x}) for x in (value, both)
    )
    assert all(torch.equal(x, y) for x, y in zip(answer, wanted, strict=True))


@pytest.mark.parametrize("value", [[1, 2.0], [True, 2], ["1", "2"], 1.5, {4}])
def test_what_is_no_list_of_lengths(value: Any, device: torch.device) -> None:
    call = every.right("flash_attn_with_kvcache", device) | {"cache_seqlens": value}
    with pytest.raises(ArgumentTypeError, match=r"^cache_seqlens: got "):
        every.run("flash_attn_with_kvcache", call)


COMPILED = [
    ("softmax_scale", 0.5),
    ("softcap", 2.0),
    ("dropout_p", 0.0),
    ("causal", True),
    ("deterministic", True),
    ("window_size", (2, 1)),
]


@pytest.mark.filterwarnings("ignore:.*Graph break:UserWarning")
@pytest.mark.parametrize(("argument", "value"), COMPILED, ids=[x for x, _ in COMPILED])
def test_numbers_of_every_form_while_compiling(argument: str, value: Any) -> None:
    call = every.right("flash_attn_func", torch.device("cpu"))
    expected = every.run("flash_attn_func", call | {argument: value})
    for form in FORMS[type(value)]:
        if TORCH < (2, 9) and form.__module__ == "numpy":
            # traced as a tensor there, which no operator takes for a number
            continue
        torch._dynamo.reset()
        compiled = torch.compile(flash_attn_npu.flash_attn_func, backend="eager")
        answer = compiled(**call | {argument: form(value)})
        assert torch.equal(answer[0], expected[0]), form
