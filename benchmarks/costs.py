"""Memory held at once, time of imports, host time of a call, whole models: mostly in children."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flash_attn_npu import flash_attn_func
from flash_attn_npu._integrations.stand_ins import npu_flash_attn_func

from .figures import Call, Figure, Measure, Run
from .speed import (
    BF16,
    FP16,
    NAMES,
    WAYS,
    call_of,
    cumulative,
    looped,
    padded_sdpa,
    rand,
    transposed,
    varlen,
)

ROOT = Path(__file__).parents[1]
IMPORTS = """
import gc, json, time
import torch

def collecting(phase, told):
    now = time.process_time()
    spent[0] += now if phase == "stop" else -now

spent = [0.0]
gc.callbacks.append(collecting)
start = time.process_time()
import flash_attn_npu
middle = time.process_time()
collected = spent[0]
flash_attn_npu.install()
print(json.dumps([middle - start - collected, collected, time.process_time() - middle]))
"""


def in_child(*command: str) -> str:
    """What a fresh Python prints, started in the root of the repository."""
    child = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PYTHONPATH": str(ROOT)}
    # the environment of this package in this process is not the child's
    child = {name: value for name, value in child.items() if not name.startswith("FLASH_ATTN")}
    # an import is timed as it is from the second one on
    child.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=child, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or done.stdout.strip()).splitlines()[-1])
    return done.stdout


def peak_bytes(call: Call) -> int:
    """The most bytes that torch's allocator held at once for a call, its kernels' scratch too."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True, acc_events=True) as told:
        call()
    events = told.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak


def memory(
    name: str, dtype: torch.dtype, options: dict[str, Any], heads: int, grad: bool, run: Run
) -> list[Figure]:
    """Inputs and the most that was held beside them, of the bytes of inputs and outputs."""
    seqlen = run.sizes.memory
    tensors = rand(1, seqlen, heads, 64, dtype=dtype)
    options = dict(options)
    if "alibi_slopes" in options:
        options["alibi_slopes"] = torch.rand(heads)
    ours: Callable[..., Tensor] = flash_attn_func
    if "s_aux" in options:
        ours, options["s_aux"] = npu_flash_attn_func, torch.rand(heads)
    call = call_of(partial(ours, causal=True, **options), tensors, grad)
    each = tensors[0].nbytes
    # q, k, v and with a backward dout are given; out comes, or dq, dk, dv
    given, results = (4, 4) if grad else (3, 1)
    peak = peak_bytes(call)
    value = (given * each + peak) / ((given + results) * each)
    told = f"{name} {NAMES[dtype]} {seqlen}, {WAYS[grad]}"
    return [Figure(told, value, "x", "memory", given * each + peak, (given + results) * each)]


def memory_cases(run: Run) -> dict[str, Measure]:
    narrow: dict[str, Any] = {"window_size": (run.sizes.window - 1, 0)}
    found: dict[str, Measure] = {
        "memory causal": partial(memory, "causal", BF16, {}, 1, False),
        # one head: there is none beside which copies of it in float32 are small
        "memory window fp16 forward": partial(memory, "window", FP16, narrow, 1, False),
        "memory window fp16": partial(memory, "window", FP16, narrow, 1, True),
    }
    options: dict[str, dict[str, Any]] = {
        "window": {},
        "softcap": {"softcap": 30.0},
        "ALiBi": {"alibi_slopes": None},
        "sink": {"s_aux": None},
        "dropout": {"dropout_p": 0.1},
    }
    for name, more in options.items():
        told = name if name == "window" else f"window and {name}"
        found[f"memory {name}"] = partial(memory, told, BF16, narrow | more, 4, True)
    return found


def imports(run: Run) -> list[Figure]:
    times = [json.loads(in_child("-c", IMPORTS)) for _ in range(2 if run.sizes.steps == 1 else 6)]
    imported, collected, installed = (
        statistics.median(side) * 1e3 for side in zip(*times[1:], strict=True)
    )
    return [
        Figure("import flash_attn_npu after torch", imported, " ms", "import"),
        # the first few thousand objects made after torch start it, whoever makes them
        Figure("and Python's collector looking through torch's objects", collected, " ms"),
        Figure("flash_attn_npu.install()", installed, " ms"),
    ]


def host(run: Run) -> list[Figure]:
    """benchmarks/overhead.py in a child: the simulated card must be there before torch is used."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "overhead.json"
        quick = ["--quick"] if run.sizes.steps == 1 else []
        in_child(str(ROOT / "benchmarks" / "overhead.py"), "-o", str(target), *quick)
        tables = json.loads(target.read_text())
    packed, dense = tables["packed, inference"], tables["dense, inference"]
    training = tables["packed, forward of training"]
    return [
        Figure("packed, inference, host", packed["flash_attn_varlen_func"], "x", "host varlen"),
        Figure("dense, inference, host", dense["flash_attn_func"], "x", "host dense"),
        Figure("packed, forward of training, host", training["flash_attn_varlen_func"]),
    ]


def models(run: Run) -> list[Figure]:
    """Training steps of tiny models of transformers: see models.py."""
    rounds, threads = str(2 * run.sizes.steps), str(run.threads)
    measured = json.loads(in_child("-m", "benchmarks.models", rounds, threads).splitlines()[-1])
    return [
        Figure(f"{model}, steps per second beside {other}", ratio, "x", "", ours, theirs)
        for model, other, ratio, ours, theirs in measured
    ]


def curves(seqlen: int, run: Run) -> list[Figure]:
    """Four sequences of 1/16 to all of a length, forward and backward: time and memory."""
    lengths = [seqlen, seqlen * 5 // 8, seqlen * 3 // 8, seqlen // 16]
    tensors = rand(sum(lengths), 2, 64)
    rows = rand(4, seqlen, 2, 64)
    loop = partial(looped, lengths, True)
    ours = partial(varlen, cumulative(lengths), seqlen, True)
    padded, bias = transposed(rows), torch.full((seqlen, seqlen), float("-inf")).triu(1)
    ways = {
        "flash_attn_npu, packed": call_of(ours, tensors, True),
        "SDPA, one by one": call_of(loop, tensors, True),
        "SDPA, padded": call_of(padded_sdpa(lengths, True), padded, True),
        "eager, padded": call_of(partial(eager, bias), padded, True),
    }
    for name, call in ways.items():
        call()
        seconds = statistics.median(run.clock.once(call) for _ in range(3))
        entry = {"length": seqlen, "what": name, "seconds": seconds, "bytes": peak_bytes(call)}
        run.curves.append(entry)
    return []


def eager(bias: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias
    return scores.softmax(-1) @ v


def cases(run: Run) -> dict[str, Measure]:
    found = memory_cases(run) | {"import": imports, "host": host, "models": models}
    return found | {f"curves {seqlen}": partial(curves, seqlen) for seqlen in run.sizes.curves}
