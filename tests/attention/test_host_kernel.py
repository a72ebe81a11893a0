"""Torch's own flash attention for a CPU: every option, by many small steps and by one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_attn_npu import flash_attn_func, flash_attn_varlen_func
from flash_attn_npu._core.kernels.bands import Band
from flash_attn_npu._core.kernels.host import attention, chunks, flash, parts, steps, strips
from flash_attn_npu._core.problems.results import Inputs
from flash_attn_npu._core.table.attention import HOST
from flash_attn_npu._integrations.stand_ins import npu_flash_attn_func
from tests.helpers.old_torch import GROUP, NEEDS_SHARED_HEADS
from tests.helpers.one_thread import one_thread
from tests.helpers.peak_bytes import PeakBytes
from tests.helpers.property_harness import EFFORTS
from tests.helpers.strategies import Problem, dense_problems, varlen_problems
from tests.helpers.tile_cases import Case, assert_case

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
CPU = torch.device("cpu")
FIELDS = {"dtype": st.sampled_from((FP32, FP32, BF16, FP16, FP64))}


@contextmanager
def steps_of(rows: int) -> Iterator[None]:
    """Blocks of so many rows, biases of one head at a time, copies of two blocks and a row."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "SMALLEST_BLOCK", rows)
        patch.setattr(steps, "LARGEST_BLOCK", rows)
        patch.setattr(flash, "COPIED_BYTES", 1)
        patch.setattr(parts, "COPIED_BYTES", 1)
        patch.setattr(parts, "TOGETHER_BYTES", 1)
        patch.setattr(parts, "PIECE_BYTES", 1)
        patch.setattr(parts, "SMALLEST_PIECE", 2 * rows + 1)
        patch.setattr(parts, "BIAS_BYTES", 1)
        yield


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of q of each launch of the forward and the backward."""
    seen: list[tuple[int, ...]] = []
    for name, place in (("_forward", 0), ("_backward", 1)):
        original = getattr(flash, name)

        def launched(*args, place=place, original=original, **options):
            seen.append(tuple(args[place].shape))
            return original(*args, **options)

        monkeypatch.setattr(flash, name, launched)
    return seen


@st.composite
def bands(draw: st.DrawFn) -> Band:
    side = st.one_of(st.none(), st.integers(0, 14))
    return Band(draw(st.integers(0, 12)), draw(st.integers(0, 12)), draw(side), draw(side))


@settings(max_examples=300)
@given(band=bands(), streams=st.sampled_from((0, 2)), rows=st.sampled_from((1, 3, 64)))
def test_steps_see_what_the_band_shows(band, streams, rows):
    """Each visible pair once, and no other that neither a bias nor the kernel hides."""
    zero = torch.zeros(())
    everything = (0, band.seqlen_q), (0, band.seqlen_k)
    hidden = band.hidden(*everything, zero)
    visible = torch.ones(band.seqlen_q, band.seqlen_k).bool()
    visible = visible if hidden is None else visible & ~hidden

    def by_pieces(band: Band, streams: int) -> Iterator[steps.Step]:
        for place, found in steps.pieces(band, streams, 2 * rows + 1):
            for step in found:
                assert place[0] <= step.rows[0] < step.rows[1] <= place[1]
                yield step

    with steps_of(rows):
        for way in (steps.forward_steps, steps.backward_steps, by_pieces):
            seen = torch.zeros(band.seqlen_q, band.seqlen_k)
            for step in way(band, streams):
                count = torch.ones(step.rows[1] - step.rows[0], step.keys[1] - step.keys[0])
                assert count.numel()
                bias = band.bias(step.rows, step.keys, None, zero) if step.biased else None
                count = count if bias is None else count.masked_fill(bias == -math.inf, 0)
                # torch's causal is aligned at the top left
                count = count.tril() if step.causal else count
                seen[slice(*step.rows), slice(*step.keys)] += count
            assert torch.equal(seen, visible.float())


@st.composite
def cases(draw: st.DrawFn) -> Case:
    packed = draw(st.booleans())
    return Case(
        draw(varlen_problems(**FIELDS) if packed else dense_problems(**FIELDS)),
        packed,
        slopes=draw(st.sampled_from(("", "", "heads", "sequences"))),
        sink=draw(st.booleans()),
        loud=draw(st.sampled_from((1.0, 4.0, -4.0, 10.0, -10.0))),
    )


@pytest.mark.parametrize("effort", EFFORTS)
def test_any_options_by_many_steps(effort):
    @settings(max_examples=100 * effort)
    @given(case=cases(), rows=st.sampled_from((2, 5, 16)))
    def run(case: Case, rows: int) -> None:
        with steps_of(rows):
            assert_case(case, CPU)

    run()


@pytest.mark.parametrize("needs_lse", [False, True])
def test_a_backward_sees_the_scores_of_the_forward(needs_lse):
    """A single key has all of the weight, however large its score, and its scale no power of 2."""
    q, k, v = (torch.randn(2, 35, 3, 40) * 8 for _ in range(3))
    v.requires_grad_()
    q.requires_grad_()
    options = {"softmax_scale": 0.9415, "window_size": (0, 0), "return_attn_probs": needs_lse}
    out = flash_attn_func(q, k, v, **options)
    dout = torch.randn_like(v)
    (dv,) = torch.autograd.grad(out[0] if needs_lse else out, v, dout)
    assert torch.equal(dv, dout)
    # one launch, whose gradient is torch's
    (dv,) = torch.autograd.grad(flash_attn_func(q, k[:, :1], v[:, :1], softmax_scale=0.3), v, dout)
    torch.testing.assert_close(dv[:, 0], dout.sum(1), rtol=1e-6, atol=1e-5)


SMALL = Problem(((21, 37), (37, 21)), nheads_k=2, group=GROUP, headdim=16)
OPTIONS = {
    "plain": {},
    "rising": {"loud": 10.0},
    "alibi": {"slopes": "heads"},
    "alibi-of-sequences": {"slopes": "sequences"},
    "sink": {"sink": True, "loud": 4.0},
    "sink-alibi": {"sink": True, "slopes": "sequences", "loud": -4.0},
}
BANDS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (11, 5)},
    "causal-window": {"causal": True, "window_size": (11, 0)},
    "open-to-the-right": {"window_size": (3, -1)},
}


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "varlen"])
@pytest.mark.parametrize("band", BANDS.values(), ids=BANDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_option(packed, band, options, launches):
    seqlens = SMALL.seqlens if packed else ((21, 37),) * 2
    for dtype in (FP32, BF16, FP64):
        problem = replace(SMALL, seqlens=seqlens, dtype=dtype, **band)
        for rows in (8, 64):
            with steps_of(rows):
                assert_case(Case(problem, packed, **options), CPU)
    assert launches


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize(
    ("seqlens", "options"),
    [
        (((1100, 1100),), {"causal": True}),
        (((520, 1300),), {"causal": True}),
        (((520, 1300),), {"causal": True, "window_size": (300, 0)}),
        (((1100, 600),), {"window_size": (-1, 100)}),
    ],
    ids=["causal", "fewer-queries", "window", "more-queries"],
)
def test_lengths_that_the_kernel_cuts_itself(seqlens, options, dtype):
    """It adds up dk and dv of blocks of 256 rows in the dtype that it is given."""
    problem = Problem(seqlens, nheads_k=1, group=2, headdim=16, dtype=dtype, **options)
    assert_case(Case(problem, packed=False), CPU)


def leaves(*shape: int, dtype: torch.dtype = FP32) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("lengths", [[32] * 64, [3, 5] * 32], ids=["side-by-side", "alternating"])
def test_launches_do_not_grow_with_short_sequences(launches, lengths, dtype):
    cu = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    q, k, v = leaves(cu[-1], 2, 16, dtype=dtype)
    out = flash_attn_varlen_func(q, k, v, cu, cu, 32, 32, causal=True)
    assert len(launches) == len(set(lengths))
    out.sum().backward()
    assert len(launches) <= 2 * len(set(lengths))


def test_a_window_is_computed_where_it_is(launches):
    q, k, v = leaves(1, 4096, 1, 8)
    flash_attn_func(q, k, v, causal=True, window_size=(256, 0)).sum().backward()
    assert len(launches) == 2 * 64
    assert {shape[2] for shape in launches} == {64}


@NEEDS_SHARED_HEADS
def test_one_query_of_heads_that_share_keys_is_one_product(launches):
    q, k = torch.randn(3, 1, 8, 16), torch.randn(3, 40, 2, 16)
    flash_attn_func(q, k, k)
    assert launches == [(3, 2, 4, 16)]


@pytest.mark.parametrize("slopes", [False, True], ids=["plain", "alibi"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_memory_at_64k_tokens_is_that_of_inputs_and_outputs(dtype, slopes):
    """A window, whose time is linear too: what is held beside is bounded, not grown."""
    seqlen, heads, headdim = 1 << 16, 4, 32
    heads_k = 1 if GROUP > 1 else heads
    q = torch.randn(1, heads, seqlen, headdim, dtype=dtype)
    k = torch.randn(1, heads_k, seqlen, headdim, dtype=dtype)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3])
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(k)
    given = torch.rand(1, heads) if slopes else None
    rule = flash.Rule(Band(seqlen, seqlen, 128, 0), headdim**-0.5, given)
    with PeakBytes() as peak:
        flash.attend((q, k, k), out, lse, rule)
    tensors = 2 * (q.nbytes + k.nbytes)
    assert peak.peak <= tensors + parts.BIAS_BYTES + 4 * parts.COPIED_BYTES
    with PeakBytes() as peak:
        flash.attend_backward((q, k, k), (q, out, lse), (dq, dk, dv), rule)
    assert peak.peak <= 4 * tensors + parts.BIAS_BYTES
    assert all(x.isfinite().all() for x in (out, lse, dq, dk, dv))


@pytest.fixture
def a_sixteenth(monkeypatch: pytest.MonkeyPatch) -> None:
    """4096 tokens are to what may be held at once as 64k are."""
    for module, names in (
        (attention, ("COPIED_BYTES", "TOGETHER_BYTES")),
        (chunks, ("TOGETHER_BYTES",)),
        (flash, ("COPIED_BYTES",)),
        (parts, ("COPIED_BYTES", "PIECE_BYTES", "SMALLEST_PIECE", "LARGEST_PIECE", "BIAS_BYTES")),
        (parts, ("TOGETHER_BYTES",)),
        (steps, ("BIAS_ELEMENTS",)),
        (strips, ("STRIP_BYTES", "KEPT_BYTES", "TILE_ELEMENTS")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, getattr(module, name) // 16)


@pytest.mark.parametrize("slopes", [False, True], ids=["plain", "alibi"])
@pytest.mark.parametrize("bound", [(None, None), (None, 0), (300, 0)], ids=str)
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_one_long_head_is_held_no_more_than_twice(a_sixteenth, dtype, bound, slopes):
    """With inputs and outputs: there is no other head beside which its float32 copies are small."""
    q, k, v, dout, out, dq, dk, dv = torch.randn(8, 1, 1, 4096, 64).to(dtype)
    lse = torch.empty(q.shape[:3])
    given = torch.rand(1, 1) if slopes else None
    rule = flash.Rule(Band(4096, 4096, *bound), 0.125, given, told=True)
    with PeakBytes() as peak:
        flash.attend((q, k, v), out, lse, rule)
    assert peak.peak <= 4 * q.nbytes
    with one_thread(), PeakBytes() as peak:
        flash.attend_backward((q, k, v), (dout, out, lse), (dq, dk, dv), rule)
    assert peak.peak <= 8 * q.nbytes


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_a_sink_is_held_no_more_than_twice(a_sixteenth, monkeypatch, dtype):
    """Inputs and outputs; what it rescales is not rounded yet, and is rescaled where it lies."""
    q, k, v = torch.randn(3, 1, 4096, 1, 64).to(dtype)
    sink, asked, groups = torch.ones(1), [], attention._groups

    def grouped(problem):
        asked.append(problem)
        return groups(problem)

    monkeypatch.setattr(attention, "_groups", grouped)
    npu_flash_attn_func(q, k, v, causal=True, s_aux=sink)
    with PeakBytes() as peak:
        attention.forward(asked[0], Inputs(q, k, v, None, sink))
    assert peak.peak <= 5 * q.nbytes


def test_the_report_names_it(reporting_of_one_call):
    assert reporting_of_one_call == [HOST]


@pytest.fixture
def reporting_of_one_call() -> list[str]:
    from flash_attn_npu import reporting

    with reporting() as report:
        q, k, v = (x.detach() for x in leaves(1, 4, 2, 8))
        flash_attn_func(q, k, v)
    return [entry.kernel for entry in report.tallies]


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_copies_of_one_launch_lie_in_one_block(dtype):
    """Of several the C library gives some back to the system after every call."""
    heads, seqlen = 4, 520
    q, k, v = (torch.randn(1, heads, seqlen, 64).to(dtype).transpose(1, 2) for _ in range(3))
    made = []

    def counted(*size: object, empty=torch.empty, **options: object) -> torch.Tensor:
        made.append(empty(*size, **options))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.setattr(torch, "empty", counted)
        out = flash_attn_func(q, k, v)
    assert [x.numel() for x in made if x.dtype == FP32] == [3 * q.numel()]
    # the same as of contiguous tensors, one by one, and inside of vmap
    few = flash_attn_func(*(x.contiguous() for x in (q, k, v)))
    assert torch.equal(out, few)
    both = torch.vmap(lambda q, k: flash_attn_func(q, k, v))(
        torch.stack([q, q]), torch.stack([k, k])
    )
    assert torch.equal(both[0], out)
    assert torch.equal(both[1], out)
