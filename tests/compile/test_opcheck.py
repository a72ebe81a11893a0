"""The operators keep the dispatcher's contract: schema, fake shapes, autograd, tracing."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

OPS = torch.ops.flash_attn_npu_shim
SCALE = 0.35


class Options(NamedTuple):
    """What every operator takes behind its tensors, in that order."""

    dropout_p: float = 0.0
    softmax_scale: float = SCALE
    causal: bool = False
    window_size_left: int = -1
    window_size_right: int = -1
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None


OPTIONS = {
    "causal": Options(causal=True),
    "window": Options(window_size_left=3, window_size_right=1),
    "softcap": Options(causal=True, softcap=5.0),
    "alibi": Options(alibi_slopes=torch.tensor([0.5, 0.25, 0.125, 0.0625])),
    "dropout": Options(dropout_p=0.2),
}
each_option = pytest.mark.parametrize("name", OPTIONS)


def on(device: torch.device, options: Options) -> Options:
    slopes = options.alibi_slopes
    return options if slopes is None else options._replace(alibi_slopes=slopes.to(device))


def tensors(device: torch.device, *lead: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(*shape, 8).to(device).requires_grad_() for shape in lead]


def dense(device: torch.device) -> list[Tensor]:
    return tensors(device, (2, 5, 4), (2, 7, 2), (2, 7, 2))


def packed(device: torch.device) -> list[Tensor]:
    return tensors(device, (10, 4), (14, 2), (14, 2))


def lengths(device: torch.device) -> tuple[Any, ...]:
    cu_q, cu_k = (torch.tensor(cu, dtype=torch.int32).to(device) for cu in ([0, 2, 10], [0, 4, 14]))
    return cu_q, cu_k, 8, 10


def opcheck(operator: Any, *arguments: Any) -> None:
    """Every check that torch offers for the device."""
    checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    if arguments[0].device.type == "cpu":
        checks.append("test_autograd_registration")
    torch.library.opcheck(operator.default, arguments, test_utils=checks)


@each_option
def test_dense_forward(device: torch.device, name: str) -> None:
    options = on(device, OPTIONS[name])
    opcheck(OPS._flash_attn_forward, *dense(device), *options, options.dropout_p > 0)


@each_option
def test_packed_forward(device: torch.device, name: str) -> None:
    options = on(device, OPTIONS[name])
    opcheck(OPS._flash_attn_varlen_forward, *packed(device), *lengths(device), *options)


def test_forward_with_sink(device: torch.device) -> None:
    sink = torch.randn(4).to(device).requires_grad_()
    options = Options(causal=True)
    opcheck(OPS._flash_attn_forward, *dense(device), *options, False, sink)
    paged = (None, None, None, False, 0)
    inputs = (*packed(device), *lengths(device))
    opcheck(OPS._flash_attn_varlen_forward, *inputs, *options, False, *paged, sink)


@each_option
def test_dense_backward(device: torch.device, name: str) -> None:
    options = on(device, OPTIONS[name])
    inputs = [x.detach() for x in dense(device)]
    out, lse, _, rng_state = OPS._flash_attn_forward(*inputs, *options, False)
    grads = [torch.empty_like(x) for x in inputs]
    dout = torch.randn(out.shape).to(device)
    arguments = (dout, *inputs, out, lse, *grads, *options, False, rng_state)
    opcheck(OPS._flash_attn_backward, *arguments)


@each_option
def test_packed_backward(device: torch.device, name: str) -> None:
    options = on(device, OPTIONS[name])
    inputs, known = [x.detach() for x in packed(device)], lengths(device)
    out, lse, _, rng_state = OPS._flash_attn_varlen_forward(*inputs, *known, *options)
    grads = [torch.empty_like(x) for x in inputs]
    dout = torch.randn(out.shape).to(device)
    arguments = (dout, *inputs, out, lse, *grads, *known, *options, False, rng_state)
    opcheck(OPS._flash_attn_varlen_backward, *arguments)


def test_sink_has_the_gradient_of_finite_differences() -> None:
    sink = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def attend_dense(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        out: Tensor = OPS._flash_attn_forward(q, k, v, *Options(causal=True), False, sink)[0]
        return out

    def attend_packed(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        out: Tensor = OPS._flash_attn_varlen_forward(
            *(q, k, v, *lengths(torch.device("cpu")), *Options(causal=True)),
            *(False, None, None, None, False, 0, sink),
        )[0]
        return out

    for function, make in ((attend_dense, dense), (attend_packed, packed)):
        inputs = [x.detach().double().requires_grad_() for x in make(torch.device("cpu"))]
        assert torch.autograd.gradcheck(function, (*inputs, sink))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_fakes_look_like_the_real_answer(dtype: torch.dtype, dropout_p: float) -> None:
    options = Options(dropout_p=dropout_p)
    cpu = torch.device("cpu")
    # longer than one rounding of S_dmask
    inputs = [torch.randn(2, 130, heads, 8, dtype=dtype) for heads in (4, 2, 2)]
    flat = [x.flatten(0, 1) for x in inputs]
    cu_seqlens = torch.tensor([0, 100, 260], dtype=torch.int32, device=cpu)
    calls = (
        (OPS._flash_attn_forward, (*inputs, *options, dropout_p > 0)),
        (
            OPS._flash_attn_varlen_forward,
            (*flat, cu_seqlens, cu_seqlens, 160, 170, *options, dropout_p > 0),
        ),
    )
    for operator, arguments in calls:
        real = operator(*arguments)
        with FakeTensorMode() as mode:
            fake = operator(
                *(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments)
            )
        assert [facts(x) for x in fake] == [facts(x) for x in real]


def facts(x: Tensor) -> tuple[Any, ...]:
    return tuple(x.shape), x.stride(), x.dtype, x.device
