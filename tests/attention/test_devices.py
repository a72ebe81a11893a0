"""Tensors of unequal devices are refused by name, through every function and operator.

One tensor on meta among others lets the dispatcher take an operator's fake, whose answer is memory
that nobody wrote.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flash_attn_npu import flash_attn_varlen_func
from flash_attn_npu.errors import ArgumentError, ArgumentTypeError
from tests.helpers import every_function as every

MAKERS: list[Any] = [
    pytest.param(name, make, id=f"{name}{suffix}")
    for name in every.FUNCTIONS
    for make, suffix in ((every.right, ""), (every.paged, " in pages"))
    if make is every.right or every.has_pages(name)
]
each_call = pytest.mark.parametrize(("name", "make"), MAKERS)
Make = Callable[[str, torch.device], every.Call]


def named(name: str, argument: str) -> set[str]:
    """The names that an error about `argument` may begin with: q differs from all others."""
    if argument == "q":
        return set(every.annotations(name)) - {"q"} | {"k_cache, v_cache", "k, v"}
    if argument.endswith("_cache"):
        return {argument, "k_cache, v_cache"}
    # pages are compared with each other
    return {argument, "k, v"} if argument in ("k", "v") else {argument}


@each_call
def test_one_tensor_on_meta(name: str, make: Make, device: torch.device) -> None:
    call = make(name, device)
    for argument in every.tensors(name, call):
        spoilt = copy.copy(call) | {argument: call[argument].to("meta")}
        written = {x: y.clone() for x, y in spoilt.items() if isinstance(y, Tensor)}
        if argument == "qkv":  # it is the whole call
            continue
        with pytest.raises((ArgumentError, ArgumentTypeError)) as caught:
            every.run(name, spoilt)
        assert caught.value.argument in named(name, argument), argument
        for x, before in written.items():
            same = spoilt[x].is_meta or torch.equal(spoilt[x], before) or before.isnan().any()
            assert same, f"{x} was written"


@each_call
def test_one_tensor_on_the_host(name: str, make: Make, npu: torch.device) -> None:
    """Lengths and tables of integers may be there; all else belongs beside q."""
    call = make(name, npu)
    for argument in every.tensors(name, call):
        if argument == "qkv" or not call[argument].is_floating_point():
            continue
        spoilt = copy.copy(call) | {argument: call[argument].cpu()}
        with pytest.raises(ArgumentError) as caught:
            every.run(name, spoilt)
        assert caught.value.argument in named(name, argument), argument


@each_call
def test_all_on_meta(name: str, make: Make) -> None:
    """Lengths stay where they have values, unless nothing reads them."""
    if "cache" in name or name == "attention_forward_varlen":
        pytest.skip("reads its lengths")
    call = make(name, torch.device("cpu"))
    real = flat(every.run(name, call))
    moved = {
        x: y.to("meta") if isinstance(y, Tensor) and y.is_floating_point() else y
        for x, y in call.items()
    }
    answer = flat(every.run(name, moved))
    assert [x.shape for x in answer] == [x.shape for x in real]
    assert answer[0].is_meta


@each_call
def test_all_on_meta_lengths_and_tables_too(name: str, make: Make) -> None:
    if name == "attention_forward_varlen":
        pytest.skip("takes lengths of the host")
    call = make(name, torch.device("cpu"))
    real = flat(every.run(name, call))
    moved = {x: y.to("meta") if isinstance(y, Tensor) else y for x, y in call.items()}
    answer = flat(every.run(name, moved))
    assert [(x.shape, x.dtype) for x in answer] == [(x.shape, x.dtype) for x in real]
    assert answer[0].is_meta


WITHOUT_VALUES: list[Any] = [
    (lambda x: {"q": x["q"][None]}, "q"),
    (lambda x: {"k": x["k"][:, :1].expand(-1, 3, -1), "v": x["v"][:, :1].expand(-1, 3, -1)}, "k"),
    (lambda x: {"v": x["v"].double()}, "v"),
    (lambda x: {"cu_seqlens_q": x["cu_seqlens_q"].long()}, "cu_seqlens_q"),
    (lambda x: {"cu_seqlens_k": x["cu_seqlens_k"][1:]}, "cu_seqlens_k"),
    (lambda x: {"max_seqlen_k": torch.ones((), dtype=torch.int32, device="meta")}, "max_seqlen_k"),
    (lambda x: {"causal": "yes"}, "causal"),
    (lambda x: {"block_table": torch.zeros(2, 1, device="meta")}, "block_table"),
]


@pytest.mark.parametrize(("spoil", "argument"), WITHOUT_VALUES)
def test_what_is_seen_without_values_is_checked(spoil: Any, argument: str) -> None:
    x = torch.empty(10, 4, 16, device="meta")
    lengths = torch.empty(3, dtype=torch.int32, device="meta")
    call = {"q": x, "k": x, "v": x, "cu_seqlens_q": lengths, "cu_seqlens_k": lengths}
    call |= {"max_seqlen_q": 6, "max_seqlen_k": 6}
    assert flash_attn_varlen_func(**call).shape == x.shape
    with pytest.raises((ArgumentError, ArgumentTypeError)) as caught:
        flash_attn_varlen_func(**call | spoil(call))
    assert caught.value.argument == argument


@each_call
def test_under_fake_tensors(name: str, make: Make, device: torch.device) -> None:
    if (
        "cache" in name
        or name == "attention_forward_varlen"
        or name.startswith("flash_attn_varlen")
    ):
        pytest.skip("reads its lengths")
    call = make(name, device)
    real = flat(every.run(name, call))
    with FakeTensorMode() as mode:
        fakes = {x: mode.from_tensor(y) if isinstance(y, Tensor) else y for x, y in call.items()}
        answer = flat(every.run(name, fakes))
    assert [(x.shape, x.dtype, x.device) for x in answer] == [
        (x.shape, x.dtype, x.device) for x in real
    ]


def flat(answer: Any) -> list[Tensor]:
    return list(answer) if isinstance(answer, (tuple, list)) else [answer]
