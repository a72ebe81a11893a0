"""The simulated normalizations against float64 expressions, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from flash_attn_npu._virtual_ascend import CardRefusal
from tests.helpers.fused_cases import (
    DTYPES,
    all_close,
    close,
    in_double,
    on_device,
    on_npu,
    random,
)
from tests.helpers.old_torch import TORCH, doubled

pytestmark = pytest.mark.usefixtures("npu")

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
EPSILON = 1e-3


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def rms(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    axes = tuple(range(-gamma.dim(), 0))
    return x / (x.square().mean(axes, keepdim=True) + EPSILON).sqrt() * gamma


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("wide_gamma", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype: torch.dtype, wide_gamma: bool, axes: int) -> None:
    import torch_npu

    shape = (3, 4, 8)
    gamma = random(*shape[-axes:], dtype=FULL if wide_gamma else dtype)
    inputs, dout = [random(*shape, dtype=dtype), gamma], random(*shape, dtype=dtype)
    got = on_npu(lambda x, g: torch_npu.npu_rms_norm(x, g, EPSILON)[0], inputs, dout)
    assert [tensor.dtype for tensor in got] == [dtype, dtype, gamma.dtype]
    all_close(got, in_double(rms, inputs, dout))
    x = inputs[0]
    rstd = torch_npu.npu_rms_norm(x.npu(), gamma.npu(), EPSILON)[1]
    assert rstd.dtype == FULL
    expected = x.double().flatten(-axes).square().mean(-1).add(EPSILON).rsqrt()
    close(rstd, expected.view(*shape[:-axes], *[1] * axes))


def test_rms_norm_of_strided_tensors_is_contiguous() -> None:
    import torch_npu

    x, gamma, dout = random(4, 3, 8), random(16)[::2], random(3, 4, 8)
    got = on_npu(
        lambda x, g: torch_npu.npu_rms_norm(x.transpose(0, 1), g, EPSILON)[0], [x, gamma], dout
    )
    assert got[0].is_contiguous()
    all_close(got, in_double(lambda x, g: rms(x.transpose(0, 1), g), [x, gamma], dout))


def test_rms_norm_of_nothing_is_nothing() -> None:
    import torch_npu

    y, rstd = torch_npu.npu_rms_norm(random(0, 16).npu(), random(16).npu(), EPSILON)
    assert (y.shape, rstd.shape) == ((0, 16), (0, 1))


def test_only_the_normalized_tensor_is_differentiable() -> None:
    import torch_npu

    x, gamma = random(2, 8).npu().requires_grad_(), random(8).npu()
    assert [t.requires_grad for t in torch_npu.npu_rms_norm(x, gamma)] == [True, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_gemma_rms_norm_has_no_gradient_and_only_warns(dtype: torch.dtype) -> None:
    import torch_npu

    x, gamma = random(3, 8, dtype=dtype), random(8, dtype=dtype)
    leaf = x.npu().requires_grad_()
    y, rstd = torch_npu.npu_gemma_rms_norm(leaf, gamma.npu(), EPSILON)
    close(y.detach(), rms(x.double(), 1 + gamma.double()))
    assert (rstd.shape, rstd.dtype) == ((3, 1), FULL)
    y.sum().backward()
    assert leaf.grad is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_rounds_where_its_kernel_does(dtype: torch.dtype) -> None:
    import torch_npu

    x1, x2, gamma = (random(*shape, dtype=dtype) for shape in ((40, 32), (40, 32), (32,)))
    y, rstd, x = torch_npu.npu_add_rms_norm(x1.npu(), x2.npu(), gamma.npu(), EPSILON)
    exact = x1.double() + x2.double()
    close(x, exact)
    normed = exact.to(dtype).double() if dtype == HALF else exact
    inverse = normed.square().mean(-1, keepdim=True).add(EPSILON).rsqrt()
    close(rstd, inverse)
    rounded = (normed * inverse).to(dtype).double() * gamma.double()
    assert torch.equal(y.cpu(), rounded.to(dtype))
    close(y, rms(exact, gamma.double()), 3)


@pytest.mark.skipif(TORCH < (2, 9), reason="torch_npu before 2.9 has no backward that says so")
def test_add_rms_norm_runs_with_a_gradient_and_fails_in_the_backward_pass() -> None:
    import torch_npu

    x, gamma = random(2, 8).npu().requires_grad_(), random(8).npu()
    y, _, total = torch_npu.npu_add_rms_norm(x, x, gamma)
    assert y.requires_grad
    assert total.requires_grad
    with pytest.raises(RuntimeError, match="not implemented"):
        total.sum().backward()


def layer_norm(x1: torch.Tensor, x2: torch.Tensor, *affine: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x1 + x2, affine[0].shape, *affine, eps=EPSILON)


@pytest.mark.parametrize("output", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_layer_norm(dtype: torch.dtype, output: int) -> None:
    import torch_npu

    shapes = ((3, 4, 8), (3, 4, 8), (8,), (8,))
    inputs = [random(*shape, dtype=dtype) for shape in shapes]
    dout = random(3, 4, 8, dtype=dtype)

    def add(x1: torch.Tensor, x2: torch.Tensor, *affine: torch.Tensor) -> torch.Tensor:
        # the sum must not lose the gradients of what it does not use
        return x1 + x2 + 0 * sum(t.sum() for t in affine)

    expected = in_double(layer_norm if output == 0 else add, inputs, dout)
    got = on_npu(
        lambda *given: torch_npu.npu_add_layer_norm(*given, EPSILON, True)[output], inputs, dout
    )
    all_close(got, expected)
    statistics = torch_npu.npu_add_layer_norm(*(t.npu() for t in inputs), EPSILON)[1:3]
    total = (inputs[0].double() + inputs[1].double()).double()
    variance = total.var(-1, unbiased=False, keepdim=True)
    for statistic, value in zip(
        statistics, (total.mean(-1, keepdim=True), (variance + EPSILON).rsqrt()), strict=True
    ):
        assert statistic.dtype == FULL
        close(statistic, value)


def test_both_outputs_of_add_layer_norm_send_gradients() -> None:
    import torch_npu

    inputs = [random(*shape) for shape in ((3, 8), (3, 8), (8,), (8,))]
    dout = random(3, 8)

    def of(y: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        return y + 2 * total

    def fused(*given: torch.Tensor) -> torch.Tensor:
        y, _, _, total = torch_npu.npu_add_layer_norm(*given, EPSILON, True)
        return of(y, total)

    expected = in_double(lambda a, b, g, d: of(layer_norm(a, b, g, d), a + b), inputs, dout)
    all_close(on_npu(fused, inputs, dout), expected)


def test_add_layer_norm_writes_the_sum_only_when_asked() -> None:
    import torch_npu

    inputs = [random(*shape).npu() for shape in ((3, 8), (3, 8), (8,), (8,))]
    assert torch_npu.npu_add_layer_norm(*inputs)[3].isnan().all()


@pytest.mark.parametrize(("first", "second"), [(HALF, FULL), (FULL, BRAIN)])
def test_add_layer_norm_of_two_dtypes_answers_in_float32(
    first: torch.dtype, second: torch.dtype
) -> None:
    import torch_npu

    x1, x2, gamma, beta = random(3, 8, dtype=first), random(3, 8, dtype=second), *random(2, 8)
    given = [tensor.npu() for tensor in (x1, x2, gamma, beta)]
    y, _, _, total = torch_npu.npu_add_layer_norm(*given, EPSILON, True)
    assert y.dtype == total.dtype == FULL
    close(y, layer_norm(x1.double(), x2.double(), gamma.double(), beta.double()))
    close(total, x1.double() + x2.double())


SHAPED = {"input": (2, 3, 16), "x1": (2, 3, 16), "x2": (2, 3, 16), "gamma": (16,), "beta": (16,)}
TAKEN = {
    "npu_rms_norm": ("input", "gamma"),
    "npu_gemma_rms_norm": ("input", "gamma"),
    "npu_add_rms_norm": ("x1", "x2", "gamma"),
    "npu_add_layer_norm": ("x1", "x2", "gamma", "beta"),
}


def call(operator: str, dtype: torch.dtype = FULL, **given: Any) -> Any:
    """One of the operators on small tensors, every argument replaceable."""
    import torch_npu

    tensors = {name: random(*SHAPED[name], dtype=dtype) for name in TAKEN[operator]}
    return getattr(torch_npu, operator)(**on_device({**tensors, **given}))


def transposed(*shape: int) -> torch.Tensor:
    return random(*shape).transpose(0, 1)


REFUSED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "rms wide gamma of float32": ("gamma must have", "npu_rms_norm", {"gamma": random(16).half()}),
    "rms gamma of another half": (
        "gamma must have",
        "npu_rms_norm",
        {"input": random(2, 16, dtype=BRAIN), "gamma": random(16, dtype=HALF)},
    ),
    "rms gamma of another size": ("gamma must have shape", "npu_rms_norm", {"gamma": random(8)}),
    "rms gamma of leading axes": (
        "gamma must have shape",
        "npu_rms_norm",
        {"gamma": random(2, 3)},
    ),
    "rms nine axes": (
        "input must have 1 to 8",
        "npu_rms_norm",
        {"input": random(1, 1, 1, 1, 1, 1, 1, 1, 16)},
    ),
    "rms empty gamma": (
        "gamma must not be empty",
        "npu_rms_norm",
        {"input": random(3, 0), "gamma": random(0)},
    ),
    "rms epsilon": ("epsilon must not", "npu_rms_norm", {"epsilon": -1.0}),
    "gemma strided input": (
        "input must be contiguous",
        "npu_gemma_rms_norm",
        {"input": transposed(3, 2, 16)},
    ),
    "gemma wide gamma": (
        "gamma must have input's dtype",
        "npu_gemma_rms_norm",
        {"input": random(2, 16).half()},
    ),
    "gemma empty": ("must not be empty", "npu_gemma_rms_norm", {"input": random(0, 16)}),
    "add rms dtypes": ("x2 must have x1's", "npu_add_rms_norm", {"x2": random(2, 3, 16).half()}),
    "add rms wide gamma": (
        "gamma must have x1's dtype",
        "npu_add_rms_norm",
        {name: random(2, 3, 16).half() for name in ("x1", "x2")},
    ),
    "add rms broadcast": ("x2 must have shape", "npu_add_rms_norm", {"x2": random(3, 16)}),
    "add rms gamma": ("gamma must have shape", "npu_add_rms_norm", {"gamma": random(1, 16)}),
    "add layer dtypes": (
        "no kernel for x1, x2",
        "npu_add_layer_norm",
        {"x1": random(2, 3, 16, dtype=HALF), "x2": random(2, 3, 16, dtype=BRAIN)},
    ),
    "add layer half affine of float32": (
        "no kernel for x1, x2",
        "npu_add_layer_norm",
        {name: random(16).half() for name in ("gamma", "beta")},
    ),
    "add layer gamma and beta": ("no kernel", "npu_add_layer_norm", {"beta": random(16).half()}),
    "add layer broadcast": ("x2 must have", "npu_add_layer_norm", {"x2": random(1, 3, 16)}),
    "add layer beta": ("beta must have shape", "npu_add_layer_norm", {"beta": random(8)}),
    "add layer two axes": (
        "gamma must have one dimension",
        "npu_add_layer_norm",
        {name: random(3, 16) for name in ("gamma", "beta")},
    ),
    "add layer empty": (
        "must not be empty",
        "npu_add_layer_norm",
        {name: random(0, 16) for name in ("x1", "x2")},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    rule, operator, given = REFUSED[name]
    with pytest.raises(CardRefusal, match=rule):
        call(operator, **given)


def test_gemma_refuses_a_strided_weight() -> None:
    with pytest.raises(CardRefusal, match="gamma must be contiguous"):
        call("npu_gemma_rms_norm", gamma=random(32).npu()[::2])


@pytest.mark.parametrize("operator", TAKEN)
def test_float64_is_refused(operator: str) -> None:
    wide = {name: doubled(torch.ones(SHAPED[name]).npu()) for name in TAKEN[operator]}
    with pytest.raises(CardRefusal, match=r"only float16, bfloat16, float32|no kernel"):
        call(operator, **wide)


@pytest.mark.parametrize("operator", TAKEN)
def test_one_dimension_is_enough(operator: str) -> None:
    shapes = {name: random(16) for name in TAKEN[operator]}
    assert call(operator, **shapes)[0].shape == (16,)


def differentiate(operator: str, **given: Any) -> None:
    leaves = {name: tensor.npu().requires_grad_() for name, tensor in given.items()}
    call(operator, **leaves)[0].sum().backward()


def test_the_gradient_of_rms_norm_wants_two_dimensions() -> None:
    with pytest.raises(CardRefusal, match="input must have 2 to 8"):
        differentiate("npu_rms_norm", input=random(16))


@pytest.mark.parametrize("first", [HALF, FULL])
def test_the_gradient_of_add_layer_norm_wants_one_dtype(first: torch.dtype) -> None:
    x2 = random(2, 3, 16, dtype=HALF)
    with pytest.raises(CardRefusal, match="must have x1's dtype"):
        differentiate("npu_add_layer_norm", x1=random(2, 3, 16, dtype=first), x2=x2)


@pytest.mark.parametrize("wrong", ["dtype", "shape"])
def test_the_gradients_want_the_statistics_of_the_forward_pass(wrong: str) -> None:
    import torch_npu

    x, gamma = random(3, 16).npu(), random(16).npu()
    rstd = torch.ones(3, 1).npu()
    rstd = rstd.half() if wrong == "dtype" else rstd[:, 0]
    with pytest.raises(CardRefusal, match="rstd must"):
        torch_npu.npu_rms_norm_backward(x, x, gamma, rstd)
    with pytest.raises(CardRefusal, match="rstd must"):
        torch.ops.npu.npu_add_layer_norm_backward(x, x, x, rstd, rstd, gamma, None)


OLD: dict[str, tuple[str, Callable[[], Any]]] = {
    "bfloat16": (
        "only float16, float32",
        lambda: call("npu_rms_norm", BRAIN),
    ),
    "wide gamma": (
        "not on a 310P",
        lambda: call("npu_rms_norm", HALF, gamma=random(16)),
    ),
    "small rows": (
        "at least 32 bytes",
        lambda: call("npu_rms_norm", input=random(2, 4), gamma=random(4)),
    ),
    "infinite": (
        "must be finite",
        lambda: call("npu_rms_norm", input=torch.full((2, 16), torch.inf)),
    ),
    "gemma": ("does not exist", lambda: call("npu_gemma_rms_norm")),
    "two dtypes": (
        "no kernel",
        lambda: call("npu_add_layer_norm", x1=random(2, 3, 16).half()),
    ),
}


@pytest.mark.parametrize("name", OLD)
def test_a_310p_refuses_more(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, ask = OLD[name]
    monkeypatch.setenv("VIRTUAL_ASCEND_SOC", "Ascend310P3")
    with pytest.raises(CardRefusal, match=rule):
        ask()


def test_a_310p_leaves_the_statistics_of_sums_unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRTUAL_ASCEND_SOC", "Ascend310P3")
    y, rstd, _ = call("npu_add_rms_norm")
    assert rstd.isnan().all()
    assert y.isfinite().all()
    assert all(statistic.isnan().all() for statistic in call("npu_add_layer_norm")[1:3])
