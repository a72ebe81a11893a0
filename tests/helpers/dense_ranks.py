"""What each rank does in test_dense_parallel: made here, where a rank can import it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from flash_attn_npu.errors import ArgumentError, UnsupportedError
from flash_attn_npu.modules import embedding, mlp
from flash_attn_npu.ops import fused_dense


class Answer(NamedTuple):
    out: Any
    dx: Tensor | None
    gradients: dict[str, Tensor]


def run_module(
    rank: int,
    group: Any,
    make: Callable[..., nn.Module],
    options: dict[str, Any],
    state: dict[str, Tensor],
    x: Tensor,
    dout: Tensor,
    forward: dict[str, Any] | None = None,
    autocast: torch.dtype | None = None,
) -> Answer:
    """Forward and backward of a parallel module with the parameters `state`."""
    module = make(process_group=group, **options).to(next(iter(state.values())).dtype)
    assert list(module.state_dict()) == list(state)
    module.load_state_dict(state)
    x = x.clone().requires_grad_(x.is_floating_point())
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        out = module(x, **(forward or {}))
    out.backward(dout.to(out.dtype))
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return Answer(out.detach(), x.grad, gradients)


def run_function(
    rank: int,
    group: Any,
    function: Callable[..., Any],
    inputs: list[Tensor],
    options: dict[str, Any],
    douts: list[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of a function over the group, and its gradients."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves, process_group=group, **options)
    outs = list(out) if isinstance(out, tuple) else [out]
    grads = torch.autograd.grad(outs, leaves, douts)
    return [out.detach() for out in outs], list(grads)


def run_plain_module(
    rank: int, group: Any, make: Callable[..., nn.Module], state: dict[str, Tensor], x: Tensor
) -> Any:
    """A module whose forward takes the group."""
    module = make().double()
    module.load_state_dict(state)
    with torch.no_grad():
        return module(x, process_group=group)


def refusals(rank: int, group: Any) -> None:
    """What both ranks refuse before anything is exchanged."""
    for make, argument in (
        (lambda: fused_dense.ColumnParallelLinear(4, 6, group, multiple_of=4), "out_features"),
        (lambda: fused_dense.RowParallelLinear(6, 4, group, multiple_of=4), "in_features"),
        (lambda: fused_dense.RowParallelLinear(6, 4, group, multiple_of=0), "multiple_of"),
        (lambda: embedding.VocabParallelEmbedding(5, 4, process_group=group), "num_embeddings"),
        (lambda: embedding.ColumnParallelEmbedding(4, 5, process_group=group), "embedding_dim"),
        (
            lambda: embedding.VocabParallelEmbedding(4, 4, process_group=group, padding_idx=0),
            "padding_idx",
        ),
        (lambda: embedding.ParallelGPT2Embeddings(4, 4, 4, group, padding_idx=1), "padding_idx"),
        (lambda: mlp.ParallelMLP(4, process_group=group)(torch.ones(2, 5)), "weight"),
    ):
        with pytest.raises(ArgumentError, match=rf"^{argument}: got .*; allowed: .*; to fix it: "):
            make()
    x = torch.ones(2, 4, requires_grad=True)
    out = fused_dense.ColumnParallelLinear(4, 6, group)(x)
    with pytest.raises(UnsupportedError, match=r"^create_graph: got True"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


def sizes(rank: int, group: Any) -> dict[str, list[tuple[int, ...]]]:
    """The shapes of what this rank holds."""
    modules = {
        "column": fused_dense.ColumnParallelLinear(3, 5, group),
        "column in twos": fused_dense.ColumnParallelLinear(3, 6, group, multiple_of=2),
        "row": fused_dense.RowParallelLinear(5, 3, group),
        "row without bias": fused_dense.RowParallelLinear(4, 3, group, bias=False),
        "gated": mlp.ParallelGatedMlp(6, group),
        "gated, odd": mlp.ParallelGatedMlp(6, group, 3, multiple_of=1),
        "words": embedding.VocabParallelEmbedding(6, 4, process_group=group),
        "columns": embedding.ColumnParallelEmbedding(6, 4, process_group=group),
        "gpt2": embedding.ParallelGPT2Embeddings(4, 6, 5, group),
    }
    return {
        name: [tuple(value.shape) for value in module.state_dict().values()]
        for name, module in modules.items()
    }
