"""A gradient that raises, or is found wrong, ends no step: under checkpoints, with dropout, and
where the forwards of other layers came before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu import flash_attn_func, flash_attn_varlen_func
from flash_attn_npu._core.ground.settings import verifying
from flash_attn_npu.errors import UnsupportedError
from flash_attn_npu.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn_npu.ops.triton.layer_norm import rms_norm_fn
from tests.helpers.telling_calls import HALF, alike, drawn, errors


@pytest.fixture(autouse=True)
def seeded(npu: torch.device) -> Iterator[None]:
    torch.npu.manual_seed(0)
    with verifying("compose"):
        yield


def leaves(device: torch.device) -> list[Tensor]:
    given = [drawn(device, 2, 20, n, 32 + i)[..., :32] for i, n in enumerate((4, 2, 2))]
    return [x.detach().requires_grad_() for x in given]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("operator", ["npu_fusion_attention", "npu_fusion_attention_grad"])
def test_a_backward_repeats_the_mask_of_what_served_the_forward(
    operator: str, deterministic: bool, npu: torch.device
) -> None:
    with virtual_ascend.lacking(operator):
        out, dout, v = dropped(npu, deterministic)
    assert weighed(out, dout) == pytest.approx(weighed(v, v.grad), rel=2e-2)


def test_a_forward_that_was_wrong_does_not_lend_its_mask(npu: torch.device) -> None:
    with virtual_ascend.lying("dropout not scaled"):
        out, dout, v = dropped(npu, deterministic=True)
    assert weighed(out, dout) == pytest.approx(weighed(v, v.grad), rel=2e-2)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("fault", ["npu_fusion_attention_grad", "gradients of q halved"])
def test_one_kernel_draws_all_masks_of_a_step(
    fault: str, reentrant: bool | None, deterministic: bool, npu: torch.device
) -> None:
    """A reentrant checkpoint computes the forward without gradients first, and with them later."""
    kind = virtual_ascend.lying if " " in fault else virtual_ascend.lacking
    with kind(fault):
        out, dout, v = dropped(npu, deterministic, reentrant)
    assert weighed(out, dout) == pytest.approx(weighed(v, v.grad), rel=2e-2)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_gradient_that_was_wrong_is_not_repeated_with_another_mask(
    deterministic: bool, npu: torch.device
) -> None:
    with verifying("always"):
        out = flash_attn_func(*leaves(npu), dropout_p=0.3, deterministic=deterministic)
        with (
            virtual_ascend.lying("gradients of q halved"),
            pytest.raises(UnsupportedError, match="take the step again"),
        ):
            out.backward(drawn(npu, 2, 20, 4, 32))


def dropped(
    device: torch.device, deterministic: bool, reentrant: bool | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """out, its gradient, and v with one. As out is linear in v, <out, dout> is <v, dv>."""
    q, k, v = leaves(device)
    call = partial(flash_attn_func, dropout_p=0.3, deterministic=deterministic)
    if reentrant is None:
        out = call(q, k, v)
    else:
        out = checkpoint(lambda *x: call(*x), q, k, v, use_reentrant=reentrant)
    dout = drawn(device, 2, 20, 4, 32)
    out.backward(dout)
    return out, dout, v


def weighed(some: Tensor, others: Tensor | None) -> float:
    assert others is not None
    return float((some.detach().double() * others.detach().double()).sum())


@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_that_have_begun_are_put_right_too(
    deterministic: bool, npu: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    """The forwards of all layers come before the first backward, which finds the gradient wrong."""

    def gradients(backwards: AbstractContextManager[None]) -> list[Tensor]:
        layers = [leaves(npu) for _ in range(3)]
        outs = [flash_attn_func(*layer, deterministic=deterministic) for layer in layers]
        dout = drawn(npu, 2, 20, 4, 32)
        with backwards:
            for out in reversed(outs):
                out.backward(dout)
        return [x.grad for layer in layers for x in layer if x.grad is not None]

    with verifying("off"):
        honest = gradients(nullcontext())
    with verifying("always"):
        served = gradients(virtual_ascend.lying("gradients of q halved"))
    assert alike(served, honest)
    assert len(errors(caplog)) == 1


def attending(x: Tensor) -> Tensor:
    return x + flash_attn_func(x, x[:, :, :2], x[:, :, 2:])


def attending_in_order(x: Tensor) -> Tensor:
    return x + flash_attn_func(x, x[:, :, :2], x[:, :, 2:], deterministic=True)


def packed(x: Tensor) -> Tensor:
    q, cu = x.flatten(0, 1), torch.tensor([0, 9, 40], dtype=torch.int32)
    return x + flash_attn_varlen_func(q, q[:, :2], q[:, 2:], cu, cu, 31, 31).view_as(x)


def norming(x: Tensor) -> Tensor:
    return x + rms_norm_fn(x, torch.ones_like(x[0, 0, 0]), None, eps=1e-5)


def losing(x: Tensor) -> Tensor:
    logits = x.flatten(0, 2).float() * 2
    losses, _ = cross_entropy_loss(logits, torch.arange(160, device=x.device) % 32)
    return x * losses.view(2, 20, 4, 1).to(x.dtype)


@pytest.mark.parametrize(
    ("layer", "operator"),
    [
        (layer, operator)
        for layer, operators in (
            (attending, ("npu_fusion_attention", "npu_fusion_attention_grad")),
            (norming, ("npu_rms_norm", "npu_rms_norm_backward")),
            (losing, ("npu_cross_entropy_loss", "npu_cross_entropy_loss_backward")),
        )
        for operator in ("", *operators)
    ],
)
def test_layers_that_are_checkpointed(
    layer: Callable[[Tensor], Tensor],
    operator: str,
    npu: torch.device,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """When they are computed again they have to keep as many tensors as they kept at first."""

    def gradient() -> list[Tensor]:
        x = leaf = drawn(npu, 2, 20, 4, 32, grad=True)
        for _ in range(2):
            x = checkpoint(layer, x, use_reentrant=False)
        return list(torch.autograd.grad(x.float().square().mean(), leaf))

    with verifying("off"):
        [honest] = gradient()
    with virtual_ascend.lacking(operator or "nothing"):
        [served] = gradient()
    scale = honest.abs().max()
    assert alike([served / scale], [honest / scale])
    assert len(errors(caplog)) == bool(operator)


@pytest.mark.parametrize("layer", [attending, attending_in_order, packed])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("first", ["telling", "of zeros"])
def test_a_wrong_gradient_ends_no_step_that_is_checkpointed(
    layer: Callable[[Tensor], Tensor],
    reentrant: bool,
    first: str,
    npu: torch.device,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is found out before a checkpoint has kept the tensors of the kernel that is left."""

    def gradient() -> list[Tensor]:
        x = leaf = drawn(npu, 2, 20, 4, 32, grad=True)
        for _ in range(2):
            x = checkpoint(layer, x, use_reentrant=reentrant)
        x.float().square().mean().backward()
        assert leaf.grad is not None
        return [leaf.grad]

    with verifying("off"):
        [honest] = gradient()
    with virtual_ascend.lying("gradients of k halved"):
        if first == "of zeros":
            layer(torch.zeros(2, 20, 4, 32, dtype=HALF, device=npu, requires_grad=True))
            assert not errors(caplog)
        [served] = gradient()
    scale = honest.abs().max()
    assert alike([served / scale], [honest / scale])
    assert len(errors(caplog)) == 1


def test_a_rehearsal_draws_nothing_and_comes_once(npu: torch.device) -> None:
    def losses() -> tuple[list[float], object]:
        torch.npu.manual_seed(3)
        layers = [leaves(npu) for _ in range(2)]
        outs = [flash_attn_func(*layer, dropout_p=0.3) for layer in layers]
        return [weighed(out, out) for out in outs], torch.npu.default_generators[0].get_offset()

    checked = losses()
    with virtual_ascend.record() as record:
        assert losses() == checked
    assert "npu_fusion_attention_grad" not in [launch.name for launch in record.launches]
    with verifying("off"):
        assert losses() == checked
