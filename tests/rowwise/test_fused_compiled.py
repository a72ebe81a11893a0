"""On Ascend one graph holds torch_npu's fused operators, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import Thread

import pytest
import torch
from torch import Tensor

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu import fallback, flash_attn_func, reporting
from flash_attn_npu._core.ground.memory import forget_all
from flash_attn_npu._core.ground.schemas import untraceable
from flash_attn_npu.errors import UnsupportedError
from flash_attn_npu.layers.rotary import apply_rotary_emb
from flash_attn_npu.ops.activations import swiglu
from flash_attn_npu.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn_npu.ops.triton.layer_norm import layer_norm_fn, layer_norm_linear_fn, rms_norm_fn

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

Run = Callable[[Tensor, Tensor], Tensor]
COMPILED: dict[str, tuple[Run, list[str]]] = {
    "rotation": (
        lambda x, table: apply_rotary_emb(x[None, :, None], table, table + 1).sum(),
        ["npu_rotary_mul", "npu_rotary_mul"],
    ),
    "rotation at positions": (
        lambda x, table: apply_rotary_emb(
            x[:, None, None], table, table + 1, seqlen_offsets=torch.arange(4, device=x.device)
        ).sum(),
        ["npu_rotary_mul", "npu_rotary_mul"],
    ),
    "rms norm": (
        lambda x, table: rms_norm_fn(x, x[0], None, residual=x).square().sum(),
        ["npu_rms_norm", "npu_rms_norm_backward"],
    ),
    "layer norm": (
        lambda x, table: layer_norm_fn(x, x[0], x[1], residual=x).square().sum(),
        [],
    ),
    "gate": (lambda x, table: swiglu(x, x + 1).sum(), []),
    "loss": (
        lambda x, table: cross_entropy_loss(x, torch.arange(4, device=x.device))[0].sum(),
        ["npu_cross_entropy_loss", "npu_cross_entropy_loss_backward"],
    ),
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing is compiled yet, and the chip's name was not asked for."""
    torch._dynamo.reset()
    forget_all()
    yield
    torch._dynamo.reset()


SERVED = {
    "rotation": ("apply_rotary", "npu_rotary_mul"),
    "rotation at positions": ("apply_rotary", "npu_rotary_mul"),
    "rms norm": ("rms_norm_fn", "npu_rms_norm"),
    "layer norm": ("layer_norm_fn", "layer_norm"),
    "gate": ("swiglu", "torch"),
    "loss": ("cross_entropy_loss", "npu_cross_entropy_loss"),
}
if virtual_ascend.REASON is None and untraceable(torch.device("npu:0"), "npu_cross_entropy_loss"):
    # torch_npu 2.6
    SERVED["loss"] = ("cross_entropy_loss", "torch")
    COMPILED["loss"] = (COMPILED["loss"][0], [])


@pytest.mark.parametrize("name", COMPILED)
def test_one_graph(name: str, npu: torch.device) -> None:
    run, launches = COMPILED[name]
    torch.manual_seed(0)
    host, table = torch.randn(4, 8), torch.randn(4, 4).to(npu)
    mine, theirs = (host.to(npu).requires_grad_() for _ in range(2))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with virtual_ascend.record() as recorded, reporting() as report:
        got = compiled(mine, table)
        got.backward()
    tallies = {(entry.function, entry.kernel): entry.calls for entry in report.tallies}
    # the gradient of a rotation is another one
    count = 2 if name.startswith("rotation") else 1
    assert tallies == {(f"{SERVED[name][0]} (compiled)", SERVED[name][1]): count}
    assert [launch.name for launch in recorded.launches] == launches
    want = run(theirs, table)
    want.backward()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(mine.grad, theirs.grad)


COMPOSED: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "rotation": ("apply_rotary", lambda x: apply_rotary_emb(x[None, :, None], x[:, :4], x[:, 4:])),
    "RMS norm with bias": ("rms_norm_fn", lambda x: rms_norm_fn(x, x[0], x[1])),
    "norm in a function": (
        "layer_norm_linear_fn",
        lambda x: layer_norm_linear_fn(x, x[0], None, x, None),
    ),
    "gate": ("swiglu", lambda x: swiglu(x, x + 1)),
    "loss": ("cross_entropy_loss", lambda x: cross_entropy_loss(x, x[:, 0].long())[0]),
}


@pytest.mark.parametrize(
    ("name", "fullgraph"), [*((name, True) for name in COMPOSED), ("RMS norm with bias", False)]
)
def test_the_policy_of_a_compiled_call(name: str, fullgraph: bool) -> None:
    """It is that of the call, not that of the first one: another policy is traced anew."""
    function, run = COMPOSED[name]
    x = torch.rand(4, 8)
    compiled = torch.compile(run, fullgraph=fullgraph, backend="eager")
    with reporting() as report:
        want = compiled(x)
        compiled(x)
    assert [(entry.function, entry.calls) for entry in report.tallies] == [
        (f"{function} (compiled)", 1)
    ]
    refused = rf"^{function}: got .*Ascend NPUs only.*`error`"
    with fallback("error"), pytest.raises(UnsupportedError, match=refused):
        compiled(x)
    with fallback("allow"):
        torch.testing.assert_close(compiled(x), want)
    torch.testing.assert_close(compiled(x), want)


def test_a_policy_is_that_of_the_thread() -> None:
    """Also where the graph was made in a thread that has never set one."""
    compiled = torch.compile(COMPOSED["gate"][1], fullgraph=True, backend="eager")
    x, answers = torch.rand(4, 8), []
    thread = Thread(target=lambda: answers.append(compiled(x)))
    with fallback("error"):
        thread.start()
        thread.join()
        with pytest.raises(UnsupportedError):
            compiled(x)
    assert torch.equal(answers[0], compiled(x))


@pytest.mark.parametrize("strict", [True, False])
def test_an_export_is_refused(strict: bool) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return COMPOSED["RMS norm with bias"][1](x)

    x = torch.rand(4, 8)
    with fallback("error"), pytest.raises(UnsupportedError, match=r"^rms_norm_fn: got "):
        torch.export.export(Module(), (x,), strict=strict)
    with reporting() as report:
        program = torch.export.export(Module(), (x,), strict=strict)
    assert [entry.function for entry in report.tallies] == ["rms_norm_fn (compiled)"]
    torch.testing.assert_close(program.module()(x), Module()(x))


def test_a_graph_of_any_size_is_decided_once() -> None:
    compiled = torch.compile(
        COMPOSED["RMS norm with bias"][1], fullgraph=True, dynamic=True, backend="eager"
    )
    with reporting() as report:
        for rows in (4, 5, 9):
            compiled(torch.rand(rows, 8))
    (entry,) = report.tallies
    assert (entry.kernel, entry.calls) == ("torch", 1)


def test_a_compiled_call_without_work_is_not_refused() -> None:
    compiled = torch.compile(COMPOSED["gate"][1], fullgraph=True, backend="eager")
    with fallback("error"):
        assert compiled(torch.rand(0, 8)).shape == (0, 8)


def test_compiled_attention_is_counted_and_refused() -> None:
    q = torch.rand(1, 4, 2, 8)
    compiled = torch.compile(flash_attn_func, fullgraph=True, backend="eager")
    with reporting() as report:
        compiled(q, q, q)
        compiled(q, q, q)
    assert [(entry.function, entry.calls) for entry in report.tallies] == [("flash_attn_func", 2)]
    with fallback("error"), pytest.raises(UnsupportedError, match="flash_attn_func"):
        compiled(q, q, q)
