"""`utils.distributed` on two gloo processes: values, gradients, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

import flash_attn_npu.utils.distributed as mirror
from flash_attn_npu.errors import ArgumentError, ArgumentTypeError
from tests.helpers import world

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64]


def _inputs(rank, shape, dtype, layout):
    """Small integers, exact in every dtype and different in each rank."""
    x = (torch.arange(torch.Size(shape).numel()) % 7 + 10 * rank).reshape(shape).to(dtype)
    if layout == "strided":
        x = x.t().contiguous().t()
    return x


def _raw(rank, group, dtype, layout, async_op):
    x = _inputs(rank, (4, 3), dtype, layout)
    before = x.clone()
    outputs = {}
    for name in ("all_gather_raw", "reduce_scatter_raw", "all_reduce_raw"):
        output, handle = getattr(mirror, name)(x, group, async_op)
        assert (handle is not None) == async_op
        if handle is not None:
            handle.wait()
        assert torch.equal(x, before)
        assert output.is_contiguous()
        assert output.dtype == dtype
        outputs[name] = output
    return outputs


def _raw_cases(rank, group):
    return {
        (dtype, layout, async_op): _raw(rank, group, dtype, layout, async_op)
        for dtype in DTYPES
        for layout in ("contiguous", "strided")
        for async_op in (False, True)
    }


def test_raw_collectives_of_every_dtype_and_layout():
    for rank, cases in enumerate(world.run(_raw_cases)):
        for (dtype, _, _), outputs in cases.items():
            x, y = (_inputs(r, (4, 3), dtype, "contiguous") for r in (0, 1))
            assert torch.equal(outputs["all_gather_raw"], torch.cat((x, y)))
            assert torch.equal(outputs["all_reduce_raw"], x + y)
            assert torch.equal(outputs["reduce_scatter_raw"], (x + y)[2 * rank : 2 * rank + 2])


def _differentiable(rank, group, name, x, weight):
    x = x.clone().requires_grad_()
    output = getattr(mirror, name)(x.t(), group)
    before = x.detach().clone()
    # a transposed gradient, so that backward has to take any layout
    output.t().backward(weight)
    assert torch.equal(x.detach(), before)
    return output.detach(), x.grad


@pytest.mark.parametrize("name", ["all_gather", "reduce_scatter", "all_reduce"])
def test_gradients(name):
    x, y = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    rows = {"all_gather": 8, "reduce_scatter": 2, "all_reduce": 4}[name]
    weights = [torch.randn(3, rows, dtype=torch.float64) for _ in range(2)]
    if name == "all_reduce":
        weights[1] = weights[0]  # what follows is the same in every rank
    results = world.run(_differentiable, name, world.per_rank(x, y), world.per_rank(*weights))
    leaves = [x.clone().requires_grad_(), y.clone().requires_grad_()]
    if name == "all_gather":
        expected = [torch.cat((leaves[0].t(), leaves[1].t()))] * 2
        loss = (expected[0] * (weights[0] + weights[1]).t()).sum()
    else:
        total = leaves[0].t() + leaves[1].t()
        expected = [total[:2], total[2:]] if name == "reduce_scatter" else [total, total]
        counted = expected[:1] if name == "all_reduce" else expected
        loss = sum((e * w.t()).sum() for e, w in zip(counted, weights, strict=False))
    loss.backward()
    for rank, (output, grad) in enumerate(results):
        torch.testing.assert_close(output, expected[rank].detach())
        torch.testing.assert_close(grad, leaves[rank].grad)


def _second_derivative(rank, group):
    x = torch.full((2, 2), 3.0 + rank, dtype=torch.float64, requires_grad=True)
    gathered = mirror.all_gather(x, group)
    (grad,) = torch.autograd.grad(gathered.pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    return grad.detach(), second


def test_all_gather_twice_differentiable():
    for rank, (grad, second) in enumerate(world.run(_second_derivative)):
        # both ranks add the cubes of all rows up: 2 (x^3 + y^3) in all
        assert torch.equal(grad, torch.full_like(grad, 2 * 3 * (3.0 + rank) ** 2))
        assert torch.equal(second, torch.full_like(second, 2 * 6 * (3.0 + rank)))


def _refusals(rank, group):
    with pytest.raises(ArgumentError, match=r"input_: got shape \(3, 2\); allowed: .*2.*; to fix"):
        mirror.reduce_scatter(torch.ones(3, 2), group)
    with pytest.raises(ArgumentError, match="input_: got a scalar tensor"):
        mirror.all_gather(torch.tensor(1.0), group)
    with pytest.raises(ArgumentTypeError, match="input_"):
        mirror.all_reduce_raw([1.0], group)
    return mirror.all_gather(torch.empty(0, 2), None), mirror.all_reduce(torch.tensor(2.0), None)


def test_refusals_empty_and_scalar_tensors_and_the_default_group():
    for gathered, reduced in world.run(_refusals):
        assert gathered.shape == (0, 2)
        assert reduced == 4.0


def _model(rank):
    """Parameters named so that the order of their registration is not that of their names."""
    model = nn.Module()
    model.b = nn.Parameter(torch.full((2, 3), 1.0 + rank))
    model.a = nn.Parameter(torch.full((3, 2), 10.0 + rank).t())
    model.own = nn.Parameter(torch.full((2,), 100.0 + rank))
    model.low = nn.Parameter(torch.full((2,), 5.0 + rank, dtype=torch.float16))
    return model


def _sync(rank, group):
    model = _model(rank)
    model.a._shared_params = model.b._shared_params = model.low._shared_params = True
    model.own._shared_params = False
    mirror.sync_shared_params(model, group)
    synced = {name: p.detach() for name, p in model.named_parameters()}
    alone = [dist.new_group([r]) for r in range(2)][rank]
    model = _model(rank)
    model.b._shared_params = True
    mirror.sync_shared_params(model, alone)
    return synced, model.b.detach()


def test_sync_shared_params_takes_the_first_rank_of_the_group():
    for rank, (synced, alone) in enumerate(world.run(_sync)):
        assert torch.equal(synced["a"], torch.full((2, 3), 10.0))
        assert torch.equal(synced["b"], torch.full((2, 3), 1.0))
        assert torch.equal(synced["low"], torch.full((2,), 5.0, dtype=torch.float16))
        assert torch.equal(synced["own"], torch.full((2,), 100.0 + rank))
        assert torch.equal(alone, torch.full((2, 3), 1.0 + rank))


def _sequence_parallel(rank, group):
    model = _model(rank)
    model.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    for name in ("a", "b", "low", "frozen"):
        getattr(model, name)._sequence_parallel = True
    model.a.grad = torch.full((3, 2), 1.0 + rank).t()
    if rank == 1:
        model.b.grad = torch.full((2, 3), 7.0)
    model.low.grad = torch.full((2,), 2.0 + rank, dtype=torch.float16)
    model.own.grad = torch.full((2,), 3.0 + rank)
    kept = model.a.grad
    mirror.allreduce_sequence_parallel_grad(model, group)
    assert model.a.grad is kept
    assert model.frozen.grad is None
    mirror.allreduce_sequence_parallel_grad(nn.Linear(2, 2), group)
    return {name: getattr(model, name).grad for name in ("a", "b", "low", "own")}


def test_allreduce_sequence_parallel_grad():
    for rank, grads in enumerate(world.run(_sequence_parallel)):
        assert torch.equal(grads["a"], torch.full((2, 3), 3.0))
        assert torch.equal(grads["b"], torch.full((2, 3), 7.0))
        assert torch.equal(grads["low"], torch.full((2,), 5.0, dtype=torch.float16))
        assert torch.equal(grads["own"], torch.full((2,), 3.0 + rank))


def test_get_dim_for_local_rank():
    shares = [mirror.get_dim_for_local_rank(100, 3, rank, multiple_of=8) for rank in range(3)]
    assert shares == [32, 32, 32]
    shares = [mirror.get_dim_for_local_rank(112, 4, rank, multiple_of=8) for rank in range(4)]
    assert shares == [32, 32, 24, 24]
    assert [mirror.get_dim_for_local_rank(7, 4, rank) for rank in range(4)] == [2, 2, 2, 1]
    assert [mirror.get_dim_for_local_rank(1, 2, rank) for rank in range(2)] == [1, 0]
    assert type(shares[0]) is int
