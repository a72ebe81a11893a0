"""Dense layers from their formulas, and how far a low-precision answer may be from float64.

Each formula takes tensors of any floating dtype: in float64 it is the reference, in the dtype of
the call it is the plain computation that the answer is measured against.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Formula = Callable[..., Tensor]


def gelu_tanh(x: Tensor) -> Tensor:
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
    return 0.5 * x * (1 + torch.tanh(inner))


def gelu_erf(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def positive(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.zeros_like(x))


def not_negative(x: Tensor) -> Tensor:
    """`positive` whose derivative at 0 is 1."""
    return torch.where(x >= 0, x, torch.zeros_like(x))


def squared_positive(x: Tensor) -> Tensor:
    return positive(x) * positive(x)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def swish_times(x: Tensor, y: Tensor) -> Tensor:
    return swish(x) * y


def affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = (x.unsqueeze(-2) * weight).sum(-1)
    return product if bias is None else product + bias


ACTIVATIONS: dict[str, Formula] = {
    "gelu_approx": gelu_tanh,
    "relu": positive,
    "sqrelu": squared_positive,
}


def derived(
    formula: Formula, inputs: Sequence[Tensor], dout: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """The formula's value and its gradients in every input, computed in dtype on the host."""
    leaves = [x.detach().cpu().to(dtype).requires_grad_() for x in inputs]
    out = formula(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.detach().cpu().to(dtype))]


def assert_close_enough(got: Tensor, exact: Tensor, plain: Tensor) -> None:
    """At most twice as far from float64 as the plain computation, up to a trace."""
    assert got.shape == exact.shape
    assert not got.isnan().any()
    if got.numel() == 0:
        return
    error = (got.detach().cpu().double() - exact).abs().max()
    allowed = 2 * (plain.double() - exact).abs().max() + trace(got.dtype) * scale(exact)
    assert error <= allowed, f"off by {error}, allowed {allowed}"


def trace(dtype: torch.dtype) -> float:
    return 1e-13 if dtype == torch.float64 else 1e-5


def scale(exact: Tensor) -> float:
    return max(1.0, float(exact.abs().max()))


def compare(
    call: Callable[..., Tensor],
    formula: Formula,
    inputs: Sequence[Tensor],
    plain_dtype: torch.dtype | None = None,
) -> None:
    """Value and gradients of `call` against the formula, for a gradient of random numbers."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = call(*leaves)
    dout = torch.randn(out.shape).to(out.device, out.dtype)
    got = [out, *torch.autograd.grad(out, leaves, dout)]
    plain_dtype = plain_dtype or out.dtype
    exact = derived(formula, inputs, dout, torch.float64)
    plain = derived(formula, inputs, dout, plain_dtype)
    assert out.is_contiguous()
    for tensor, of in zip(got, [out, *leaves], strict=True):
        assert tensor.dtype == of.dtype
    for triple in zip(got, exact, plain, strict=True):
        assert_close_enough(*triple)
