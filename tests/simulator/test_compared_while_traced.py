"""What a compiled graph holds runs unseen: it is compared, or tried, while the graph is traced."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu._core.ground.schemas import untraceable
from flash_attn_npu._core.ground.settings import verifying
from flash_attn_npu._core.verification import graphs, kinds
from flash_attn_npu.layers.rotary import apply_rotary_emb
from flash_attn_npu.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn_npu.ops.triton.layer_norm import rms_norm_fn
from tests.helpers.telling_calls import alike, drawn, errors

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.usefixtures("fresh_dynamo"),
]

Step = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def on(npu: torch.device) -> Iterator[None]:
    with verifying("compose"):
        yield


def normed(x: Tensor, table: Tensor) -> Tensor:
    return rms_norm_fn(x, table[0], None, residual=x * 2, eps=0.1)


def lost(x: Tensor, table: Tensor) -> Tensor:
    labels = torch.arange(x.shape[0] * 20, device=x.device) % 32
    return cross_entropy_loss(x.flatten(0, 1).float() * 2, labels)[0]


def turned(x: Tensor, table: Tensor) -> Tensor:
    return apply_rotary_emb(x[:, :, None], table[:, :16], table[:, 16:])


FAULTS: dict[str, tuple[Step, str, tuple[str, ...]]] = {
    "norm": (
        normed,
        "npu_rms_norm",
        ("norm without weight", "gradients of a norm's weight halved"),
    ),
    "loss": (
        lost,
        "npu_cross_entropy_loss",
        ("gradients of a cross entropy halved",),
    ),
    "rotation": (
        turned,
        "npu_rotary_mul",
        ("rotary tables one row late",),
    ),
}


def stepped(step: Step, device: torch.device, *, compiled: bool, dynamic: bool = False) -> list:
    x, table = drawn(device, 3, 20, 32, grad=True), drawn(device, 20, 32, grad=True)
    run = step
    if compiled:
        run = torch.compile(step, backend="eager", fullgraph=True, dynamic=dynamic)
    out = run(x, table)
    out.float().square().mean().backward()
    return [out.detach(), *(t.grad / t.grad.abs().max() for t in (x, table) if t.grad is not None)]


def traced(operator: str, device: torch.device) -> None:
    if operator == "npu_cross_entropy_loss" and untraceable(device, operator):
        pytest.skip("this torch_npu cannot trace the operator: the call is composed")


@pytest.mark.parametrize(
    ("name", "lie", "dynamic"),
    [
        (name, lie, dynamic)
        for name, (_, _, lies) in FAULTS.items()
        for lie, dynamic in zip(lies, (True, False), strict=False)
    ],
)
def test_a_lie_does_not_come_into_a_graph(
    name: str, lie: str, dynamic: bool, npu: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    step, operator, _ = FAULTS[name]
    with verifying("off"):
        honest = stepped(step, npu, compiled=False)
    traced(operator, npu)
    with virtual_ascend.lying(lie):
        served = stepped(step, npu, compiled=True, dynamic=dynamic)
        assert alike(served, honest)
        [record] = errors(caplog)
        with virtual_ascend.record() as recorded:
            assert alike(stepped(step, npu, compiled=True, dynamic=dynamic), honest)
    assert operator in record
    assert operator not in {launch.name for launch in recorded.launches}
    assert len(errors(caplog)) == 1


@pytest.mark.parametrize("name", FAULTS)
def test_a_launch_that_raises_does_not_come_into_a_graph(
    name: str, npu: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    step, operator, _ = FAULTS[name]
    with verifying("off"):
        honest = stepped(step, npu, compiled=False)
    traced(operator, npu)
    with virtual_ascend.lacking(operator) as lack:
        assert alike(stepped(step, npu, compiled=True), honest)
        assert alike(stepped(step, npu, compiled=True), honest)
    assert lack.raised == len(errors(caplog)) == 1


@pytest.mark.parametrize("name", FAULTS)
def test_an_honest_operator_is_tried_once_for_all_graphs(
    name: str, npu: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    step, operator, _ = FAULTS[name]
    traced(operator, npu)
    stepped(step, npu, compiled=True)
    assert not errors(caplog)
    known = [kind for kind in kinds._verdicts._known if kind.kernel == operator]
    assert all(kinds._verdicts._known[kind].settled for kind in known)
    # what was settled while a graph was traced is the kind that a call of itself is
    step(drawn(npu, 3, 20, 32, grad=True), drawn(npu, 20, 32, grad=True))
    assert [kind for kind in kinds._verdicts._known if kind.kernel == operator] == known
    with virtual_ascend.record() as again:
        stepped(step, npu, compiled=True)
    torch._dynamo.reset()
    with virtual_ascend.record() as anew:
        stepped(step, npu, compiled=True)
    assert [x.name for x in anew.launches] == [x.name for x in again.launches]


def test_without_memory_for_it_nothing_is_found_out(
    npu: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("NPU out of memory")

    monkeypatch.setattr(graphs, "_values", full)
    with virtual_ascend.record() as recorded:
        stepped(normed, npu, compiled=True)
    assert "npu_rms_norm" in {launch.name for launch in recorded.launches}
    assert not errors(caplog)
    assert not kinds._verdicts._known
