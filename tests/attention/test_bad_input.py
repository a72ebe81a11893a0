"""Whatever is wrong with a call is refused by name, before anything is done."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import flash_attn_npu
from flash_attn_npu._core.ground.memory import forget_all
from flash_attn_npu.errors import ArgumentError, ArgumentTypeError
from tests.helpers import buffer_calls as calls
from tests.helpers.buffer_calls import Call, refused
from tests.helpers.old_torch import doubled

Spoil = Callable[[Call], Call]

DENSE, VARLEN = "flash_attn_func", "flash_attn_varlen_func"
NAN, INFINITE = float("nan"), float("inf")

both = pytest.mark.parametrize("function", [DENSE, VARLEN])


@pytest.fixture(autouse=True)
def fresh() -> None:
    forget_all()


@pytest.fixture(params=["first", "after a right call"])
def right(request: pytest.FixtureRequest, device: torch.device) -> Callable[[str], Call]:
    """Makes a right call's arguments; in one case the call has been served before."""

    def make(function: str) -> Call:
        call = calls.RIGHT[function](device)
        if request.param != "first":
            calls.run(function, call)
        return call

    return make


def spoilt_tensors(*names: str, to: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    return lambda call: {name: to(call[name]) for name in names}


TENSORS: dict[str, tuple[str, str, Spoil]] = {
    "rank of q, low": ("q", "shape (", spoilt_tensors("q", to=lambda x: x[0])),
    "rank of q, high": ("q", "shape (1, ", spoilt_tensors("q", to=lambda x: x[None])),
    "rank of k": ("k", "shape (1, ", spoilt_tensors("k", to=lambda x: x[None])),
    "rank of v": ("v", "shape (", spoilt_tensors("v", to=lambda x: x[0])),
    "rank of k and v": ("k", "shape (", spoilt_tensors("k", "v", to=lambda x: x[0])),
    "all of rank 0": ("q", "shape ()", spoilt_tensors("q", "k", "v", to=lambda x: x.sum())),
    "dtype of q": ("k", "torch.float32", spoilt_tensors("q", to=torch.Tensor.half)),
    "dtype of k": ("k", "torch.float16", spoilt_tensors("k", to=torch.Tensor.half)),
    "dtype of v": ("v", "torch.float64", spoilt_tensors("v", to=doubled)),
    "integers": ("q", "torch.int32", spoilt_tensors("q", "k", "v", to=torch.Tensor.int)),
    "booleans": ("q", "torch.bool", spoilt_tensors("q", "k", "v", to=torch.Tensor.bool)),
    "complex": ("q", "torch.complex64", spoilt_tensors("q", "k", "v", to=lambda x: x + 0j)),
    "heads of k and v": (
        "k",
        "3 heads",
        spoilt_tensors("k", "v", to=lambda x: x[..., :1, :].repeat_interleave(3, -2)),
    ),
    "more heads of k and v": (
        "k",
        "8 heads",
        spoilt_tensors("k", "v", to=lambda x: x.repeat_interleave(4, -2)),
    ),
    "no heads of k and v": ("k", "0 heads", spoilt_tensors("k", "v", to=lambda x: x[..., :0, :])),
    "heads of v": ("v", "shape (", spoilt_tensors("v", to=lambda x: x[..., :1, :])),
    "headdim of q": ("k", "headdim 16", spoilt_tensors("q", to=lambda x: x[..., :8])),
    "headdim of k": ("k", "headdim 8", spoilt_tensors("k", to=lambda x: x[..., :8])),
    "headdim of v": ("v", "headdim 8", spoilt_tensors("v", to=lambda x: x[..., :8])),
    "rows of v": ("v", "shape (", spoilt_tensors("v", to=lambda x: x[..., 1:, :, :])),
}


@both
@pytest.mark.parametrize("case", TENSORS)
def test_tensors(case: str, function: str, right: Callable[[str], Call]) -> None:
    argument, came, spoil = TENSORS[case]
    call = right(function)
    with torch.no_grad():
        call |= spoil(call)
    with refused(argument, ArgumentError, came):
        calls.run(function, call)


@both
@pytest.mark.parametrize("argument", ["q", "k", "v"])
def test_another_device(
    argument: str, function: str, right: Callable[[str], Call], device: torch.device
) -> None:
    other, call = calls.other_device(device), right(function)
    call[argument] = call[argument].to(other)
    with refused("k" if argument == "q" else argument, ArgumentError, "device "):
        calls.run(function, call)


@pytest.mark.parametrize(("argument", "spoilt"), [("k", ("k", "v")), ("k", ("q",)), ("v", ("v",))])
def test_another_batch(
    argument: str, spoilt: tuple[str, ...], right: Callable[[str], Call]
) -> None:
    call = right(DENSE)
    call |= spoilt_tensors(*spoilt, to=lambda x: x[:1])(call)
    with refused(argument, ArgumentError):
        calls.run(DENSE, call)


def lengths(*values: float, dtype: torch.dtype = torch.int32) -> Callable[[torch.device], Any]:
    return lambda device: torch.tensor(values, dtype=dtype, device=device)


LENGTHS: dict[str, tuple[type[Exception], str, Callable[[torch.device], Any]]] = {
    "decreasing": (ArgumentError, "[0, 7, 5, 9]", lengths(0, 7, 5, 9)),
    "not from 0": (ArgumentError, "[1, 4, 9]", lengths(1, 4, 9)),
    "negative": (ArgumentError, "[-1, 4, 9]", lengths(-1, 4, 9)),
    "past the end": (ArgumentError, "10", lengths(0, 4, 10)),
    "empty": (ArgumentError, "[]", lengths()),
    "int64": (ArgumentError, "torch.int64", lengths(0, 4, 9, dtype=torch.int64)),
    "float": (ArgumentError, "torch.float32", lengths(0, 4, 9, dtype=torch.float32)),
    "rank 0": (ArgumentError, "shape ()", lambda device: lengths(9)(device)[0]),
    "rank 2": (ArgumentError, "shape (1, 3)", lambda device: lengths(0, 4, 9)(device)[None]),
    "decreasing list": (ArgumentError, "[0, 9, 4]", lambda _: [0, 9, 4]),
    "list past the end": (ArgumentError, "10", lambda _: [0, 4, 10]),
    "empty list": (ArgumentError, "[]", lambda _: []),
    "long list": (ArgumentError, "... 40 entries]", lambda _: list(range(40, 0, -1))),
    "list of floats": (ArgumentTypeError, "list", lambda _: [0, 4.0, 9.0]),
    "list of booleans": (ArgumentTypeError, "list", lambda _: [False, True]),
    "tuple of strings": (ArgumentTypeError, "tuple", lambda _: ("0", "9")),
    "integer": (ArgumentTypeError, "int", lambda _: 9),
    "string": (ArgumentTypeError, "str", lambda _: "0 4 9"),
    "dictionary": (ArgumentTypeError, "dict", lambda _: {0: 9}),
}


@pytest.mark.parametrize("argument", ["cu_seqlens_q", "cu_seqlens_k"])
@pytest.mark.parametrize("case", LENGTHS)
def test_lengths(
    case: str, argument: str, right: Callable[[str], Call], device: torch.device
) -> None:
    error, came, make = LENGTHS[case]
    call = right(VARLEN) | {argument: make(device)}
    with refused(argument, error, came):
        calls.run(VARLEN, call)


@pytest.mark.parametrize("cu", [[0, 9], [0, 4, 4, 9], [0]], ids=repr)
def test_another_number_of_sequences(
    cu: list[int], right: Callable[[str], Call], device: torch.device
) -> None:
    made = torch.tensor(cu, dtype=torch.int32, device=device)
    call = right(VARLEN) | {"cu_seqlens_k": made, "max_seqlen_k": 9}
    with refused("cu_seqlens_k", ArgumentError, f"{len(cu) - 1} sequences"):
        calls.run(VARLEN, call)


@pytest.mark.parametrize("argument", ["cu_seqlens_q", "cu_seqlens_k"])
def test_missing_lengths(argument: str, right: Callable[[str], Call]) -> None:
    call = right(VARLEN) | {argument: None}
    with refused(argument, ArgumentTypeError, "None"):
        calls.run(VARLEN, call)


@pytest.mark.parametrize("packing", ["", "_kvpacked", "_qkvpacked"])
def test_no_lengths_at_all(packing: str, right: Callable[[str], Call]) -> None:
    function = f"flash_attn_varlen{packing}_func"
    call = right(function)
    names = [name for name in call if name.startswith("cu_seqlens")]
    with refused(names[0], ArgumentTypeError, "None"):
        calls.run(function, call | dict.fromkeys(names))


@pytest.mark.parametrize("missing", [("cu_seqlens_q",), ("cu_seqlens_q", "cu_seqlens_k")])
def test_padded_tensors_without_lengths(missing: tuple[str, ...], device: torch.device) -> None:
    call = calls.packed(device) | calls.dense(device)
    with refused("cu_seqlens_q", ArgumentTypeError, "None"):
        calls.run(VARLEN, call | dict.fromkeys(missing))


MAX_SEQLENS: dict[str, tuple[type[Exception], str, Any]] = {
    "too small": (ArgumentError, "4", 4),
    "zero": (ArgumentError, "0", 0),
    "negative": (ArgumentError, "-1", -1),
    "too small, tensor": (ArgumentError, "4", torch.tensor(4)),
    "missing": (ArgumentTypeError, "None", None),
    "float": (ArgumentTypeError, "9.0", 9.0),
    "string": (ArgumentTypeError, "'9'", "9"),
    "boolean": (ArgumentTypeError, "True", True),
    "list": (ArgumentTypeError, "[9]", [9]),
    "two elements": (ArgumentTypeError, "shape (2,)", torch.tensor([9, 9])),
    "float tensor": (ArgumentTypeError, "torch.float32", torch.tensor(9.0)),
}


@pytest.mark.parametrize("argument", ["max_seqlen_q", "max_seqlen_k"])
@pytest.mark.parametrize("case", MAX_SEQLENS)
def test_longest_lengths(case: str, argument: str, right: Callable[[str], Call]) -> None:
    error, came, value = MAX_SEQLENS[case]
    call = right(VARLEN) | {argument: value}
    with refused(argument, error, came):
        calls.run(VARLEN, call)


VALUES: dict[str, list[Any]] = {
    "dropout_p": [-0.1, 1.0, 1, True, 1.5, NAN, INFINITE],
    "softmax_scale": [NAN, INFINITE, -INFINITE],
    "softcap": [NAN, INFINITE],
}
TYPES: dict[str, list[Any]] = {
    "dropout_p": ["0.1", None, [0.1], 1j, torch.zeros(2)],
    "softmax_scale": ["0.5", [0.5], 1j, torch.zeros(2), (0.5,)],
    "softcap": ["1", None, [1.0], 1j, torch.zeros(2)],
    "causal": ["yes", None, 2, -1, 0.5, NAN, 1j, [True], torch.tensor(2), torch.zeros(2).bool()],
    "deterministic": ["no", None, 2, 0.5, [True], torch.tensor(0.5)],
    "return_attn_probs": ["no", None, 2, 0.5, [True], torch.tensor(-1)],
    "window_size": [
        *(None, 4, "ab", (4,), (1, 2, 3), ("a", 1), (1.5, 2), (None, 0), {1}),
        *((2, 0.5), (NAN, 0), (0, INFINITE), (1j, 0)),
    ],
}


def pairs(table: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(name, value, id=f"{name}={type(value).__name__}-{index}")
        for name, values in table.items()
        for index, value in enumerate(values)
    ]


@both
@pytest.mark.parametrize(("argument", "value"), pairs(VALUES))
def test_values(argument: str, value: float, function: str, right: Callable[[str], Call]) -> None:
    call = right(function) | {argument: value}
    with refused(argument, ArgumentError, str(float(value))):
        calls.run(function, call)


@both
@pytest.mark.parametrize(("argument", "value"), pairs(TYPES))
def test_types(argument: str, value: Any, function: str, right: Callable[[str], Call]) -> None:
    came = "tensor of shape" if isinstance(value, torch.Tensor) else repr(value)
    call = right(function) | {argument: value}
    with refused(argument, ArgumentTypeError, came):
        calls.run(function, call)


@both
@pytest.mark.parametrize("argument", ["dropout_p", "softmax_scale", "softcap"])
def test_numbers_that_cannot_be_read(
    argument: str, function: str, right: Callable[[str], Call]
) -> None:
    call = right(function) | {argument: torch.tensor(0.5, device="meta")}
    with refused(argument, ArgumentTypeError, "on meta"):
        calls.run(function, call)


SLOPES: dict[str, tuple[str, Callable[[torch.device], Any]]] = {
    "float16": ("torch.float16", lambda device: torch.ones(4, device=device).half()),
    "integers": ("torch.int64", lambda device: torch.ones(4, device=device).long()),
    "for key heads": ("shape (2,)", lambda device: torch.ones(2, device=device)),
    "scalar": ("shape ()", lambda device: torch.tensor(1.0, device=device)),
    "another batch": ("shape (3, 4)", lambda device: torch.ones(3, 4, device=device)),
    "the other way round": ("shape (4, 2)", lambda device: torch.ones(4, 2, device=device)),
    "rank 3": ("shape (1, 2, 4)", lambda device: torch.ones(1, 2, 4, device=device)),
    "another device": ("device", lambda device: torch.ones(4).to(calls.other_device(device))),
}


@both
@pytest.mark.parametrize("case", SLOPES)
def test_slopes(
    case: str, function: str, right: Callable[[str], Call], device: torch.device
) -> None:
    came, make = SLOPES[case]
    call = right(function) | {"alibi_slopes": make(device)}
    with refused("alibi_slopes", ArgumentError, came):
        calls.run(function, call)


PACKED: dict[str, list[tuple[str, Callable[[torch.Tensor], Any]]]] = {
    "qkv": [
        ("shape (", lambda x: x[..., :2, :, :]),
        ("shape (", lambda x: torch.cat((x, x), -3)),
        ("shape (", lambda x: x.sum(-3)),
        ("shape (", lambda x: x[None, None]),
        ("shape (", lambda x: x[None] if x.dim() == 4 else x[0]),
    ],
    "kv": [
        ("shape (", lambda x: x[None] if x.dim() == 4 else x[0]),
        ("shape (", lambda x: x[..., :1, :, :]),
        ("shape (", lambda x: torch.cat((x, x), -3)),
        ("shape (", lambda x: x.sum(-3)),
    ],
}


@pytest.mark.parametrize("function", [name for name in calls.RIGHT if "packed" in name])
def test_packed_tensors(function: str, right: Callable[[str], Call]) -> None:
    argument = "qkv" if "qkv" in function else "kv"
    call = right(function)
    for came, spoil in PACKED[argument]:
        with torch.no_grad():
            spoilt = spoil(call[argument])
        with refused(argument, ArgumentError, came):
            calls.run(function, call | {argument: spoilt})


@pytest.mark.parametrize("function", calls.RIGHT)
def test_any_argument_that_is_no_such_thing(function: str, right: Callable[[str], Call]) -> None:
    call = right(function)
    for argument in inspect.signature(getattr(flash_attn_npu, function)).parameters:
        for value in (object(), "x", b"x", {}):
            # packed functions pass one tensor of lengths on for both sides
            with refused(rf"{argument}(_q)?", ArgumentTypeError):
                calls.run(function, call | {argument: value})


def table(*rows: tuple[float, ...], dtype: torch.dtype = torch.int32) -> Callable:
    return lambda device: torch.tensor(rows, dtype=dtype, device=device)


BLOCKS: dict[str, tuple[type[Exception], str, Callable[[torch.device], Any]]] = {
    "rank 1": (ArgumentError, "(2,)", lambda device: table((2, 0), (3, 1))(device)[0]),
    "rank 3": (ArgumentError, "(1, 2, 2)", lambda device: table((2, 0), (3, 1))(device)[None]),
    "rank 0": (ArgumentError, "()", lambda device: table((2, 0), (3, 1))(device)[0, 0]),
    "int64": (ArgumentError, "torch.int64", table((2, 0), (3, 1), dtype=torch.int64)),
    "float": (ArgumentError, "torch.float32", table((2, 0), (3, 1), dtype=torch.float32)),
    "fewer rows": (ArgumentError, "(1, 2)", table((2, 0))),
    "more rows": (ArgumentError, "(3, 2)", table((2, 0), (3, 1), (1, 2))),
    "past the end": (ArgumentError, "4", table((2, 0), (3, 4))),
    "far past the end": (ArgumentError, "1000000", table((1_000_000, 0), (3, 1))),
    "negative": (ArgumentError, "-1", table((2, 0), (-1, 1))),
    "too short": (ArgumentError, "5", table((2,), (3,))),
    "no pages": (ArgumentError, "", lambda device: table((2,), (3,))(device)[:, :0]),
    "list": (ArgumentTypeError, "list", lambda _: [[2, 0], [3, 1]]),
}
paged = pytest.mark.parametrize("function", calls.PAGED)
history = pytest.mark.parametrize("served", [False, True], ids=["first", "after a right call"])


@paged
@history
@pytest.mark.parametrize("gradients", [False, True], ids=["plain", "gradients"])
@pytest.mark.parametrize("case", BLOCKS)
def test_paged_keys(
    case: str, gradients: bool, served: bool, function: str, device: torch.device
) -> None:
    error, came, make = BLOCKS[case]
    call = calls.PAGED[function](device)
    if served:
        calls.run(function, call)
    before = {name: call[name].clone() for name in call if name.endswith("_cache")}
    call["q"].requires_grad_(gradients)
    call["block_table"] = make(device)
    # which of the two that disagree is wrong nobody knows, but both are arguments of the call
    seqlens = "cache_seqlens" if "cache_seqlens" in call else "cu_seqlens_k"
    disagree = case in ("too short", "no pages")
    with refused(f"(block_table|{seqlens})" if disagree else "block_table", error, came):
        calls.run(function, call)
    assert all(torch.equal(call[name], before[name]) for name in before)


@paged
def test_block_ids_that_no_length_reaches_are_not_looked_at(
    function: str, device: torch.device
) -> None:
    call = calls.PAGED[function](device)
    expected = calls.run(function, call)
    unused = table((2, -1, 9), (3, 1, 1_000_000))(device)
    assert torch.equal(calls.run(function, call | {"block_table": unused}), expected)


@paged
def test_a_table_on_another_device(function: str, device: torch.device) -> None:
    """One on the host may name the pages of a cache on a device, not the reverse."""
    other, call = calls.other_device(device), calls.PAGED[function](device)
    moved = {"block_table": call["block_table"].to(other)}
    if device.type == "cpu":
        with refused("block_table", ArgumentError, str(other)):
            calls.run(function, call | moved)
        return
    assert torch.equal(calls.run(function, call | moved), calls.run(function, call))


@pytest.mark.parametrize(("argument", "value"), pairs(TYPES))
def test_types_beside_pages(argument: str, value: Any, device: torch.device) -> None:
    call = calls.PAGED[VARLEN](device) | {argument: value}
    with refused(argument, ArgumentTypeError):
        calls.run(VARLEN, call)
