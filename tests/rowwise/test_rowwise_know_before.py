"""Off a card the row-wise table answers for an Ascend that is not there, as the simulated card."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

import flash_attn_npu
from flash_attn_npu._core.ground.absent import Absent
from flash_attn_npu._core.problems.rowwise import Norm
from flash_attn_npu._core.table import choice, rowwise
from flash_attn_npu._core.table.rowwise import TABLE, TORCH
from flash_attn_npu.errors import UnsupportedError
from tests.helpers.decided import is_fused, plans
from tests.helpers.old_torch import like_the_installed
from tests.helpers.rowwise_examples import EXAMPLES

CPU = torch.device("cpu")
ELSEWHERE = {
    "tensors outside an Ascend NPU",
    "Ascend 310P and 200I",
    # what a card that is not there compiles nobody can say
    "jit_compile=True, rotation by pairs or of a rotary_dim other than 128",
}
COMPILED = {
    "RMS norm with gradient under torch.compile": (rowwise.ADD_RMS_NORM, {"needs_grad": True}),
    "torch.compile": (rowwise.ADD_LAYER_NORM, {"rms": False, "bias_dtype": torch.bfloat16}),
}


@pytest.fixture
def there(npu: torch.device) -> Absent:
    return Absent(torch.npu.get_device_name(), like_the_installed())


def test_every_row_has_an_example() -> None:
    # whether one launch does what several do as well is asked of a card alone
    rows = {rule.name for rule in TABLE if "a torch_npu" not in rule.name}
    alone = (rowwise.LOOKED_UP, "exact geglu", rowwise.CONSISTENT)
    rows = {name for name in rows if not name.startswith(alone)}
    assert rows - ELSEWHERE - set(COMPILED) <= set(EXAMPLES)


@pytest.mark.parametrize("row", EXAMPLES)
def test_the_verdict_off_a_card_is_that_of_the_card(
    row: str, npu: torch.device, there: Absent, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_card = plans(EXAMPLES[row], npu, monkeypatch)
    away = plans(EXAMPLES[row], CPU, monkeypatch)
    told = [choice.on_ascend(plan.problem, there) for plan in away]
    assert [(one.kernel, one.fused) for one in told] == [(p.name, is_fused(p)) for p in on_card]
    assert on_card
    for plan, one in zip(on_card, told, strict=True):
        assert plan.reasons == one.reasons


@pytest.mark.parametrize("row", COMPILED)
def test_so_it_is_under_torch_compile(row: str, npu: torch.device, there: Absent) -> None:
    operator, changed = COMPILED[row]
    options: dict[str, Any] = dict.fromkeys(
        ("zero_centered", "scaled", "dropout", "buffers", "needs_grad", "empty"), False
    )
    options |= {"branches": 1, "outputs": 1, "rms": True, "bias_dtype": None, "compiling": True}
    options |= dict.fromkeys(("dtype", "out_dtype", "weight_dtype"), torch.bfloat16)
    options |= {"residual_dtype": torch.bfloat16, "function": "layer_norm_fn"}
    on_card, away = (Norm(device=device, **{**options, **changed}) for device in (npu, CPU))
    [rule] = [rule for rule in TABLE if rule.name == row]
    assert rule.refused[operator] in choice.refusals(operator, on_card)
    plan, told = choice._decide(on_card), choice.on_ascend(away, there)
    assert (plan.name, plan.reasons) == (told.kernel, told.reasons)
    assert told.fused
    assert told.kernel not in (operator, TORCH)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_policy_refuses_what_the_report_calls_composed(name: str) -> None:
    with flash_attn_npu.reporting() as report:
        EXAMPLES[name](CPU)
    told = [entry.on_ascend for entry in report.tallies]
    assert all(told)
    composed = any("composed" in one and "nothing to compute" not in one for one in told)
    refused = pytest.raises(UnsupportedError, match="fallback policy `ascend")
    with flash_attn_npu.fallback("ascend"), refused if composed else nullcontext():
        EXAMPLES[name](CPU)
