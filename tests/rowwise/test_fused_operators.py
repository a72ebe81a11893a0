"""The public functions reach torch_npu's fused operators, with right numbers, or say why not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu import fallback, flash_attn_with_kvcache, reporting
from flash_attn_npu._core.ground.memory import forget_all
from flash_attn_npu.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from flash_attn_npu.layers.rotary import apply_rotary_emb, apply_rotary_emb_qkv_
from flash_attn_npu.ops.activations import swiglu, swiglu_bwd, swiglu_fwd
from flash_attn_npu.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn_npu.ops.triton.layer_norm import layer_norm_fn, layer_norm_linear_fn, rms_norm_fn
from tests.helpers.fused_cases import close as close_to_exact

HALF = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def first_warning() -> None:
    forget_all()
    torch.manual_seed(0)


def names(run: Callable[[], Any]) -> tuple[Any, list[str]]:
    with virtual_ascend.record() as recorded:
        out = run()
    return out, [launch.name for launch in recorded.launches]


def close(got: Tensor, plain: Tensor, exact: Tensor) -> None:
    """At most twice the error of plain torch in the same precision."""
    assert got.dtype == plain.dtype
    scale = exact.abs().max().item()
    error = (got.cpu().double() - exact).abs().max().item()
    bound = (plain.cpu().double() - exact).abs().max().item()
    assert error <= 2 * bound + 1e-6 * scale


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The first dimensions turned as complex numbers, in the dtype of x."""
    width = 2 * cos.shape[-1]
    head = x[..., :width]
    if interleaved:
        a, b = head[..., 0::2], head[..., 1::2]
    else:
        a, b = head.chunk(2, dim=-1)
    c, s = cos[:, None], sin[:, None]
    turned = (a * c - b * s, a * s + b * c)
    head = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat((head, x[..., width:]), dim=-1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [64, 32])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_rotation(
    npu: torch.device, dtype: torch.dtype, rotary_dim: int, interleaved: bool
) -> None:
    x, dout = torch.randn(2, 2, 7, 3, 64, dtype=dtype)
    angle = torch.randn(7, rotary_dim // 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    mine = x.to(npu).requires_grad_()
    with reporting() as report:
        out, forward = names(lambda: apply_rotary_emb(mine, cos.to(npu), sin.to(npu), interleaved))
        _, backward = names(lambda: out.backward(dout.to(npu)))
    assert forward == backward == ["npu_rotary_mul"]
    assert {entry.kernel for entry in report.tallies} == {"npu_rotary_mul"}
    plain, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    want = [rotated(leaf, cos.to(leaf), sin.to(leaf), interleaved) for leaf in (plain, exact)]
    for result, leaf in zip(want, (plain, exact), strict=True):
        result.backward(dout.to(leaf))
    close(out.detach(), want[0].detach(), want[1].detach())
    close(mine.grad, plain.grad, exact.grad)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "dtypes",
    [
        (HALF[0], torch.float32),
        (HALF[1], torch.float32),
        (torch.float32, HALF[1]),
        (HALF[0], HALF[1]),
    ],
    ids=str,
)
def test_rotation_by_tables_of_another_dtype(
    npu: torch.device, dtypes: tuple[torch.dtype, torch.dtype], interleaved: bool
) -> None:
    """In float32, and rounded once: the operator alone would round the tables."""
    x, dout = torch.randn(2, 2, 7, 3, 8, dtype=dtypes[0])
    angle = torch.randn(7, 4)
    cos, sin = angle.cos().to(dtypes[1]), angle.sin().to(dtypes[1])
    mine = x.to(npu).requires_grad_()
    out, forward = names(lambda: apply_rotary_emb(mine, cos.to(npu), sin.to(npu), interleaved))
    _, backward = names(lambda: out.backward(dout.to(npu)))
    assert forward == backward == ["npu_rotary_mul"]
    exact = x.double().requires_grad_()
    want = rotated(exact, cos.double(), sin.double(), interleaved)
    want.backward(dout.double())
    for got, true in ((out.detach(), want.detach()), (mine.grad, exact.grad)):
        assert got.dtype == dtypes[0]
        close_to_exact(got, true)


class Operators(TorchDispatchMode):
    """The operators that made something new, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)]
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in given:
            self.names.append(func.overloadpacket.__name__)
        return out


@pytest.mark.parametrize(("interleaved", "made"), [(False, "cat"), (True, "repeat_interleave")])
def test_a_batch_shares_its_tables_as_they_are(
    npu: torch.device, interleaved: bool, made: str
) -> None:
    """No copy of a table for each sequence, and none of x."""
    x = torch.randn(3, 7, 4, 64, dtype=torch.bfloat16)
    angle = torch.randn(9, 32)
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    given = [t.to(npu) for t in (x, cos, sin)]
    apply_rotary_emb(*given, interleaved)
    with Operators() as seen:
        out = apply_rotary_emb(*given, interleaved, seqlen_offsets=2)
    assert seen.names == [made, made, "npu_rotary_mul"]
    assert out.is_contiguous()
    want = rotated(x.double(), cos[2:].double(), sin[2:].double(), interleaved)
    close_to_exact(out, want)


@pytest.mark.parametrize(
    ("interleaved", "shape"), [(False, (1000, 1, 1, 8)), (True, (250, 2, 4, 8))]
)
def test_a_batch_too_large_to_share_its_tables(
    npu: torch.device, interleaved: bool, shape: tuple[int, ...]
) -> None:
    x, angle = torch.randn(shape, dtype=torch.float16), torch.randn(shape[1], 4)
    cos, sin = angle.cos().half(), angle.sin().half()
    out, launched = names(
        lambda: apply_rotary_emb(x.to(npu), cos.to(npu), sin.to(npu), interleaved)
    )
    assert launched == ["npu_rotary_mul"]
    close_to_exact(out, rotated(x.double(), cos.double(), sin.double(), interleaved))


@pytest.mark.parametrize("weight_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_float32_residual_is_added_by_the_operator(
    npu: torch.device, dtype: torch.dtype, weight_dtype: torch.dtype | None
) -> None:
    """Without a gradient: the operator's own takes one dtype."""
    x, residual = torch.randn(2, 5, 64, dtype=dtype), 3e4 * torch.randn(2, 5, 64)
    weight, bias = torch.randn(2, 64, dtype=weight_dtype or dtype)
    given = [t.to(npu) for t in (x, weight, bias, residual)]
    (y, total), launched = names(lambda: layer_norm_fn(*given, prenorm=True))
    assert launched == ["npu_add_layer_norm"]
    assert (y.dtype, total.dtype) == (dtype, torch.float32)
    leaves = [t.double() for t in (x, residual, weight, bias)]
    s = leaves[0] + leaves[1]
    want = torch.nn.functional.layer_norm(s, (64,), *leaves[2:], 1e-6)
    close_to_exact(y, want)
    close_to_exact(total, s)
    given[0].requires_grad_()
    _, launched = names(lambda: layer_norm_fn(*given, prenorm=True)[0].float().sum().backward())
    assert "npu_add_layer_norm" not in launched


@pytest.mark.parametrize("seqlen", [1, 3])
def test_a_step_looks_the_rows_of_q_and_k_up_once(npu: torch.device, seqlen: int) -> None:
    q, k, v = (torch.randn(2, seqlen, n, 64, dtype=torch.float16).to(npu) for n in (4, 2, 2))
    caches = [torch.zeros(2, 16, 2, 64, dtype=torch.float16, device=npu) for _ in "kv"]
    angle = torch.randn(16, 32)
    options: dict[str, Any] = {
        "rotary_cos": angle.cos().half().to(npu),
        "rotary_sin": angle.sin().half().to(npu),
        "rotary_interleaved": False,
        "causal": True,
    }
    with virtual_ascend.record() as seen:
        flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=[5, 9], **options)
    asked = [name.rpartition("::")[2] for name in seen.operators]
    assert (asked.count("index_select"), asked.count("npu_mrope")) == (2, 1), asked
    assert asked.count("arange") == asked.count("add") == 0, asked
    for i, start in enumerate((5, 9)):
        rows = slice(start, start + seqlen)
        tables = [options[name].cpu().double()[rows] for name in ("rotary_cos", "rotary_sin")]
        want = rotated(k[i].cpu().double(), *tables, False)
        close_to_exact(caches[0][i, start : start + seqlen], want)


def norm_of(leaves: dict[str, Tensor], rms: bool) -> tuple[Tensor, Tensor]:
    """The norm and the sum, step by step in the dtypes that come."""
    total = leaves["x"] + leaves["residual"] if "residual" in leaves else leaves["x"]
    centred = total if rms else total - total.mean(-1, keepdim=True)
    normal = centred * (centred.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    y = normal * leaves["weight"] + leaves.get("bias", 0)
    return y.to(leaves["x"].dtype), total


NORMS = {
    "rms": (True, ("x", "weight"), ["npu_rms_norm"], ["npu_rms_norm_backward"]),
    "rms, residual": (
        True,
        ("x", "weight", "residual"),
        ["npu_add_rms_norm"],
        ["npu_rms_norm_backward"],
    ),
    "layer, residual": (
        False,
        ("x", "weight", "bias", "residual"),
        ["npu_add_layer_norm"],
        ["npu_add_layer_norm_backward"],
    ),
    # one operator of aten's own, which the journal does not see
    "layer": (False, ("x", "weight", "bias"), [], []),
}


CASES = [(name, dtype, "") for name in NORMS for dtype in (*HALF, torch.float32)] + [
    (name, dtype, wide)
    for name, (_, given, _, _) in NORMS.items()
    for dtype in HALF
    for wide in ("weight", "residual")
    if wide in given
]


@pytest.mark.parametrize(("name", "dtype", "wide"), CASES)
def test_norm(npu: torch.device, dtype: torch.dtype, name: str, wide: str) -> None:
    """wide: the argument that comes in float32."""
    rms, given, forward, backward = NORMS[name]
    kinds = {"weight": (32,), "bias": (32,)}
    host = {key: torch.randn(kinds.get(key, (3, 5, 32))).to(dtype) for key in given}
    host |= {key: host[key].float() for key in given if key == wide}
    mine = {key: value.to(npu).requires_grad_() for key, value in host.items()}
    dy = torch.randn(3, 5, 32, dtype=dtype)
    with reporting() as report:
        call = {"bias": None} | mine
        (y, total), launched = names(
            lambda: layer_norm_fn(**call, prenorm=True, is_rms_norm=rms, eps=1e-6)
        )
        end = (y * dy.to(npu)).sum() + total.sum()
        _, behind = names(lambda: end.backward())
    assert len(report.tallies) == 1
    assert report.tallies[0].kernel != "torch"
    if dtype == torch.float16 and name == "layer, residual":
        # added in float32, then one operator of aten's own
        assert (launched, behind) == ([], [])
    elif dtype == torch.float16 and name == "rms, residual":
        assert (launched, behind) == (["npu_rms_norm"], ["npu_rms_norm_backward"])
    elif not wide:
        assert (launched, behind) == (forward, backward)
    plain = {key: value.clone().requires_grad_() for key, value in host.items()}
    exact = {key: value.double().requires_grad_() for key, value in host.items()}
    want = [norm_of(leaves, rms) for leaves in (plain, exact)]
    for one, end in want:
        ((one * dy.to(one)).sum() + end.sum()).backward()
    close(y.detach(), want[0][0].detach(), want[1][0].detach())
    close(total.detach(), want[0][1].detach(), want[1][1].detach())
    for key in given:
        close(mine[key].grad, plain[key].grad, exact[key].grad)


def test_a_norm_without_gradient_adds_in_the_same_launch(npu: torch.device) -> None:
    x, residual = torch.randn(2, 4, 32, dtype=torch.bfloat16, device=npu)
    weight = torch.randn(32, dtype=torch.bfloat16, device=npu)
    (y, total), launched = names(lambda: rms_norm_fn(x, weight, None, residual, prenorm=True))
    assert launched == ["npu_add_rms_norm"]
    leaves = {"x": x.cpu(), "residual": residual.cpu(), "weight": weight.cpu()}
    exact = norm_of({key: value.double() for key, value in leaves.items()}, True)
    for got, plain, want in zip((y, total), norm_of(leaves, True), exact, strict=True):
        close(got, plain, want)


def test_a_remembered_norm_is_counted_and_still_checked(npu: torch.device) -> None:
    x, weight = torch.randn(2, 8, device=npu), torch.ones(8, device=npu)
    with reporting() as report:
        for _ in range(3):
            rms_norm_fn(x, weight, None)
    (tally,) = report.tallies
    assert (tally.function, tally.kernel, tally.calls) == ("rms_norm_fn", "npu_rms_norm", 3)
    for bad in (weight[:4], weight.cpu(), weight.int(), None):
        with pytest.raises((ArgumentError, ArgumentTypeError), match=r"^weight: got "):
            rms_norm_fn(x, bad, None)
    with pytest.raises(ArgumentError, match=r"^out_dtype: got "):
        rms_norm_fn(x, weight, None, out_dtype=torch.int32)
    with reporting() as report:
        rms_norm_fn(x, weight, None, x1=x)
        rms_norm_fn(x, weight.requires_grad_(), None, residual=x).sum().backward()
    assert {tally.kernel for tally in report.tallies} == {"torch", "npu_add_rms_norm"}
    assert weight.grad is not None


@pytest.mark.parametrize("fn", [rms_norm_fn, layer_norm_fn])
@pytest.mark.parametrize("grad", [False, True])
def test_a_sum_beyond_float16_is_still_normed(
    npu: torch.device, fn: Callable[..., Any], grad: bool
) -> None:
    x = torch.full((2, 8), 6e4, dtype=torch.float16)
    x[:, ::2] = 5e4
    weight, bias = torch.ones(2, 8, dtype=torch.float16)
    bias = None if fn is rms_norm_fn else bias
    mine = [None if t is None else t.to(npu).requires_grad_(grad) for t in (x, weight, bias, x)]
    theirs = [None if t is None else t.float() for t in (x, weight, bias, x)]
    torch.testing.assert_close(fn(*mine).detach().cpu().float(), fn(*theirs), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("fn", [rms_norm_fn, layer_norm_fn])
def test_results_of_strided_rows_are_contiguous(
    npu: torch.device, fn: Callable[..., Any], added: bool, grad: bool
) -> None:
    x = torch.randn(8, 4).to(npu).t().requires_grad_(grad)
    for wide in (False, True):
        residual = x.detach() if added else None
        results = fn(x, torch.ones(8).to(npu), None, residual, prenorm=True, residual_in_fp32=wide)
        assert all(result.is_contiguous() for result in results)
        assert torch.equal(results[1].cpu(), (2 * x if added else x).detach().cpu())


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_gate(npu: torch.device, dtype: torch.dtype) -> None:
    host, dout = torch.randn(3, 5, 64, dtype=dtype), torch.randn(3, 5, 32, dtype=dtype)
    mine = host.to(npu).requires_grad_()
    out, forward = names(lambda: swiglu(*mine.chunk(2, dim=-1)))
    _, backward = names(lambda: out.backward(dout.to(npu)))
    assert (forward, backward) == (["npu_swiglu"], ["npu_swiglu_backward"])
    plain, exact = host.clone().requires_grad_(), host.double().requires_grad_()
    want = []
    for leaf in (plain, exact):
        x, y = leaf.chunk(2, dim=-1)
        want.append(x * x.sigmoid() * y)
        want[-1].backward(dout.to(leaf))
    close(out.detach(), want[0].detach(), want[1].detach())
    close(mine.grad, plain.grad, exact.grad)


def test_the_gate_may_be_in_the_second_half(npu: torch.device) -> None:
    y, x = torch.randn(4, 64, device=npu).chunk(2, dim=-1)
    out, launched = names(lambda: swiglu(x, y))
    assert launched == ["npu_swiglu"]
    torch.testing.assert_close(out, torch.nn.functional.silu(x) * y)
    dx, dy = swiglu_bwd(x, y, torch.ones_like(x))
    chance = x.sigmoid()
    torch.testing.assert_close(dx, y * chance * (1 + x * (1 - chance)))
    torch.testing.assert_close(dy, torch.nn.functional.silu(x))


def test_a_gate_that_is_differentiated_by_itself(npu: torch.device) -> None:
    both = torch.randn(4, 64, device=npu, requires_grad=True)
    (got,) = torch.autograd.grad(swiglu_fwd(*both.chunk(2, dim=-1)).sum(), both)
    x, y = both.detach().cpu().requires_grad_().chunk(2, dim=-1)
    want = torch.autograd.grad((torch.nn.functional.silu(x) * y).sum(), (x, y))
    torch.testing.assert_close(got.cpu(), torch.cat(want, dim=-1))


def test_a_gate_with_a_gradient_of_another_dtype(npu: torch.device) -> None:
    halves, g = torch.randn(4, 64, dtype=torch.bfloat16), torch.randn(4, 32)
    exact = [half.double().requires_grad_() for half in halves.chunk(2, dim=-1)]
    (torch.nn.functional.silu(exact[0]) * exact[1]).backward(g.double())
    for mine, leaf in zip(
        swiglu_bwd(*halves.to(npu).chunk(2, dim=-1), g.to(npu)), exact, strict=True
    ):
        assert torch.equal(mine.cpu(), leaf.grad.to(torch.bfloat16))


def test_loss(npu: torch.device) -> None:
    logits, labels = torch.randn(6, 11), torch.tensor([3, -100, 0, 10, -100, 7])
    mine = logits.to(npu).requires_grad_()
    (losses, z_losses), forward = names(lambda: cross_entropy_loss(mine, labels.to(npu)))
    dout = torch.randn(6)
    _, backward = names(lambda: losses.backward(dout.to(npu)))
    assert forward == ["npu_cross_entropy_loss"]
    assert backward == ["npu_cross_entropy_loss_backward"]
    exact = logits.double().requires_grad_()
    want = torch.nn.functional.cross_entropy(exact, labels, reduction="none")
    want.backward(dout.double())
    torch.testing.assert_close(losses.detach().cpu().double(), want.detach(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(mine.grad.cpu().double(), exact.grad, atol=1e-6, rtol=1e-6)
    assert not z_losses.any()


@pytest.mark.parametrize(("smoothing", "grad"), [(0.2, False), (0.2, True), (1.0, False)])
def test_a_smoothed_loss(npu: torch.device, smoothing: float, grad: bool) -> None:
    logits, labels = torch.randn(6, 11), torch.tensor([3, -100, 0, 10, -100, 7])
    mine = logits.to(npu).requires_grad_(grad)
    (losses, _), launched = names(
        lambda: cross_entropy_loss(mine, labels.to(npu), label_smoothing=smoothing)
    )
    assert launched == ([] if grad or smoothing == 1 else ["npu_cross_entropy_loss"])
    want = torch.nn.functional.cross_entropy(
        logits.double(), labels, reduction="none", label_smoothing=smoothing
    )
    torch.testing.assert_close(losses.detach().cpu().double(), want, atol=1e-6, rtol=1e-6)


def second_derivative(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.requires_grad_()
    (first,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(first.pow(3).sum() + x.square().sum(), x)[0]


TWICE: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "RMS norm": ("npu_rms_norm", lambda x: rms_norm_fn(x, x[0], None)),
    "RMS norm of a sum": ("npu_add_rms_norm", lambda x: rms_norm_fn(x, x[0], None, residual=x)),
    "layer norm": ("", lambda x: layer_norm_fn(x, x[0], x[1])),
    "layer norm of a sum": (
        "npu_add_layer_norm",
        lambda x: layer_norm_fn(x, x[0], x[1], residual=x),
    ),
    "the sum alone": (
        "npu_add_layer_norm",
        lambda x: layer_norm_fn(x, x[0], x[1], residual=x, prenorm=True)[1],
    ),
    "loss": (
        "npu_cross_entropy_loss",
        lambda x: cross_entropy_loss(x, torch.tensor([3, 1]).to(x.device))[0][:, None],
    ),
}


@pytest.mark.filterwarnings("ignore:.*autograd kernel was not registered:UserWarning")
@pytest.mark.parametrize("through", ["what was saved", "the loss", "both"])
@pytest.mark.parametrize("name", TWICE)
def test_a_second_derivative_is_refused(npu: torch.device, name: str, through: str) -> None:
    """torch_npu's autograd has none, and would lose its terms without a word."""
    operator, run = TWICE[name]
    x = torch.randn(2, 64).to(npu).requires_grad_()
    weight = torch.rand(64).to(npu).requires_grad_()
    out, launched = names(lambda: run(x if through == "the loss" else x * weight))
    assert not operator or any(operator in launch for launch in launched)
    loss = out * (weight if through != "what was saved" else 2.0)
    if name == "the sum alone" and through == "what was saved":
        loss = out.square()
    (dx,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
    with pytest.raises(UnsupportedError, match=r"^create_graph: got a second derivative of "):
        (dx.square().sum() + weight.sum()).backward()


def test_a_second_derivative_of_rotations_in_place(npu: torch.device) -> None:
    angle, qkv = torch.randn(5, 4), torch.randn(1, 5, 3, 2, 8)

    def run(x: Tensor) -> Tensor:
        return apply_rotary_emb_qkv_(x * x, angle.cos().to(x), angle.sin().to(x))

    mine, exact = second_derivative(run, qkv.to(npu)), second_derivative(run, qkv.double())
    torch.testing.assert_close(mine.cpu().double(), exact, rtol=1e-4, atol=1e-3)


def test_a_label_that_is_no_class_is_nan(npu: torch.device) -> None:
    losses, _ = cross_entropy_loss(torch.randn(2, 5, device=npu), torch.tensor([5, 4]).to(npu))
    assert losses.isnan().tolist() == [True, False]


REASONS: dict[str, tuple[str, Callable[[torch.device], Any]]] = {
    "norm": (
        "npu_rms_norm: it has no dropout_p",
        lambda device: rms_norm_fn(
            torch.randn(2, 8, device=device), torch.ones(8, device=device), None, dropout_p=0.5
        ),
    ),
    "projected norm": (
        "npu_rms_norm: the function around it has a backward of its own",
        lambda device: layer_norm_linear_fn(
            torch.randn(2, 8, device=device),
            torch.ones(8, device=device),
            None,
            torch.ones(3, 8, device=device),
            None,
            is_rms_norm=True,
        ),
    ),
    "gate": (
        "npu_swiglu: it takes one dtype",
        lambda device: swiglu(torch.randn(2, 16).to(device), torch.randn(2, 16).half().to(device)),
    ),
    "rotation": (
        "npu_rotary_mul: it takes float16, bfloat16 and float32",
        lambda device: apply_rotary_emb(
            torch.randn(1, 2, 1, 4, dtype=torch.bfloat16).to(device),
            torch.randn(2, 2).double().to(device),
            torch.randn(2, 2).double().to(device),
        ),
    ),
    "loss": (
        "npu_cross_entropy_loss: its lse_square_scale is documented as not supported",
        lambda device: cross_entropy_loss(
            torch.randn(2, 5, device=device),
            torch.tensor([1, 2]).to(device),
            lse_square_scale=0.1,
        ),
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_policy(name: str, npu: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    reason, run = REASONS[name]
    with fallback("error"), pytest.raises(UnsupportedError, match=reason):
        run(npu)
    with fallback("allow"):
        run(npu)
    assert not caplog.records
    run(npu)
    run(npu)
    assert [reason in record.getMessage() for record in caplog.records] == [True]
    caplog.clear()
    run(torch.device("cpu"))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
