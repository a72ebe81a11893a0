"""Names and signatures of the norm modules, and what they say to bad input."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from flash_attn_npu.errors import ArgumentError, ArgumentTypeError
from flash_attn_npu.ops import layer_norm, rms_norm
from flash_attn_npu.ops.triton import layer_norm as of_triton
from tests.helpers.norm_cases import SHAPE

HIDDEN = SHAPE[-1]
ROW = torch.ones(HIDDEN)
MATRIX = torch.ones(SHAPE)
META = {"device": "meta"}

BAD: list[tuple[str, dict[str, Any], type[Exception]]] = [
    ("x", {"x": 1.0}, ArgumentTypeError),
    ("x", {"x": torch.ones(())}, ArgumentError),
    ("x", {"x": MATRIX.int()}, ArgumentError),
    ("weight", {"weight": None}, ArgumentTypeError),
    ("weight", {"weight": torch.ones(1)}, ArgumentError),
    ("weight", {"weight": torch.ones(HIDDEN, **META)}, ArgumentError),
    ("bias", {"bias": [0.0] * HIDDEN}, ArgumentTypeError),
    ("bias", {"bias": torch.ones(1, HIDDEN)}, ArgumentError),
    ("residual", {"residual": MATRIX[:1]}, ArgumentError),
    ("residual", {"residual": torch.ones(SHAPE, **META)}, ArgumentError),
    ("x1", {"x1": MATRIX[0]}, ArgumentError),
    ("weight1", {"weight1": torch.ones(HIDDEN + 1)}, ArgumentError),
    ("bias1", {"bias1": ROW}, ArgumentError),
    ("bias1", {"weight1": ROW, "bias1": ROW.long()}, ArgumentError),
    ("rowscale", {"rowscale": torch.ones(SHAPE[0])}, ArgumentError),
    ("rowscale", {"rowscale": MATRIX[..., 0], "x1": MATRIX}, ArgumentError),
    ("eps", {"eps": "1e-5"}, ArgumentTypeError),
    ("dropout_p", {"dropout_p": 1.5}, ArgumentError),
    ("dropout_p", {"dropout_p": -0.1}, ArgumentError),
    ("dropout_p", {"dropout_p": None}, ArgumentTypeError),
    ("out_dtype", {"out_dtype": torch.int32}, ArgumentError),
    ("out_dtype", {"out_dtype": "float32"}, ArgumentError),
    ("out", {"out": 3}, ArgumentTypeError),
    ("out", {"out": MATRIX.clone(), "out_dtype": torch.float16}, ArgumentError),
    ("residual_out", {"residual_out": MATRIX.half()}, ArgumentError),
    ("residual_out", {"residual": MATRIX.half(), "residual_out": MATRIX.clone()}, ArgumentError),
]


def message_about(argument: str) -> str:
    return rf"^{argument}: got .*; allowed: .*; to fix it: "


@pytest.mark.parametrize(("argument", "changed", "error"), BAD)
def test_bad_input(argument: str, changed: dict[str, Any], error: type[Exception]) -> None:
    given = {"x": MATRIX, "weight": ROW, "bias": None, **changed}
    for function in (of_triton.layer_norm_fn, of_triton.rms_norm_fn):
        with pytest.raises(error, match=message_about(argument)):
            function(**given)
    names = list(inspect.signature(of_triton.LayerNormFn.forward).parameters)[1:]
    defaults = inspect.signature(of_triton.layer_norm_fn).parameters
    with pytest.raises(error, match=message_about(argument)):
        of_triton.LayerNormFn.apply(*(given.get(n, defaults[n].default) for n in names))


def test_arguments_are_called_as_the_function_calls_them() -> None:
    wrong = torch.ones(1)
    add, add_rms = layer_norm.dropout_add_layer_norm, rms_norm.dropout_add_rms_norm
    two = layer_norm.dropout_add_layer_norm_parallel_residual
    two_rms = rms_norm.dropout_add_rms_norm_parallel_residual
    none = (None,) * 3
    calls: list[tuple[str, type[Exception], Any]] = [
        ("x0", ArgumentTypeError, lambda: add(1, None, ROW, None, 0.0, 1e-5)),
        ("weight", ArgumentError, lambda: add(MATRIX, None, wrong, None, 0.0, 1e-5)),
        ("epsilon", ArgumentTypeError, lambda: add_rms(MATRIX, None, ROW, None, 0.0, None)),
        ("dropout_p", ArgumentError, lambda: add_rms(MATRIX, None, ROW, None, 2.0, 1e-5)),
        (
            "layerscale",
            ArgumentError,
            lambda: add(MATRIX, None, ROW, None, 0.0, 1e-5, None, wrong),
        ),
        ("x0", ArgumentTypeError, lambda: two(1, None, None, ROW, *none, 0.0, 1e-5)),
        ("weight0", ArgumentError, lambda: two(MATRIX, None, None, wrong, *none, 0.0, 1e-5)),
        ("bias0", ArgumentError, lambda: two_rms(MATRIX, None, None, ROW, wrong, None, None, 0, 1)),
        ("bias1", ArgumentError, lambda: two_rms(MATRIX, None, None, ROW, None, None, ROW, 0, 1)),
        ("x", ArgumentTypeError, lambda: rms_norm.rms_norm([1.0], ROW, 1e-5)),
        ("bias", ArgumentError, lambda: layer_norm.layer_norm(MATRIX, ROW, wrong, 1e-5)),
        (
            "gamma",
            ArgumentError,
            lambda: layer_norm.DropoutAddLayerNormFn.apply(
                MATRIX, None, wrong, None, None, None, 0.0, 1e-5
            ),
        ),
        (
            "beta1",
            ArgumentError,
            lambda: layer_norm.DropoutAddLayerNormParallelResidualFn.apply(
                MATRIX, None, None, ROW, None, ROW, wrong, 0.0, 1e-5
            ),
        ),
    ]
    for argument, error, call in calls:
        with pytest.raises(error, match=message_about(argument)):
            call()


@pytest.mark.parametrize(
    ("argument", "place", "value", "error"),
    [
        ("norm_weight", 1, ROW[:1], ArgumentError),
        ("norm_bias", 2, ROW[:1], ArgumentError),
        ("linear_weight", 3, None, ArgumentTypeError),
        ("linear_weight", 3, torch.ones(HIDDEN), ArgumentError),
        ("linear_weight", 3, torch.ones(4, HIDDEN + 1), ArgumentError),
        ("linear_bias", 4, torch.ones(5), ArgumentError),
        ("linear_bias", 4, torch.ones(4).int(), ArgumentError),
    ],
)
def test_bad_input_of_the_linear_layer(
    argument: str, place: int, value: Any, error: type[Exception]
) -> None:
    given: list[Any] = [MATRIX, ROW, ROW, torch.ones(4, HIDDEN), torch.ones(4)]
    given[place] = value
    with pytest.raises(error, match=message_about(argument)):
        of_triton.layer_norm_linear_fn(*given)


def test_numbers_of_other_types_are_numbers() -> None:
    y = of_triton.rms_norm_fn(MATRIX, ROW, None, eps=0, dropout_p=0)
    assert torch.equal(y, MATRIX)
    dropped = of_triton.rms_norm_fn(MATRIX, ROW, None, MATRIX, eps=0, dropout_p=1)
    assert torch.equal(dropped, MATRIX)


def test_the_launchers_of_kernels_are_absent() -> None:
    for name in ("_layer_norm_fwd", "_layer_norm_bwd", "triton_autotune_configs"):
        assert not hasattr(of_triton, name)
    assert not hasattr(layer_norm, "_dropout_add_layer_norm_forward")


def test_contiguous_helpers() -> None:
    turned = torch.ones(2, 3).t()
    assert of_triton.maybe_contiguous(None) is None
    assert of_triton.maybe_contiguous_lastdim(None) is None
    assert of_triton.maybe_contiguous(turned).is_contiguous()
    assert of_triton.maybe_contiguous_lastdim(turned).is_contiguous()
    sliced = torch.ones(2, 4)[:, :2]
    assert of_triton.maybe_contiguous_lastdim(sliced) is sliced
    assert of_triton.maybe_contiguous(sliced).is_contiguous()
