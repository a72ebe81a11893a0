"""flash_attn.layers.rotary's functions: values, gradients, in place, packed forms, compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu._core.ground.memory import forget_lengths
from flash_attn_npu.errors import ArgumentError, ArgumentTypeError
from flash_attn_npu.layers import rotary
from tests.helpers.rotation_reference import assert_rounded_once, batch_positions, rotated, tables

HALF = [torch.float16, torch.bfloat16]
DTYPES = [*HALF, torch.float32]
OFFSETS: list[Any] = [0, 3, [2, 0]]
# dynamo itself makes instances of every autograd.Function it traces
dynamo_instantiates = pytest.mark.filterwarnings(
    "ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"
)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_pairing = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
each_offset = pytest.mark.parametrize("offsets", OFFSETS, ids=str)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def on(device: torch.device, offsets: int | list[int]) -> int | Tensor:
    return offsets if isinstance(offsets, int) else torch.tensor(offsets, device=device)


def turned(
    x: Tensor, part: slice, cos: Tensor, sin: Tensor, offsets: Any, *options: bool
) -> Tensor:
    """x (batch, seqlen, heads, ...) in float64 with heads `part` rotated."""
    out = x.detach().cpu().double().clone()
    flat = out[:, :, part].flatten(0, 1)
    positions = batch_positions(*x.shape[:2], offsets)
    out[:, :, part] = rotated(flat, cos, sin, positions, *options).view_as(out[:, :, part])
    return out


@each_dtype
@each_pairing
@each_offset
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
def test_values_and_gradients(
    device: torch.device, dtype: torch.dtype, interleaved: bool, offsets: Any, inplace: bool
) -> None:
    x = torch.randn(2, 4, 3, 10).to(device, dtype).requires_grad_()
    cos, sin = tables(8, 4, dtype)
    given = x * 1
    out = rotary.apply_rotary_emb(
        given, cos.to(device), sin.to(device), interleaved, inplace, on(device, offsets)
    )
    assert (out is given) == inplace
    every = slice(None)
    assert_rounded_once(out, turned(x, every, cos, sin, offsets, interleaved), 5.0)
    dout = torch.randn(out.shape).to(device, dtype)
    kept = dout.clone()
    (dx,) = torch.autograd.grad(out, x, dout)
    assert_rounded_once(dx, turned(dout, every, cos, sin, offsets, interleaved, True), 5.0)
    assert torch.equal(dout, kept), "the incoming gradient belongs to others"


@each_dtype
@each_pairing
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
def test_tables_that_require_a_gradient_are_read_as_others(
    device: torch.device, dtype: torch.dtype, interleaved: bool, inplace: bool, offsets: Any
) -> None:
    cos, sin = (table.to(device) for table in tables(8, 8, dtype))
    wanted = [table.clone().requires_grad_() for table in (cos, sin)]
    for _ in range(2):
        x = torch.randn(2, 4, 3, 16).to(device, dtype)
        options = (interleaved, inplace, on(device, offsets))
        want = rotary.apply_rotary_emb(x.clone(), cos, sin, *options)
        got = rotary.apply_rotary_emb(x, *wanted, *options)
        torch.testing.assert_close(got.detach(), want)


# the first dual of a process compiles torch's own formulas
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@each_dtype
@each_pairing
def test_a_tangent_is_rotated_on_a_cpu(dtype: torch.dtype, interleaved: bool) -> None:
    x, tangent = torch.randn(2, 2, 4, 3, 16).to(dtype)
    cos, sin = tables(4, 8, dtype)
    for _ in range(2):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, tangent)
            turned = forward_ad.unpack_dual(rotary.apply_rotary_emb(dual, cos, sin, interleaved))
        for got, given in ((turned.primal, x), (turned.tangent, tangent)):
            want = rotary.apply_rotary_emb(given, cos, sin, interleaved)
            torch.testing.assert_close(got, want)


@each_dtype
@each_pairing
@each_offset
def test_packed_sequences(
    device: torch.device, dtype: torch.dtype, interleaved: bool, offsets: Any
) -> None:
    x = torch.randn(7, 3, 8).to(device, dtype).requires_grad_()
    cos, sin = tables(8, 3, dtype)
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32, device=device)
    starts = [offsets] * 2 if isinstance(offsets, int) else offsets
    positions = [starts[0] + i for i in range(3)] + [starts[1] + i for i in range(4)]
    out = rotary.apply_rotary_emb(
        x,
        cos.to(device),
        sin.to(device),
        interleaved=interleaved,
        seqlen_offsets=on(device, offsets),
        cu_seqlens=cu_seqlens,
        max_seqlen=4,
    )
    assert_rounded_once(out, rotated(x, cos, sin, positions, interleaved), 5.0)
    dout = torch.randn(out.shape).to(device, dtype)
    (dx,) = torch.autograd.grad(out, x, dout)
    assert_rounded_once(dx, rotated(dout, cos, sin, positions, interleaved, True), 5.0)


def test_forward_and_backward_of_packed_sequences_copy_the_lengths_once(npu: torch.device) -> None:
    forget_lengths()
    x = torch.randn(7, 3, 8).to(npu).requires_grad_()
    cos, sin = (table.to(npu) for table in tables(8, 3))
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32).to(npu)
    with virtual_ascend.record() as rec:
        out = rotary.apply_rotary_emb(x, cos, sin, cu_seqlens=cu_seqlens, max_seqlen=4)
        out.backward(torch.ones_like(out))
    assert [copy.shape for copy in rec.device_to_host] == [(3,)]


@each_dtype
@each_pairing
@each_offset
@pytest.mark.parametrize("form", ["three", "grouped"])
@pytest.mark.parametrize("own_k", [False, True], ids=["one table", "own for k"])
def test_packed_qkv(
    device: torch.device,
    dtype: torch.dtype,
    interleaved: bool,
    offsets: Any,
    form: str,
    own_k: bool,
) -> None:
    shape = (2, 4, 3, 2, 8) if form == "three" else (2, 4, 8, 8)
    num_heads_q, q, k = (None, slice(0, 1), slice(1, 2))
    if form == "grouped":
        num_heads_q, q, k = 4, slice(0, 4), slice(4, 6)
    qkv = torch.randn(shape).to(device, dtype).requires_grad_()
    cos, sin = tables(8, 3, dtype)
    cos_k, sin_k = tables(8, 3, dtype) if own_k else (cos, sin)
    of_k = (cos_k.to(device), sin_k.to(device)) if own_k else (None, None)
    tables_on_device = (cos.to(device), sin.to(device), *of_k)
    given = qkv * 1
    out = rotary.apply_rotary_emb_qkv_(
        given, *tables_on_device, interleaved, on(device, offsets), num_heads_q
    )
    assert out is given

    def expected(x: Tensor, conjugate: bool) -> Tensor:
        done = turned(x, q, cos, sin, offsets, interleaved, conjugate)
        return turned(done, k, cos_k, sin_k, offsets, interleaved, conjugate)

    assert_rounded_once(out, expected(qkv, False), 5.0)
    dout = torch.randn(shape).to(device, dtype)
    kept = dout.clone()
    (dqkv,) = torch.autograd.grad(out, qkv, dout)
    assert_rounded_once(dqkv, expected(dout, True), 5.0)
    assert torch.equal(dout, kept)
    low_level = rotary._apply_rotary_emb_qkv(
        qkv.detach(), *tables_on_device, interleaved, False, True, on(device, offsets), num_heads_q
    )
    assert low_level.is_contiguous()
    assert_rounded_once(low_level, expected(qkv, True), 5.0)


@each_dtype
@each_pairing
@each_offset
def test_packed_kv(
    device: torch.device, dtype: torch.dtype, interleaved: bool, offsets: Any
) -> None:
    kv = torch.randn(2, 4, 2, 3, 8).to(device, dtype).requires_grad_()
    cos, sin = tables(8, 3, dtype)
    given = kv * 1
    out = rotary.apply_rotary_emb_kv_(
        given, cos.to(device), sin.to(device), interleaved, on(device, offsets)
    )
    assert out is given
    k = slice(0, 1)
    assert_rounded_once(out, turned(kv, k, cos, sin, offsets, interleaved), 5.0)
    dout = torch.randn(kv.shape).to(device, dtype)
    (dkv,) = torch.autograd.grad(out, kv, dout)
    assert_rounded_once(dkv, turned(dout, k, cos, sin, offsets, interleaved, True), 5.0)


def test_in_place_writes_the_slice_it_was_given(device: torch.device) -> None:
    cos, sin = (table.to(device) for table in tables(8, 3))
    for shape, rotate in (
        ((2, 4, 3, 8), lambda x: rotary.apply_rotary_emb(x, cos, sin, inplace=True)),
        ((2, 4, 3, 2, 8), lambda x: rotary.apply_rotary_emb_qkv_(x, cos, sin)),
        ((2, 4, 2, 2, 8), lambda x: rotary.apply_rotary_emb_kv_(x, cos, sin)),
    ):
        whole = torch.full([size + 2 for size in shape], 7.0, device=device)
        x = whole[tuple(slice(1, -1) for _ in shape)]
        x.copy_(torch.randn(shape))
        compact = x.clone()
        assert torch.equal(rotate(x), rotate(compact))
        assert torch.equal(x, compact)
        x.fill_(7.0)
        assert bool((whole == 7.0).all())


def test_a_gradient_flows_through_a_rotated_slice() -> None:
    cos, sin = tables(4, 2, torch.float64)

    def rotate_in_the_middle(x: Tensor) -> Tensor:
        whole = x * 2
        rotary.apply_rotary_emb(whole[:, :, 1:], cos, sin, inplace=True)
        return whole.sin()

    x = torch.randn(1, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rotate_in_the_middle, x)


GRADCHECKED: dict[str, tuple[tuple[int, ...], Callable[..., Tensor]]] = {
    "emb": ((2, 3, 2, 6), lambda x, c, s, o: rotary.apply_rotary_emb(x, c, s, True, False, o)),
    "emb in place": (
        (2, 3, 2, 6),
        lambda x, c, s, o: rotary.apply_rotary_emb(x * 1, c, s, False, True, o),
    ),
    "qkv": (
        (2, 3, 3, 2, 6),
        lambda x, c, s, o: rotary.apply_rotary_emb_qkv_(x * 1, c, s, s * 2, c * 2, False, o),
    ),
    "grouped qkv": (
        (2, 3, 4, 6),
        lambda x, c, s, o: rotary.apply_rotary_emb_qkv_(x * 1, c, s, None, None, True, o, 2),
    ),
    "kv": ((2, 3, 2, 2, 6), lambda x, c, s, o: rotary.apply_rotary_emb_kv_(x * 1, c, s, True, o)),
}


@pytest.mark.parametrize("name", GRADCHECKED)
def test_first_and_second_derivatives(name: str) -> None:
    shape, function = GRADCHECKED[name]
    cos, sin = tables(6, 2, torch.float64)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    for offsets in (1, torch.tensor([3, 0])):
        call = lambda x, o=offsets: function(x, cos, sin, o).sin()  # noqa: E731
        assert torch.autograd.gradcheck(call, x)
        assert torch.autograd.gradgradcheck(call, x)


@pytest.mark.usefixtures("fresh_dynamo")
@dynamo_instantiates
@pytest.mark.parametrize("name", GRADCHECKED)
def test_compiles_in_one_graph(name: str) -> None:
    shape, function = GRADCHECKED[name]
    cos, sin = tables(9, 2)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for offsets in (1, torch.tensor([3, 0])) if name == "emb" else (1,):
        for seqlen in (3, 4):
            sized = (shape[0], seqlen, *shape[2:])
            mine = torch.randn(sized, requires_grad=True)
            theirs = mine.detach().clone().requires_grad_()
            got, want = compiled(mine, cos, sin, offsets), function(theirs, cos, sin, offsets)
            torch.testing.assert_close(got, want)
            dout = torch.randn(sized)
            got.backward(dout)
            want.backward(dout)
            torch.testing.assert_close(mine.grad, theirs.grad)


IN_PLACE: dict[str, tuple[tuple[int, ...], Callable[..., Tensor]]] = {
    "emb": ((2, 4, 3, 6), lambda x, cos, sin: rotary.apply_rotary_emb(x, cos, sin, inplace=True)),
    "qkv": ((2, 4, 3, 2, 6), rotary.apply_rotary_emb_qkv_),
    "kv": ((2, 4, 2, 2, 6), rotary.apply_rotary_emb_kv_),
}


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_without_gradient_compiles_in_one_graph(name: str) -> None:
    shape, function = IN_PLACE[name]
    cos, sin = tables(9, 2)
    x = torch.randn(shape)
    mine = x.clone()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert compiled(mine, cos, sin).data_ptr() == mine.data_ptr()
    torch.testing.assert_close(mine, function(x.clone(), cos, sin))


@pytest.mark.usefixtures("fresh_dynamo")
@dynamo_instantiates
def test_packed_sequences_compile_in_one_graph() -> None:
    cos, sin = tables(9, 2)

    def run(x: Tensor, cu_seqlens: Tensor) -> Tensor:
        return rotary.apply_rotary_emb(x, cos, sin, cu_seqlens=cu_seqlens, max_seqlen=5)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for lengths in ([0, 3, 8], [0, 5, 5, 7]):
        cu_seqlens = torch.tensor(lengths, dtype=torch.int32)
        mine = torch.randn(lengths[-1], 2, 6, requires_grad=True)
        theirs = mine.detach().clone().requires_grad_()
        torch.testing.assert_close(compiled(mine, cu_seqlens), run(theirs, cu_seqlens))
        dout = torch.randn(mine.shape)
        compiled(mine, cu_seqlens).backward(dout)
        run(theirs, cu_seqlens).backward(dout)
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_autocast_changes_nothing(device: torch.device) -> None:
    cos, sin = (table.to(device) for table in tables(4, 3))
    for dtype in DTYPES:
        x = torch.randn(2, 4, 3, 8).to(device, dtype)
        plain = rotary.apply_rotary_emb(x, cos, sin)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            assert torch.equal(rotary.apply_rotary_emb(x, cos, sin), plain)
        assert plain.dtype == dtype


@each_pairing
def test_the_torch_function_is_the_same_rotation(device: torch.device, interleaved: bool) -> None:
    x = torch.randn(2, 4, 3, 10, dtype=torch.float64)
    cos, sin = tables(4, 4, torch.float64)
    exact = turned(x, slice(None), cos, sin, 0, interleaved)
    shared = rotary.apply_rotary_emb_torch(x, cos, sin, interleaved)
    each = rotary.apply_rotary_emb_torch(x, cos.expand(2, 4, 4), sin.expand(2, 4, 4), interleaved)
    torch.testing.assert_close(shared, exact)
    torch.testing.assert_close(each, exact)
    given = [t.bfloat16() for t in (x, cos, sin)]
    half = rotary.apply_rotary_emb_torch(*(t.to(device) for t in given), interleaved)
    assert half.dtype == torch.bfloat16
    wide = [t.double() for t in given]
    exact = turned(wide[0], slice(None), *wide[1:], 0, interleaved)
    # two products and their sum, each rounded to bfloat16: |a c| + |b s| is at most this
    sizes = 1.5 * wide[0].abs().amax(-1, keepdim=True)
    error = (half.cpu().double() - exact).abs()
    assert (error <= torch.finfo(torch.bfloat16).eps * sizes).all()
    assert torch.equal(half.cpu()[..., 8:], given[0][..., 8:])


def test_rotate_half() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert rotary.rotate_half(x).tolist() == [-3.0, -4.0, 1.0, 2.0]
    assert rotary.rotate_half(x, True).tolist() == [-2.0, 1.0, -4.0, 3.0]


def test_the_alias_is_the_same_object() -> None:
    assert rotary.apply_rotary_emb_func is rotary.apply_rotary_emb


def test_a_replaced_apply_rotary_does_not_reach_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    from flash_attn_npu.ops.triton import rotary as single

    def missing(*_args: Any, **_options: Any) -> None:
        raise RuntimeError("no exist")

    monkeypatch.setattr(single, "apply_rotary", missing)
    monkeypatch.setattr(rotary, "apply_rotary", missing)
    x, tables_of_two = torch.randn(1, 2, 1, 4), tables(2, 2)
    out = rotary.apply_rotary_emb(x, *tables_of_two)
    assert_rounded_once(out, turned(x, slice(None), *tables_of_two, 0, False), 5.0)


def bad(argument: str, error: type[Exception], call: Callable[..., Any]) -> Any:
    return pytest.param(argument, error, call)


@pytest.mark.parametrize(
    ("argument", "error", "call"),
    [
        bad("x", ArgumentTypeError, lambda c, s: rotary.apply_rotary_emb(None, c, s)),
        bad("x", ArgumentError, lambda c, s: rotary.apply_rotary_emb(c[0], c, s)),
        bad("cos", ArgumentError, lambda c, s: rotary.apply_rotary_emb_torch(c[..., None], c, s)),
        bad("qkv", ArgumentError, lambda c, s: rotary.apply_rotary_emb_qkv_(box(4, 8), c, s)),
        bad("qkv", ArgumentError, lambda c, s: rotary.apply_rotary_emb_qkv_(box(2, 1, 8), c, s)),
        bad(
            "qkv",
            ArgumentError,
            lambda c, s: rotary.apply_rotary_emb_qkv_(box(7, 8), c, s, num_heads_q=4),
        ),
        bad("cos_k", ArgumentError, lambda c, s: rotary.apply_rotary_emb_qkv_(QKV, c, s, c[:3], s)),
        bad("sin_k", ArgumentTypeError, lambda c, s: rotary.apply_rotary_emb_qkv_(QKV, c, s, c, 1)),
        bad("kv", ArgumentError, lambda c, s: rotary.apply_rotary_emb_kv_(box(3, 2, 8), c, s)),
        bad("kv", ArgumentTypeError, lambda c, s: rotary.apply_rotary_emb_kv_(None, c, s)),
    ],
)
def test_bad_input_is_named(
    argument: str, error: type[Exception], call: Callable[[Tensor, Tensor], Any]
) -> None:
    QKV.fill_(1.0)
    with pytest.raises(error, match=f"^{argument}: got "):
        call(*tables(4, 4))
    assert bool((QKV == 1.0).all())


def box(*rest: int) -> Tensor:
    return torch.ones(2, 4, *rest)


QKV = box(3, 2, 8)
