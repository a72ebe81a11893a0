"""No operator of the simulated Ascend answers with memory that nobody wrote."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from flash_attn_npu._core.ground.versions import torch_npu_version
from flash_attn_npu._virtual_ascend import CardRefusal, operators
from flash_attn_npu._virtual_ascend.machine import arithmetic
from tests.helpers.old_torch import HOLDS_KERNELS, TORCH

pytestmark = pytest.mark.usefixtures("npu")

MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 9)),
    "conv2d of channels": (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3), (2, 4, 5, 5, 5)),
    "batch norm": (lambda: nn.BatchNorm2d(4), (2, 4, 5, 5)),
    "linear": (lambda: nn.Linear(9, 5), (2, 9)),
}


# torch_npu's batch norm looks at its storage in the old way
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("move", [lambda m: m.to("npu"), lambda m: m.npu()], ids=["to", "npu"])
def test_a_module_keeps_its_weights_and_its_numbers(name: str, move: Callable) -> None:
    build, shape = MODULES[name]
    torch.manual_seed(0)
    host, x = build(), torch.randn(shape)
    with torch.no_grad():
        for parameter in host.parameters():
            parameter.normal_()
    device = move(copy.deepcopy(host))
    for moved, kept in zip(device.parameters(), host.parameters(), strict=True):
        assert moved.device.type == "npu"
        assert torch.equal(moved.cpu(), kept)
    inputs = [x.clone().requires_grad_(), x.npu().requires_grad_()]
    answers = [module(value) for module, value in zip((host, device), inputs, strict=True)]
    dout = torch.randn(answers[0].shape)
    answers[0].backward(dout)
    answers[1].backward(dout.npu())
    pairs = [answers, [x.grad for x in inputs]]
    pairs += [[a.grad, b.grad] for a, b in zip(host.parameters(), device.parameters(), strict=True)]
    for expected, got in pairs:
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("number", [0, 2, 29])
def test_a_format_cast_copies(number: int) -> None:
    """By default torch_npu gives the plain format in place of the one asked for."""
    import torch_npu

    x = torch.randn(4, 32, 16)
    for view in (lambda x: x, lambda x: x.transpose(0, 1), lambda x: x[1:, ::2]):
        assert torch.equal(torch_npu.npu_format_cast(view(x.npu()), number).cpu(), view(x))


@HOLDS_KERNELS
def test_a_format_of_kernels_is_refused() -> None:
    import torch_npu

    x = torch.randn(32, 32).npu()
    torch.npu.config.allow_internal_format = True
    try:
        with pytest.raises(CardRefusal, match="memory format 29 is not simulated"):
            torch_npu.npu_format_cast(x, 29)
        # else torch_npu leaves the weights of modules as they are
        torch.npu.set_compile_mode(jit_compile=True)
        with pytest.raises(CardRefusal, match="is not simulated"):
            nn.Conv2d(4, 6, 3).to("npu")
    finally:
        torch.npu.set_compile_mode(jit_compile=False)
        torch.npu.config.allow_internal_format = False


@HOLDS_KERNELS
def test_only_what_is_computed_or_allocates_or_views_is_torch_npus_own() -> None:
    """Whatever else it would launch, this rig must compute or refuse."""
    replaced = {**arithmetic.kernels(), **operators.kernels()}
    names = torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1")
    own = set()
    for name in names:
        op = arithmetic.overload(name)
        if op is not None and name not in replaced and not arithmetic._is_view(op):
            own.add(op._schema.name)
    allocations = {name for name in own if name.startswith("aten::empty")}
    assert own - allocations <= {f"aten::{name}" for name in arithmetic._KEPT} | {
        f"npu::{name}" for name in operators._KEPT
    }


ABOVE_AUTOGRAD: dict[str, Callable[[torch.Tensor], Any]] = {
    "argsort": lambda x: x.argsort(-1),
    "cdist": lambda x: torch.cdist(x, x + 1),
    "fill_diagonal_": lambda x: x.clone().fill_diagonal_(1.0),
    "isclose": lambda x: torch.isclose(x, x + 1e-7),
    "max.out": lambda x: torch.max(x, x.flip(0), out=torch.empty_like(x)),
    "min.out": lambda x: torch.min(x, x.flip(0), out=torch.empty_like(x)),
    "one_hot": lambda x: nn.functional.one_hot((x[0] > 0).long(), 3),
    "or": lambda x: (x > 0).__ior__(x < -0.5),
    "slogdet": lambda x: torch.linalg.slogdet(x),
    "softmax": lambda x: x.softmax(-1),
    "where": lambda x: torch.where(x > 0)[0],
    "xor": lambda x: (x > 0) ^ (x > 0.5),
}


@pytest.mark.parametrize("name", ABOVE_AUTOGRAD)
def test_what_torch_npu_launches_above_autograd_is_computed(name: str) -> None:
    x = torch.randn(4, 4)
    expected, got = (ABOVE_AUTOGRAD[name](value) for value in (x, x.npu()))
    for want, value in zip(
        *(y if isinstance(y, tuple) else (y,) for y in (expected, got)), strict=True
    ):
        torch.testing.assert_close(value.cpu(), want)


REFUSED: dict[str, Callable[[torch.Tensor], Any]] = {
    "atb::_npu_reshape_and_cache_siso": lambda x: torch.ops.atb._npu_reshape_and_cache_siso(
        x, x, x.int()
    ),
    "aten::mm.dtype": lambda x: torch.mm(x.half(), x.half(), out_dtype=torch.float32),
    "aten::_masked_scale": lambda x: torch._masked_scale(x, x > 0, 2.0),
    "npu::npu_format_cast_": lambda x: torch.ops.npu.npu_format_cast_(x, 2),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_nobody_computes_is_refused(name: str) -> None:
    there = torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1")
    if name not in there or (name.startswith("atb") and TORCH < (2, 9)):
        pytest.skip(f"with torch_npu {torch_npu_version()} it is torch_npu that refuses it")
    with pytest.raises(NotImplementedError, match=f"{name} has no simulated arithmetic"):
        REFUSED[name](torch.randn(4, 4).npu())


@pytest.mark.parametrize("size", [(0,), (2,), (2, 2), (50,)], ids=str)
def test_out_is_resized_without_a_warning(size: tuple[int, ...]) -> None:
    x, index = torch.arange(12.0).view(4, 3), torch.tensor([3, 1])
    out = torch.empty(size, device="npu")
    assert torch.index_select(x.npu(), 0, index.npu(), out=out) is out
    assert torch.equal(out.cpu(), x[[3, 1]])
    out = torch.empty(size, device="npu")
    torch.add(x.npu(), 1, out=out)
    assert torch.equal(out.cpu(), x + 1)


def test_out_is_written_where_it_lies() -> None:
    x, base = torch.arange(6.0).view(2, 3), torch.zeros(3, 4).npu()
    torch.add(x.npu(), 1, out=base[:, 1:3].t())
    assert torch.equal(base[:, 1:3].t().cpu(), x + 1)
    assert not base[:, ::3].any()
    y = x.npu()
    torch.mul(y, y, out=y)
    assert torch.equal(y.cpu(), x * x)


@pytest.mark.parametrize("name", ["_softmax", "_log_softmax"])
def test_a_softmax_from_half_to_float(name: str) -> None:
    softmax = getattr(torch, name)
    host, dout = torch.randn(4, 5).half().requires_grad_(), torch.randn(4, 5)
    device = host.detach().npu().requires_grad_()
    expected = softmax(host.float(), -1, False)
    got = softmax(device, -1, True)
    expected.backward(dout)
    got.backward(dout.npu())
    assert (got.dtype, device.grad.dtype) == (torch.float32, torch.float16)
    assert torch.equal(got.cpu(), expected)
    assert torch.equal(device.grad.cpu(), host.grad)
    with pytest.raises(RuntimeError, match="Half type only"):
        softmax(device.float(), -1, True)
