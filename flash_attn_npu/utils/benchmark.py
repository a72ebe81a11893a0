"""Mirror of `flash_attn.utils.benchmark`: time, profile and weigh a function on its device.

The function is called as fn(*inputs, **kwinputs). Its device is that of the first tensor among
them, or among a module's weights, that is not on the CPU; the machine's accelerator where there
is no tensor at all. A clock is read when that device has finished, whatever its kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from timeit import default_timer
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, supported_activities
from torch.utils.benchmark import Measurement, Timer

from ..errors import ArgumentError, UnsupportedError

__all__ = [
    "benchmark_all",
    "benchmark_backward",
    "benchmark_combined",
    "benchmark_forward",
    "benchmark_fwd_bwd",
    "benchmark_memory",
    "pytorch_profiler",
]

_Function = Callable[..., Any]
_Timed = tuple[Timer, Measurement]

_GIGABYTE = 1000 * 2**20
_WARM_UPS = 10
_TABLE_ROWS = 50


def benchmark_forward(
    fn: _Function,
    *inputs: Any,
    repeats: int = 10,
    desc: str = "",
    verbose: bool = True,
    amp: bool = False,
    amp_dtype: torch.dtype = torch.float16,
    **kwinputs: Any,
) -> _Timed:
    """Time the forward.

    Args:
        repeats: how often it is run; Measurement.mean is the seconds of one run.
        desc: printed before the measurement.
        verbose: print it.
        amp, amp_dtype: run fn under torch.autocast of the device, in this dtype.

    Returns:
        (torch.utils.benchmark.Timer, Measurement).

    Contract: flash-attention 2.8, `benchmark_forward`.
    """
    device = _device(fn, inputs, kwinputs)

    def forward() -> None:
        with _autocast(device, amp, amp_dtype):
            fn(*inputs, **kwinputs)

    return _timed(forward, device, repeats, f"{desc} - forward", verbose)


def benchmark_backward(
    fn: _Function,
    *inputs: Any,
    grad: Tensor | None = None,
    repeats: int = 10,
    desc: str = "",
    verbose: bool = True,
    amp: bool = False,
    amp_dtype: torch.dtype = torch.float16,
    **kwinputs: Any,
) -> _Timed:
    """Time the backward of one forward, over and over.

    Args:
        grad: of fn's result, or of the first if it returns several; random if None. The other
            arguments are those of `benchmark_forward`.

    The gradients of the inputs are dropped before each run, and left there after the last.

    Contract: flash-attention 2.8, `benchmark_backward`.
    """
    device = _device(fn, inputs, kwinputs)
    with _autocast(device, amp, amp_dtype):
        out = _first(fn(*inputs, **kwinputs))
    grad = _gradient(grad, out)

    def backward() -> None:
        _drop_gradients(inputs, kwinputs)
        out.backward(grad, retain_graph=True)

    return _timed(backward, device, repeats, f"{desc} - backward", verbose)


def benchmark_combined(
    fn: _Function,
    *inputs: Any,
    grad: Tensor | None = None,
    repeats: int = 10,
    desc: str = "",
    verbose: bool = True,
    amp: bool = False,
    amp_dtype: torch.dtype = torch.float16,
    **kwinputs: Any,
) -> _Timed:
    """Time forward and backward together; the arguments are those of `benchmark_backward`.

    Contract: flash-attention 2.8, `benchmark_combined`.
    """
    device = _device(fn, inputs, kwinputs)
    with _autocast(device, amp, amp_dtype), torch.no_grad():
        given = _gradient(grad, _first(fn(*inputs, **kwinputs)))

    def both() -> None:
        _drop_gradients(inputs, kwinputs)
        with _autocast(device, amp, amp_dtype):
            out = _first(fn(*inputs, **kwinputs))
        out.backward(given)

    return _timed(both, device, repeats, f"{desc} - forward and backward", verbose)


def benchmark_fwd_bwd(
    fn: _Function,
    *inputs: Any,
    grad: Tensor | None = None,
    repeats: int = 10,
    desc: str = "",
    verbose: bool = True,
    amp: bool = False,
    amp_dtype: torch.dtype = torch.float16,
    **kwinputs: Any,
) -> tuple[_Timed, _Timed]:
    """`benchmark_forward` and `benchmark_backward`.

    Contract: flash-attention 2.8, `benchmark_fwd_bwd`.
    """
    how: Any = {
        "repeats": repeats,
        "desc": desc,
        "verbose": verbose,
        "amp": amp,
        "amp_dtype": amp_dtype,
    }
    return (
        benchmark_forward(fn, *inputs, **how, **kwinputs),
        benchmark_backward(fn, *inputs, grad=grad, **how, **kwinputs),
    )


def benchmark_all(
    fn: _Function,
    *inputs: Any,
    grad: Tensor | None = None,
    repeats: int = 10,
    desc: str = "",
    verbose: bool = True,
    amp: bool = False,
    amp_dtype: torch.dtype = torch.float16,
    **kwinputs: Any,
) -> tuple[_Timed, _Timed, _Timed]:
    """`benchmark_forward`, `benchmark_backward` and `benchmark_combined`.

    Contract: flash-attention 2.8, `benchmark_all`.
    """
    how: Any = {
        "repeats": repeats,
        "desc": desc,
        "verbose": verbose,
        "amp": amp,
        "amp_dtype": amp_dtype,
    }
    return (
        benchmark_forward(fn, *inputs, **how, **kwinputs),
        benchmark_backward(fn, *inputs, grad=grad, **how, **kwinputs),
        benchmark_combined(fn, *inputs, grad=grad, **how, **kwinputs),
    )


def pytorch_profiler(
    fn: _Function,
    *inputs: Any,
    trace_filename: str | None = None,
    backward: bool = False,
    amp: bool = False,
    amp_dtype: torch.dtype = torch.float16,
    cpu: bool = False,
    verbose: bool = True,
    **kwinputs: Any,
) -> None:
    """Profile one run by torch.profiler, after a few that warm up.

    Args:
        trace_filename: where to write a Chrome trace; none if None.
        backward: profile the backward too, from a random gradient.
        cpu: record the host as well as the device. It is recorded alone, and always, for inputs
            on the CPU and where torch.profiler knows no activity of any device.
        verbose: print the table of operators. The rest are those of `benchmark_forward`.

    Contract: flash-attention 2.8, `pytorch_profiler`.
    """
    device = _device(fn, inputs, kwinputs)

    def run() -> None:
        with _autocast(device, amp, amp_dtype):
            out = _first(fn(*inputs, **kwinputs))
        if backward:
            _drop_gradients(inputs, kwinputs)
            out.backward(torch.randn_like(out))

    for _ in range(_WARM_UPS):
        run()
    host, devices = {ProfilerActivity.CPU}, set(supported_activities()) - {ProfilerActivity.CPU}
    recorded = host if device.type == "cpu" or not devices else devices | (host if cpu else set())
    with profile(activities=recorded) as profiled:
        run()
        _synchronize(device)
    if verbose:
        order = "self_cpu_time_total" if recorded == host else "self_device_time_total"
        print(profiled.key_averages().table(sort_by=order, row_limit=_TABLE_ROWS))
    if trace_filename is not None:
        profiled.export_chrome_trace(trace_filename)


def benchmark_memory(
    fn: _Function, *inputs: Any, desc: str = "", verbose: bool = True, **kwinputs: Any
) -> float:
    """The peak of the device's allocated memory while fn runs, in GB of 1000 MiB.

    What is allocated before the call counts, the inputs among it. The peak statistics of the
    device start anew.

    Raises:
        UnsupportedError: the inputs are on the CPU, whose memory is not counted.

    Contract: flash-attention 2.8, `benchmark_memory`.
    """
    device = _device(fn, inputs, kwinputs)
    counters: Any = torch.get_device_module(device)
    if not hasattr(counters, "max_memory_allocated"):
        raise UnsupportedError(
            "inputs",
            f"tensors on {device}, where torch counts no memory",
            "tensors on an accelerator",
            "move the inputs to a device, or use a memory profiler of the host",
        )
    counters.empty_cache()
    counters.reset_peak_memory_stats(device)
    fn(*inputs, **kwinputs)
    _synchronize(device)
    gigabytes: float = counters.max_memory_allocated(device) / _GIGABYTE
    if verbose:
        print(f"{desc} - peak memory: {gigabytes} GB")
    counters.empty_cache()
    return gigabytes


def _timed(
    run: Callable[[], None], device: torch.device, repeats: int, title: str, verbose: bool
) -> _Timed:
    def clock() -> float:
        _synchronize(device)
        return default_timer()

    timer = Timer("run()", globals={"run": run}, timer=clock, num_threads=torch.get_num_threads())
    measurement = timer.timeit(repeats)
    if verbose:
        print(title)
        print(measurement)
    return timer, measurement


def _device(fn: _Function, inputs: tuple[Any, ...], kwinputs: dict[str, Any]) -> torch.device:
    weights = list(fn.parameters()) if isinstance(fn, torch.nn.Module) else []
    devices = [x.device for x in _tensors([inputs, kwinputs, weights])]
    for device in devices:
        if device.type != "cpu":
            return device
    if not devices and torch.accelerator.is_available():
        # what fn closes over cannot be seen, and may be there
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    return torch.device("cpu")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def _autocast(device: torch.device, amp: bool, dtype: torch.dtype) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, dtype=dtype) if amp else nullcontext()


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, (tuple, list)) else out


def _gradient(grad: Tensor | None, out: Tensor) -> Tensor:
    if grad is None:
        return torch.randn_like(out)
    if grad.shape != out.shape:
        raise ArgumentError(
            "grad",
            f"shape {tuple(grad.shape)}",
            f"{tuple(out.shape)}, as what fn returns",
            "pass the gradient of the (first) result, or None for a random one",
        )
    return grad


def _drop_gradients(*inputs: Any) -> None:
    for x in _tensors(inputs):
        if x.is_leaf:
            x.grad = None
