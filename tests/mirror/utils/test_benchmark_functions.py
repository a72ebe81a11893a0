"""The benchmark functions: what they run, how often, what they return and print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.benchmark import Measurement, Timer

from flash_attn_npu.errors import ArgumentError, UnsupportedError
from flash_attn_npu.utils import benchmark

TIMED = ("benchmark_forward", "benchmark_backward", "benchmark_combined")
TITLES = ("forward", "backward", "forward and backward")


class Counting:
    """A function of two tensors that remembers its calls."""

    def __init__(self) -> None:
        self.dtypes: list[torch.dtype] = []
        self.backwards = 0

    def __call__(self, x: Tensor, *, weight: Tensor) -> tuple[Tensor, int]:
        out = x @ weight
        self.dtypes.append(out.dtype)
        if out.requires_grad:
            out.register_hook(self.count)
        return out, 0

    def count(self, grad: Tensor) -> None:
        self.backwards += 1


def tensors(device: torch.device | str = "cpu") -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        name: torch.randn(shape, device=device, requires_grad=True)
        for name, shape in (("x", (2, 3)), ("weight", (3, 4)))
    }


@pytest.mark.parametrize("name", TIMED)
def test_one_measurement(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    fn, given = Counting(), tensors()
    timer, measured = getattr(benchmark, name)(
        fn, given["x"], weight=given["weight"], repeats=3, desc="product"
    )
    assert isinstance(timer, Timer)
    assert isinstance(measured, Measurement)
    assert (measured.number_per_run, len(measured.raw_times)) == (3, 1)
    assert measured.mean > 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"product - {TITLES[TIMED.index(name)]}\n")
    assert str(measured) in printed
    # each is run three times, and once or more to warm up
    assert len(fn.dtypes) == 1 if name == "benchmark_backward" else len(fn.dtypes) >= 4
    assert fn.backwards == 0 if name == "benchmark_forward" else fn.backwards >= 4


@pytest.mark.parametrize("name", ["benchmark_backward", "benchmark_combined"])
def test_the_gradient_is_that_of_one_run(name: str, device: torch.device) -> None:
    given = tensors(device)
    grad = torch.ones(2, 4, device=device)
    getattr(benchmark, name)(
        Counting(), given["x"], weight=given["weight"], grad=grad, verbose=False
    )
    torch.testing.assert_close(given["x"].grad, grad @ given["weight"].detach().t())


def test_several_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    given = tensors()
    some = benchmark.benchmark_fwd_bwd(Counting(), given["x"], weight=given["weight"], repeats=2)
    assert capsys.readouterr().out.count(" - ") == 2
    every = benchmark.benchmark_all(
        Counting(), given["x"], weight=given["weight"], repeats=2, verbose=False
    )
    assert capsys.readouterr().out == ""
    assert [len(some), len(every)] == [2, 3]
    assert all(isinstance(measured, Measurement) for _, measured in (*some, *every))


def test_amp_is_that_of_the_device(device: torch.device) -> None:
    fn, given = Counting(), tensors(device)
    how: Any = {"amp": True, "amp_dtype": torch.bfloat16, "verbose": False, "repeats": 1}
    benchmark.benchmark_all(fn, given["x"], weight=given["weight"], **how)
    assert set(fn.dtypes) == {torch.bfloat16}


def test_the_clock_waits_for_the_device(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []
    monkeypatch.setattr(torch.npu, "synchronize", waits.append)
    fn, given = Counting(), tensors(npu)
    benchmark.benchmark_forward(fn, given["x"], weight=given["weight"], verbose=False)
    # at both ends of the warm-up and of the measurement, not in between
    assert waits == [npu] * 4


def test_memory(npu: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    size = 4 * 2**20
    x = torch.zeros(size, dtype=torch.uint8, device=npu)
    peak = benchmark.benchmark_memory(lambda x: x + 1, x, desc="sum")
    assert peak >= 2 * size / (1000 * 2**20)
    assert capsys.readouterr().out == f"sum - peak memory: {peak} GB\n"


def test_memory_of_the_host_is_not_counted() -> None:
    with pytest.raises(UnsupportedError, match=r"^inputs: got tensors on cpu, .*; allowed: "):
        benchmark.benchmark_memory(torch.neg, torch.zeros(1))


def test_which_device_is_waited_for(npu: torch.device) -> None:
    here, there = torch.zeros(1), torch.zeros(1, device=npu)
    found = [
        benchmark._device(nn.Linear(1, 1, device=npu), (1.0,), {}),
        benchmark._device(abs, (here,), {"x": [{"y": there}]}),
        benchmark._device(abs, (here, 1.0), {}),
        benchmark._device(lambda: there, (), {}),
    ]
    assert [device.type for device in found] == ["npu", "npu", "cpu", "npu"]


def test_profiler(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, trace = tensors(), tmp_path / "trace.json"
    how: Any = {"backward": True, "cpu": True, "trace_filename": str(trace)}
    benchmark.pytorch_profiler(Counting(), given["x"], weight=given["weight"], **how)
    assert "MmBackward0" in capsys.readouterr().out
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "aten::mm" in names


def test_a_gradient_of_another_shape_is_named() -> None:
    given = tensors()
    with pytest.raises(ArgumentError, match=r"^grad: got shape \(1,\); allowed: \(2, 4\)"):
        benchmark.benchmark_backward(
            Counting(), given["x"], weight=given["weight"], grad=torch.zeros(1)
        )
