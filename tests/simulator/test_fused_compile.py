"""Which helper operators of torch_npu run under torch.compile, by its own Meta registrations and
autograd formulas, and where what they then do differs from eager.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flash_attn_npu._core.ground.schemas import untraceable
from flash_attn_npu._virtual_ascend import CardRefusal
from tests.helpers.fused_cases import random
from tests.helpers.old_torch import OWN_FAKES

Function = Callable[..., torch.Tensor]
Shapes = tuple[tuple[int, ...], ...]

ROWS, WIDTH = (2, 3, 32), (32,)
BRAIN = torch.bfloat16

pytestmark = pytest.mark.usefixtures("npu", "fresh_compiler")


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Function) -> Function:
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def call(name: str, *given: object) -> torch.Tensor:
    """The first output, of the operator of this name."""
    import torch_npu

    outputs = getattr(torch_npu, name)(*given)
    return outputs[0] if isinstance(outputs, (tuple, list)) else outputs


def target() -> torch.Tensor:
    return torch.tensor([3, 0, 5, 3]).npu()


TABLES = ((2, 3, 4, 32), (1, 3, 1, 32), (1, 3, 1, 32))

SERVED: dict[str, tuple[Function, Shapes]] = {
    "rotary half": (lambda *given: call("npu_rotary_mul", *given), TABLES),
    "rotary interleave": (lambda *given: call("npu_rotary_mul", *given, "interleave"), TABLES),
    "rms norm": (lambda x, g: call("npu_rms_norm", x, g), (ROWS, WIDTH)),
    "swiglu": (lambda x: call("npu_swiglu", x), (ROWS,)),
    "cross entropy mean": (lambda x: call("npu_cross_entropy_loss", x, target()), ((4, 6),)),
    "cross entropy rows": (
        lambda x: call("npu_cross_entropy_loss", x, target(), None, "none"),
        ((4, 6),),
    ),
}


def with_gradients(function: Function, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [tensor.npu().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    torch.manual_seed(1)
    out.backward(random(*out.shape, dtype=out.dtype).npu())
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, BRAIN])
@pytest.mark.parametrize("name", SERVED)
def test_served_with_gradients(name: str, dtype: torch.dtype) -> None:
    if "cross entropy" in name and untraceable(torch.device("npu:0"), "npu_cross_entropy_loss"):
        pytest.skip("torch_npu 2.6 has no fake operator for it, and the table composes it")
    function, shapes = SERVED[name]
    # a wide second half of a swiglu row: its gradient wants 64 bytes
    inputs = [random(*shape[:-1], 2 * shape[-1], dtype=dtype) for shape in shapes]
    eager, graph = (with_gradients(f, inputs) for f in (function, compiled(function)))
    for mine, theirs in zip(graph, eager, strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", ["rotary half", "rms norm"])
def test_served_with_float32_beside_bfloat16(name: str) -> None:
    function, shapes = SERVED[name]
    inputs = [random(*shapes[0], dtype=BRAIN), *(random(*shape) for shape in shapes[1:])]
    eager, graph = (with_gradients(f, inputs) for f in (function, compiled(function)))
    assert all(torch.equal(*pair) for pair in zip(graph, eager, strict=True))


FORWARD_ONLY: dict[str, tuple[Function, Shapes, str]] = {
    "add rms norm": (
        lambda *given: call("npu_add_rms_norm", *given),
        (ROWS, ROWS, WIDTH),
        "derivative for npu::npu_add_rms_norm is not implemented",
    ),
    "add layer norm": (
        lambda *given: call("npu_add_layer_norm", *given),
        (ROWS, ROWS, WIDTH, WIDTH),
        "npu_add_layer_norm_backward",
    ),
    "geglu": (
        lambda x: call("npu_geglu", x),
        (ROWS,),
        "missing 2 required positional arguments",
    ),
}


@OWN_FAKES
@pytest.mark.parametrize("name", FORWARD_ONLY)
def test_served_without_gradients_only(name: str) -> None:
    function, shapes, reason = FORWARD_ONLY[name]
    inputs = [random(*shape).npu() for shape in shapes]
    given = [[tensor.clone() for tensor in inputs] for _ in range(2)]
    assert torch.equal(compiled(function)(*given[0]), function(*given[1]))
    torch._dynamo.reset()
    with pytest.raises(Exception, match=re.escape(reason)):
        with_gradients(compiled(function), [tensor.cpu() for tensor in inputs])


@OWN_FAKES
def test_gemma_rms_norm_loses_its_gradient_in_a_graph_too() -> None:
    x, gamma = random(2, 3, 32).npu().requires_grad_(), random(32).npu()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = compiled(lambda x, g: call("npu_gemma_rms_norm", x, g) + x)(x, gamma)
        out.sum().backward()
    # the sum's alone: nothing came through the norm
    assert torch.equal(x.grad, torch.ones_like(x))


def test_tables_computed_in_the_graph_get_no_gradient_from_rotary_mul() -> None:
    """The saved tables no longer say that they require one, and torch_npu then computes none."""

    def turned(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        return call("npu_rotary_mul", x, angles.cos(), angles.sin())

    inputs = [random(*shape) for shape in TABLES[:2]]
    assert with_gradients(turned, inputs)[2].isfinite().all()
    out, dx, dangles = with_gradients(compiled(turned), inputs)
    assert out.isfinite().all()
    assert dx.isfinite().all()
    assert dangles.isnan().any()


def test_a_graph_gives_the_gradient_of_swiglu_the_strides_of_a_sum() -> None:
    out = compiled(lambda x: call("npu_swiglu", x).sum())(random(2, 32).npu().requires_grad_())
    with pytest.raises(CardRefusal, match="grad_output must be contiguous"):
        out.backward()


HEADS = ((2, 3, 4, 64), (2, 3, 2, 64), (2, 3, 1, 64))


@OWN_FAKES
def test_a_graph_writes_into_the_query_unannounced() -> None:
    query, key, table = (random(*shape).npu() for shape in HEADS)
    before = query.clone()
    function = compiled(lambda q, k, c: call("npu_apply_rotary_pos_emb", q, k, c, c))
    with pytest.warns(UserWarning, match="must not also be an input"):
        out = function(query, key, table)
    assert not torch.equal(query, before)
    assert torch.equal(query, out)


@OWN_FAKES
def test_the_fake_outputs_have_the_shapes_and_dtypes_of_the_real_ones() -> None:
    for name, given in {
        "npu_add_layer_norm": (ROWS, ROWS, WIDTH, WIDTH),
        "npu_add_rms_norm": (ROWS, ROWS, WIDTH),
        "npu_geglu": (ROWS,),
        "npu_gemma_rms_norm": (ROWS, WIDTH),
        "npu_rms_norm": (ROWS, WIDTH),
        "npu_rotary_mul": TABLES,
        "npu_swiglu": (ROWS,),
    }.items():
        real = outputs(name, given)
        with FakeTensorMode():
            fake = outputs(name, given)
        assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in real], name


def outputs(name: str, shapes: Shapes) -> tuple[torch.Tensor, ...]:
    import torch_npu

    given = [torch.ones(shape, dtype=torch.float16, device="npu:0") for shape in shapes]
    results = getattr(torch_npu, name)(*given)
    return tuple(results) if isinstance(results, (tuple, list)) else (results,)


@OWN_FAKES
def test_the_fake_cross_entropy_holds_a_z_loss_that_the_real_one_has_not() -> None:
    import torch_npu

    logits = random(4, 6).npu()
    real = torch_npu.npu_cross_entropy_loss(logits, target())
    fake = torch_npu.npu_cross_entropy_loss(logits.to("meta"), target().to("meta"))
    assert [t.shape for t in real] == [(1,), (4, 6), (0,), (0,)]
    assert [t.shape for t in fake] == [(1,), (4, 6), (1,), (4,)]


def test_the_fake_rms_norm_keeps_strides_that_the_real_one_has_not() -> None:
    import torch_npu

    x, gamma = random(3, 2, 32).npu().transpose(0, 1), random(32).npu()
    assert torch_npu.npu_rms_norm(x, gamma)[0].is_contiguous()
    fake = torch_npu.npu_rms_norm(x.to("meta"), gamma.to("meta"))[0]
    assert fake.stride() == x.stride()
