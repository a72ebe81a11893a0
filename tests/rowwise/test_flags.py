"""Flags are taken as attention takes them: what is true by Python's rules alone is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flash_attn_npu.errors import ArgumentError, ArgumentTypeError
from flash_attn_npu.layers.rotary import apply_rotary_emb
from flash_attn_npu.losses.cross_entropy import CrossEntropyLoss
from flash_attn_npu.modules.block import Block
from flash_attn_npu.ops.layer_norm import (
    dropout_add_layer_norm,
    dropout_add_layer_norm_parallel_residual,
    dropout_add_layer_norm_subset,
)
from flash_attn_npu.ops.rms_norm import rms_norm
from flash_attn_npu.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn_npu.ops.triton.layer_norm import layer_norm_fn, layer_norm_linear_fn

X, ONE, Q, TABLE = torch.randn(6, 16), torch.ones(16), torch.randn(1, 5, 2, 16), torch.rand(5, 4)
CALLS: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = {
    "layer_norm_fn": (
        (
            *("prenorm", "residual_in_fp32", "zero_centered_weight", "is_rms_norm"),
            "return_dropout_mask",
        ),
        partial(layer_norm_fn, X, ONE, None),
    ),
    "layer_norm_linear_fn": (
        ("prenorm", "residual_in_fp32", "is_rms_norm"),
        partial(layer_norm_linear_fn, X, ONE, None, torch.ones(3, 16), None),
    ),
    "dropout_add_layer_norm": (
        ("prenorm", "residual_in_fp32", "return_dropout_mask"),
        partial(dropout_add_layer_norm, X, None, ONE, None, 0.0, 1e-5),
    ),
    "dropout_add_layer_norm_parallel_residual": (
        ("prenorm", "residual_in_fp32", "return_dropout_mask"),
        partial(
            dropout_add_layer_norm_parallel_residual,
            *(X, None, None, ONE, None, ONE, None, 0.0, 1e-5),
        ),
    ),
    "dropout_add_layer_norm_subset": (
        ("prenorm", "residual_in_fp32", "return_dropout_mask"),
        partial(dropout_add_layer_norm_subset, X, None, ONE, None, 0.0, 1e-5),
    ),
    "apply_rotary_emb": (("interleaved", "inplace"), partial(apply_rotary_emb, Q, TABLE, TABLE)),
    "cross_entropy_loss": (
        ("inplace_backward",), partial(cross_entropy_loss, X, torch.arange(6))
    ),
    "CrossEntropyLoss": (("return_z_loss",), CrossEntropyLoss),
}  # fmt: skip
WRONG = {
    "a text": "x",
    "a list": [1],
    "a dictionary": {},
    "nan": float("nan"),
    "an object": object(),
    "two": 2,
    "a tensor": torch.ones(3),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_flag_is_true_or_false(name: str) -> None:
    flags, call = CALLS[name]
    for flag in flags:
        for remembered in (False, True):
            if remembered:
                call()
            for wrong in WRONG.values():
                with pytest.raises(ArgumentTypeError, match=rf"^{flag}: .*; allowed: True or Fal"):
                    call(**{flag: wrong})
        for right in (np.bool_(True), 1, torch.tensor(True), 1.0):
            one, other = call(**{flag: right}), call(**{flag: True})
            assert type(one) is type(other)
            assert not isinstance(one, tuple) or len(one) == len(other)


def test_a_tensor_as_a_flag_is_read_at_every_call() -> None:
    flag = torch.tensor(True)
    assert isinstance(layer_norm_fn(X, ONE, None, prenorm=flag), tuple)
    flag.logical_not_()
    assert isinstance(layer_norm_fn(X, ONE, None, prenorm=flag), Tensor)
    means = []
    for rms in (True, False):
        flag.fill_(rms)
        means.append(layer_norm_fn(X + 5.0, ONE, None, is_rms_norm=flag).mean().item())
    assert means[0] > 0.9
    assert abs(means[1]) < 1e-5


def test_a_block_says_what_came() -> None:
    with pytest.raises(ArgumentError, match=r"^residual_in_fp32: got True \(bool\); allowed: Fal"):
        Block(16, prenorm=False, residual_in_fp32=True)


class DTensor(Tensor):
    """Told by its name: to import torch's own takes seconds."""


def test_a_dtensor_beside_plain_tensors_is_named() -> None:
    x, weight = X.as_subclass(DTensor), ONE.as_subclass(DTensor)
    # all of one kind are torch's business
    assert isinstance(rms_norm(x, weight, 1e-5), DTensor)
    calls: dict[str, list[Callable[[], Any]]] = {
        "x": [
            lambda: rms_norm(x, ONE, 1e-5),
            lambda: apply_rotary_emb(Q.as_subclass(DTensor), TABLE, TABLE),
        ],
        "weight": [lambda: layer_norm_fn(X, weight, None)],
        "input": [lambda: CrossEntropyLoss()(x, torch.arange(6))],
    }
    for argument, wrong in calls.items():
        for call in wrong:
            with pytest.raises(ArgumentTypeError, match=rf"^{argument}: got a DTensor"):
                call()
