"""Attention has first derivatives: whatever would lose the term of a second one is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_npu import flash_attn_interface as interface
from flash_attn_npu._integrations.stand_ins import npu_flash_attn_func
from flash_attn_npu.errors import UnsupportedError
from tests.helpers.old_torch import TORCH

CU_SEQLENS = torch.tensor([0, 2, 6], dtype=torch.int32)


def _varlen(x: Tensor, **options: Any) -> Any:
    return interface.flash_attn_varlen_func(x, x, x, CU_SEQLENS, CU_SEQLENS, 4, 4, **options)


CALLS: dict[str, Callable[[Tensor], Any]] = {
    "dense": lambda x: interface.flash_attn_func(x[None], x[None], x[None], softcap=5.0),
    "qkvpacked": lambda x: interface.flash_attn_qkvpacked_func(torch.stack([x[None]] * 3, 2)),
    "varlen": lambda x: _varlen(x, causal=True),
    "deterministic": lambda x: _varlen(x, deterministic=True),
    "lse too": lambda x: _varlen(x, return_attn_probs=True)[0],
    "sink": lambda x: npu_flash_attn_func(x[None], x[None], x[None], s_aux=x[0, :, 0]),
    "class": lambda x: interface.FlashAttnFunc.apply(
        *(x[None],) * 3, 0.0, None, False, (-1, -1), 0.0, None, False, False, True
    ),
}


TWICE = r"^create_graph: got a second derivative of "
# torch_npu's own autograd, whose terms would be lost, warns
refused = pytest.mark.filterwarnings("ignore:.*autograd kernel was not registered:UserWarning")


@refused
@pytest.mark.parametrize("linear", [False, True], ids=["curved", "linear"])
@pytest.mark.parametrize("name", CALLS)
def test_a_lost_term_is_refused(device: torch.device, name: str, linear: bool) -> None:
    weight = torch.randn(8, requires_grad=True, device=device)
    x = torch.randn(6, 2, 8, requires_grad=True, device=device)
    out = CALLS[name](x * weight)
    # a linear loss leaves a gradient that depends on what was saved alone
    loss = out.sum() if linear else out.square().sum()
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(UnsupportedError, match=TWICE):
        torch.autograd.grad(dx.square().sum() + x.square().sum(), weight)


@refused
@pytest.mark.parametrize("name", CALLS)
def test_what_reaches_the_gradient_through_the_loss_alone(device: torch.device, name: str) -> None:
    """Nothing that was saved depends on the weight; its term must not be dropped silently."""
    weight = torch.randn(8, requires_grad=True, device=device)
    x = torch.randn(6, 2, 8, requires_grad=True, device=device)
    (dx,) = torch.autograd.grad((CALLS[name](x) * weight).sum(), x, create_graph=True)
    with pytest.raises(UnsupportedError, match=TWICE):
        torch.autograd.grad(dx.square().sum(), weight, allow_unused=True)


@refused
def test_each_backward_of_a_graph_that_is_kept_refuses(device: torch.device) -> None:
    x = torch.randn(6, 2, 8, requires_grad=True, device=device)
    loss = CALLS["varlen"](x).square().sum()
    for _ in range(2):
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(UnsupportedError, match=TWICE):
            torch.autograd.grad(dx.square().sum(), x, retain_graph=True)
    assert torch.equal(torch.autograd.grad(loss, x)[0], dx)


@pytest.mark.skipif(TORCH < (2, 9), reason="before 2.9 torch.func hides what a card's tensor holds")
def test_a_functional_gradient_on_ascend(npu: torch.device) -> None:
    """torch.func always keeps the graph of a gradient."""
    x = torch.randn(6, 2, 8, device=npu)
    functional = torch.func.grad(lambda x: CALLS["varlen"](x).square().sum())(x)
    x.requires_grad_()
    (plain,) = torch.autograd.grad(CALLS["varlen"](x).square().sum(), x)
    assert torch.equal(functional, plain)


@pytest.mark.parametrize("name", CALLS)
def test_create_graph_alone_changes_nothing(device: torch.device, name: str) -> None:
    x = torch.randn(6, 2, 8, requires_grad=True, device=device)
    grads = [
        torch.autograd.grad(CALLS[name](x).square().sum(), x, create_graph=create_graph)[0]
        for create_graph in (False, True)
    ]
    assert torch.equal(*grads)


def test_compiled_attention_refuses_too() -> None:
    torch._dynamo.reset()
    x = torch.randn(6, 2, 8, requires_grad=True)
    weight = torch.randn(8, requires_grad=True)
    out = torch.compile(lambda x, w: CALLS["dense"](x * w), backend="eager")(x, weight)
    (dx,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(UnsupportedError, match=r"^create_graph: got a second derivative of "):
        dx.square().sum().backward()
    torch._dynamo.reset()
