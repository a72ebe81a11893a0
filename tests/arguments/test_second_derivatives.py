"""Attention has first derivatives: whatever would lose the term of a second one is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_npu import flash_attn_interface as interface
from flash_attn_npu.errors import UnsupportedError
from flash_attn_npu.integrations.transformers import npu_flash_attn_func

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


# torch_npu's own autograd warns, and its backward then refuses the gradient that is not there
TWICE = r"a second derivative of |The shapes of the input dy should be 3 or 4 dimensional"
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
    with pytest.raises((UnsupportedError, RuntimeError), match=TWICE):
        torch.autograd.grad(dx.square().sum() + x.square().sum(), weight)


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
