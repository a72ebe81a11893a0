"""A lie that the first call of a kind cannot show is caught all the same, by the call that does.

Either that one is of another kind, or the first one settled nothing, or a probe showed the lie.
"""

from __future__ import annotations

import pytest
import torch

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu._core.ground.settings import verifying
from tests.helpers import telling_calls as calls
from tests.helpers.old_torch import TORCH
from tests.helpers.telling_calls import (
    CALLS,
    Call,
    alike,
    cached,
    dense,
    errors,
    lost,
    normed,
    packed,
    rotated,
    sunk,
    sunk_pages,
)

LATER: dict[str, tuple[Call, Call]] = {
    "window sides exchanged": (
        dense(window_size=(7, 7)),
        CALLS["flash_attn_func(window)"],
    ),
    "scale of the headdim, whatever is given": (
        dense(),
        CALLS["flash_attn_func(softmax_scale)"],
    ),
    "dropout keeps what it should drop": (
        dense(dropout_p=0.5),
        CALLS["flash_attn_func(dropout_p)"],
    ),
    "alibi of the next head": (
        dense(slopes=torch.full((4,), 0.1)),
        CALLS["flash_attn_func(alibi)"],
    ),
    "sink of the next head": (sunk(False, (0.5, 0.5)), sunk(False)),
    "sinks of the first key head for all": (
        sunk_pages(torch.full((4,), 2.0)),
        CALLS["a sink over pages"],
    ),
    "sinks of the first key head for all, that repeat": (
        sunk_pages(torch.tensor([4.0, 2.0, 4.0, 2.0])),
        CALLS["a sink over pages"],
    ),
    "sink scaled as scores are": (
        sunk_pages(calls.SINKS, softmax_scale=1.0),
        CALLS["a sink over pages"],
    ),
    "values of the next key head": (dense(change=calls.alike_values), dense()),
    "partial tile of keys dropped": (dense((40, 256)), dense((40, 300))),
    "last row of each tile repeats the one before": (dense((12, 12)), dense((40, 40))),
    "lengths of queries taken from keys": (
        packed(calls.MANY, calls.MANY),
        packed(calls.MANY, calls.OTHERS),
    ),
    "pages shifted from the second on": (cached(filled=20), cached(filled=70)),
    "norm without weight": (normed(True, False, new=True), normed(True, False)),
    "norm without bias": (normed(False, new=True), normed(False)),
    "rotary tables one row late": (rotated(tokens=1), rotated()),
    "cross entropy of the next class": (lost(False, ignored=True), lost(False)),
}


@pytest.mark.parametrize("lie", LATER)
def test_a_lie_is_caught_by_a_later_call(
    lie: str, npu: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    first, later = LATER[lie]
    lie = lie.removesuffix(", that repeat")

    def run() -> list[list[torch.Tensor]]:
        torch.npu.manual_seed(0)
        return [first(npu), later(npu)]

    with verifying("off"):
        honest = run()
        with virtual_ascend.lying(lie):
            lied = run()
    assert alike(lied[0], honest[0]) or "dropout" in lie, "the first call shows the lie"
    shown = not alike(lied[1], honest[1])
    if not shown and TORCH < (2, 9):
        pytest.skip("this torch_npu lacks the operator that would lie: the call is composed")
    assert shown, "the later call does not show the lie"
    with verifying("compose"), virtual_ascend.lying(lie):
        served = run()
    assert errors(caplog)
    assert alike(served[1], honest[1]) or "dropout" in lie
