"""The simulated gated activations against float64 expressions, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from flash_attn_npu._virtual_ascend import CardRefusal
from tests.helpers.fused_cases import DTYPES, all_close, close, in_double, on_npu, random
from tests.helpers.old_torch import doubled

pytestmark = pytest.mark.usefixtures("npu")

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
GELUS = {0: "none", 1: "tanh"}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dim", [-1, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype: torch.dtype, dim: int) -> None:
    import torch_npu

    x = 3 * random(2, 4, 64, dtype=dtype)

    def expected(x: torch.Tensor) -> torch.Tensor:
        first, second = x.split(x.shape[dim] // 2, dim)
        return F.silu(first) * second

    dout = random(*expected(x).shape, dtype=dtype)
    got = on_npu(lambda x: torch_npu.npu_swiglu(x, dim), [x], dout)
    all_close(got, in_double(expected, [x], dout))


def geglu(x: torch.Tensor, dim: int, approximate: int, left: bool) -> torch.Tensor:
    halves = x.split(x.shape[dim] // 2, dim)
    plain, activated = halves[::-1] if left else halves
    return plain * F.gelu(activated, approximate=GELUS[approximate])


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("approximate", GELUS)
@pytest.mark.parametrize(("dtype", "roundings"), [(FULL, 1), (BRAIN, 2), (HALF, 3)])
def test_geglu(dtype: torch.dtype, roundings: int, approximate: int, left: bool) -> None:
    import torch_npu

    x, dout = random(2, 4, 6, dtype=dtype), random(2, 4, 3, dtype=dtype)
    arguments = (-1, approximate, left)
    got = on_npu(lambda x: torch_npu.npu_geglu(x, *arguments)[0], [x], dout)
    all_close(got, in_double(lambda x: geglu(x, *arguments), [x], dout), roundings)


def test_geglu_keeps_the_gelu_of_the_right_half_by_default() -> None:
    import torch_npu

    x = random(4, 3, dtype=HALF)
    out, gelu = torch_npu.npu_geglu(x.npu(), 0)
    expected = F.gelu(x[2:].double(), approximate="tanh").half()
    assert torch.equal(gelu.cpu(), expected)
    # float16 multiplies the rounded one, in float16
    assert torch.equal(out.cpu(), expected * x[:2])


def test_geglu_differentiates_its_product_only() -> None:
    import torch_npu

    outputs = torch_npu.npu_geglu(random(2, 4).npu().requires_grad_())
    assert [output.requires_grad for output in outputs] == [True, False]


def test_geglu_of_strided_and_of_empty_tensors() -> None:
    import torch_npu

    x, dout = random(4, 3), random(3, 2)
    got = on_npu(lambda x: torch_npu.npu_geglu(x.T)[0], [x], dout)
    all_close(got, in_double(lambda x: geglu(x.T, -1, 1, False), [x], dout))
    assert torch_npu.npu_geglu(random(0, 4).npu())[0].shape == (0, 2)


REFUSED: dict[str, tuple[str, str, torch.Tensor, dict[str, Any]]] = {
    "swiglu odd": ("must be even", "npu_swiglu", random(2, 5), {}),
    "swiglu empty": ("must not be empty", "npu_swiglu", random(0, 4), {}),
    "swiglu strided": ("must be contiguous", "npu_swiglu", random(4, 6).T, {}),
    "swiglu nine axes": ("1 to 8", "npu_swiglu", random(1, 1, 1, 1, 1, 1, 1, 1, 4), {}),
    "swiglu integers": ("only float16", "npu_swiglu", torch.ones(2, 4).int(), {}),
    "geglu odd": ("must be even", "npu_geglu", random(2, 5), {}),
    "geglu approximation": ("must be 0 or 1", "npu_geglu", random(2, 4), {"approximate": 2}),
    "geglu nine axes": ("1 to 8", "npu_geglu", random(1, 1, 1, 1, 1, 1, 1, 1, 4), {}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    import torch_npu

    rule, operator, x, given = REFUSED[name]
    with pytest.raises(CardRefusal, match=rule):
        getattr(torch_npu, operator)(x.npu(), **given)


@pytest.mark.parametrize("operator", ["npu_swiglu", "npu_geglu"])
def test_float64_is_refused(operator: str) -> None:
    import torch_npu

    with pytest.raises(CardRefusal, match="only float16"):
        getattr(torch_npu, operator)(doubled(random(2, 4).npu()))


@pytest.mark.parametrize("operator", ["npu_swiglu", "npu_geglu"])
def test_torch_npu_itself_refuses_an_axis_beyond_the_last(operator: str) -> None:
    import torch_npu

    with pytest.raises(RuntimeError, match="dim"):
        getattr(torch_npu, operator)(random(2, 4).npu(), 2)


def swiglu_backward(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    import torch_npu

    return torch_npu.npu_swiglu_backward(dy.npu(), x.npu())


REFUSED_BACKWARD: dict[str, tuple[str, Callable[[], Any]]] = {
    "another dtype": (
        "must have input's dtype",
        lambda: swiglu_backward(random(2, 16).half(), random(2, 32)),
    ),
    "another shape": (
        "must have shape",
        lambda: swiglu_backward(random(2, 32), random(2, 32)),
    ),
    "strided": (
        "grad_output must be contiguous",
        lambda: swiglu_backward(random(16, 2).T, random(2, 32)),
    ),
    "unaligned": ("64-byte aligned", lambda: swiglu_backward(random(2, 8), random(2, 16))),
    "unaligned halves": (
        "half a row from the split axis on holds 32 bytes",
        lambda: swiglu_backward(random(2, 16).half(), random(2, 32).half()),
    ),
    "empty": ("must not be empty", lambda: swiglu_backward(random(0, 16), random(0, 32))),
}


@pytest.mark.parametrize("name", REFUSED_BACKWARD)
def test_refused_by_the_gradient_of_swiglu(name: str) -> None:
    rule, ask = REFUSED_BACKWARD[name]
    with pytest.raises(CardRefusal, match=rule):
        ask()


def test_the_gradient_of_swiglu_takes_strided_input_and_aligned_trailing_axes() -> None:
    import torch_npu

    x, dy = random(16, 4).npu(), random(2, 16).npu()
    got = torch_npu.npu_swiglu_backward(dy, x.T, 0)
    leaf = x.cpu().T.double().requires_grad_()
    (F.silu(leaf[:2]) * leaf[2:]).backward(dy.cpu().double())
    close(got, leaf.grad)
    assert got.is_contiguous()


def test_a_gradient_from_a_sum_is_strided_and_refused() -> None:
    """Autograd expands one number over the output: whoever calls it has to copy."""
    import torch_npu

    with pytest.raises(CardRefusal, match="grad_output must be contiguous"):
        torch_npu.npu_swiglu(random(2, 32).npu().requires_grad_()).sum().backward()


@pytest.mark.parametrize("wrong", ["dtype", "shape"])
def test_the_gradient_of_geglu_wants_the_gelu_of_the_forward_pass(wrong: str) -> None:
    import torch_npu

    x, dy = random(2, 8).npu(), random(2, 4).npu()
    gelu = dy.half() if wrong == "dtype" else x
    with pytest.raises(CardRefusal, match="gelu must have"):
        torch_npu.npu_geglu_grad(dy, x, gelu, -1, 1)


def test_a_310p_refuses_more(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch_npu

    monkeypatch.setenv("VIRTUAL_ASCEND_SOC", "Ascend310P3")
    for operator in (torch_npu.npu_swiglu, torch_npu.npu_geglu):
        with pytest.raises(CardRefusal, match="only float16, float32"):
            operator(random(2, 32, dtype=BRAIN).npu())
    with pytest.raises(CardRefusal, match="64-byte aligned"):
        torch_npu.npu_swiglu(random(2, 16).npu())
    out = torch_npu.npu_geglu(random(2, 32).npu().requires_grad_(), -1, 0)[0]
    with pytest.raises(CardRefusal, match="approximate 1 only"):
        out.backward(torch.ones_like(out))
