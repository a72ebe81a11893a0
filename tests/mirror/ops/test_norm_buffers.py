"""out and residual_out: results are written where they lie, and gradients survive that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_npu._core.kernels.composed import norm_blocks
from flash_attn_npu.errors import ArgumentError
from flash_attn_npu.ops.triton import layer_norm
from tests.helpers.norm_cases import SHAPE, draw
from tests.helpers.norm_reference import EPS, Options, judge
from tests.helpers.peak_bytes import PeakBytes


def assert_same(got: Tensor, want: Tensor) -> None:
    """On an NPU a call with buffers is composed, and one without is fused."""
    if got.device.type == "cpu":
        assert torch.equal(got, want)
    else:
        torch.testing.assert_close(got, want)


ORDER = ("x", "weight", "bias", "residual", "x1", "weight1", "bias1")


def poisoned(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.full(SHAPE, torch.nan, device=device, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("wishes", ["bias", "bias residual:float32"])
@pytest.mark.parametrize("way", ["function", "class"])
def test_results_lie_in_the_buffers(
    device: torch.device, dtype: torch.dtype, wishes: str, way: str
) -> None:
    leaves = draw(wishes, device, dtype)
    total_dtype = leaves["residual"].dtype if "residual" in leaves else dtype
    out, residual_out = poisoned(device, dtype), poisoned(device, total_dtype)
    if way == "function":
        y, total = layer_norm.layer_norm_fn(
            **leaves, eps=EPS, prenorm=True, out=out, residual_out=residual_out
        )
    else:
        given = [leaves.get(name) for name in ORDER]
        options = (EPS, 0.0, None, True, False, False, False, False, None)
        y, total = layer_norm.LayerNormFn.apply(*given, *options, out, residual_out)
    for result, buffer in ((y, out), (total, residual_out)):
        assert result.data_ptr() == buffer.data_ptr()
        assert torch.equal(result, buffer)
        assert result.requires_grad
        assert not buffer.requires_grad
    judge({"y": y, "total": total}, leaves, Options(), total=total_dtype)


def test_a_buffer_may_be_part_of_a_larger_one(device: torch.device) -> None:
    leaves = draw("residual", device, torch.float32)
    whole = torch.full((3, 5, 64), torch.nan, device=device)
    y = layer_norm.rms_norm_fn(**leaves, bias=None, out=whole[..., 16:48])
    assert_same(whole[..., 16:48], layer_norm.rms_norm_fn(**leaves, bias=None))
    assert torch.equal(y, whole[..., 16:48])
    assert bool(whole[..., :16].isnan().all())
    assert bool(whole[..., 48:].isnan().all())


@pytest.mark.parametrize("between", ["columns", "numbers"])
def test_both_buffers_may_be_parts_of_one(device: torch.device, between: str) -> None:
    leaves = draw("residual", device, torch.float32)
    leaves["bias"] = None
    want = layer_norm.rms_norm_fn(**leaves, prenorm=True)
    both = torch.cat([poisoned(device, torch.float32)] * 2, dim=-1)
    out, residual_out = (
        both.chunk(2, dim=-1) if between == "columns" else (both[..., ::2], both[..., 1::2])
    )
    layer_norm.rms_norm_fn(**leaves, prenorm=True, out=out, residual_out=residual_out)
    for buffer, result in zip((out, residual_out), want, strict=True):
        assert_same(buffer, result.detach())


def test_residual_out_without_prenorm_is_written(device: torch.device) -> None:
    leaves = draw("residual:float32", device, torch.bfloat16)
    buffer = poisoned(device, torch.float32)
    y = layer_norm.rms_norm_fn(**leaves, bias=None, residual_out=buffer)
    assert_same(y, layer_norm.rms_norm_fn(**leaves, bias=None))
    assert torch.equal(buffer, leaves["x"].float() + leaves["residual"])


def test_buffers_serve_layer_after_layer(device: torch.device) -> None:
    out, residual_out = poisoned(device, torch.float32), poisoned(device, torch.float32)
    leaves = draw("", device, torch.float32)

    def two_layers(**buffers: Any) -> Tensor:
        y, total = layer_norm.rms_norm_fn(**leaves, bias=None, prenorm=True, **buffers)
        y, total = layer_norm.rms_norm_fn(
            torch.tanh(y), leaves["weight"], None, total * 2, prenorm=True, **buffers
        )
        return y + total

    expected = torch.autograd.grad(two_layers().square().sum(), list(leaves.values()))
    got = two_layers(out=out, residual_out=residual_out)
    found = torch.autograd.grad(got.square().sum(), list(leaves.values()))
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


def test_inputs_may_be_buffers_without_gradient(device: torch.device) -> None:
    leaves = {n: leaf.detach() for n, leaf in draw("residual", device, torch.bfloat16).items()}
    expected = layer_norm.rms_norm_fn(**leaves, bias=None, prenorm=True)
    x, residual = leaves["x"], leaves["residual"]
    layer_norm.rms_norm_fn(**leaves, bias=None, out=x, residual_out=residual)
    assert_same(x, expected[0])
    assert_same(residual, expected[1])


@pytest.mark.parametrize("way", ["function", "class"])
@pytest.mark.parametrize("residual", [False, True])
def test_the_input_may_be_the_buffer_with_a_gradient(way: str, residual: bool) -> None:
    leaves = draw("residual" if residual else "", torch.device("cpu"), torch.float32)
    direction = torch.randn(SHAPE)

    def weights_gradient(**buffers: Any) -> Tensor:
        x = leaves["x"].detach().clone()
        added = leaves["residual"].detach().clone() if residual else None
        names = {"out": x, "residual_out": added}
        given = {name: names[name] for name in buffers if names[name] is not None}
        if way == "function":
            y = layer_norm.rms_norm_fn(x, leaves["weight"], None, added, **given)
        else:
            y = layer_norm.LayerNormFn.apply(
                x, leaves["weight"], None, added, None, None, None, 1e-6, 0.0, None, False, False,
                False, True, False, None, given.get("out"), given.get("residual_out"),
            )  # fmt: skip
        assert buffers == {} or y.data_ptr() == x.data_ptr()
        (grad,) = torch.autograd.grad(y, leaves["weight"], direction)
        return grad

    want = weights_gradient()
    assert torch.equal(weights_gradient(out=True), want)
    assert torch.equal(weights_gradient(out=True, residual_out=True), want)


def test_a_buffer_that_lies_across_the_input_is_written_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(norm_blocks, "BLOCK_ELEMENTS", 1)
    memory, weight = torch.randn(7, 8), torch.ones(8)
    x, out = memory[:6], memory[1:]
    want = layer_norm.rms_norm_fn(x.clone(), weight, None)
    first = memory[0].clone()
    layer_norm.rms_norm_fn(x, weight, None, out=out)
    assert torch.equal(out, want)
    assert torch.equal(memory[0], first)
    # transposed over itself, and in another dtype
    square = torch.randn(8, 8)
    want = layer_norm.rms_norm_fn(square.clone(), weight, None)
    layer_norm.rms_norm_fn(square, weight, None, out=square.t())
    assert torch.equal(square.t(), want)


@pytest.mark.parametrize(
    "wishes", ["bias", "bias residual:float32 x1 weight1 bias1", "bias rowscale"]
)
@pytest.mark.parametrize("limit", [1, 100, 10_000])
def test_blocks_of_rows_make_no_difference(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, wishes: str, limit: int
) -> None:
    drawn = draw(wishes, device, torch.bfloat16)
    leaves = {name: leaf.detach().expand(leaf.shape) for name, leaf in drawn.items()}
    if "rowscale" in leaves:
        leaves["rowscale"] = leaves["rowscale"].reshape(-1, 1)
    leaves["x"] = torch.stack((leaves["x"], leaves["x"] * torch.nan), 1)[:, 0]
    kind = {"residual_out": torch.float32 if "residual" in leaves else torch.bfloat16}
    for p in (0.0, 0.5):
        options = {"eps": EPS, "dropout_p": p, "prenorm": True, "return_dropout_mask": p > 0}
        torch.manual_seed(0)
        want = layer_norm.layer_norm_fn(**leaves, **options)
        for names in (("out",), ("residual_out",), ("out", "residual_out")):
            buffers = {n: poisoned(device, kind.get(n, torch.bfloat16)) for n in names}
            monkeypatch.setattr(norm_blocks, "BLOCK_ELEMENTS", limit)
            torch.manual_seed(0)
            got = layer_norm.layer_norm_fn(**leaves, **options, **buffers)
            for one, other in zip(got, want, strict=True):
                assert (one is None) == (other is None)
                if one is not None:
                    assert_same(one, other)
            if "out" in buffers:
                assert got[0].data_ptr() == buffers["out"].data_ptr()


@pytest.mark.parametrize("prenorm", [False, True])
def test_results_in_buffers_take_a_work_space_of_fixed_size(
    monkeypatch: pytest.MonkeyPatch, prenorm: bool
) -> None:
    monkeypatch.setattr(norm_blocks, "BLOCK_ELEMENTS", 1 << 16)
    x, residual = (torch.ones(64, 64, 1024, dtype=torch.bfloat16) for _ in range(2))
    weight = torch.ones(1024)
    out, residual_out = torch.empty_like(x), torch.empty_like(x)
    # a block in float32 is 256 KiB, and there are up to ten of them
    for given, buffers in (
        ((None,), {"out": out}),
        ((residual,), {"out": out, "residual_out": residual_out}),
        ((residual,), {"out": x, "residual_out": residual}),
    ):
        with PeakBytes() as bytes_of:
            layer_norm.rms_norm_fn(
                x, weight, None, *given, prenorm=prenorm and "residual_out" in buffers, **buffers
            )
        assert bytes_of.peak < 3 << 20


def test_buffers_may_lie_side_by_side_and_beside_their_arguments() -> None:
    memory = torch.randn(4, *SHAPE)
    x, residual, out, residual_out = memory
    weight = torch.ones(SHAPE[-1])
    want = layer_norm.rms_norm_fn(x.clone(), weight, None, residual.clone(), prenorm=True)
    layer_norm.rms_norm_fn(x, weight, None, residual, out=out, residual_out=residual_out)
    assert torch.equal(memory[2], want[0])
    assert torch.equal(memory[3], want[1])
    row = torch.randn(SHAPE[-1] * 2)
    layer_norm.rms_norm_fn(torch.ones(SHAPE[-1]), row[: SHAPE[-1]], None, out=row[SHAPE[-1] :])
    torch.testing.assert_close(row[SHAPE[-1] :], row[: SHAPE[-1]])


def test_a_refused_buffer_leaves_the_other_alone() -> None:
    x, residual = torch.randn(2, *SHAPE)
    with torch.inference_mode():
        of_inference = torch.empty(SHAPE)
    whole = torch.full((4, *SHAPE[1:]), torch.nan)
    shared = torch.full(SHAPE, torch.nan)
    weight = torch.ones(SHAPE[-1])
    lying = weight.as_strided(SHAPE, (0, 0, 1))
    for out, residual_out, words in (
        (shared, of_inference, "^residual_out: got an inference tensor"),
        (whole[1:], whole[:-1], "^out: got memory of residual_out"),
        (shared, shared.view_as(shared), "^out: got memory of residual_out"),
        (shared, torch.empty(SHAPE).to_sparse(), "^residual_out: got "),
        (shared, torch.empty(80).as_strided(SHAPE, (5, 1, 1)), "^residual_out: got .* strides"),
        (lying, shared, "^out: got "),
    ):
        with pytest.raises(ArgumentError, match=words):
            layer_norm.layer_norm_fn(x, weight, None, residual, out=out, residual_out=residual_out)
        assert shared.isnan().all()
        assert whole.isnan().all()
    square = torch.randn(8, 8)
    for name, given in (("weight", {"weight": square[0]}), ("bias", {"bias": square[3]})):
        with pytest.raises(ArgumentError, match=f"^out: got memory of {name}; "):
            layer_norm.layer_norm_fn(
                torch.ones(8, 8), **{"weight": torch.ones(8), "bias": None, **given}, out=square
            )


def test_refused_buffers_are_not_written() -> None:
    leaves = draw("residual", torch.device("cpu"), torch.float32)
    out = poisoned(torch.device("cpu"), torch.float32)
    for other in (
        torch.empty(SHAPE, dtype=torch.float16),
        torch.empty(SHAPE[1:]),
        torch.empty(SHAPE, requires_grad=True),
        torch.empty(SHAPE[-1:]).expand(SHAPE),
        out,
    ):
        with pytest.raises(
            ArgumentError, match=r"^(residual_)?out: got .*; allowed: .*; to fix it: "
        ):
            layer_norm.rms_norm_fn(**leaves, bias=None, out=out, residual_out=other)
        with pytest.raises(
            ArgumentError, match=r"^(residual_)?out: got .*; allowed: .*; to fix it: "
        ):
            layer_norm.rms_norm_fn(**leaves, bias=None, out=other, residual_out=out)
    assert bool(out.isnan().all())


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("out_dtype", [None, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_mask_that_nobody_asks_for_drops_the_same_values(
    no_small: None,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    out_dtype: torch.dtype | None,
    rms: bool,
) -> None:
    """It lies in the memory of y, which is written block by block."""
    monkeypatch.setattr(norm_blocks, "HOST_BLOCK", 3 * 32)
    x, residual = torch.randn(2, 7, 5, 32).to(dtype)
    weight = torch.randn(32)

    def run(masked: bool) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        found = layer_norm.layer_norm_fn(
            x,
            weight,
            None,
            residual,
            dropout_p=0.4,
            prenorm=True,
            is_rms_norm=rms,
            out_dtype=out_dtype,
            return_dropout_mask=masked,
        )
        return found[0], found[1]

    for got, want in zip(run(masked=False), run(masked=True), strict=True):
        assert torch.equal(got, want)
        assert not got._is_view()


def test_dropout_without_a_gradient_takes_no_memory_for_its_mask() -> None:
    x, residual = torch.randn(2, 2048, 1024)
    weight = torch.ones(1024)
    with PeakBytes() as bytes_of:
        y, total = layer_norm.layer_norm_fn(
            x, weight, weight, residual, dropout_p=0.1, prenorm=True
        )
    # two blocks of 512 KiB, and not the 2 MiB of a mask
    assert bytes_of.peak < y.nbytes + total.nbytes + (3 << 19)
