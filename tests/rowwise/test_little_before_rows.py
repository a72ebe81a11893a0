"""What stands before the launches of norms, gates and rotations: nothing but look-ups."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.forward_ad import dual_level, make_dual

from flash_attn_npu._core.ground.memory import forget_all
from flash_attn_npu.errors import ArgumentError
from flash_attn_npu.layers.rotary import apply_rotary_emb
from flash_attn_npu.ops.activations import swiglu, swiglu_fwd
from flash_attn_npu.ops.triton.layer_norm import rms_norm_fn
from flash_attn_npu.ops.triton.rotary import apply_rotary
from tests.helpers.frames import frames

pytestmark = pytest.mark.usefixtures("npu")


@pytest.fixture(autouse=True)
def fresh() -> None:
    forget_all()
    torch.manual_seed(0)


def again(call: Callable[[], Any]) -> list[str]:
    """The functions that a call runs when everything is known of it."""
    call()
    return frames(call)


GATE = ["swiglu_fwd", "_key", "is_compiling", "run"]


def test_a_gate_without_gradient_has_no_autograd_function() -> None:
    both = torch.randn(3, 64).npu()
    x, y = both.chunk(2, dim=-1)
    assert again(lambda: swiglu_fwd(x, y)) == GATE
    plain = ["swiglu", "is_undisturbed", "is_dynamo_compiling"]
    assert again(lambda: swiglu(x, y)) == [*plain, *GATE]
    both.requires_grad_()
    assert again(lambda: swiglu(*both.chunk(2, dim=-1))) == [
        *plain,
        "forward",
        "save_for_backward",
        *GATE,
    ]


class _Subclass(Tensor):
    pass


# the first dual of a process compiles torch's own formulas
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_gate_of_a_subclass_or_a_transform_goes_through_the_autograd_function() -> None:
    x, y = torch.randn(2, 3, 64).npu()
    seen = frames(lambda: swiglu(x.as_subclass(_Subclass), y))
    assert seen[:4] == ["swiglu", "is_undisturbed", "is_dynamo_compiling", "apply"]
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda t: swiglu(t, y).sum())(x)
    with dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        swiglu(make_dual(x, x), y)


@pytest.mark.parametrize(("added", "grad"), [(False, True), (True, False), (True, True)])
def test_a_norm_is_looked_up_and_launched(added: bool, grad: bool) -> None:
    x, residual = torch.randn(2, 3, 64).npu().requires_grad_(grad)
    weight = torch.ones(64).npu()
    seen = again(lambda: rms_norm_fn(x, weight, None, residual if added else None, prenorm=True))
    # the arguments as a value
    assert seen.count("<lambda>") == 1
    look_up = ["rms_norm_fn", "normed", "_key", "is_compiling"]
    launch = ["_added_norm" if added else "_norm", "launcher", "is_dynamo_compiling"]
    launch += ["watch", "is_compiling"]
    if added and grad:
        launch = [
            "_recorded_norm",
            "is_undisturbed",
            "is_dynamo_compiling",
            "forward",
            "launcher",
            "is_dynamo_compiling",
        ]
        launch += ["save_for_backward", "set_materialize_grads"]
    around = ["_fused", "total_dtype", "out_dtype", "_add_and_norm"]
    named = [name for name in seen if name != "<lambda>"]
    assert named == [*look_up, *around, *launch, "_in", "_in"]


@pytest.mark.parametrize("grad", [False, True])
def test_a_rotation_is_looked_up_and_launched(grad: bool) -> None:
    x = torch.randn(2, 3, 4, 16).npu().requires_grad_(grad)
    cos, sin = torch.randn(2, 5, 8).npu()
    key = ["_key", "is_compiling", "remembers_compiling", "_is_set_to_compile"]
    launch = [
        "_shared",
        "_rotated",
        "_may_share",
        "_turned",
        "launcher",
        "is_dynamo_compiling",
    ]
    seen = again(lambda: apply_rotary_emb(x, cos, sin, seqlen_offsets=1))
    named = [name for name in seen if name != "<lambda>"]
    start, door = named[: named.index("rotate")], ["apply_rotary_emb", "_is_differentiated"]
    if grad:
        door += ["is_undisturbed", "is_dynamo_compiling", "forward", "_save", "save_for_backward"]
    assert start == door
    assert named[named.index("rotate") + 1 :] == [*key, *launch]


def test_positions_and_compile_modes_are_told_apart() -> None:
    """What is remembered of a rotation by one position serves no other, nor other tables."""
    x, tables = torch.randn(2, 3, 4, 16), torch.randn(2, 5, 8)
    for batch, start, back in itertools.product((1, 2), (0, 1, 2), (False, True)):
        for rows in (3 + start, 5):
            given = [x[:batch], *tables[:, :rows]]
            turned = [
                apply_rotary(*(t.to(device) for t in given), start, conjugate=back)
                for device in ("cpu", "npu")
            ]
            torch.testing.assert_close(turned[1].cpu(), turned[0])
    for start in (-1, 3):
        with pytest.raises(ArgumentError, match="positions"):
            apply_rotary(x.npu(), *tables.npu(), start)
