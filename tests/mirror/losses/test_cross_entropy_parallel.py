"""Cross entropy with the classes spread over two processes, against all classes in one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from flash_attn_npu.errors import ArgumentError, UnsupportedError
from flash_attn_npu.losses.cross_entropy import CrossEntropyLoss
from flash_attn_npu.ops.triton.cross_entropy import cross_entropy_loss
from tests.helpers import cross_entropy_reference as expected
from tests.helpers import world

COLUMNS = 7


def _call(rank, group, logits, labels, weight, options):
    own = logits[:, rank * COLUMNS : (rank + 1) * COLUMNS].clone().requires_grad_()
    lse = own.detach().double().logsumexp(1) if options.pop("precomputed_lse", False) else None
    if lse is not None and (options.get("label_smoothing") or "logit_scale" in options):
        lse = lse + 1  # counts for nothing
    losses, z_losses = cross_entropy_loss(own, labels, lse, process_group=group, **options)
    losses.backward(weight.to(losses.dtype))
    assert not z_losses.requires_grad
    return losses.detach(), z_losses, own.grad


def _calls(rank, group, calls):
    return [_call(rank, group, *call) for call in calls]


def _compare(calls):
    """Whether both ranks agree with the reference over all classes, for each of the calls."""
    both = world.run(_calls, calls)
    for number, (logits, labels, weight, options) in enumerate(calls):
        options = {k: v for k, v in options.items() if k not in ("precomputed_lse",)}
        inplace = options.pop("inplace_backward", False)
        want, want_z, want_grad = expected.reference(logits, labels, **options)
        want_grad *= weight[:, None]
        # one rounding to 16 bits; before it, what an lse of about 20 costs in float32
        rtol = 1e-12 if logits.dtype == torch.float64 else 1e-5
        rtol += torch.finfo(logits.dtype).eps
        for rank, results in enumerate(both):
            losses, z_losses, grad = results[number]
            wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
            assert losses.dtype == wide, (number, inplace)
            torch.testing.assert_close(losses, want.to(wide))
            torch.testing.assert_close(z_losses, want_z.to(wide))
            own = want_grad[:, rank * COLUMNS : (rank + 1) * COLUMNS]
            assert grad.dtype == logits.dtype
            torch.testing.assert_close(grad.double(), own, rtol=rtol, atol=rtol)
        assert torch.equal(both[0][number][0], both[1][number][0])


def test_losses_and_shards_of_the_gradient():
    torch.manual_seed(0)
    calls = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for options in expected.CASES.values():
            ignore = options.get("ignore_index", expected.IGNORE)
            logits, labels = expected.make(9, 2 * COLUMNS, dtype, ignore)
            calls.append((logits, labels, torch.rand(9).double() + 0.5, dict(options)))
            calls.append((*calls[-1][:3], dict(options, precomputed_lse=True)))
            calls.append((*calls[-2][:3], dict(options, inplace_backward=True)))
    # every label of each rank's edge
    labels = torch.tensor([0, COLUMNS - 1, COLUMNS, 2 * COLUMNS - 1])
    calls.append((torch.randn(4, 2 * COLUMNS), labels, torch.ones(4).double(), {}))
    calls.append((torch.randn(0, 2 * COLUMNS), labels[:0], torch.ones(0).double(), {}))
    _compare(calls)


@pytest.mark.parametrize("masked", [slice(10, 14), slice(7, 14), slice(0, 7)])
def test_masked_classes_of_one_rank(masked):
    torch.manual_seed(0)
    calls = []
    for dtype in (torch.float32, torch.bfloat16):
        for options in ({}, {"lse_square_scale": 0.1}):
            logits, labels = expected.make(8, 2 * COLUMNS, dtype)
            logits[:, masked] = -torch.inf
            free = [c for c in range(2 * COLUMNS) if c not in range(masked.start, masked.stop)]
            labels = torch.where(labels < 0, labels, torch.tensor(free)[labels % len(free)])
            calls.append((logits, labels, torch.ones(8).double(), options))
    _compare(calls)


def test_logits_that_are_huge_in_one_rank():
    torch.manual_seed(0)
    logits, labels = expected.make(8, 2 * COLUMNS, torch.float64)
    logits[:, COLUMNS:] += 1e4
    logits[0] -= 2e4
    _compare([(logits, labels, torch.ones(8).double(), {"label_smoothing": 0.1})])


def _module(rank, group, logits, labels):
    own = logits[:, rank * COLUMNS : (rank + 1) * COLUMNS].clone().requires_grad_()
    loss, z_loss = CrossEntropyLoss(
        label_smoothing=0.1,
        lse_square_scale=0.1,
        process_group=group,
        return_z_loss=True,
        inplace_backward=True,
    )(own, labels)
    loss.backward()
    assert own.grad.data_ptr() == own.data_ptr()
    alone = [dist.new_group([r]) for r in range(2)][rank]
    single = CrossEntropyLoss(process_group=alone)(logits, labels)
    torch.testing.assert_close(single, CrossEntropyLoss()(logits, labels))
    return loss.detach(), z_loss, own.grad


def test_the_module_with_a_process_group():
    torch.manual_seed(0)
    logits, labels = expected.make(9, 2 * COLUMNS, torch.float32)
    whole = logits.clone().requires_grad_()
    module = CrossEntropyLoss(label_smoothing=0.1, lse_square_scale=0.1, return_z_loss=True)
    want, want_z = module(whole, labels)
    want.backward()
    for rank, (loss, z_loss, grad) in enumerate(world.run(_module, logits, labels)):
        torch.testing.assert_close(loss, want.detach())
        torch.testing.assert_close(z_loss, want_z)
        own = whole.grad[:, rank * COLUMNS : (rank + 1) * COLUMNS]
        torch.testing.assert_close(grad, own)


def _refusals(rank, group):
    logits = torch.randn(2, COLUMNS, requires_grad=True)
    message = f"labels: got a label {2 * COLUMNS}; allowed: 0 to {2 * COLUMNS - 1}, .*global"
    with pytest.raises(ArgumentError, match=message):
        cross_entropy_loss(logits, torch.tensor([0, 2 * COLUMNS]), process_group=group)
    losses, _ = cross_entropy_loss(logits, torch.tensor([0, COLUMNS]), process_group=group)
    with pytest.raises(UnsupportedError, match="create_graph: got True with a process_group"):
        torch.autograd.grad(losses.sum(), logits, create_graph=True)


def test_refusals():
    world.run(_refusals)
