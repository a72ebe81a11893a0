"""`losses.cross_entropy.CrossEntropyLoss`: reductions, surface, and both losses compiled."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.autograd.function import Function

from flash_attn_npu.errors import UnsupportedError
from flash_attn_npu.losses import cross_entropy as mirror
from flash_attn_npu.losses.cross_entropy import CrossEntropyLoss, cross_entropy_loss
from flash_attn_npu.ops.triton import cross_entropy as function
from tests.helpers import cross_entropy_reference as expected

dynamo_instantiates = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", expected.CASES)
def test_reductions(device, case, reduction):
    options = expected.CASES[case]
    ignore = options.get("ignore_index", expected.IGNORE)
    logits, labels = expected.make(10, 9, torch.float64, ignore)
    want, want_z, want_grad = expected.reference(logits, labels, **options)
    logits = logits.to(device).requires_grad_()
    module = CrossEntropyLoss(reduction=reduction, return_z_loss=True, **options)
    loss, z_loss = module(logits, labels.to(device))
    alone = CrossEntropyLoss(reduction=reduction, **options)(logits, labels.to(device))
    assert torch.equal(alone, loss)
    assert not z_loss.requires_grad
    loss.sum().backward()
    counted = (labels != ignore).sum()
    if reduction == "mean":
        want, want_z, want_grad = want.sum() / counted, want_z.sum() / counted, want_grad / counted
    elif reduction == "sum":
        want, want_z = want.sum(), want_z.sum()
    torch.testing.assert_close(loss.detach().cpu(), want)
    torch.testing.assert_close(z_loss.cpu(), want_z)
    torch.testing.assert_close(logits.grad.cpu(), want_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_default_is_torchs_loss_in_float32(dtype):
    logits, labels = expected.make(10, 9, dtype)
    logits.requires_grad_()
    loss = CrossEntropyLoss()(logits, labels)
    loss.backward()
    x = logits.detach().float().requires_grad_()
    want = F.cross_entropy(x, labels)
    want.backward()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(logits.grad, x.grad.to(dtype))
    assert loss.dtype == torch.float32


def test_precomputed_lse_and_inplace_backward_are_handed_on():
    values, labels = expected.make(10, 9, torch.float32)
    logits = values.clone().requires_grad_()
    lse = values.logsumexp(1) + 1
    shifted = CrossEntropyLoss(inplace_backward=True)(logits, labels, precomputed_lse=lse)
    torch.testing.assert_close(shifted, CrossEntropyLoss()(values, labels) + 1)
    shifted.backward()
    assert logits.grad.data_ptr() == logits.data_ptr()


def test_all_rows_ignored():
    logits, labels = torch.randn(3, 4, requires_grad=True), torch.full((3,), -100)
    loss = CrossEntropyLoss()(logits, labels)
    assert loss.isnan()
    assert F.cross_entropy(logits, labels).isnan()
    loss.backward()
    assert logits.grad.eq(0).all()
    assert CrossEntropyLoss(reduction="sum")(logits, labels) == 0


def test_uint8_targets_are_not_taken_for_ignored():
    logits, labels = torch.randn(3, 200), torch.tensor([156, 1, 2])
    loss = CrossEntropyLoss()
    torch.testing.assert_close(loss(logits, labels.to(torch.uint8)), loss(logits, labels))


@pytest.mark.parametrize("reduction", ["average", None, "MEAN"])
def test_another_reduction_is_refused(reduction):
    with pytest.raises(UnsupportedError, match=r"reduction: got .*; allowed: 'mean', 'none' or"):
        CrossEntropyLoss(reduction=reduction)
    assert issubclass(UnsupportedError, NotImplementedError)


def test_names_signatures_and_bases():
    def parameters(what):
        return " ".join(
            name if p.default is p.empty else f"{name}={p.default!r}"
            for name, p in inspect.signature(what).parameters.items()
        )

    assert parameters(CrossEntropyLoss.__init__) == (
        "self ignore_index=-100 reduction='mean' label_smoothing=0.0 logit_scale=1.0 "
        "lse_square_scale=0.0 inplace_backward=False process_group=None return_z_loss=False"
    )
    assert parameters(CrossEntropyLoss.forward) == "self input target precomputed_lse=None"
    rest = (
        "logit_scale=1.0 lse_square_scale=0.0 ignore_index=-100 inplace_backward=False "
        "process_group=None"
    )
    assert parameters(function.cross_entropy_loss) == (
        f"logits labels precomputed_lse=None label_smoothing=0.0 {rest}"
    )
    assert parameters(function.CrossEntropyLoss.forward) == (
        f"ctx logits labels precomputed_lse=None smoothing=0.0 {rest}"
    )
    assert parameters(function.CrossEntropyLoss.backward) == "ctx grad_losses grad_z_losses"
    assert issubclass(function.CrossEntropyLoss, Function)
    assert mirror.cross_entropy_loss is function.cross_entropy_loss


@pytest.mark.parametrize("case", ["plain", "all"])
@pytest.mark.parametrize("dynamic", [False, True])
@dynamo_instantiates
def test_compiled(case, dynamic):
    torch._dynamo.reset()
    options = expected.CASES[case]
    module = CrossEntropyLoss(return_z_loss=True, inplace_backward=case == "all", **options)

    def both(x, labels):
        losses = cross_entropy_loss(2 * x, labels, **options)[0]
        return losses, *module(3 * x, labels)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (6, 9) if dynamic else (6,):
        logits, labels = expected.make(
            batch, 8, torch.bfloat16, options.get("ignore_index", expected.IGNORE)
        )
        weight = torch.rand(batch)
        results = []
        for call in (compiled, both):
            x = logits.clone().requires_grad_()
            losses, loss, z_loss = call(x, labels)
            ((losses * weight).sum() + loss).backward()
            results.append((losses.detach(), loss.detach(), z_loss, x.grad))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)
    torch._dynamo.reset()


@dynamo_instantiates
def test_compiled_with_a_label_that_is_no_class():
    torch._dynamo.reset()
    logits, labels = torch.randn(3, 4), torch.tensor([0, 4, -100])
    compiled = torch.compile(cross_entropy_loss, fullgraph=True, backend="aot_eager")
    assert compiled(logits, labels)[0].isnan().tolist() == [False, True, False]
    torch._dynamo.reset()
