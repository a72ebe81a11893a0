"""Calls of a few rows on a CPU that differ in one fact: none is served by what another's plan says.

Each is made once after the plans of all others, and once after nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_npu._core.ground.memory import forget_all
from flash_attn_npu.bert_padding import pad_input
from flash_attn_npu.layers.rotary import apply_rotary_emb
from flash_attn_npu.ops.layer_norm import dropout_add_layer_norm
from flash_attn_npu.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn_npu.ops.triton.layer_norm import layer_norm_fn, rms_norm_fn

HALF, WIDE = torch.bfloat16, torch.float64
Facts = dict[str, Any]
"""Changes of the arguments of a call: a tensor is made anew by a function, all else replaced."""


def turned(tensor: Tensor) -> Tensor:
    return torch.stack((tensor, tensor), -1)[..., 0]


TENSORS: dict[str, Callable[[Tensor], Tensor]] = {
    "half": lambda t: t.to(HALF),
    "wide": lambda t: t.to(WIDE),
    "integer": lambda t: t.long(),
    "strides": turned,
    "leaf": lambda t: t.clone().requires_grad_(),
    "narrower": lambda t: t[..., :6].contiguous(),
    "one row": lambda t: t[:1].contiguous(),
    "subclass": lambda t: t.as_subclass(_Subclass),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
}


class _Subclass(Tensor):
    pass


def of_norm(rms: bool) -> tuple[Callable[..., Any], Facts, list[Facts]]:
    rows, more, third = torch.randn(3, 4, 8)
    given: Facts = {"x": rows, "weight": torch.rand(8), "bias": torch.randn(8)}
    added: Facts = {"residual": more, "x1": third, "weight1": torch.rand(8), "bias1": None}
    options: list[Facts] = [
        {"prenorm": True},
        {"eps": 0.5},
        {"eps": 1},
        {"zero_centered_weight": True},
        {"residual_in_fp32": True, "prenorm": True},
        {"out_dtype": HALF},
        {"dropout_p": 0.5},
        {"return_dropout_mask": True},
        {"rowscale": torch.rand(4)},
        {"bias": None},
        {"out": torch.empty(4, 8)},
        {"residual": more, "prenorm": True},
        {"residual": more.to(HALF), "prenorm": True},
        {"residual": more.clone().requires_grad_(), "prenorm": True},
        {"x1": third},
        {"weight1": added["weight1"]},
        {"weight1": added["weight1"], "prenorm": True},
    ]
    return (rms_norm_fn if rms else layer_norm_fn), given, options


def of_dropout() -> tuple[Callable[..., Any], Facts, list[Facts]]:
    rows, more = torch.randn(2, 4, 8)
    given = {"x0": rows, "residual": more, "weight": torch.rand(8), "bias": torch.randn(8)}
    scales = {"rowscale": torch.rand(4), "layerscale": torch.rand(8)}
    return (
        partial(dropout_add_layer_norm, dropout_p=0.25, epsilon=1e-5),
        given,
        [{"dropout_p": 0.5}, {"prenorm": True}, {"return_dropout_mask": True}, scales],
    )


def of_loss() -> tuple[Callable[..., Any], Facts, list[Facts]]:
    given = {"logits": torch.randn(4, 8), "labels": torch.tensor([1, 5, 0, 3])}
    options: list[Facts] = [
        {"label_smoothing": 0.25},
        {"logit_scale": 0.5},
        {"lse_square_scale": 0.125},
        {"ignore_index": 5},
        {"inplace_backward": True},
        {"precomputed_lse": torch.rand(4)},
        {"labels": torch.tensor([1, 5, 0, 3], dtype=torch.uint8)},
        {"labels": torch.tensor([1, 5, 0, 8])},
        {"labels": torch.tensor([1, 5, 0, -100])},
        {"logits": torch.randn(4, 8).requires_grad_(), "inplace_backward": True},
        {"labels": torch.tensor([1, 5, 0])},
        {"labels": torch.tensor([1.0, 5.0, 0.0, 3.0])},
        {"logits": torch.randn(4, 4)},
    ]
    return cross_entropy_loss, given, options


def of_rotation() -> tuple[Callable[..., Any], Facts, list[Facts]]:
    cos, sin = torch.randn(2, 5, 4)
    given = {"x": torch.randn(2, 4, 3, 8), "cos": cos, "sin": sin}
    options: list[Facts] = [
        {"interleaved": True},
        {"seqlen_offsets": 1},
        {"seqlen_offsets": 2},
        {"seqlen_offsets": -1},
        {"seqlen_offsets": torch.tensor([1, 0])},
        {"inplace": True},
        {"cos": cos[:, :2], "sin": sin[:, :2]},
        {"cos": cos[:, :2]},
        {"cos": cos[:4], "sin": sin[:4]},
        {"cos": cos[:3], "sin": sin[:3]},
        {"x": torch.randn(2, 4, 3, 2, 8)},
        {"x": torch.randn(8, 3, 8), "cu_seqlens": torch.tensor([0, 4, 8], dtype=torch.int32)},
    ]
    return apply_rotary_emb, given, options


def of_padding() -> tuple[Callable[..., Any], Facts, list[Facts]]:
    given = {"hidden_states": torch.randn(4, 8), "indices": torch.tensor([0, 1, 3, 4])}
    options: list[Facts] = [
        {"indices": given["indices"].int()},
        {"indices": torch.tensor([0, 1, 3, 6])},
        {"indices": torch.tensor([0, 1, 3])},
        {"batch": True},
        {"batch": -1},
        {"seqlen": 1 << 31},
    ]
    return partial(pad_input, batch=2, seqlen=3), given, options


FUNCTIONS: dict[str, Callable[[], tuple[Callable[..., Any], Facts, list[Facts]]]] = {
    "layer norm": partial(of_norm, False),
    "rms norm": partial(of_norm, True),
    "dropout": of_dropout,
    "loss": of_loss,
    "rotation": of_rotation,
    "padding": of_padding,
}


def varied(given: Facts, options: list[Facts]) -> list[Facts]:
    every = [given, *(given | option for option in options)]
    for name, tensor in given.items():
        if isinstance(tensor, Tensor) and tensor.dtype.is_floating_point:
            every += [given | {name: change(tensor)} for change in TENSORS.values()]
    return every


def said(function: Callable[..., Any], arguments: Facts, mode: AbstractContextManager[Any]) -> Any:
    """All that a call answers, its gradients, and what it leaves in its arguments; or its error."""
    torch.manual_seed(0)
    copied = {
        name: value.detach().clone().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor)
        else value
        for name, value in arguments.items()
    }
    try:
        with mode:
            answer = function(**copied)
        found = answer if isinstance(answer, tuple) else (answer,)
        ends = [one for one in found if isinstance(one, Tensor) and one.requires_grad]
        leaves = [one for one in copied.values() if isinstance(one, Tensor) and one.requires_grad]
        inner: tuple[Any, ...] = ()
        if ends:
            inner = torch.autograd.grad([end.sum() for end in ends], leaves, allow_unused=True)
        return [*found, *inner, *copied.values()]
    except (RuntimeError, TypeError, ValueError) as error:
        return [type(error), str(error)]


def same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or one.is_meta:
        return type(one) is type(other) and (isinstance(one, Tensor) or one == other)
    if (one.dtype, one.shape, one.layout) != (other.dtype, other.shape, other.layout):
        return False
    if one.requires_grad != other.requires_grad or type(one) is not type(other):
        return False
    one, other = (t.detach().to_dense().as_subclass(Tensor) for t in (one, other))
    return torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("without", [False, True], ids=["", "no grad"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_call_is_served_as_if_it_were_the_first(name: str, without: bool) -> None:
    function, given, options = FUNCTIONS[name]()
    every = varied(given, options)

    def mode() -> AbstractContextManager[Any]:
        return torch.no_grad() if without else nullcontext()

    alone = []
    for arguments in every:
        forget_all()
        alone.append(said(function, arguments, mode()))
    for _ in range(2):
        for arguments, expected in zip(every, alone, strict=True):
            got = said(function, arguments, mode())
            assert len(got) == len(expected)
            assert all(same(one, other) for one, other in zip(got, expected, strict=True)), [
                key for key, value in arguments.items() if value is not given.get(key)
            ]
    refused = [answer for answer in alone if isinstance(answer[0], type)]
    assert 3 <= len(refused) <= len(every) // 2
