"""Composed attention over several tiles of scores, in both directions, with every option."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_attn_npu import flash_attn_func
from flash_attn_npu._core.kernels.bands import Band
from flash_attn_npu._core.kernels.composed import forward, tiles
from tests.helpers import reference
from tests.helpers.composed_only import composed_only
from tests.helpers.peak_bytes import PeakBytes
from tests.helpers.property_harness import EFFORTS
from tests.helpers.strategies import Problem, dense_problems, varlen_problems
from tests.helpers.tile_cases import Case, assert_case, masks, solve, tiles_of

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
CPU = torch.device("cpu")
DTYPES = st.sampled_from((FP32, FP32, BF16, FP16, FP64))
FIELDS = {"dtype": DTYPES, "layouts": st.just(("contiguous",) * 3)}


@pytest.fixture(autouse=True)
def composed() -> Iterator[None]:
    """On a CPU another kernel would serve what has no softcap and no dropout."""
    with composed_only():
        yield


def test_tiles_are_as_small_as_asked():
    """The seam works: 4 x 6 tiles take a product each for their scores and for their output."""
    case = Case(Problem(((16, 24),), headdim=8), packed=False)
    with tiles_of(4), torch.autograd.profiler.profile() as profile:
        solve(case, CPU)
    names = ("aten::bmm", "aten::baddbmm_")
    products = sum(event.count for event in profile.key_averages() if event.key in names)
    # and five for their gradients
    assert products == (2 + 5) * 4 * 6


@st.composite
def cases(draw: st.DrawFn) -> Case:
    packed = draw(st.booleans())
    return Case(
        draw(varlen_problems(**FIELDS) if packed else dense_problems(**FIELDS)),
        packed,
        softcap=draw(st.sampled_from((0.0, 0.0, 0.7, 20.0))),
        slopes=draw(st.sampled_from(("", "", "heads", "sequences"))),
        dropout_p=draw(st.sampled_from((0.0, 0.0, 0.25))),
        sink=draw(st.booleans()),
        loud=draw(st.sampled_from((1.0, 4.0, -4.0, 10.0, -10.0))),
    )


@pytest.mark.parametrize("effort", EFFORTS)
def test_any_options_over_many_tiles(effort):
    @settings(max_examples=100 * effort)
    @given(case=cases(), side=st.sampled_from((4, 7, 16)))
    def run(case: Case, side: int) -> None:
        with tiles_of(side):
            assert_case(case, CPU)

    run()


# one option each, so that a failure names it; 3 x 5 tiles of 8, the last ones cut
SMALL = Problem(((21, 37), (37, 21)), nheads_k=2, group=2, headdim=16)
OPTIONS = {
    "plain": {},
    "rising": {"loud": 10.0},
    "falling": {"loud": -10.0},
    "softcap": {"softcap": 5.0, "loud": 8.0},
    "alibi": {"slopes": "heads"},
    "alibi-of-sequences": {"slopes": "sequences"},
    "dropout": {"dropout_p": 0.3},
    "sink": {"sink": True, "loud": 4.0},
    "sink-dropout-alibi": {"sink": True, "dropout_p": 0.3, "slopes": "sequences", "loud": -4.0},
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
def test_each_option_over_many_tiles(packed, band, options):
    seqlens = SMALL.seqlens if packed else ((21, 37),) * 2
    for dtype in (FP32, BF16, FP64):
        problem = replace(SMALL, seqlens=seqlens, dtype=dtype, **band)
        with tiles_of(8):
            assert_case(Case(problem, packed, **options), CPU)


@pytest.mark.parametrize("loud", [10.0, -10.0])
@pytest.mark.parametrize(
    ("seqlens", "options"),
    [
        (((1100, 1100),), {}),
        (((1100, 1100),), {"causal": True}),
        (((520, 1300),), {"causal": True, "window_size": (600, 0)}),
        (((1100, 600),), {"window_size": (-1, 100)}),
    ],
    ids=["full", "causal", "window", "more-queries"],
)
def test_tiles_of_the_true_size(seqlens, options, loud):
    problem = Problem(seqlens, headdim=16, **options)
    assert_case(Case(problem, packed=False, loud=loud), CPU)


def test_tiles_of_the_true_size_of_many_heads():
    """64 heads leave a tile 128 x 128 scores on the CPU."""
    problem = Problem(((200, 300),), nheads_k=8, group=8, headdim=8, causal=True)
    assert_case(Case(problem, packed=False, softcap=15.0, slopes="heads", loud=9.0), CPU)


def test_tiles_on_ascend(npu):
    problem = Problem(((21, 37), (37, 21)), nheads_k=2, group=2, headdim=16, dtype=FP16)
    for options in (OPTIONS["softcap"], {"softcap": 5.0, "slopes": "sequences", "dropout_p": 0.3}):
        with tiles_of(16):
            assert_case(Case(replace(problem, causal=True), **options), npu)


# more sequences times heads than share a tile: 64
LENGTHS = ((3, 5), (4, 4), (5, 3), (1, 9), (0, 2), (4, 4), (2, 0))
MANY = {
    "dense": (False, Problem(((5, 7),) * 50, nheads_k=2, group=2, headdim=8)),
    "dense-one-head": (False, Problem(((5, 7),) * 150, headdim=8)),
    "dense-many-heads": (False, Problem(((5, 7),) * 3, nheads_k=35, group=2, headdim=8)),
    "varlen": (True, Problem(LENGTHS * 20, nheads_k=2, group=2, headdim=8)),
    "varlen-alike": (True, Problem(((4, 6),) * 150, headdim=8)),
}
MANY_OPTIONS = {
    name: OPTIONS[name] for name in ("plain", "alibi-of-sequences", "dropout", "sink-dropout-alibi")
}


@pytest.mark.parametrize(("packed", "problem"), MANY.values(), ids=MANY)
@pytest.mark.parametrize("options", MANY_OPTIONS.values(), ids=MANY_OPTIONS)
@pytest.mark.parametrize("side", [None, 4], ids=["true-tiles", "small-tiles"])
def test_many_sequences(packed, problem, options, side):
    case = Case(replace(problem, causal=True), packed, **options)
    if side is None:
        assert_case(case, CPU)
    else:
        with tiles_of(side):
            assert_case(case, CPU)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "varlen"])
def test_every_sequence_and_head_has_a_mask_of_its_own(packed):
    """Also where sequences do not share a tile, and in every tile of a sequence."""
    case = Case(Problem(((24, 24),) * 70, group=2), packed, dropout_p=0.5)
    with tiles_of(8):
        kept = torch.stack(masks(case, solve(case, CPU)["s_dmask"]))
    blocks = kept.unflatten(2, (3, 8)).unflatten(4, (3, 8)).transpose(3, 4).flatten(0, 3)
    assert blocks.shape == (70 * 2 * 9, 8, 8)
    assert len({tuple(block.flatten().tolist()) for block in blocks}) == len(blocks)


@pytest.mark.parametrize("dtype", [FP16, BF16, FP32], ids=str)
def test_a_sink_is_not_rounded_again(dtype):
    sink = torch.linspace(-1.0, 4.0, 7).to(dtype)
    q, lse = torch.zeros(1, 7, 1, 5, 8, dtype=dtype), torch.empty(1, 7, 1, 5)
    streams = tiles.Streams(q, q, q, torch.empty_like(q), lse, place=(0,))
    forward.attend(streams, Band(5, 5, None, None), tiles.Scoring(1.0, sink=sink[:, None, None]))
    exact = (5 + sink.double().exp()).log()[None, :, None, None].expand_as(lse)
    reference.assert_lse_close(lse, exact)


def test_a_softcap_far_beyond_its_bounds():
    """Where tanh is 1, and -1, and where a score is no number."""
    q, k = torch.tensor([1e4, -1e4, 1e30, 0.01]), torch.tensor([1.0, -3e4, 0.5])
    v = torch.randn(1, 3, 1, 1)
    q, k = q.view(1, 4, 1, 1).requires_grad_(), k.view(1, 3, 1, 1)
    out = flash_attn_func(q, k, v, softcap=5.0)
    exact = reference.dense(q.double(), k.double(), v.double(), softcap=5.0).out
    torch.testing.assert_close(out, exact.float())
    (dq,) = torch.autograd.grad(out.sum(), q)
    assert dq.isfinite().all()
    assert flash_attn_func(q.detach() * torch.nan, k, v, softcap=5.0).isnan().all()


@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_tiles_use_the_same_memory(dtype, softcap):
    """One head of 1024 tokens are 16 tiles of 256 x 256, whose scores take 256 KiB."""
    q, k, v = (torch.randn(1, 1024, 1, 8).to(dtype).requires_grad_() for _ in range(3))
    with tiles_of(256), PeakBytes() as peak:
        out = flash_attn_func(q, k, v, softcap=softcap)
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert peak.peak < 5 * 4 * 256**2 + 20 * 4 * q.numel()


@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_launches_of_a_tile(softcap):
    """What a card would be asked for, tile by tile, in the forward: at most 12."""
    # not a CPU's, so counted as a card's
    q, out, lse = (torch.empty(1, 2, 1, 64, *last, device="meta") for last in ((8,), (8,), ()))
    streams = tiles.Streams(q, q, q, out, lse, place=(0,))
    scoring = tiles.Scoring(0.3, softcap)

    def launched(keys: int) -> int:
        seen = tiles.Streams(q, q[..., :keys, :], q[..., :keys, :], out, streams.lse, place=(0,))
        with tiles_of(16), torch.autograd.profiler.profile() as profile:
            forward.attend(seen, Band(64, keys, None, None), scoring)
        views = ("view", "slice", "transpose", "as_strided", "empty", "resolve")
        events = [e for e in profile.function_events if e.cpu_parent is None]
        return sum(not any(view in event.name for view in views) for event in events)

    # four rows of tiles, of four tiles and of two
    assert (launched(64) - launched(32)) / 8 <= 12
