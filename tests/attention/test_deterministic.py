"""deterministic=True: the card is asked for it at the backward, and torch's setting is put back."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu import flash_attn_func, flash_attn_varlen_func
from flash_attn_npu import flash_attn_interface as interface
from flash_attn_npu._core.ground.settings import verifying
from tests.helpers import argument_harness as harness
from tests.helpers.strategies import Problem

DENSE = Problem(((9, 13),) * 2, nheads_k=2, group=2, headdim=16, dtype=torch.float16, causal=True)
VARLEN = Problem(((5, 8), (9, 9), (4, 7)), 2, 2, 16, torch.bfloat16, causal=True)
PUBLIC = [(flash_attn_func, DENSE), (flash_attn_varlen_func, VARLEN)]
LOW_LEVEL = [
    (interface._flash_attn_backward, DENSE),
    (interface._flash_attn_varlen_backward, VARLEN),
]
IDS = ["dense", "varlen", "dense-low-level", "varlen-low-level"]
both_layouts = pytest.mark.parametrize(("function", "problem"), PUBLIC, ids=IDS[:2])
every_backward = pytest.mark.parametrize(("function", "problem"), PUBLIC + LOW_LEVEL, ids=IDS)

SETTINGS = {
    "off": (False, False),
    "on": (True, False),
    "warn-only": (True, True),
}


def current() -> tuple[bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS)
def setting(request):
    """Torch's global setting while the test runs."""
    before = current()
    torch.use_deterministic_algorithms(request.param[0], warn_only=request.param[1])
    yield request.param
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def settings_at_launch(monkeypatch, npu):
    """The global setting at each launch of the fused gradient."""
    import torch_npu

    seen = []
    launch = torch_npu.npu_fusion_attention_grad

    def watched(*args, **kwargs):
        seen.append(current())
        return launch(*args, **kwargs)

    monkeypatch.setattr(torch_npu, "npu_fusion_attention_grad", watched)
    return seen


@every_backward
def test_the_gradient_is_launched_deterministically(
    npu, setting, settings_at_launch, function, problem
):
    call = harness.arguments_for(function, problem) | {"deterministic": True}
    harness.run(function, call, npu)
    assert settings_at_launch == [(True, False)]
    assert current() == setting


@every_backward
def test_otherwise_the_setting_is_not_touched(npu, monkeypatch, function, problem):
    def refuse(*args, **kwargs):
        raise AssertionError("the global setting was touched")

    monkeypatch.setattr(torch, "use_deterministic_algorithms", refuse)
    harness.run(function, harness.arguments_for(function, problem), npu)


@every_backward
def test_the_setting_is_put_back_after_an_error(npu, setting, monkeypatch, function, problem):
    import torch_npu

    def fail(*args, **kwargs):
        assert current() == (True, False)
        raise RuntimeError("the card is on fire")

    monkeypatch.setattr(torch_npu, "npu_fusion_attention_grad", fail)
    call = harness.arguments_for(function, problem) | {"deterministic": True}
    # where first calls are compared another kernel would serve
    with verifying("off"), pytest.raises(RuntimeError, match="on fire"):
        harness.run(function, call, npu)
    assert current() == setting


def test_two_threads_do_not_take_the_setting_from_each_other(npu, monkeypatch):
    """The second would find what the first has set, and lose it when the first puts it back."""
    import torch_npu

    function, problem = LOW_LEVEL[0]
    before = current()
    launch = torch_npu.npu_fusion_attention_grad
    inside, both_inside, first_over = (threading.Event() for _ in range(3))
    seen = []

    def watched(*args, **kwargs):
        if not inside.is_set():
            inside.set()
            # the second has a hundred turns to come in too, which it must not
            any(both_inside.wait(0.01) for _ in range(100))
        else:
            both_inside.set()
            assert first_over.wait(60)
        seen.append(current())
        return launch(*args, **kwargs)

    def run(over: threading.Event) -> None:
        call = harness.arguments_for(function, problem) | {"deterministic": True}
        try:
            harness.run(function, call, npu)
        finally:
            over.set()

    monkeypatch.setattr(torch_npu, "npu_fusion_attention_grad", watched)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(run, first_over)
        assert inside.wait(60)
        second = pool.submit(run, threading.Event())
        first.result(), second.result()
    assert seen == [(True, False)] * 2
    assert current() == before


@every_backward
def test_numbers_do_not_depend_on_it(device, function, problem):
    call = harness.arguments_for(function, problem)
    names = ("dq", "dk", "dv")
    answers = []
    for deterministic in (False, True, True):
        there = call | {"deterministic": deterministic}
        there |= {x: torch.full_like(call[x], torch.nan) for x in names if x in call}
        answers.append(harness.run(function, there, device))
    harness.assert_right(answers[1], harness.truth(function, call))
    for name, first in answers[1].items():
        assert torch.equal(first, answers[2][name])
    harness.assert_right(answers[0], harness.truth(function, call))


@both_layouts
def test_forward_and_backward_stay_fused(npu, function, problem):
    call = harness.arguments_for(function, problem) | {"deterministic": True}
    with virtual_ascend.record() as seen:
        answer = harness.run(function, call, npu)
    launches = [x.name for x in seen.launches if "attention" in x.name]
    assert launches == ["npu_fusion_attention", "npu_fusion_attention_grad"]
    harness.assert_right(answer, harness.truth(function, call))


@both_layouts
def test_without_gradients_it_is_the_plain_call(npu, function, problem):
    call = harness.arguments_for(function, problem) | {"deterministic": True}
    given = {x: call[x] for x in harness.parameters(function)}
    given |= {x: y.to(npu) for x, y in given.items() if isinstance(y, torch.Tensor)}
    with virtual_ascend.record() as seen:
        out = function(**given)
    assert [x.name for x in seen.launches] == ["npu_fusion_attention"]
    harness.assert_right({"out": out}, harness.truth(function, call))
