"""Forward-mode tangents: torch_npu's operators drop them without a word, so they are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual

from flash_attn_npu._core.rowwise.gates import geglu
from flash_attn_npu.errors import UnsupportedError
from flash_attn_npu.layers.rotary import apply_rotary_emb
from flash_attn_npu.ops.activations import swiglu_fwd
from flash_attn_npu.ops.layer_norm import dropout_add_layer_norm
from flash_attn_npu.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn_npu.ops.triton.layer_norm import layer_norm_fn, rms_norm_fn
from flash_attn_npu.ops.triton.rotary import apply_rotary

WIDTH = 64
X = (2, 4, 3, WIDTH)

# the first dual of a process compiles torch's own formulas
pytestmark = [
    pytest.mark.usefixtures("npu"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]


def made(*shape: int) -> Tensor:
    return torch.randn(shape).npu()


def added(x: Tensor) -> Tensor:
    params = torch.ones(WIDTH).npu(), torch.zeros(WIDTH).npu()
    normed: Tensor = dropout_add_layer_norm(x, made(*X), *params, 0.0, 1e-5)
    return normed


CALLS: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "swiglu": ("x", lambda x: swiglu_fwd(*x.chunk(2, dim=-1))),
    "swiglu of two": ("y", lambda x: swiglu_fwd(made(*X), x)),
    "RMS norm": ("x", lambda x: rms_norm_fn(x, made(WIDTH), None)),
    "weight": ("weight", lambda x: rms_norm_fn(made(5, WIDTH), x[0, 0, 0], None)),
    "RMS norm of a sum": ("residual", lambda x: rms_norm_fn(made(*X), made(WIDTH), None, x)),
    "layer norm of a sum": ("x0", added),
    "rotation": ("x", lambda x: apply_rotary_emb(x, made(4, WIDTH // 2), made(4, WIDTH // 2))),
    "tables": ("cos", lambda x: apply_rotary(made(*X), x[0, :, 0, ::2], made(4, WIDTH // 2))),
    "at positions": (
        "x",
        lambda x: apply_rotary(
            x, made(9, WIDTH // 2), made(9, WIDTH // 2), torch.tensor([1, 2]).npu()
        ),
    ),
    "loss": ("logits", lambda x: cross_entropy_loss(x.flatten(0, 2), torch.arange(24).npu())),
}


@pytest.mark.parametrize("remembered", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_a_tangent_before_a_fused_kernel_is_refused(name: str, remembered: bool) -> None:
    argument, call = CALLS[name]
    x = made(*X)
    with torch.no_grad():
        if remembered:
            call(x)
        with dual_level():
            # there may be others
            call(x)
            with pytest.raises(UnsupportedError, match=rf"^{argument}: .* forward-mode tangent"):
                call(make_dual(x, made(*X)))


def test_where_torch_differentiates_forward_it_does() -> None:
    x, tangent, weight = torch.randn(5, WIDTH), torch.randn(5, WIDTH), torch.randn(WIDTH)

    def norm(x: Tensor) -> Any:
        return layer_norm_fn(x, weight.to(x.device), weight.to(x.device))

    def scaled(x: Tensor) -> Any:
        # no kernel takes dropout
        return rms_norm_fn(x, weight.to(x.device), None, dropout_p=1e-30)

    with torch.no_grad(), dual_level():
        for function in (norm, scaled, geglu):
            dual = make_dual(x, tangent), make_dual(x.npu(), tangent.npu())
            expected, found = (unpack_dual(function(one)).tangent for one in dual)
            torch.testing.assert_close(found.cpu(), expected)


def test_a_transform_forward_is_refused_too() -> None:
    x, y = made(2, 3, WIDTH)
    with pytest.raises(UnsupportedError, match="forward-mode tangent"):
        torch.func.jvp(swiglu_fwd, (x, y), (x, y))
    torch.testing.assert_close(torch.vmap(swiglu_fwd)(x, y).cpu(), swiglu_fwd(x, y).cpu())
