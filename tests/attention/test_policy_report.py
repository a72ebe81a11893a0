"""What happens to calls that no fused kernel serves, and what is said and counted about it."""

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextvars import ContextVar

import pytest
import torch

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu import (
    fallback,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_varlen_func,
    report,
    reporting,
)
from flash_attn_npu._core.ground import settings
from flash_attn_npu._core.ground.memory import forget_all
from flash_attn_npu._core.ground.settings import fallback_policy
from flash_attn_npu.errors import ArgumentError, UnsupportedError
from tests.helpers import argument_harness as harness
from tests.helpers.old_torch import GROUP
from tests.helpers.strategies import Problem

DENSE = Problem(((9, 13),) * 2, nheads_k=2, group=2, headdim=16, dtype=torch.float16)
DIAGONAL = Problem(((5, 8), (9, 9)), 2, 2, 16, torch.bfloat16, window_size=(0, 0))
CAPPED = {"softcap": 5.0}
NO_SOFTCAP = "npu_fusion_attention: no Ascend kernel has softcap"
NO_DIAGONAL = (
    "npu_fusion_attention: its packed backward demands a window_size with left + right > 0"
)
HOST = "scaled_dot_product_flash_attention_for_cpu"
OFF_NPU = "npu_fusion_attention: it runs on Ascend NPUs only"


@pytest.fixture(autouse=True)
def nothing_said_yet() -> None:
    forget_all()


@pytest.fixture
def said(caplog) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, logger="flash_attn_npu"):
        yield caplog


def forward(function, problem: Problem, device: torch.device, **changes) -> object:
    """The call alone, without gradients."""
    call = harness.arguments_for(function, problem) | changes
    given = {name: call[name] for name in harness.parameters(function)}
    return function(
        **{x: y.to(device) if isinstance(y, torch.Tensor) else y for x, y in given.items()}
    )


def with_gradients(function, problem: Problem, device: torch.device, **changes) -> None:
    """The call and its backward, which must be right whatever the policy."""
    call = harness.arguments_for(function, problem) | changes
    harness.assert_right(harness.run(function, call, device), harness.truth(function, call))


def test_error_refuses_before_anything_runs(npu):
    torch.manual_seed(0)
    before = torch.npu.get_rng_state(), torch.get_rng_state()
    call = {"dropout_p": 0.3, "return_attn_probs": True}
    with virtual_ascend.record() as seen, reporting() as region, fallback("error"):
        with pytest.raises(UnsupportedError, match=r"flash_attn_func: .*probabilities.*`error`"):
            forward(flash_attn_func, DENSE, npu, **call)
        with pytest.raises(UnsupportedError, match="softcap"):
            with_gradients(flash_attn_func, DENSE, npu, **CAPPED)
    assert not seen.launches
    assert not region.tallies
    assert torch.equal(torch.npu.get_rng_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


def test_error_refuses_off_an_npu():
    with fallback("error"), pytest.raises(UnsupportedError, match="Ascend NPUs only"):
        forward(flash_attn_func, DENSE, torch.device("cpu"))


def test_error_lets_fused_calls_pass(npu):
    with fallback("error"), virtual_ascend.record() as seen:
        with_gradients(flash_attn_func, DENSE, npu)
        with_gradients(flash_attn_varlen_func, DIAGONAL, npu, window_size=(0, 1))
        with_gradients(flash_attn_func, DENSE, npu, deterministic=True)
    assert sum("attention" in x.name for x in seen.launches) == 6


def test_error_foresees_the_backward(npu):
    """A window of the diagonal is fused in the packed forward only."""
    with fallback("error"), virtual_ascend.record() as seen:
        forward(flash_attn_varlen_func, DIAGONAL, npu)
        assert [x.name for x in seen.launches] == ["npu_fusion_attention"]
        with pytest.raises(UnsupportedError, match="packed backward"):
            with_gradients(flash_attn_varlen_func, DIAGONAL, npu)
    assert len(seen.launches) == 1


@pytest.mark.parametrize("options", [{}, CAPPED], ids=str)
def test_a_call_without_work_is_never_refused(device, said, options):
    nothing = Problem(((4, 0),) * 2, nheads_k=2, group=2, headdim=16)
    call = harness.arguments_for(flash_attn_func, nothing) | {"return_attn_probs": True} | options
    with fallback("error"), reporting() as region:
        answer = harness.run(flash_attn_func, call, device)
        # a single key makes work of it
        with pytest.raises(UnsupportedError, match=r"softcap|Ascend NPUs only"):
            forward(flash_attn_func, Problem(((4, 1),) * 2, 2, 2, 16), device, **CAPPED)
    # the forward and the backward
    assert sum(tally.calls for tally in region.tallies) == 2
    assert not said.records
    shapes = {"out": (2, 4, 4, 16), "dq": (2, 4, 4, 16), "dk": (2, 0, 2, 16), "dv": (2, 0, 2, 16)}
    for name, shape in shapes.items():
        assert torch.equal(answer[name].cpu(), torch.zeros(shape))
    assert torch.equal(answer["softmax_lse"].cpu(), torch.full((2, 4, 4), torch.inf))


@pytest.mark.parametrize("function", [flash_attn_func, flash_attn_kvpacked_func])
def test_warn_says_each_reason_once_for_each_function(npu, said, function):
    for softcap in (5.0, 7.0):
        for _ in range(2):
            forward(function, DENSE, npu, softcap=softcap)
    (record,) = said.records
    assert (record.name, record.levelno) == ("flash_attn_npu", logging.WARNING)
    assert record.getMessage() == (
        f"flash_attn_npu: `{function.__name__}` is composed of torch operations, exact but not "
        f'fused: {NO_SOFTCAP} (no more of this: flash_attn_npu.fallback("allow") or '
        "FLASH_ATTN_NPU_FALLBACK=allow; an error instead: `error`)"
    )
    forward(function, DENSE, npu, dropout_p=0.2, return_attn_probs=True)
    assert len(said.records) == 2
    assert "it does not return probabilities" in said.records[1].getMessage()


def test_warn_speaks_for_every_function(npu, said):
    for function in (flash_attn_func, flash_attn_kvpacked_func) * 2:
        forward(function, DENSE, npu, **CAPPED)
    assert [x.getMessage().split("`")[1] for x in said.records] == [
        "flash_attn_func",
        "flash_attn_kvpacked_func",
    ]


@pytest.mark.parametrize(
    ("function", "problem", "changes", "reason"),
    [
        (flash_attn_varlen_func, DIAGONAL, {}, NO_DIAGONAL),
        (flash_attn_func, DENSE, CAPPED, NO_SOFTCAP),
    ],
    ids=["for the backward's sake", "for the forward's"],
)
def test_a_call_and_its_backward_say_it_once(npu, said, function, problem, changes, reason):
    for _ in range(2):
        with_gradients(function, problem, npu, **changes)
    (record,) = said.records
    assert record.getMessage().startswith(f"flash_attn_npu: `{function.__name__}` is")
    assert reason in record.getMessage()


def test_off_an_npu_it_is_said_quietly(said):
    forward(flash_attn_func, DENSE, torch.device("cpu"))
    assert [x.levelno for x in said.records] == [logging.INFO]
    assert OFF_NPU in said.text


def test_allow_is_silent(device, said):
    with fallback("allow"):
        with_gradients(flash_attn_func, DENSE, device, **CAPPED)
    assert not said.records


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "behind"])
def test_the_policy_of_a_call_holds_for_its_backward(device, monkeypatch, inside):
    """What was allowed is not refused half-way: not where `.backward()` stands, and not in the
    thread in which autograd runs a device's backward, which has a context of its own.
    """
    monkeypatch.setattr(settings, "_fallback", ContextVar("strict", default="error"))
    q = torch.randn(1, 4, 2, 8, device=device, requires_grad=True)
    with fallback("allow"):
        out = flash_attn_func(q, q, q, **CAPPED)
        if inside:
            out.sum().backward()
    if not inside:
        out.sum().backward()
    assert q.grad.isfinite().all()


def test_the_policy_ends_with_its_block():
    assert fallback_policy() == "warn"
    with fallback("error"):
        with fallback("allow"):
            assert fallback_policy() == "allow"
        assert fallback_policy() == "error"
        with pytest.raises(KeyError), fallback("allow"):
            raise KeyError
        assert fallback_policy() == "error"
    assert fallback_policy() == "warn"


@pytest.mark.parametrize("word", ["ignore", "", "Error", None])
def test_other_policies_do_not_exist(word):
    with pytest.raises(ArgumentError, match=r"warn, allow, error, ascend"), fallback(word):
        pytest.fail("the block ran")
    with pytest.raises(ArgumentError, match=r"warn, allow, error, ascend"):
        fallback(word)
    assert fallback_policy() == "warn"


def test_threads_have_a_policy_of_their_own():
    inside, leave = threading.Event(), threading.Event()
    seen = []

    def other() -> None:
        seen.append(fallback_policy())
        with fallback("allow"):
            seen.append(fallback_policy())
            inside.set()
            leave.wait(10)

    with fallback("error"):
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(10)
        seen.append(fallback_policy())
        leave.set()
        thread.join()
    assert seen == ["warn", "allow", "error"]


PROGRAM = """
import torch
from flash_attn_npu import fallback, flash_attn_func
q = torch.ones(1, 1, 1, 8)
with fallback("warn"):
    flash_attn_func(q, q, q)
print("served")
flash_attn_func(q, q, q)
"""


def test_the_environment_reaches_calls():
    environment = os.environ | {"FLASH_ATTN_NPU_FALLBACK": "error"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "served\n"), done.stderr
    assert "UnsupportedError: flash_attn_func: got" in done.stderr


def entries(of) -> list[tuple]:
    return [(x.function, x.kernel, x.reasons, x.calls) for x in of.tallies]


def test_reporting_counts_calls_by_function_kernel_and_reason(npu):
    with reporting() as region:
        for _ in range(3):
            with_gradients(flash_attn_func, DENSE, npu)
        for _ in range(2):
            forward(flash_attn_func, DENSE, npu, **CAPPED)
        assert sorted(entries(region)) == [
            ("flash_attn_func", "blockwise", (NO_SOFTCAP,), 2),
            ("flash_attn_func", "npu_fusion_attention", (), 3),
        ]
        assert "npu_fusion_attention  3" in str(region)
        forward(flash_attn_kvpacked_func, DENSE, npu, **CAPPED)
    forward(flash_attn_kvpacked_func, DENSE, npu, **CAPPED)
    assert sorted(entries(region)) == [
        ("flash_attn_func", "blockwise", (NO_SOFTCAP,), 2),
        ("flash_attn_func", "npu_fusion_attention", (), 3),
        ("flash_attn_kvpacked_func", "blockwise", (NO_SOFTCAP,), 1),
    ]


def test_a_composed_backward_is_counted_by_itself(npu):
    with reporting() as region:
        with_gradients(flash_attn_varlen_func, DIAGONAL, npu)
    assert sorted(entries(region)) == [
        ("flash_attn_varlen_func", "blockwise", (NO_DIAGONAL,), 1),
        ("flash_attn_varlen_func (backward)", "blockwise", (NO_DIAGONAL,), 1),
    ]


def test_regions_nest_and_survive_errors(device):
    def call() -> None:
        forward(flash_attn_func, DENSE, device)

    def call_and_fail() -> None:
        call()
        raise KeyError

    with reporting() as outer:
        call()
        with pytest.raises(KeyError), reporting() as inner:
            call_and_fail()
        call()
    with reporting() as nothing:
        pass
    assert [x.calls for x in inner.tallies] == [1]
    assert [x.calls for x in outer.tallies] == [3]
    assert entries(nothing) == []
    assert str(nothing) == "flash_attn_npu has served no call"


def test_report_counts_since_the_start_and_gives_copies(device):
    forward(flash_attn_func, DENSE, device)
    before = report()
    known = {x[:3]: x[3] for x in entries(before)}
    assert all(known.values())
    for tally in before.tallies:
        tally.calls = -1
    forward(flash_attn_func, DENSE, device)
    after = {x[:3]: x[3] for x in entries(report())}
    # torch before 2.9 shares no heads, and what is told is what an Ascend would need
    key = {"cpu": ("flash_attn_func", HOST if GROUP > 1 else "blockwise", (OFF_NPU,))}
    key = key.get(device.type, ("flash_attn_func", "npu_fusion_attention", ()))
    assert {x: after[x] - known[x] for x in known if after[x] != known[x]} == {key: 1}


def test_the_table_is_aligned(npu):
    with reporting() as region:
        forward(flash_attn_func, DENSE, npu)
        forward(flash_attn_kvpacked_func, DENSE, npu, **CAPPED)
    heading, *lines = str(region).splitlines()
    assert heading == "function                  kernel                calls  why not fused"
    assert sorted(lines) == [
        "flash_attn_func           npu_fusion_attention  1",
        f"flash_attn_kvpacked_func  blockwise             1      {NO_SOFTCAP}",
    ]
