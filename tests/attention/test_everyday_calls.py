"""Forms of a call that clients use and upstream takes: each gives what the plain form gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import flash_attn_npu
from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu._core.ground.memory import forget_all
from tests.helpers import buffer_calls as calls
from tests.helpers import reference

DENSE, VARLEN = "flash_attn_func", "flash_attn_varlen_func"
DIFFERENT = {"softmax_scale": 0.3, "causal": True, "window_size": (3, 0)}


@pytest.fixture(autouse=True)
def fresh() -> None:
    forget_all()
    torch.manual_seed(0)


def same(got: Any, expected: Any) -> None:
    """Bitwise, whether one tensor or three."""
    if isinstance(expected, Tensor):
        got, expected = (got,), (expected,)
    for mine, other in zip(got, expected, strict=True):
        assert torch.equal(mine.detach().cpu(), other.detach().cpu())


def trained(function: str, call: calls.Call) -> list[Tensor]:
    """The result and the gradients of q, k and v."""
    leaves = {name: call[name].detach().requires_grad_() for name in "qkv"}
    out = calls.run(function, call | leaves)
    out.square().sum().backward()
    return [out, *(leaf.grad for leaf in leaves.values())]


FORMS: dict[str, list[tuple[Any, Any]]] = {
    "causal": [(1, True), (0, False), (np.int64(1), True)],
    "deterministic": [(1, True), (0, False)],
    "dropout_p": [(0, 0.0), (1e-30, 0.0), (-0.0, 0.0), (np.float32(0), 0.0)],
    "softmax_scale": [
        (1, 1.0),
        (np.float64(0.25), 0.25),
        (np.float32(0.25), 0.25),
        (torch.tensor(0.25), 0.25),
        (torch.tensor([0.25]), 0.25),
        (torch.tensor(1), 1.0),
        (torch.tensor(0.25, requires_grad=True), 0.25),
        (None, 0.25),
    ],
    "softcap": [(0, 0.0), (5, 5.0), (np.float32(5), 5.0), (torch.tensor(5.0), 5.0), (-1.0, 0.0)],
    "window_size": [
        ([3, 0], (3, 0)),
        (torch.Size((3, 0)), (3, 0)),
        ((np.int64(3), np.int32(0)), (3, 0)),
        ((-5, -2), (-1, -1)),
        ((2**40, 2**40), (-1, -1)),
        ((np.iinfo(np.int64).max, 0), (-1, 0)),
    ],
}


EQUAL: list[tuple[str, Any, Any]] = [
    ("dropout_p", False, 0.0),
    ("softcap", False, 0.0),
    ("softcap", True, 1.0),
    ("softmax_scale", True, 1.0),
    ("causal", 0.0, False),
    ("causal", 1.0, True),
    ("causal", np.True_, True),
    ("causal", np.False_, False),
    ("deterministic", 0.0, False),
    ("deterministic", np.True_, True),
    ("return_attn_probs", 0.0, False),
    ("return_attn_probs", np.False_, False),
    ("window_size", (-1.0, -1.0), (-1, -1)),
    ("window_size", (3.0, np.float64(0)), (3, 0)),
    ("window_size", (True, 2), (1, 2)),
]


@pytest.mark.parametrize("function", [DENSE, VARLEN])
@pytest.mark.parametrize("argument", FORMS)
def test_forms_of_a_value(argument: str, function: str, device: torch.device) -> None:
    call = calls.RIGHT[function](device)
    for form, plain in (*FORMS[argument], *(pair for name, *pair in EQUAL if name == argument)):
        for step in (calls.run, trained):
            forget_all()
            got = step(function, call | {argument: form})
            same(got, step(function, call | {argument: plain}))
            same(got, step(function, call | {argument: form}))


@pytest.mark.parametrize("function", [DENSE, VARLEN])
def test_return_attn_probs_as_a_number(function: str, device: torch.device) -> None:
    call = calls.RIGHT[function](device)
    got = calls.run(function, call | {"return_attn_probs": 1})
    same(got, calls.run(function, call | {"return_attn_probs": True}))
    assert isinstance(calls.run(function, call | {"return_attn_probs": 0}), Tensor)


@pytest.mark.parametrize("more", [{}, {"softcap": 5.0}], ids=["plain", "composed"])
@pytest.mark.parametrize("served", [False, True], ids=["first", "after a right call"])
@pytest.mark.parametrize(("argument", "value", "plain"), EQUAL)
def test_what_equals_a_right_value_is_that_value(
    argument: str, value: Any, plain: Any, served: bool, more: calls.Call, device: torch.device
) -> None:
    """On the first call and later alike: plans are looked up by equality."""
    call = calls.dense(device) | more
    if served:
        calls.run(DENSE, call | {argument: plain})
    got = calls.run(DENSE, call | {argument: value})
    same(got, calls.run(DENSE, call | {argument: plain}))
    masks = ("softmax_scale", "causal", "window_size", "softcap")
    options = more | ({argument: plain} if argument in masks else {})
    q, k, v = (call[name].cpu().double() for name in "qkv")
    expected = reference.dense(q, k, v, **options).out
    torch.testing.assert_close(got.cpu().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}], ids=["plain", "composed"])
@pytest.mark.parametrize("function", [DENSE, VARLEN])
def test_a_scale_that_changes_between_calls(
    function: str, options: dict[str, Any], device: torch.device
) -> None:
    call, scale = calls.RIGHT[function](device) | options, torch.tensor(0.25)
    for value in (0.25, 0.5, 0.25, 1.0):
        scale.fill_(value)
        got = calls.run(function, call | {"softmax_scale": scale})
        same(got, calls.run(function, call | {"softmax_scale": value}))


@pytest.mark.parametrize("argument", ["dropout_p", "softcap"])
def test_other_numbers_that_change_between_calls(argument: str, device: torch.device) -> None:
    call, number = calls.dense(device), torch.tensor(0.0)
    same(calls.run(DENSE, call | {argument: number}), calls.run(DENSE, call))
    number.fill_(0.5)
    torch.manual_seed(1)
    got = calls.run(DENSE, call | {argument: number})
    torch.manual_seed(1)
    same(got, calls.run(DENSE, call | {argument: 0.5}))


LONGEST: dict[str, Callable[[int, torch.device], Any]] = {
    "tensor": lambda value, _: torch.tensor(value),
    "int32 tensor": lambda value, _: torch.tensor(value, dtype=torch.int32),
    "one element": lambda value, _: torch.tensor([value]),
    "on the device": lambda value, device: torch.tensor(value, device=device),
    "made on the device": lambda value, device: torch.tensor([1, value], device=device).max(),
    "numpy": lambda value, _: np.int32(value),
}


@pytest.mark.parametrize(
    "options", [{}, DIFFERENT, {"softcap": 5.0}], ids=["plain", "other", "cap"]
)
@pytest.mark.parametrize("form", LONGEST)
def test_forms_of_the_longest_length(
    form: str, options: dict[str, Any], device: torch.device
) -> None:
    call = calls.packed(device) | options
    longest = LONGEST[form](5, device)
    expected = trained(VARLEN, call)
    with virtual_ascend.record() as rec:
        got = trained(VARLEN, call | {"max_seqlen_q": longest, "max_seqlen_k": longest})
    same(got, expected)
    assert not rec.device_to_host
    assert not rec.host_to_device


def test_a_longest_length_on_the_device_is_not_even_looked_at(npu: torch.device) -> None:
    call = calls.packed(npu)
    longest = torch.tensor(1, device=npu)
    calls.run(VARLEN, call)
    with virtual_ascend.record() as rec:
        got = calls.run(VARLEN, call | {"max_seqlen_q": longest, "max_seqlen_k": longest})
    assert not rec.device_to_host
    same(got, calls.run(VARLEN, call))


def test_a_longest_length_beyond_the_longest(device: torch.device) -> None:
    call = calls.packed(device)
    got = calls.run(VARLEN, call | {"max_seqlen_q": 512, "max_seqlen_k": 1024})
    same(got, calls.run(VARLEN, call))


@pytest.mark.parametrize("form", ["list", "tuple", "host"])
def test_lengths_on_the_host(form: str, device: torch.device) -> None:
    call = calls.packed(device)
    values = [0, 4, calls.ROWS]
    made = {
        "list": values,
        "tuple": tuple(values),
        "host": torch.tensor(values, dtype=torch.int32),
    }[form]
    for options in ({}, {"softcap": 5.0}):
        got = trained(VARLEN, call | options | {"cu_seqlens_q": made, "cu_seqlens_k": made})
        same(got, trained(VARLEN, call | options))


@pytest.mark.parametrize("function", calls.RIGHT)
def test_positions_and_keywords_mean_the_same(function: str, device: torch.device) -> None:
    call = calls.RIGHT[function](device) | DIFFERENT
    attend = getattr(flash_attn_npu, function)
    parameters = inspect.signature(attend).parameters.values()
    expected = attend(**call)
    positions = [call.get(parameter.name, parameter.default) for parameter in parameters]
    same(attend(*positions), expected)
    for count in range(1, len(call)):
        named = {
            parameter.name: value for parameter, value in zip(parameters, positions, strict=True)
        }
        rest = dict(list(named.items())[count:])
        same(attend(*positions[:count], **rest), expected)


@pytest.mark.parametrize("function", [DENSE, VARLEN])
def test_slopes_as_clients_hold_them(function: str, device: torch.device) -> None:
    call = calls.RIGHT[function](device)
    batch = 2
    slopes = torch.rand(8).to(device)[::2]
    expected = calls.run(function, call | {"alibi_slopes": slopes.contiguous()})
    for form in (slopes, slopes.expand(batch, 4), torch.nn.Parameter(slopes)):
        same(calls.run(function, call | {"alibi_slopes": form}), expected)


@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 5.0}, {"dropout_p": 0.5}, {"dropout_p": 1e-30}],
    ids=["plain", "composed", "dropout", "vanishing"],
)
@pytest.mark.parametrize("function", [*calls.RIGHT, "pages"])
def test_statistics_need_no_gradient(
    function: str, options: dict[str, Any], device: torch.device
) -> None:
    call = calls.PAGED[VARLEN](device) if function == "pages" else calls.RIGHT[function](device)
    for name in call.keys() & {"q", "k", "v", "kv", "qkv"}:
        call[name].requires_grad_()
    name = VARLEN if function == "pages" else function
    out, lse, s_dmask = calls.run(name, call | options | {"return_attn_probs": True})
    assert out.requires_grad
    assert not lse.requires_grad
    assert not s_dmask.requires_grad
    assert (s_dmask.numel() == 0) == (options.get("dropout_p", 0.0) < 0.5)


def test_a_cache_gives_no_gradient(device: torch.device) -> None:
    call = calls.PAGED["flash_attn_with_kvcache"](device)
    call["q"].requires_grad_()
    result = calls.run("flash_attn_with_kvcache", call | {"return_softmax_lse": True})
    assert not any(tensor.requires_grad for tensor in result)


@pytest.mark.parametrize("dropout_p", [0.0, 1e-30, 0.5])
@pytest.mark.parametrize("function", [DENSE, VARLEN])
def test_fake_tensors_have_the_shapes_of_real_ones(
    function: str, dropout_p: float, device: torch.device
) -> None:
    call = calls.RIGHT[function](device) | {"dropout_p": dropout_p, "return_attn_probs": True}
    real = calls.run(function, call)
    with FakeTensorMode() as mode:
        fake = {x: mode.from_tensor(y) if isinstance(y, Tensor) else y for x, y in call.items()}
        shown = calls.run(function, fake)
    for one, other in zip(real, shown, strict=True):
        assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    assert (real[2].shape == (0,)) == (dropout_p < 0.5)
