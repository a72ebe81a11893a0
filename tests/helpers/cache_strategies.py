"""Random cache calls for hypothesis."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from tests.helpers.cache_calls import CacheProblem
from tests.helpers.strategies import windows

ROWS = (1, 7, 16, 40, 48, 64)
PAGES = (5, 16, 48, 128, 256)
HEADDIMS = (64, 128, 64, 128, 8, 80)


@st.composite
def options(draw: st.DrawFn, rotary: bool) -> dict:
    """The arguments that are not tensors; those at their defaults are left out now and then."""
    found = {
        "causal": draw(st.booleans()),
        "return_softmax_lse": draw(st.booleans()),
        "num_splits": draw(st.sampled_from((0, 1, 3))),
        "softmax_scale": draw(st.none() | st.floats(0.01, 1.0)),
        "softcap": draw(st.sampled_from((0.0, 0.0, 0.0, 3.0))),
    }
    window = draw(windows())
    if window != (-1, -1):
        found["window_size"] = window
    if rotary:
        found["rotary_interleaved"] = draw(st.booleans())
    return found


@st.composite
def cache_problems(draw: st.DrawFn) -> CacheProblem:
    """Any legal call, native on an Ascend or not."""
    paged = draw(st.booleans())
    size = draw(st.sampled_from(PAGES if paged else ROWS))
    max_blocks = draw(st.integers(1, 2 if size >= 128 else 4)) if paged else None
    capacity = size * (max_blocks or 1)
    batch = draw(st.integers(1, 4))
    new = draw(st.none() | st.integers(0, min(3, capacity)))
    given = draw(st.sampled_from(("int", "cpu", "device") + (("none",) if new is None else ())))
    lengths = _lengths(draw, batch, capacity - (new or 0), capacity, given)
    headdim = draw(st.sampled_from(HEADDIMS))
    rotary = headdim if new is not None and draw(st.booleans()) else 0
    return CacheProblem(
        lengths=lengths,
        seqlen_cache=size,
        max_blocks=max_blocks,
        seqlen_q=draw(st.integers(1, 5)),
        seqlen_new=new,
        nheads_k=draw(st.integers(1, 2)),
        group=draw(st.sampled_from((1, 1, 3))),
        headdim=headdim,
        dtype=draw(st.sampled_from((torch.float16, torch.bfloat16, torch.float32))),
        given=given,
        layout=draw(st.sampled_from(("contiguous", "contiguous", "interleaved", "sliced"))),
        strided=draw(st.booleans()),
        rows=None if paged else draw(st.none() | _rows(batch, distinct=new is not None)),
        leftpad=_leftpad(draw, lengths, new or 0),
        shared=paged and new is None and draw(st.sampled_from((False, False, True))),
        rotary_dim=rotary and draw(st.sampled_from((rotary, rotary // 4 * 2))),
        alibi=draw(st.sampled_from(("none", "none", "none", "head", "sequence"))),
        options=draw(options(rotary > 0)),
        seed=draw(st.integers(0, 2**31)),
    )


def _lengths(
    draw: st.DrawFn, batch: int, longest: int, capacity: int, given: str
) -> tuple[int, ...]:
    if given == "none":
        return (capacity,) * batch
    one = st.one_of(st.integers(0, longest), st.sampled_from((0, longest)))
    if given == "int":
        return (draw(one),) * batch
    return tuple(draw(one) for _ in range(batch))


def _rows(batch: int, distinct: bool) -> st.SearchStrategy[tuple[int, ...]]:
    row = st.integers(0, batch + 1)
    return st.lists(row, min_size=batch, max_size=batch, unique=distinct).map(tuple)


def _leftpad(draw: st.DrawFn, lengths: tuple[int, ...], new: int) -> tuple[int, ...] | None:
    """Mostly none; now and then it reaches into the new keys, or past them."""
    if draw(st.sampled_from((True, True, False))):
        return None
    return tuple(draw(st.integers(0, length + new)) for length in lengths)
