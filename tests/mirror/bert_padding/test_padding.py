"""bert_padding against a reference in Python lists, its gradients, and its one host copy."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu import bert_padding
from flash_attn_npu._core.ground.lengths import host_lengths
from flash_attn_npu._core.ground.memory import forget_lengths
from flash_attn_npu.bert_padding import (
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)
from flash_attn_npu.errors import ArgumentError, ArgumentTypeError

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
MASKS = [torch.bool, torch.int32, torch.int64, torch.float32]
Bits = list[list[int]]


@st.composite
def masks(draw: st.DrawFn) -> tuple[Bits, Bits | None]:
    """0 is padding, 1 a token, 2 an unused row."""
    batch, seqlen = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    row = st.lists(st.integers(0, 2), min_size=seqlen, max_size=seqlen)
    drawn = draw(st.lists(row, min_size=batch, max_size=batch))
    tokens = [[int(bit == 1) for bit in row] for row in drawn]
    return tokens, draw(st.sampled_from((None, [[int(bit == 2) for bit in row] for row in drawn])))


def check_unpad(device: torch.device, tokens: Bits, unused: Bits | None, *dtypes: Any) -> None:
    dtype, mask_dtype = dtypes
    batch, seqlen = len(tokens), len(tokens[0])
    kept = [
        [bit or (unused is not None and unused[i][j]) for j, bit in enumerate(row)]
        for i, row in enumerate(tokens)
    ]
    mask = torch.tensor(tokens, dtype=mask_dtype, device=device)
    unused_mask = None if unused is None else torch.tensor(unused, device=device).to(mask_dtype)
    hidden = torch.randn(batch, seqlen, 2, 3).to(device, dtype).requires_grad_()
    packed, indices, cu_seqlens, max_seqlen, seqused = unpad_input(hidden, mask, unused_mask)

    expected = [i for i, bit in enumerate(bit for row in kept for bit in row) if bit]
    lengths = [sum(map(bool, row)) for row in kept]
    assert indices.tolist() == expected
    assert cu_seqlens.tolist() == list(accumulate(lengths, initial=0))
    assert host_lengths("cu_seqlens", cu_seqlens).cumulative == tuple(cu_seqlens.tolist())
    assert (max_seqlen, type(max_seqlen)) == (max(lengths), int)
    assert seqused.tolist() == [sum(row) for row in tokens]
    assert (indices.dtype, cu_seqlens.dtype, seqused.dtype) == (
        torch.int64,
        torch.int32,
        torch.int32,
    )
    assert all(t.device == hidden.device for t in (packed, indices, cu_seqlens, seqused))
    assert torch.equal(packed, hidden.flatten(0, 1)[expected])

    padded = pad_input(packed, indices, batch, seqlen)
    here = torch.tensor(kept, device=device).bool()[..., None, None]
    assert torch.equal(padded, hidden.where(here, 0.0))
    dout = torch.randn(padded.shape).to(device, dtype)
    (gradient,) = torch.autograd.grad(padded, hidden, dout)
    assert torch.equal(gradient, dout.where(here, 0.0))


@pytest.mark.parametrize(
    "effort", [pytest.param(1, id="quick"), pytest.param(10, marks=pytest.mark.sweep, id="sweep")]
)
def test_unpadding_and_padding(device: torch.device, effort: int) -> None:
    @settings(max_examples=60 * effort, deadline=None)
    @given(masks(), st.sampled_from(DTYPES), st.sampled_from(MASKS))
    def run(drawn: tuple[Bits, Bits | None], dtype: torch.dtype, mask_dtype: torch.dtype) -> None:
        check_unpad(device, *drawn, dtype, mask_dtype)

    run()


@pytest.mark.parametrize(
    ("rows", "kept", "cumulative"),
    [
        (
            [[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]],
            [5, 5, 6],
            [0, 2, 5, 8, 10, 16],
        ),
        ([[0, 0, 0], [0, 1, 1]], [0, 2], [0, 1, 2]),
        ([[0, 0]], [0], [0]),
    ],
)
def test_concatenated_sequences(
    device: torch.device, rows: Bits, kept: list[int], cumulative: list[int]
) -> None:
    seqlen = len(rows[0])
    hidden = torch.randn(len(rows), seqlen, 4).to(device).requires_grad_()
    answer = unpad_input_for_concatenated_sequences(hidden, torch.tensor(rows, device=device))
    packed, indices, cu_seqlens, max_seqlen = answer
    assert indices.tolist() == [i * seqlen + j for i, n in enumerate(kept) for j in range(n)]
    assert cu_seqlens.tolist() == cumulative
    assert cu_seqlens.dtype == torch.int32
    assert max_seqlen == max(map(max, rows))
    assert torch.equal(packed, hidden.flatten(0, 1)[indices])
    padded = pad_input(packed, indices, len(rows), seqlen)
    (gradient,) = torch.autograd.grad(padded.sum(), hidden)
    assert gradient.sum().item() == 4 * sum(kept)


def test_autocast_changes_nothing(device: torch.device) -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).to(device)
    hidden = torch.randn(2, 3, 4).to(device).requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        packed, indices, *_ = unpad_input(hidden, mask)
        padded = pad_input(packed * 2, indices, 2, 3)
        (grad,) = torch.autograd.grad(padded.sum(), hidden)
    assert {packed.dtype, padded.dtype, grad.dtype} == {torch.float32}
    assert torch.equal(padded, 2 * hidden * mask[..., None])
    assert torch.equal(grad, (2 * mask[..., None]).expand(2, 3, 4).float())


def test_masks_and_lengths_on_the_host_cost_no_copy(npu: torch.device) -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    lengths = torch.tensor([[2, 1, 0], [1, 0, 0]])
    hidden = torch.randn(2, 3, 4).to(npu)
    for unpad, masks in (
        (unpad_input, (mask, 1 - mask)),
        (unpad_input_for_concatenated_sequences, (lengths,)),
    ):
        with virtual_ascend.record() as rec:
            got = unpad(hidden, *masks)
            host_lengths("cu_seqlens", got[2])
        assert not rec.device_to_host
        want = unpad(hidden, *(tensor.to(npu) for tensor in masks))
        for mine, theirs in zip(got, want, strict=True):
            if isinstance(mine, Tensor):
                assert mine.device == npu
                assert torch.equal(mine, theirs)
            else:
                assert mine == theirs
    with pytest.raises(ArgumentError, match="unused_mask"):
        unpad_input(hidden, mask, mask.to(npu))


@pytest.mark.parametrize("inference", [False, True])
def test_one_host_copy_there_and_none_back(npu: torch.device, inference: bool) -> None:
    forget_lengths()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).to(npu)
    lengths = torch.tensor([[2, 1, 0], [1, 0, 0]]).to(npu)
    hidden = torch.randn(2, 3, 4).to(npu)
    with torch.inference_mode(inference):
        with virtual_ascend.record() as rec:
            packed, indices, cu_seqlens, *_ = unpad_input(hidden, mask, 1 - mask)
            host_lengths("cu_seqlens", cu_seqlens)
        assert [copy.shape for copy in rec.device_to_host] == [(2,)]
        assert not rec.host_to_device
        with virtual_ascend.record() as rec:
            pad_input(packed, indices, 2, 3)
        assert not rec.device_to_host
        with virtual_ascend.record() as rec:
            host_lengths("c", unpad_input_for_concatenated_sequences(hidden, lengths)[2])
        assert [copy.shape for copy in rec.device_to_host] == [(2, 3)]


def test_an_empty_batch(device: torch.device) -> None:
    packed, indices, cu_seqlens, max_seqlen, seqused = unpad_input(
        torch.zeros(0, 3, 4, device=device), torch.zeros(0, 3, device=device)
    )
    assert packed.shape == (0, 4)
    assert (indices.numel(), cu_seqlens.tolist(), max_seqlen) == (0, [0], 0)
    assert seqused.shape == (0,)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_rows(device: torch.device, index_dtype: torch.dtype) -> None:
    x = torch.randn(5, 2, 3).to(device)
    indices = torch.tensor([4, 0, 2], device=device, dtype=index_dtype)
    assert torch.equal(index_first_axis(x, indices), x[[4, 0, 2]])
    rows, residual = index_first_axis_residual(x, indices)
    assert torch.equal(rows, x[[4, 0, 2]])
    assert torch.equal(residual, x)
    whole = index_put_first_axis(rows, indices, 5)
    assert torch.equal(whole[[4, 0, 2]], rows)
    assert not whole[[1, 3]].any()
    for function, arguments in (
        (bert_padding.IndexFirstAxis, (x, indices)),
        (bert_padding.IndexPutFirstAxis, (rows, indices, 5)),
    ):
        assert torch.isfinite(function.apply(*arguments)).all()
    assert len(bert_padding.IndexFirstAxisResidual.apply(x, indices)) == 2


GRADCHECKED: dict[str, Callable[[Tensor], Any]] = {
    "gather": lambda x: index_first_axis(x, torch.tensor([3, 1])).sin(),
    "gather twice the same": lambda x: index_first_axis(x, torch.tensor([3, 1, 3])).sin(),
    "put": lambda x: index_put_first_axis(x, torch.tensor([5, 1, 0, 2]), 6).sin(),
    "residual": lambda x: index_first_axis_residual(x, torch.tensor([3, 1]))[0].sin(),
    "both of residual": lambda x: tuple(
        part.sin() for part in index_first_axis_residual(x, torch.tensor([3, 1]))
    ),
    "there and back": lambda x: pad_input(
        *unpad_input(x.view(2, 2, 3), torch.tensor([[1, 0], [1, 1]]))[:2], 2, 2
    ).sin(),
}


@pytest.mark.parametrize("name", GRADCHECKED)
def test_first_and_second_derivatives(name: str) -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(GRADCHECKED[name], x)
    assert torch.autograd.gradgradcheck(GRADCHECKED[name], x)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_gathering_and_putting_compile_in_one_graph() -> None:
    torch._dynamo.reset()
    indices = torch.tensor([3, 1])

    def run(x: Tensor) -> Tensor:
        rows, residual = index_first_axis_residual(x, indices)
        return index_put_first_axis(rows + index_first_axis(x, indices), indices, 4) + residual

    x = torch.randn(4, 3, requires_grad=True)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), run(x))
    (mine,), (theirs,) = (torch.autograd.grad(f(x).square().sum(), x) for f in (compiled, run))
    torch.testing.assert_close(mine, theirs)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True)
def test_unpadding_compiles_in_one_graph() -> None:
    torch._dynamo.reset()
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0]])

    def run(x: Tensor) -> tuple[Tensor, ...]:
        packed, indices, cu_seqlens, max_seqlen, seqused = unpad_input(x, mask)
        return pad_input(packed * 2, indices, 3, 4), cu_seqlens, cu_seqlens + max_seqlen, seqused

    x = torch.randn(3, 4, 2, requires_grad=True)
    mine, theirs = torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x)
    for got, want in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, want)
    (got,), (want,) = (torch.autograd.grad(out[0].square().sum(), x) for out in (mine, theirs))
    torch.testing.assert_close(got, want)
    torch._dynamo.reset()


def test_the_incoming_gradient_of_the_residual_is_left_alone() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    rows, residual = index_first_axis_residual(x, torch.tensor([3, 1]))
    douts = (torch.ones_like(rows), torch.ones_like(residual))
    torch.autograd.grad((rows, residual), x, douts)
    assert all(bool((dout == 1).all()) for dout in douts)


def test_rearrange_is_that_of_einops(monkeypatch: pytest.MonkeyPatch) -> None:
    einops = types.ModuleType("einops")
    einops.rearrange, einops.repeat = object(), object()
    monkeypatch.setitem(sys.modules, "einops", einops)
    from flash_attn_npu.bert_padding import rearrange, repeat

    assert (rearrange, repeat) == (einops.rearrange, einops.repeat)


def test_rearrange_is_ours_without_einops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "einops", None)
    from flash_attn_npu.bert_padding import rearrange

    x = torch.randn(2, 3, 4)
    assert torch.equal(rearrange(x, "b s ... -> (b s) ..."), x.flatten(0, 1))
    assert not hasattr(bert_padding, "repeat")
    assert not hasattr(bert_padding, "einsum")


H, M = torch.zeros(2, 3, 4), torch.ones(2, 3)
LENGTHS = torch.tensor([[2, 1, 0], [3, 0, 0]])
BAD: list[tuple[str, type[Exception], Callable[[], Any]]] = [
    ("hidden_states", ArgumentTypeError, lambda: unpad_input(None, M)),
    ("attention_mask", ArgumentTypeError, lambda: unpad_input(H, [[1, 1, 1]] * 2)),
    ("attention_mask", ArgumentError, lambda: unpad_input(H, M[:, :2])),
    ("attention_mask", ArgumentError, lambda: unpad_input(H, M[..., None])),
    ("attention_mask", ArgumentError, lambda: unpad_input(H, M.to("meta"))),
    ("unused_mask", ArgumentError, lambda: unpad_input(H, M, M[:1])),
    ("indices", ArgumentError, lambda: pad_input(H[0], torch.zeros(3), 2, 3)),
    ("batch", ArgumentError, lambda: pad_input(H[0], torch.arange(3), -2, 3)),
    ("seqlen", ArgumentTypeError, lambda: pad_input(H[0], torch.arange(3), 2, "3")),
    ("seqlen", ArgumentError, lambda: pad_input(H[0], torch.arange(3), 2**16, 2**16)),
    ("hidden_states", ArgumentError, lambda: pad_input(H[0], torch.arange(2), 2, 3)),
    ("values", ArgumentError, lambda: index_put_first_axis(H[0], torch.arange(2), 6)),
    ("first_axis_dim", ArgumentError, lambda: index_put_first_axis(H[0], torch.arange(2), 2**40)),
    ("indices", ArgumentError, lambda: pad_input(H[0], torch.tensor([0, 1, 6]), 2, 3)),
    ("indices", ArgumentError, lambda: pad_input(H[0], torch.tensor([0, 1, -1]), 2, 3)),
    ("indices", ArgumentError, lambda: index_first_axis(H[0], torch.tensor([0, 3]))),
    ("indices", ArgumentError, lambda: index_first_axis(H, torch.zeros(1, 1).long())),
    ("indices", ArgumentError, lambda: index_first_axis_residual(H, torch.ones(2).bool())),
    ("input", ArgumentTypeError, lambda: index_first_axis([1], torch.arange(1))),
    *(
        (
            "attention_mask_in_length",
            ArgumentError,
            lambda lengths=lengths: unpad_input_for_concatenated_sequences(H, lengths),
        )
        for lengths in (LENGTHS + 1, LENGTHS - 1, LENGTHS.float(), LENGTHS[:1])
    ),
]


@pytest.mark.parametrize(("argument", "error", "call"), BAD)
def test_bad_input_is_named(argument: str, error: type[Exception], call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=f"^{argument}: got "):
        call()
