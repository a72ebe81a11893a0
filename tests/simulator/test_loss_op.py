"""The simulated cross entropy against float64, where it rounds, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from flash_attn_npu._virtual_ascend import CardRefusal
from tests.helpers.fused_cases import DTYPES, close, on_device, random
from tests.helpers.old_torch import doubled

pytestmark = pytest.mark.usefixtures("npu")

TARGET = torch.tensor([3, 0, 5, 3])
REDUCTIONS = ("mean", "sum", "none")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def losses(**given: Any) -> tuple[torch.Tensor, ...]:
    """One call of the operator on [4, 6] logits, every argument replaceable."""
    import torch_npu

    return torch_npu.npu_cross_entropy_loss(
        **on_device({"input": random(4, 6), "target": TARGET, **given})
    )


ASKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "ignored": {"ignore_index": 3},
    "weighted": {"weight": torch.linspace(0.1, 1, 6)},
    "smoothed": {"label_smoothing": 0.2},
    "everything": {
        "ignore_index": 3,
        "weight": torch.linspace(0.1, 1, 6),
        "label_smoothing": 0.2,
    },
}


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(dtype: torch.dtype, reduction: str, name: str) -> None:
    given, logits = ASKED[name], 2 * random(4, 6, dtype=dtype)
    loss, log_prob, z_loss, lse = losses(input=logits, reduction=reduction, **given)
    weight = given.get("weight")
    reference = {**given, "weight": None if weight is None else weight.double()}
    expected = F.cross_entropy(logits.double(), TARGET, reduction=reduction, **reference)
    assert loss.dtype == log_prob.dtype == dtype
    assert loss.shape == ((4,) if reduction == "none" else (1,))
    close(loss, expected.reshape(loss.shape))
    close(log_prob, logits.double().log_softmax(-1))
    assert z_loss.shape == lse.shape == (0,)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradient(reduction: str) -> None:
    import torch_npu

    logits = random(4, 6)
    leaf, host = logits.npu().requires_grad_(), logits.double().requires_grad_()
    loss = torch_npu.npu_cross_entropy_loss(leaf, TARGET.npu(), reduction=reduction)[0]
    expected = F.cross_entropy(host, TARGET, reduction=reduction)
    dout = random(*loss.shape)
    loss.backward(dout.npu())
    expected.backward(dout.double().reshape(expected.shape))
    close(leaf.grad, host.grad)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradient_with_weights_and_ignored_rows(reduction: str) -> None:
    import torch_npu

    logits, weight = random(4, 6), torch.linspace(0.1, 1, 6)
    leaf, host = logits.npu().requires_grad_(), logits.double().requires_grad_()
    arguments = {"reduction": reduction, "ignore_index": 3}
    loss = torch_npu.npu_cross_entropy_loss(leaf, TARGET.npu(), weight.npu(), **arguments)[0]
    F.cross_entropy(host, TARGET, weight.double(), **arguments).sum().backward()
    loss.backward(torch.ones_like(loss))
    close(leaf.grad, host.grad)
    assert leaf.grad[0].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_gradient_starts_from_rounded_log_probabilities(dtype: torch.dtype) -> None:
    import torch_npu

    logits = (8 * random(4, 6)).to(dtype)
    leaf = logits.npu().requires_grad_()
    torch_npu.npu_cross_entropy_loss(leaf, TARGET.npu(), reduction="sum")[0].backward(
        torch.ones(1, dtype=dtype).npu()
    )
    hit = F.one_hot(TARGET, 6)
    exact = logits.double().softmax(-1) - hit
    rounded = logits.double().log_softmax(-1).to(dtype).double().exp() - hit
    assert torch.equal(leaf.grad.cpu(), rounded.to(dtype))
    assert not torch.equal(leaf.grad.cpu(), exact.to(dtype))


def test_every_row_ignored_has_no_mean() -> None:
    assert losses(ignore_index=3, target=torch.full((4,), 3))[0].isnan().all()
    assert losses(ignore_index=3, target=torch.full((4,), 3), reduction="sum")[0].item() == 0


def test_the_loss_alone_is_differentiable_and_the_z_loss_says_so_too() -> None:
    outputs = losses(input=random(4, 6).npu().requires_grad_())
    assert [output.requires_grad for output in outputs] == [True, False, True, False]


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "three dimensions": ("must be \\[N, C\\]", {"input": random(2, 4, 6)}),
    "integers": ("only float16", {"input": torch.ones(4, 6).int()}),
    "no rows": ("must not be empty", {"input": random(0, 6), "target": TARGET[:0]}),
    "no classes": ("must not be empty", {"input": random(4, 0)}),
    "too many rows": (
        "N must be in 1..200000",
        {"input": random(200001, 1), "target": torch.zeros(200001).long()},
    ),
    "int32 target": ("target must be int64", {"target": TARGET.int()}),
    "another number of targets": ("target must have shape", {"target": TARGET[:3]}),
    "probabilities": ("target must be int64", {"target": random(4, 6).softmax(-1)}),
    "target too large": ("target must be in", {"target": TARGET + 1}),
    "negative target": ("target must be in", {"target": TARGET - 1}),
    "negative label to ignore": (
        "a negative ignore_index ignores nothing",
        {"target": torch.tensor([3, 0, -100, 3])},
    ),
    "ignore_index beyond": ("ignore_index must be below", {"ignore_index": 6}),
    "half weight": ("weight must be float32", {"weight": torch.ones(6).half()}),
    "weights of other classes": ("weight must have shape", {"weight": torch.ones(5)}),
    "weight of zero": ("weight must be in", {"weight": torch.linspace(0, 1, 6)}),
    "large weight": ("weight must be in", {"weight": torch.linspace(1, 2, 6)}),
    "reduction": ("reduction must be one of", {"reduction": "batchmean"}),
    "negative smoothing": ("label_smoothing must be in", {"label_smoothing": -0.1}),
    "full smoothing": ("label_smoothing must be in", {"label_smoothing": 1.0}),
    "z-loss scale": ("not supported", {"lse_square_scale_for_zloss": 0.1}),
    "z-loss": ("return_zloss is not supported", {"return_zloss": True}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    rule, given = REFUSED[name]
    with pytest.raises(CardRefusal, match=rule):
        losses(**given)


def test_float64_is_refused() -> None:
    with pytest.raises(CardRefusal, match="only float16"):
        losses(input=doubled(random(4, 6).npu()))


WITH_GRADIENT: dict[str, tuple[str, dict[str, Any]]] = {
    "smoothed sum": ("label_smoothing", {"reduction": "sum", "label_smoothing": 0.1}),
    "smoothed rows": ("label_smoothing", {"reduction": "none", "label_smoothing": 0.1}),
    "smoothed mean": ("label_smoothing", {"label_smoothing": 0.1}),
    "weighted mean": ("must leave every other", {"weight": torch.ones(6)}),
    "mean of some rows": ("must leave every other", {"ignore_index": 3}),
}


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_refused_with_a_gradient_only(name: str) -> None:
    rule, given = WITH_GRADIENT[name]
    logits = random(4, 6).npu()
    losses(input=logits, **given)
    with torch.no_grad():
        losses(input=logits.clone().requires_grad_(), **given)
    with pytest.raises(CardRefusal, match=rule):
        losses(input=logits.requires_grad_(), **given)


REFUSED_BACKWARD: dict[str, tuple[str, dict[str, Any]]] = {
    "smoothing": ("label_smoothing", {"label_smoothing": 0.1}),
    "z-loss gradient": ("grad_zloss is not", {"grad_zloss": torch.ones(1)}),
    "z-loss logarithms": ("lse_for_zloss is not", {"lse_for_zloss": torch.ones(4)}),
    "another dtype": ("grad_loss must have", {"grad_loss": torch.ones(1).half()}),
    "row gradients of a mean": ("must hold one number", {"grad_loss": torch.ones(4)}),
    "one gradient of rows": ("grad_loss must have shape", {"reduction": "none"}),
    "weighted mean": ("must leave every other", {"weight": torch.ones(6)}),
}


@pytest.mark.parametrize("name", REFUSED_BACKWARD)
def test_refused_by_the_gradient(name: str) -> None:
    import torch_npu

    rule, given = REFUSED_BACKWARD[name]
    arguments = {"grad_loss": torch.ones(1), "log_prob": random(4, 6), "target": TARGET, **given}
    with pytest.raises(CardRefusal, match=rule):
        torch_npu.npu_cross_entropy_loss_backward(**on_device(arguments))


def test_a_310p_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRTUAL_ASCEND_SOC", "Ascend310P3")
    with pytest.raises(CardRefusal, match="does not exist on a 310P"):
        losses()
