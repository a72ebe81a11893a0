"""Dense layers over two ranks, against the same layer with the whole weights on one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from flash_attn_npu.modules.embedding import ParallelGPT2Embeddings
from flash_attn_npu.modules.mlp import ParallelGatedMlp, ParallelMLP
from flash_attn_npu.ops.fused_dense import (
    ColumnParallelLinear,
    FusedDense,
    FusedMLP,
    ParallelFusedMLP,
    RowParallelLinear,
    fused_dense_func,
    fused_mlp_func,
)
from tests.helpers import world
from tests.helpers.dense_ranks import (
    Answer,
    refusals,
    run_function,
    run_module,
    run_plain_module,
    sizes,
)
from tests.helpers.dense_reference import assert_close_enough
from tests.helpers.world import per_rank

State = dict[str, Tensor]
Split = Callable[[Tensor], list[Tensor]]
each_mode = pytest.mark.parametrize("scattered", [True, False], ids=["scattered", "whole"])


def dealt(dim: int, *shares: int) -> Split:
    """Contiguous shares of one dimension."""
    return lambda whole: list(whole.split(shares, dim))


def gated(whole: Tensor) -> list[Tensor]:
    """[y, gate] to each rank's own [y, gate], of an odd width 2 + 1."""
    y, gate = whole.chunk(2)
    return [torch.cat(pair) for pair in zip(y.split((2, 1)), gate.split((2, 1)), strict=True)]


def on_the_first(whole: Tensor) -> list[Tensor]:
    return [whole]


MLP_SPLITS = {
    "fc1.weight": dealt(0, 3, 2),
    "fc1.bias": dealt(0, 3, 2),
    "fc2.weight": dealt(1, 3, 2),
    "fc2.bias": on_the_first,
}
GATED_SPLITS = {
    "fc1.weight": gated,
    "fc1.bias": gated,
    "fc2.weight": dealt(1, 2, 1),
    "fc2.bias": on_the_first,
}
MODULES: dict[str, tuple[Callable[..., nn.Module], dict[str, Any], dict[str, Split]]] = {
    "ColumnParallelLinear": (
        ColumnParallelLinear,
        {"in_features": 4, "out_features": 6, "multiple_of": 2},
        {"weight": dealt(0, 4, 2), "bias": dealt(0, 4, 2)},
    ),
    "RowParallelLinear": (
        RowParallelLinear,
        {"in_features": 5, "out_features": 4},
        {"weight": dealt(1, 3, 2), "bias": on_the_first},
    ),
    "ParallelMLP": (
        ParallelMLP,
        {"in_features": 4, "hidden_features": 5, "activation": F.gelu},
        MLP_SPLITS,
    ),
    "ParallelGatedMlp": (
        ParallelGatedMlp,
        {"in_features": 4, "hidden_features": 3, "multiple_of": 1},
        GATED_SPLITS,
    ),
    "ParallelGatedMlp, swiglu": (
        ParallelGatedMlp,
        {"in_features": 4, "hidden_features": 3, "multiple_of": 1, "activation": F.silu},
        GATED_SPLITS,
    ),
    **{
        f"ParallelFusedMLP, {activation}, {level}": (
            ParallelFusedMLP,
            {
                "in_features": 4,
                "hidden_features": 5,
                "activation": activation,
                "checkpoint_lvl": level,
            },
            MLP_SPLITS,
        )
        for activation, level in (("gelu_approx", 0), ("relu", 1), ("sqrelu", 2))
    },
}


def states(whole: State, splits: dict[str, Split]) -> list[State]:
    """What each rank holds of the whole."""
    parts = {name: split(whole[name]) for name, split in splits.items()}
    return [
        {name: held[rank].clone() for name, held in parts.items() if rank < len(held)}
        for rank in range(2)
    ]


def whole_answer(module: nn.Module, x: Tensor, dout: Tensor | None = None) -> tuple[Answer, Tensor]:
    x = x.clone().requires_grad_()
    out = module(x)
    dout = torch.randn_like(out) if dout is None else dout
    out.backward(dout)
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    return Answer(out.detach(), x.grad, grads), dout


def rows(x: Tensor, scattered: bool) -> Any:
    return per_rank(*x.chunk(2)) if scattered else x


@each_mode
@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str, scattered: bool) -> None:
    make, options, splits = MODULES[name]
    whole = make(process_group=None, **options).double()
    assert list(whole.state_dict()) == list(splits)
    width = options["in_features"]
    x = torch.randn(4, 3, width, dtype=torch.float64)
    want, dout = whole_answer(whole, x)
    columns, own_columns = make is ColumnParallelLinear, make is RowParallelLinear
    answers = world.run(
        run_module,
        make,
        {**options, "sequence_parallel": scattered},
        per_rank(*states(whole.state_dict(), splits)),
        # the input of a row-parallel layer is split by columns, whatever becomes of its rows
        per_rank(*x.split((3, 2), -1)) if own_columns else rows(x, scattered),
        per_rank(*dout.split((4, 2), -1)) if columns else rows(dout, scattered),
    )
    outs, dxs = ([getattr(answer, field) for answer in answers] for field in ("out", "dx"))
    if columns:
        torch.testing.assert_close(torch.cat(outs, dim=-1), want.out)
    elif scattered:
        torch.testing.assert_close(torch.cat(outs), want.out)
    else:
        assert torch.equal(*outs)
        torch.testing.assert_close(outs[0], want.out)
    if own_columns:
        torch.testing.assert_close(torch.cat(dxs, dim=-1), want.dx)
    elif scattered:
        torch.testing.assert_close(torch.cat(dxs), want.dx)
    else:
        for dx in dxs:
            torch.testing.assert_close(dx, want.dx)
    for answer, gradients in zip(answers, states(want.gradients, splits), strict=True):
        torch.testing.assert_close(answer.gradients, gradients)


@each_mode
@pytest.mark.parametrize("name", ["fused_dense_func", "fused_mlp_func"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_functions(name: str, scattered: bool, residual: bool) -> None:
    """Over the ranks, out is a share of the columns, or a summand; the residual is what came."""
    x, weight, second = (torch.randn(s, dtype=torch.float64) for s in ((4, 3), (6, 3), (2, 6)))
    functions = {"fused_dense_func": fused_dense_func, "fused_mlp_func": fused_mlp_func}
    inputs = [x, weight] if name == "fused_dense_func" else [x, weight, second]
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    out, kept = functions[name](*leaves, return_residual=True)
    dout, dkept = torch.randn_like(out), torch.randn_like(kept) * residual
    want = torch.autograd.grad([out, kept], leaves, [dout, dkept])
    split = [per_rank(*weight.chunk(2)), per_rank(*second.chunk(2, dim=1))][: len(inputs) - 1]
    douts = dout.chunk(2, dim=-1) if name == "fused_dense_func" else [dout, dout]
    mine = [[dout, part] for dout, part in zip(douts, _both(rows(dkept, scattered)), strict=True)]
    answers = world.run(
        run_function,
        functions[name],
        per_rank(
            *([_of(tensor, rank) for tensor in (rows(x, scattered), *split)] for rank in (0, 1))
        ),
        {"sequence_parallel": scattered, "return_residual": residual},
        per_rank(*(given[: 1 + residual] for given in mine)),
    )
    (outs, grads), (other_outs, other_grads) = answers
    if name == "fused_dense_func":
        torch.testing.assert_close(torch.cat((outs[0], other_outs[0]), dim=-1), out)
    else:
        torch.testing.assert_close(outs[0] + other_outs[0], out)
    if residual:
        assert torch.equal(outs[1], _of(rows(x, scattered), 0))
    dx = torch.cat((grads[0], other_grads[0])) if scattered else other_grads[0]
    torch.testing.assert_close(dx, want[0])
    torch.testing.assert_close(torch.cat((grads[1], other_grads[1])), want[1])
    if name == "fused_mlp_func":
        torch.testing.assert_close(torch.cat((grads[2], other_grads[2]), dim=1), want[2])


def _both(value: Any) -> list[Any]:
    return [_of(value, 0), _of(value, 1)]


def _of(value: Any, rank: int) -> Any:
    return value[rank] if isinstance(value, per_rank) else value


def test_modules_that_take_the_group_in_forward() -> None:
    x = torch.randn(4, 3, dtype=torch.float64)
    dense = nn.Linear(3, 6).double()
    state = dense.state_dict()
    halves = [{k: v.chunk(2)[rank].clone() for k, v in state.items()} for rank in (0, 1)]
    first, second = world.run(
        run_plain_module,
        partial(FusedDense, 3, 3, return_residual=True),
        per_rank(*halves),
        rows(x, True),
    )
    torch.testing.assert_close(torch.cat((first[0], second[0]), dim=1), dense(x))
    assert torch.equal(first[1], x[:2])
    mlp = FusedMLP(3, 6, bias2=False).double()
    parts = states(
        mlp.state_dict(),
        {"fc1.weight": dealt(0, 3, 3), "fc1.bias": dealt(0, 3, 3), "fc2.weight": dealt(1, 3, 3)},
    )
    for residual in (False, True):
        answers = world.run(
            run_plain_module,
            partial(FusedMLP, 3, 3, bias2=False, return_residual=residual),
            per_rank(*parts),
            rows(x, True),
        )
        outs = [answer[0] if residual else answer for answer in answers]
        torch.testing.assert_close(torch.cat(outs), mlp(x))
        if residual:
            assert torch.equal(answers[1][1], x[2:])


@each_mode
@pytest.mark.parametrize("flat", [False, True], ids=["batch", "flat"])
@pytest.mark.parametrize("positions", [0, 5])
def test_embeddings(scattered: bool, flat: bool, positions: int) -> None:
    whole = ParallelGPT2Embeddings(4, 6, positions, None).double()
    words = torch.randint(0, 6, (2, 5))
    out = whole(words, combine_batch_seqlen_dim=flat)
    dout = torch.randn_like(out)
    out.backward(dout)
    splits = {"word_embeddings.weight": dealt(0, 3, 3)}
    if positions:
        splits["position_embeddings.weight"] = dealt(1, 2, 2)
    answers = world.run(
        run_module,
        ParallelGPT2Embeddings,
        {
            "embed_dim": 4,
            "vocab_size": 6,
            "max_position_embeddings": positions,
            "sequence_parallel": scattered,
        },
        per_rank(*states(whole.state_dict(), splits)),
        words,
        rows(dout, scattered),
        {"combine_batch_seqlen_dim": flat},
    )
    outs = [answer.out for answer in answers]
    got = torch.cat(outs) if scattered else outs[1]
    torch.testing.assert_close(got, out)
    grads = {name: parameter.grad for name, parameter in whole.named_parameters()}
    for answer, want in zip(answers, states(grads, splits), strict=True):
        torch.testing.assert_close(answer.gradients, want)


def two_halves(x: Tensor, fc1: nn.Linear, fc2: nn.Linear) -> Tensor:
    """The MLP as two ranks compute it, in torch's operations."""
    hidden = (
        F.gelu(F.linear(x, *half), approximate="tanh")
        for half in zip(fc1.weight.chunk(2), fc1.bias.chunk(2), strict=True)
    )
    halves = zip(hidden, fc2.weight.chunk(2, dim=1), (fc2.bias, None), strict=True)
    first, second = (F.linear(*half) for half in halves)
    return first + second


@each_mode
def test_autocast(scattered: bool) -> None:
    torch.manual_seed(0)
    make, options, splits = MODULES["ParallelFusedMLP, gelu_approx, 0"]
    whole = make(process_group=None, **options)
    x = torch.randn(4, 4)
    dout = torch.randn(4, options.get("out_features", 4))
    answers = world.run(
        run_module,
        make,
        {**options, "sequence_parallel": scattered},
        per_rank(*states(whole.state_dict(), splits)),
        rows(x, scattered),
        rows(dout, scattered),
        None,
        torch.bfloat16,
    )
    with torch.autocast("cpu", torch.bfloat16):
        leaf = x.clone().requires_grad_()
        out = two_halves(leaf, whole.fc1, whole.fc2)
        out.backward(dout.to(out.dtype))
    gradients = {name: p.grad.clone() for name, p in whole.named_parameters()}
    plain = Answer(out.detach(), leaf.grad, gradients)
    exact, _ = whole_answer(
        copy.deepcopy(whole).double().requires_grad_(), x.double(), dout.double()
    )
    of_ranks = (states(answer.gradients, splits) for answer in (exact, plain))
    for answer, *wanted in zip(answers, *of_ranks, strict=True):
        assert answer.out.dtype == torch.bfloat16
        assert answer.dx.dtype == torch.float32
        for name, grad in answer.gradients.items():
            assert_close_enough(grad, *(gradients[name] for gradients in wanted))
        if not scattered:
            assert_close_enough(answer.out, exact.out, plain.out)
            assert_close_enough(answer.dx, exact.dx, plain.dx)
    if scattered:
        assert_close_enough(torch.cat([a.out for a in answers]), exact.out, plain.out)
        assert_close_enough(torch.cat([a.dx for a in answers]), exact.dx, plain.dx)


def test_what_each_rank_holds() -> None:
    first, second = world.run(sizes)
    assert first == {
        "column": [(3, 3), (3,)],
        "column in twos": [(4, 3), (4,)],
        "row": [(3, 3), (3,)],
        "row without bias": [(3, 2)],
        "gated": [(128, 6), (128,), (6, 64), (6,)],
        "gated, odd": [(4, 6), (4,), (6, 2), (6,)],
        "words": [(3, 4)],
        "columns": [(6, 2)],
        "gpt2": [(3, 4), (5, 2)],
    }
    assert second == {
        "column": [(2, 3), (2,)],
        "column in twos": [(2, 3), (2,)],
        "row": [(3, 2)],
        "row without bias": [(3, 2)],
        "gated": [(128, 6), (128,), (6, 64)],
        "gated, odd": [(2, 6), (2,), (6, 1)],
        "words": [(3, 4)],
        "columns": [(6, 2)],
        "gpt2": [(3, 4), (5, 2)],
    }


def test_refusals() -> None:
    world.run(refusals)
