"""apply_rotary against the reference: every combination of options, in place and not."""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu._core.ground.memory import forget_lengths
from flash_attn_npu.errors import ArgumentError, ArgumentTypeError
from flash_attn_npu.ops.triton.rotary import apply_rotary
from tests.helpers.rotation_reference import assert_rounded_once, batch_positions, rotated, tables

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
POISON = 7.0


class Case(NamedTuple):
    dtype: torch.dtype
    table_dtype: torch.dtype
    lengths: list[int]
    packed: bool
    nheads: int
    half: int
    rest: int
    offsets: int | list[int]
    offset_dtype: torch.dtype
    offsets_on_host: bool
    max_seqlen: str
    interleaved: bool
    conjugate: bool
    inplace: bool
    strided: bool
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    packed = draw(st.booleans())
    batch = draw(st.integers(1, 3))
    one_length = st.integers(0, 5)
    lengths = (
        draw(st.lists(one_length, min_size=batch, max_size=batch))
        if packed
        else [draw(one_length)] * batch
    )
    offset = st.integers(0, 4)
    dtype = draw(st.sampled_from(DTYPES))
    return Case(
        dtype,
        draw(st.sampled_from((dtype, torch.float32))),
        lengths,
        packed,
        draw(st.integers(1, 3)),
        draw(st.integers(1, 4)),
        draw(st.integers(0, 3)),
        draw(st.one_of(offset, st.lists(offset, min_size=batch, max_size=batch))),
        draw(st.sampled_from((torch.int32, torch.int64))),
        draw(st.booleans()),
        draw(st.sampled_from(("none", "int", "tensor"))),
        *(draw(st.booleans()) for _ in range(4)),
        draw(st.integers(0, 2**16)),
    )


def embedded(x: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of x inside a larger tensor full of poison, and that tensor."""
    whole = torch.full([size + 2 for size in x.shape], POISON, dtype=x.dtype, device=x.device)
    view = whole[tuple(slice(1, -1) for _ in x.shape)]
    view.copy_(x)
    return view, whole


def arguments(case: Case, device: torch.device) -> tuple[dict[str, Any], list[int]]:
    """The options of the call, and the position of each token."""
    offsets, listed = case.offsets, case.offsets
    if isinstance(listed, int):
        listed = [listed] * len(case.lengths)
    else:
        where = "cpu" if case.offsets_on_host else device
        offsets = torch.tensor(case.offsets, dtype=case.offset_dtype, device=where)
    options = {
        "seqlen_offsets": offsets,
        "interleaved": case.interleaved,
        "inplace": case.inplace,
        "conjugate": case.conjugate,
    }
    if case.packed:
        cumulative = list(accumulate(case.lengths, initial=0))
        options["cu_seqlens"] = torch.tensor(cumulative, dtype=case.offset_dtype, device=device)
        longest = max(case.lengths)
        if case.max_seqlen != "none":
            options["max_seqlen"] = (
                torch.tensor(longest) if case.max_seqlen == "tensor" else longest
            )
    positions = [
        start + i for start, size in zip(listed, case.lengths, strict=True) for i in range(size)
    ]
    return options, positions


def check(case: Case, device: torch.device) -> None:
    torch.manual_seed(case.seed)
    headdim = 2 * case.half + case.rest
    total = sum(case.lengths)
    original = torch.randn(total, case.nheads, headdim, dtype=torch.float64).to(case.dtype)
    shape = (len(case.lengths), case.lengths[0], case.nheads, headdim)
    x = original.to(device) if case.packed else original.to(device).view(shape)
    x, whole = embedded(x) if case.strided else (x.clone(), None)
    cos, sin = tables(9, case.half, case.table_dtype)
    options, positions = arguments(case, device)
    out = apply_rotary(x, cos.to(device), sin.to(device), **options)

    assert out.shape == x.shape
    assert out.dtype == case.dtype
    exact = rotated(original, cos, sin, positions, case.interleaved, case.conjugate)
    largest = float(original.abs().max()) if total else 0.0
    assert_rounded_once(out.reshape(original.shape), exact, largest)
    if case.inplace:
        assert out is x
    else:
        assert out.is_contiguous()
        assert torch.equal(x.cpu().reshape(original.shape), original)
    kept = out.reshape(original.shape)[..., 2 * case.half :].cpu()
    assert torch.equal(kept, original[..., 2 * case.half :])
    if whole is not None:
        x.fill_(POISON)
        assert bool((whole == POISON).all())


@pytest.mark.parametrize(
    "effort", [pytest.param(1, id="quick"), pytest.param(10, marks=pytest.mark.sweep, id="sweep")]
)
def test_every_combination(device: torch.device, effort: int) -> None:
    @settings(max_examples=120 * effort, deadline=None)
    @given(cases())
    def run(case: Case) -> None:
        check(case, device)

    run()


@pytest.mark.parametrize("interleaved", [False, True])
def test_q_and_k_of_a_packed_qkv_in_one_view(device: torch.device, interleaved: bool) -> None:
    qkv = torch.randn(7, 3, 2, 8).to(device)
    before = qkv.cpu().clone()
    cos, sin = tables(9, 4)
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32, device=device)
    qk = qkv[:, :2].view(7, 4, 8)
    apply_rotary(qk, cos.to(device), sin.to(device), 0, cu_seqlens, 4, interleaved, inplace=True)
    exact = rotated(before[:, :2].reshape(7, 4, 8), cos, sin, [0, 1, 2, 0, 1, 2, 3], interleaved)
    assert_rounded_once(qkv[:, :2].reshape(7, 4, 8), exact, 5.0)
    assert torch.equal(qkv[:, 2].cpu(), before[:, 2])


def test_transposed_and_expanded_inputs_give_contiguous_outputs(device: torch.device) -> None:
    cos, sin = tables(6, 4)
    x = torch.randn(2, 3, 6, 8).to(device).transpose(1, 2)
    expanded = torch.randn(2, 6, 1, 8).to(device).expand(2, 6, 3, 8)
    for tensor in (x, expanded, x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)):
        out = apply_rotary(tensor, cos.to(device), sin.to(device))
        assert out.is_contiguous()
        exact = rotated(tensor.flatten(0, 1), cos, sin, batch_positions(2, 6, 0), False)
        assert_rounded_once(out.flatten(0, 1), exact, 5.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_conjugate_undoes_it(device: torch.device, dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 3, 12).to(device, dtype)
    cos, sin = (table.to(device) for table in tables(5, 5))
    back = apply_rotary(apply_rotary(x, cos, sin), cos, sin, conjugate=True)
    tolerance = 4 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-6
    torch.testing.assert_close(back, x, rtol=tolerance, atol=tolerance)


def test_gradients_of_everything_in_float64() -> None:
    x = torch.randn(2, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    cos, sin = (t.requires_grad_() for t in tables(5, 2, torch.float64))
    offsets = torch.tensor([2, 0])
    for interleaved in (False, True):
        assert torch.autograd.gradcheck(
            lambda *a, i=interleaved: apply_rotary(*a, offsets, interleaved=i), (x, cos, sin)
        )


def test_lengths_cost_one_copy_per_tensor_and_offsets_none(npu: torch.device) -> None:
    forget_lengths()
    x, (cos, sin) = torch.randn(9, 2, 8).to(npu), (t.to(npu) for t in tables(9, 4))
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32).to(npu)
    offsets = torch.tensor([1, 3]).to(npu)
    with virtual_ascend.record() as rec:
        for _ in range(3):
            apply_rotary(x, cos, sin, offsets, cu_seqlens, torch.tensor(5).to(npu))
            apply_rotary(x.view(1, 9, 2, 8), cos, sin, torch.zeros_like(offsets[:1]))
    assert [copy.shape for copy in rec.device_to_host] == [(3,)]


def test_positions_beyond_the_tables_are_never_invented(device: torch.device) -> None:
    x, (cos, sin) = torch.randn(2, 4, 1, 4).to(device), (t.to(device) for t in tables(6, 2))
    for offsets in ([0, 3], [-1, 0]):
        with pytest.raises((IndexError, RuntimeError, ArgumentError)):
            apply_rotary(x, cos, sin, torch.tensor(offsets, device=device))


GOOD = {"x": torch.zeros(2, 4, 3, 8), "cos": torch.zeros(6, 4), "sin": torch.zeros(6, 4)}
PACKED = {**GOOD, "x": torch.zeros(8, 3, 8), "cu_seqlens": torch.tensor([0, 4, 8]).int()}
BAD = [
    ("x", ArgumentTypeError, {**GOOD, "x": [1.0]}),
    ("x", ArgumentError, {**GOOD, "x": torch.zeros(4, 3, 8)}),
    ("x", ArgumentError, {**GOOD, "x": torch.zeros(2, 4, 3, 8, dtype=torch.int32)}),
    ("x", ArgumentError, {**PACKED, "x": torch.zeros(3, 8)}),
    (
        "cos",
        ArgumentError,
        {**GOOD, "x": torch.zeros(2, 7, 3, 8), "seqlen_offsets": torch.ones(2).int()},
    ),
    ("cos", ArgumentTypeError, {**GOOD, "cos": None}),
    ("cos", ArgumentError, {**GOOD, "cos": torch.zeros(6, 5)}),
    ("cos", ArgumentError, {**GOOD, "cos": torch.zeros(1, 6, 4)}),
    ("cos", ArgumentError, {**GOOD, "cos": torch.zeros(6, 4, device="meta")}),
    ("sin", ArgumentError, {**GOOD, "sin": torch.zeros(5, 4)}),
    ("sin", ArgumentError, {**GOOD, "sin": torch.zeros(6, 4, dtype=torch.int64)}),
    ("seqlen_offsets", ArgumentError, {**GOOD, "seqlen_offsets": 3}),
    ("seqlen_offsets", ArgumentError, {**GOOD, "seqlen_offsets": -1}),
    ("seqlen_offsets", ArgumentError, {**GOOD, "seqlen_offsets": torch.tensor([0, 3])}),
    ("seqlen_offsets", ArgumentError, {**GOOD, "seqlen_offsets": torch.tensor([0, 1, 2])}),
    ("seqlen_offsets", ArgumentError, {**GOOD, "seqlen_offsets": torch.tensor([0.0, 1.0])}),
    ("seqlen_offsets", ArgumentTypeError, {**GOOD, "seqlen_offsets": 1.0}),
    ("seqlen_offsets", ArgumentError, {**PACKED, "seqlen_offsets": 3}),
    ("seqlen_offsets", ArgumentError, {**PACKED, "seqlen_offsets": torch.tensor([3, 0])}),
    ("cu_seqlens", ArgumentTypeError, {**PACKED, "cu_seqlens": [0, 4, 8]}),
    ("cu_seqlens", ArgumentError, {**PACKED, "cu_seqlens": torch.tensor([0.0, 8.0])}),
    ("cu_seqlens", ArgumentError, {**PACKED, "cu_seqlens": torch.tensor([0, 4]).int()}),
    ("max_seqlen", ArgumentError, {**PACKED, "max_seqlen": 3}),
    ("max_seqlen", ArgumentTypeError, {**PACKED, "max_seqlen": 4.0}),
]


@pytest.mark.parametrize(("argument", "error", "call"), BAD)
def test_bad_input_is_named_and_has_no_effect(
    argument: str, error: type[Exception], call: dict[str, Any]
) -> None:
    x = call["x"]
    before = x.clone() if isinstance(x, Tensor) else x
    with pytest.raises(error, match=f"^{argument}: got "):
        apply_rotary(**call, inplace=True)
    if isinstance(x, Tensor):
        assert torch.equal(x, before)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_an_input_that_begins_at_an_odd_place(
    interleaved: bool, inplace: bool, device: torch.device
) -> None:
    x, (cos, sin) = torch.randn(2, 5, 3, 8), (torch.rand(5, 4), torch.rand(5, 4))
    odd = torch.empty(x.numel() + 1, device=device)[1:].view(x.shape).copy_(x)
    turned = apply_rotary(
        odd, cos.to(device), sin.to(device), interleaved=interleaved, inplace=inplace
    )
    plain = apply_rotary(x.clone(), cos, sin, interleaved=interleaved)
    torch.testing.assert_close(turned.cpu(), plain, atol=1e-6, rtol=1e-6)
    assert (turned.data_ptr() == odd.data_ptr()) is inplace
