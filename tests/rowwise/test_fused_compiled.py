"""On Ascend one graph holds torch_npu's fused operators, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import virtual_ascend
from torch import Tensor

from flash_attn_npu.layers.rotary import apply_rotary_emb
from flash_attn_npu.memory import forget_all
from flash_attn_npu.ops.activations import swiglu
from flash_attn_npu.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn_npu.ops.triton.layer_norm import layer_norm_fn, rms_norm_fn

Run = Callable[[Tensor, Tensor], Tensor]
COMPILED: dict[str, tuple[Run, list[str]]] = {
    "rotation": (
        lambda x, table: apply_rotary_emb(x[None, :, None], table, table + 1).sum(),
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


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Cannot create tensor with internal format:UserWarning")
@pytest.mark.parametrize("name", COMPILED)
def test_one_graph(name: str, npu: torch.device) -> None:
    run, launches = COMPILED[name]
    torch.manual_seed(0)
    host, table = torch.randn(4, 8), torch.randn(4, 4).to(npu)
    mine, theirs = (host.to(npu).requires_grad_() for _ in range(2))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with virtual_ascend.record() as recorded:
        got = compiled(mine, table)
        got.backward()
    assert [launch.name for launch in recorded.launches] == launches
    want = run(theirs, table)
    want.backward()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(mine.grad, theirs.grad)
