"""The backward of long bfloat16 on one thread of a CPU: strips of any size, in one block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_attn_npu import flash_attn_func
from flash_attn_npu._core.ground.processor import multiplies_bf16
from flash_attn_npu._core.kernels.bands import Band
from flash_attn_npu._core.kernels.host import flash, strips
from tests.helpers.one_thread import one_thread
from tests.helpers.peak_bytes import PeakBytes
from tests.helpers.property_harness import EFFORTS
from tests.helpers.strategies import dense_problems, varlen_problems
from tests.helpers.tile_cases import Case, assert_case

BF16, CPU = torch.bfloat16, torch.device("cpu")
NEEDS_BF16 = pytest.mark.skipif(not multiplies_bf16(), reason="strips are for such a CPU only")


def poisoned(*size: object, made=torch.empty, **options: object) -> torch.Tensor:
    """torch.empty, but that bytes are those of NaN in every dtype."""
    found = made(*size, **options)
    return found.fill_(255) if found.dtype == torch.uint8 else found


@contextmanager
def strips_of(keys: int, rows: int, kept: int = 12 << 20) -> Iterator[None]:
    """Every backward of bfloat16 by strips of so many keys, tiles of rows, few heads together."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash, "LONG", 1)
        patch.setattr(strips, "STREAM_ROWS", 3 * rows)
        patch.setattr(strips, "SMALLEST_BLOCK", keys)
        patch.setattr(strips, "LARGEST_CUT", keys)
        patch.setattr(strips, "LARGEST_BLOCK", keys)
        patch.setattr(strips, "TILE_ELEMENTS", keys * rows)
        patch.setattr(strips, "KEPT_BYTES", kept)
        patch.setattr(torch, "empty", poisoned)
        with one_thread():
            yield


@st.composite
def plain_cases(draw: st.DrawFn) -> Case:
    packed, fields = draw(st.booleans()), {"dtype": st.just(BF16)}
    problem = draw(varlen_problems(**fields) if packed else dense_problems(**fields))
    sink, loud = draw(st.booleans()), draw(st.sampled_from((1.0, 4.0, -4.0, 10.0, -10.0)))
    return Case(problem, packed, sink=sink, loud=loud)


@NEEDS_BF16
@pytest.mark.parametrize("effort", EFFORTS)
def test_any_band_by_strips(effort):
    @settings(max_examples=100 * effort)
    @given(
        case=plain_cases(),
        keys=st.sampled_from((4, 7, 16)),
        rows=st.sampled_from((3, 8)),
        kept=st.sampled_from((0, 12 << 20)),
    )
    def run(case: Case, keys: int, rows: int, kept: int) -> None:
        with strips_of(keys, rows, kept):
            assert_case(case, CPU)

    run()


@NEEDS_BF16
@pytest.mark.parametrize("causal", [False, True])
def test_strips_lie_in_one_piece(causal):
    """Of several pieces the C library gives some back to the system after every call."""
    q, k, out, dk, dv = torch.randn(5, 1, 2, 1024, 16).to(BF16)
    band = Band(1024, 1024, None, 0 if causal else None)
    lse, made = torch.zeros(1, 2, 1024), []

    def counted(*size: object, empty=torch.empty, **options: object) -> torch.Tensor:
        made.append(empty(*size, **options))
        return made[-1]

    with one_thread(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", counted)
        rule = flash.Rule(band, 0.25)
        flash.attend_backward((q, k, k), (out, out, lse), (torch.empty_like(q), dk, dv), rule)
    assert len(made) == 1


@NEEDS_BF16
@pytest.mark.parametrize("shape", [(1, 600, 8), (1, 1200, 4), (8, 600, 1), (3, 520, 3)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_streams_that_strips_do_not_share_evenly(causal, shape):
    q, k, v, dout = (torch.randn(*shape, 16).to(BF16).requires_grad_() for _ in range(4))
    with one_thread():
        found = torch.autograd.grad(flash_attn_func(q, k, v, causal=causal), (q, k, v), dout)
        alone = [
            torch.autograd.grad(flash_attn_func(*one[:3], causal=causal), one[:3], one[3])
            for one in zip(*(x.unflatten(0, (-1, 1)) for x in (q, k, v, dout)), strict=True)
        ]
    for got, parts_of_it in zip(found, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(got, torch.cat(parts_of_it), rtol=0.02, atol=0.02)


@NEEDS_BF16
@pytest.mark.parametrize("rows", [1 << 12, 1 << 13], ids=["kept", "added"])
def test_strips_are_as_large_as_said(rows):
    heads, keys, headdim = 4, 1 << 10, 16
    q, k = torch.randn(1, heads, rows, headdim).to(BF16), torch.randn(1, heads, keys, headdim)
    lse, k = torch.zeros(q.shape[:3]), k.to(BF16)
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(k)
    rule = flash.Rule(Band(rows, keys, None, None), headdim**-0.5)
    with one_thread(), PeakBytes() as peak:
        flash.attend_backward((q, k, k), (q, q, lse), grads, rule)
    kept = 2 * rows * (keys + strips.PAD)
    of_scores = kept if kept <= strips.KEPT_BYTES else strips.STRIP_BYTES
    held = of_scores + strips.STRIP_BYTES + 2 * 4 * strips.TILE_ELEMENTS
    # float32 of q and dq, and what else there is of one head
    assert of_scores < peak.peak <= held + 8 * q[:, 0].nbytes
