"""One tensor in several places: each place has its own gradient, and they add up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flash_attn_npu import flash_attn_func
from flash_attn_npu._core.attention import call
from flash_attn_npu._core.problems.ask import Options
from flash_attn_npu._integrations.stand_ins import npu_flash_attn_func
from flash_attn_npu.layers.rotary import apply_rotary_emb, apply_rotary_emb_qkv_
from flash_attn_npu.ops.activations import bias_gelu_impl, swiglu
from flash_attn_npu.ops.layer_norm import (
    dropout_add_layer_norm,
    dropout_add_layer_norm_parallel_residual,
    dropout_add_layer_norm_subset,
)
from flash_attn_npu.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn_npu.ops.triton.layer_norm import layer_norm_fn, layer_norm_linear_fn, rms_norm_fn

Places = tuple[Tensor, ...]
Run = Callable[[Places], Tensor]


def attention(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, sink: Tensor) -> Tensor:
    out = call.attend("sunk", (q, k, v), None, Options(causal=True), slopes, sink)
    assert isinstance(out, Tensor)
    return out


def _heads(x: Tensor) -> Tensor:
    return x.view(1, 4, 4, 4)


def _rows(*places: Tensor) -> list[Tensor]:
    """The first row of each: one object for one tensor."""
    known = {id(x): x[0] for x in places}
    return [known[id(x)] for x in places]


def _logits(*places: Tensor) -> list[Tensor]:
    known = {id(x): x[0, :4] for x in places}
    return [known[id(x)] for x in places]


def _tables(*places: Tensor) -> list[Tensor]:
    known = {id(x): x[:, :4] for x in places}
    return [known[id(x)] for x in places]


def _packed_attention(p: Places) -> Tensor:
    slopes, sink = _logits(*p[3:])
    q, k, v = (_heads(x)[0] for x in p[:3])
    lengths = ([0, 1, 4], [0, 1, 4], 3, 3)
    out = call.attend("sunk", (q, k, v), lengths, Options(causal=True), slopes, sink)
    assert isinstance(out, Tensor)
    return out


def _subset(p: Places) -> Tensor:
    weight, bias, layerscale = _rows(*p[2:])
    rows = torch.tensor([1, 2, 3, 4], dtype=torch.int32, device=p[0].device)
    return dropout_add_layer_norm_subset(
        p[0], p[1], weight, bias, 0.0, 1e-5, layerscale, rows, rows, 1.0, 4
    )


def _in_place(p: Places) -> Tensor:
    qkv = torch.stack([x.view(1, 4, 2, 8) for x in p[:3]], dim=2)
    return apply_rotary_emb_qkv_(qkv, *_tables(*p[3:]))


CALLS: dict[str, tuple[Run, int]] = {
    "attention": (
        lambda p: attention(*(_heads(x) for x in p[:3]), *_logits(*p[3:])),
        5,
    ),
    "packed attention": (_packed_attention, 5),
    "softcap": (lambda p: flash_attn_func(*(_heads(x) for x in p), softcap=3.0), 3),
    "sink alone": (
        lambda p: npu_flash_attn_func(*(_heads(x) for x in p[:3]), s_aux=p[3][0, :4]),
        4,
    ),
    "layer norm": (
        lambda p: sum(layer_norm_fn(p[0], *_rows(*p[1:3]), *p[3:5], *_rows(*p[5:]))),
        7,
    ),
    "fused layer norm": (lambda p: layer_norm_fn(p[0], *_rows(*p[1:3]), p[3]), 4),
    "fused RMS norm": (lambda p: rms_norm_fn(p[0], p[1][0], None, p[2]), 3),
    "norm and linear": (
        lambda p: layer_norm_linear_fn(p[0], *_rows(*p[1:3]), p[3], p[4][0, :4], p[5]),
        6,
    ),
    "dropout, add, norm": (
        lambda p: dropout_add_layer_norm(*p[:2], *_rows(*p[2:4]), 0.0, 1e-5, layerscale=p[4][0]),
        5,
    ),
    "parallel residual": (
        lambda p: sum(dropout_add_layer_norm_parallel_residual(*p[:3], *_rows(*p[3:]), 0.0, 1e-5)),
        7,
    ),
    "subset": (_subset, 5),
    "gate": (lambda p: swiglu(*p), 2),
    "bias and gelu": (lambda p: bias_gelu_impl(*p), 2),
    "rotation": (lambda p: apply_rotary_emb(p[0].view(1, 4, 2, 8), *_tables(*p[1:])), 3),
    "rotation in place": (_in_place, 5),
    "cross entropy": (
        lambda p: cross_entropy_loss(
            p[0], torch.arange(4, device=p[0].device), p[1].sum(1), lse_square_scale=0.1
        )[0],
        2,
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_gradients_of_one_tensor_are_those_of_its_places(device: torch.device, name: str) -> None:
    run, places = CALLS[name]
    torch.manual_seed(0)
    host = torch.randn(4, 16)
    weights = None

    def gradients(leaves: Places, places: Places) -> tuple[Tensor | None, ...]:
        nonlocal weights
        out = run(places)
        weights = torch.randn(out.shape).to(out) if weights is None else weights
        return torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True)

    shared = host.clone().to(device).requires_grad_()
    (together,) = gradients((shared,), (shared,) * places)
    apart = tuple(host.clone().to(device).requires_grad_() for _ in range(places))
    given = [grad for grad in gradients(apart, apart) if grad is not None]
    assert given
    torch.testing.assert_close(together, torch.stack(given).sum(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "varlen"])
@pytest.mark.parametrize("softcap", [0.0, 3.0], ids=["fused on Ascend", "composed"])
def test_slopes_have_no_gradient(device: torch.device, softcap: float, packed: bool) -> None:
    """As in flash-attention, though torch_npu's autograd would give one."""
    q = torch.randn(1, 4, 2, 8, device=device, requires_grad=True)
    slopes = torch.tensor([0.5, 0.25], device=device, requires_grad=True)
    lengths = ([0, 4], [0, 4], 4, 4) if packed else None
    x = q[0] if packed else q
    options = Options(causal=True, softcap=softcap)
    out = call.attend("biased", (x, x, x), lengths, options, slopes)
    assert isinstance(out, Tensor)
    assert torch.autograd.grad(out.sum(), (q, slopes), allow_unused=True)[1] is None
