"""flash_attn.modules.mlp on one process."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu import reporting
from flash_attn_npu.errors import ArgumentError
from flash_attn_npu.modules import mlp
from flash_attn_npu.modules.mlp import GatedMlp, Mlp, ParallelGatedMlp, ParallelMLP
from tests.helpers import dense_reference as reference

DTYPES = [torch.bfloat16, torch.float32, torch.float64]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
WITH_BIASES = ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]

PLAIN: dict[str, tuple[Callable[[Tensor], Tensor], reference.Formula]] = {
    "gelu": (F.gelu, reference.gelu_erf),
    "silu": (F.silu, reference.swish),
    "own": (lambda x: x * x, lambda x: x * x),
}
GATED: dict[str, tuple[Callable[[Tensor], Tensor], reference.Formula]] = {
    **PLAIN,
    "sigmoid": (F.sigmoid, torch.sigmoid),
}


def gated(formula: reference.Formula) -> reference.Formula:
    def of_halves(both: Tensor) -> Tensor:
        half = both.shape[-1] // 2
        return both[..., :half] * formula(both[..., half:])

    return of_halves


def check(
    module: nn.Module,
    activation: reference.Formula,
    x: Tensor,
    amp: torch.dtype | None = None,
) -> None:
    """The module's value and gradients against the formula, and its residual; under autocast."""
    names = [name for name, _ in module.named_parameters()]

    def formula(x: Tensor, *parameters: Tensor) -> Tensor:
        held = dict(zip(names, parameters, strict=True))
        hidden = reference.affine(x, held["fc1.weight"], held.get("fc1.bias"))
        return reference.affine(activation(hidden), held["fc2.weight"], held.get("fc2.bias"))

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        held = dict(zip(names, parameters, strict=True))
        with torch.autocast(x.device.type, dtype=amp, enabled=amp is not None):
            out = torch.func.functional_call(module, held, (x,))
        if isinstance(out, tuple):
            out, residual = out
            assert residual is x
        return out

    reference.compare(call, formula, [x, *(p.detach() for p in module.parameters())])


@each_dtype
@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("make", [Mlp, ParallelMLP])
def test_mlp(device: torch.device, dtype: torch.dtype, name: str, make: type[nn.Module]) -> None:
    activation, formula = PLAIN[name]
    module = make(16, 40, 12, activation=activation, device=device, dtype=dtype)
    assert list(module.state_dict()) == WITH_BIASES
    check(module, formula, torch.randn(2, 16, 16).to(device, dtype))


@each_dtype
@pytest.mark.parametrize("name", GATED)
def test_gated_mlp(device: torch.device, dtype: torch.dtype, name: str) -> None:
    activation, formula = GATED[name]
    x = torch.randn(2, 16, 16).to(device, dtype)
    module = GatedMlp(16, 24, 12, activation, multiple_of=8, device=device, dtype=dtype)
    assert list(module.state_dict()) == WITH_BIASES
    check(module, gated(formula), x)
    parallel = ParallelGatedMlp(
        16, None, 24, 12, activation=activation, multiple_of=8, device=device, dtype=dtype
    )
    assert list(parallel.state_dict()) == WITH_BIASES
    check(parallel, gated(formula), x)


@pytest.mark.parametrize("make", [Mlp, GatedMlp])
def test_residual_and_missing_biases(make: type[nn.Module]) -> None:
    module = make(6, 8, bias1=False, return_residual=True, dtype=torch.float64)
    assert list(module.state_dict()) == ["fc1.weight", "fc2.weight", "fc2.bias"]
    activation = reference.gelu_erf if make is Mlp else gated(torch.sigmoid)
    x = torch.randn(3, 6, dtype=torch.float64)
    check(module, activation, x)
    module = make(6, 8, bias2=False, dtype=torch.float64)
    assert list(module.state_dict()) == ["fc1.weight", "fc1.bias", "fc2.weight"]
    check(module, activation, x)


def shapes(module: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(value.shape) for value in module.state_dict().values()]


def test_sizes() -> None:
    assert shapes(Mlp(6)) == [(24, 6), (24,), (6, 24), (6,)]
    assert shapes(Mlp(6, 5, 3)) == [(5, 6), (5,), (3, 5), (3,)]
    assert shapes(ParallelMLP(6)) == [(24, 6), (24,), (6, 24), (6,)]
    assert shapes(GatedMlp(6)) == [(256, 6), (256,), (6, 128), (6,)]
    assert shapes(GatedMlp(96)) == [(512, 96), (512,), (96, 256), (96,)]
    assert shapes(GatedMlp(100)) == [(768, 100), (768,), (100, 384), (100,)]  # 266 rounded up
    assert shapes(GatedMlp(6, 129, 3)) == [(512, 6), (512,), (3, 256), (3,)]
    assert shapes(GatedMlp(7, multiple_of=1)) == [(36, 7), (36,), (7, 18), (7,)]
    assert shapes(ParallelGatedMlp(6, None)) == [(256, 6), (256,), (6, 128), (6,)]


def test_the_same_seed_makes_the_same_module_as_torch() -> None:
    torch.manual_seed(1)
    ours = [Mlp(6), GatedMlp(6, 8, multiple_of=1), ParallelMLP(6)]
    torch.manual_seed(1)
    theirs = [nn.Linear(*size) for size in ((6, 24), (24, 6), (6, 16), (8, 6), (6, 24), (24, 6))]
    mine = [value for module in ours for value in module.state_dict().values()]
    for one, other in zip(mine, nn.ModuleList(theirs).state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["silu", "sigmoid"])
@pytest.mark.parametrize("outer", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(device: torch.device, name: str, outer: torch.dtype) -> None:
    activation, formula = GATED[name]
    module = GatedMlp(16, 24, activation=activation, multiple_of=8, device=device)
    x = torch.randn(8, 16).to(device)
    with torch.autocast(device.type, dtype=outer):
        assert module(x).dtype == outer
    check(module, gated(formula), x, outer)


def test_silu_goes_through_swiglu(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(gate: Tensor, y: Tensor) -> Tensor:
        seen.append((gate, y))
        return gate

    monkeypatch.setattr(mlp, "swiglu", spy)
    module = GatedMlp(4, 6, activation=F.silu, multiple_of=1, bias1=False)
    x = torch.randn(3, 4)
    module(x)
    ((gate, y),) = seen
    torch.testing.assert_close(y, x @ module.fc1.weight[:6].t())
    torch.testing.assert_close(gate, x @ module.fc1.weight[6:].t())


@pytest.mark.parametrize("dtype", [torch.float16, *DTYPES[:2]], ids=str)
def test_exact_gelu_is_one_launch_without_a_gradient(npu: torch.device, dtype: torch.dtype) -> None:
    """With one it is as ever, as far as second derivatives: the operator's gradient has none."""
    module = GatedMlp(16, 24, 12, F.gelu, multiple_of=8, device=npu, dtype=dtype)
    x = torch.randn(2, 5, 16).to(npu, dtype)
    with virtual_ascend.record() as seen, torch.no_grad(), reporting() as report:
        out = module(x)
    asked = [name.rpartition("::")[2] for name in seen.operators]
    assert asked.count("npu_geglu") == 1
    assert not {"gelu", "mul"} & set(asked)
    assert [(entry.function, entry.kernel) for entry in report.tallies] == [("geglu", "npu_geglu")]
    (launch,) = seen.launches
    assert launch.arguments["approximate"] == 0
    assert not launch.arguments["activate_left"]
    held = [p.detach().cpu() for p in module.parameters()]

    def formula(dtype: torch.dtype) -> Tensor:
        first, bias1, second, bias2 = (p.to(dtype) for p in held)
        y, gate = F.linear(x.cpu().to(dtype), first, bias1).chunk(2, -1)
        return F.linear(y * F.gelu(gate), second, bias2)

    exact = formula(torch.float64)
    error, plain = ((o.double() - exact).abs().max() for o in (out.cpu(), formula(dtype)))
    assert error <= 2 * plain + 1e-6
    with virtual_ascend.record() as seen:
        module(x)
        x.requires_grad_()
        (dx,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
        (ddx,) = torch.autograd.grad(dx.square().sum(), x)
    assert not [launch.name for launch in seen.launches]
    leaf = x.detach().cpu().double().requires_grad_()
    first, bias1, second, bias2 = (p.double() for p in held)
    y, gate = F.linear(leaf, first, bias1).chunk(2, -1)
    want = F.linear(y * F.gelu(gate), second, bias2).sum()
    (slope,) = torch.autograd.grad(want, leaf, create_graph=True)
    (curve,) = torch.autograd.grad(slope.square().sum(), leaf)
    assert (ddx.cpu().double() - curve).abs().max() < 0.1 * curve.abs().max()


def test_exact_gelu_of_every_shape(npu: torch.device) -> None:
    """Of strided halves, no row at all, and more dimensions than the operator takes."""
    for shape in ((0, 16), (16,), (3, 2, 16), (*[1] * 8, 16)):
        both = torch.randn(shape, dtype=torch.float32)
        for there in (both.to(npu), both.to(npu).repeat_interleave(2, -1)[..., ::2]):
            out = mlp._gated(there, F.gelu)
            y, gate = both.double().chunk(2, -1)
            torch.testing.assert_close(out.cpu().double(), y * F.gelu(gate), atol=1e-5, rtol=1e-5)
    wide = torch.randn(3, 16, dtype=torch.float64)
    y, gate = wide.chunk(2, -1)
    torch.testing.assert_close(mlp._gated(wide.to(npu), F.gelu).cpu(), y * F.gelu(gate))


def test_empty_batches(device: torch.device) -> None:
    for module in (Mlp(6, device=device), GatedMlp(6, activation=F.silu, device=device)):
        module(torch.empty(0, 6, device=device)).sum().backward()
        assert not any(p.grad.any() for p in module.parameters())


def test_bad_input_is_named() -> None:
    for make in (
        lambda: GatedMlp(6, multiple_of=0),
        lambda: ParallelGatedMlp(6, None, multiple_of=-1),
    ):
        with pytest.raises(ArgumentError, match=r"^multiple_of: got .*; allowed: .*; to fix it: "):
            make()
