"""Calls that must take the operators, or stay one step, although nothing of ours is compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.compiled_autograd as compiled_autograd
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from flash_attn_npu import flash_attn_func, flash_attn_varlen_func
from flash_attn_npu._core.ground.memory import forget_all, memos
from tests.helpers.old_torch import TORCH


def problem() -> dict[str, Tensor]:
    made = {name: torch.randn(1, 3, heads, 8) for name, heads in zip("qkv", (4, 2, 2), strict=True)}
    return made | {"alibi_slopes": torch.rand(4)}


@pytest.mark.parametrize("name", ["q", "k", "v", "alibi_slopes"])
def test_a_subclass_in_any_place_is_asked(name: str) -> None:
    """A pair of tensors gives a pair of answers, wherever it stands."""
    given = problem()
    first, second = given[name], given[name] * 0.5 + 0.1
    out = flash_attn_func(**{**given, name: TwoTensor(first, second)})
    assert isinstance(out, TwoTensor)
    assert torch.equal(out.a, flash_attn_func(**{**given, name: first}))
    assert torch.equal(out.b, flash_attn_func(**{**given, name: second}))


@pytest.mark.filterwarnings("ignore")
def test_compiled_autograd_does_not_trace_a_backward() -> None:
    """Its graphs hold no tiles, so that other lengths need no other graphs."""
    graphs: list[int] = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    for middle in range(1, 20, 2):
        lengths = [0, middle, 20]
        eager = [torch.randn(20, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
        traced = [x.detach().clone().requires_grad_() for x in eager]
        flash_attn_varlen_func(*eager, lengths, lengths, 20, 20).square().sum().backward()
        loss = flash_attn_varlen_func(*traced, lengths, lengths, 20, 20).square().sum()
        with compiled_autograd._enable(lambda graph: torch.compile(graph, backend=count)):
            loss.backward()
        assert all(torch.equal(x.grad, y.grad) for x, y in zip(traced, eager, strict=True))
    # the first lengths are taken for constants, the next ones for any
    assert len(graphs) <= (5 if TORCH >= (2, 9) else 10)
    assert max(graphs) < 100


def flat(part: object) -> list[object]:
    return [x for one in part for x in flat(one)] if isinstance(part, tuple) else [part]


@pytest.mark.filterwarnings("ignore")
def test_a_trace_leaves_no_plan_behind() -> None:
    forget_all()
    given = tuple(problem()[name] for name in "qkv")
    traced = torch.jit.trace(flash_attn_func, given, check_trace=False)
    plans = next(memo for memo in memos() if memo.name == "plans of calls")
    parts = [part for key in plans._known for part in flat(key)]
    assert parts
    assert not any(isinstance(part, torch.Tensor) for part in parts)
    assert torch.equal(traced(*given), flash_attn_func(*given))
