"""What a call costs on the host, beside the fused kernel called directly. Simulated, no Ascend.

    python benchmarks/overhead.py [--rounds 60] [--calls 300] [--quick] [-o FILE]

The real torch_npu wheel runs over stub CANN libraries without arithmetic, so a call is all host
work: Python, torch's dispatcher, torch_npu's preparation of the launch. Nothing here says how
long a kernel runs on a card; a card hides this time as long as it has work queued.

How to read the table: each row is measured in turns with the direct call, one after the other
in every round, in shuffled order. `min` and `median` are microseconds per call over all rounds.
`ratio` is the median over the rounds of (time of the row / time of the direct call in the same
round), against npu_fusion_attention called with keyword arguments, as its users write it, and
with positional ones, which torch parses faster. A fresh process measures each table anew, so
compare ratios, not microseconds, between runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# torch must not load torch_npu before the stubs are there
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
# nothing is computed here, which the comparison of first calls would notice
os.environ["FLASH_ATTN_NPU_VERIFY"] = "off"

from flash_attn_npu import _virtual_ascend as virtual_ascend

REASON = virtual_ascend.start()

import torch  # noqa: E402

if REASON is None:
    import torch_npu  # noqa: F401

Calls = dict[str, Callable[[], Any]]

BATCH, SEQLEN, HEADS, HEADDIM = 4, 512, 16, 64
UNLIMITED = 2147483647
MINDIESD = "mindiesd's attention_forward_varlen"
KEYWORDS, POSITIONAL = "npu_fusion_attention, keywords", "npu_fusion_attention, positional"


def tensors(*shape: int, grad: bool = False) -> list[Any]:
    make = partial(torch.empty, shape, dtype=torch.bfloat16, device="npu:0", requires_grad=grad)
    return [make(), make(), make()]


def direct_calls(q: Any, k: Any, v: Any, layout: str, ends: list[int] | None) -> Calls:
    """The kernel as a user calls it for causal attention, with everything prepared beforehand."""
    from torch_npu import npu_fusion_attention

    from flash_attn_npu._core.kernels.ascend.fusion_attention import causal_mask

    mask, scale = causal_mask(q.device), HEADDIM**-0.5

    def keywords() -> Any:
        return npu_fusion_attention(
            q,
            k,
            v,
            HEADS,
            input_layout=layout,
            atten_mask=mask,
            scale=scale,
            keep_prob=1.0,
            actual_seq_qlen=ends,
            actual_seq_kvlen=ends,
            sparse_mode=3,
        )[0]

    def positional() -> Any:
        return npu_fusion_attention(
            *(q, k, v, HEADS, layout, None, None, mask, scale, 1.0, UNLIMITED, UNLIMITED),
            *(0, None, ends, ends, 3),
        )[0]

    return {KEYWORDS: keywords, POSITIONAL: positional}


def packed_calls(grad: bool) -> Calls:
    from flash_attn_npu import attention_forward_varlen, flash_attn_varlen_func

    q, k, v = tensors(BATCH * SEQLEN, HEADS, HEADDIM, grad=grad)
    cumulative = [SEQLEN * i for i in range(BATCH + 1)]
    cu = torch.tensor(cumulative, dtype=torch.int32).to(q.device)
    calls = direct_calls(q, k, v, "TND", cumulative[1:])
    calls |= {
        "flash_attn_varlen_func": lambda: flash_attn_varlen_func(
            q, k, v, cu, cu, SEQLEN, SEQLEN, causal=True
        ),
        "attention_forward_varlen": lambda: attention_forward_varlen(q, k, v, cu, cu, causal=True),
    }
    theirs = transformers_wrapper()
    if theirs is not None:
        calls["transformers' npu_flash_attn_varlen_func"] = lambda: theirs(
            q, k, v, cu, cu, SEQLEN, SEQLEN, causal=True
        )
    huawei = mindiesd_function()
    if huawei is not None:
        calls[MINDIESD] = lambda: huawei(q, k, v, cumulative, cumulative, causal=True)
    return calls


def dense_calls() -> Calls:
    from flash_attn_npu import flash_attn_func

    q, k, v = tensors(BATCH, SEQLEN, HEADS, HEADDIM)
    calls = direct_calls(q, k, v, "BSND", None)
    return calls | {"flash_attn_func": lambda: flash_attn_func(q, k, v, causal=True)}


def transformers_wrapper() -> Callable[..., Any] | None:
    try:
        from transformers.integrations.npu_flash_attention import npu_flash_attn_varlen_func
    except ImportError as error:
        print(f"not compared: transformers: {error}")
        return None
    return npu_flash_attn_varlen_func


def mindiesd_function() -> Callable[..., Any] | None:
    """Loaded as the tests load it: importing mindiesd itself needs libraries of a real CANN."""
    if importlib.util.find_spec("mindiesd") is None:
        print("not compared: mindiesd is not installed")
        return None
    from mindie_function import load

    function: Callable[..., Any] = load()[0].attention_forward_varlen
    return function


def time_calls(call: Callable[[], Any], count: int) -> float:
    """Microseconds of this process per call."""
    start = time.process_time()
    for _ in range(count):
        call()
    return (time.process_time() - start) / count * 1e6


def share(name: str, count: int) -> int:
    """mindiesd makes its 4 MiB mask on the host at every call, thousands of times the work."""
    return max(1, count // 100) if name == MINDIESD else count


def measure(calls: Calls, rounds: int, count: int) -> dict[str, list[float]]:
    """Microseconds per call, round by round; within a round the order is drawn."""
    order = list(calls)
    times: dict[str, list[float]] = {name: [] for name in order}
    for name in order:
        time_calls(calls[name], share(name, count))
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            times[name].append(time_calls(calls[name], share(name, count)))
    return times


def ratio(times: list[float], to: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(times, to, strict=True))


def ratios(times: dict[str, list[float]]) -> dict[str, float]:
    """Of each row to the call with keywords."""
    return {name: ratio(values, times[KEYWORDS]) for name, values in times.items()}


def print_table(title: str, times: dict[str, list[float]]) -> None:
    print(f"\n{title}")
    print(
        f"  {'microseconds per call':44} {'min':>8} {'median':>8} {'ratio kw':>9} {'ratio pos':>9}"
    )
    for name, values in times.items():
        to_keywords = ratio(values, times[KEYWORDS])
        to_positional = ratio(values, times[POSITIONAL])
        print(
            f"  {name:44} {min(values):8.2f} {statistics.median(values):8.2f} "
            f"{to_keywords:9.3f} {to_positional:9.3f}"
        )


def asked(description: str, rounds: int) -> tuple[int, int, Path | None]:
    """Rounds, calls of each row in a round and a file, from a benchmark's command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--calls", type=int, default=300, help="calls of each row in a round")
    parser.add_argument("--quick", action="store_true", help="a few calls, to see that it runs")
    parser.add_argument("-o", "--output", type=Path, help="write the ratios to keywords as JSON")
    options = parser.parse_args()
    if REASON is not None:
        sys.exit(f"the virtual Ascend is not running: {REASON}")
    torch.set_num_threads(1)
    rounds, count = (3, 5) if options.quick else (options.rounds, options.calls)
    return rounds, count, options.output


def main() -> None:
    rounds, count, output = asked(__doc__.splitlines()[0], 60)
    print("simulated Ascend without arithmetic: host overhead only")
    print(f"{rounds} rounds of {count} calls, causal, {BATCH} sequences of {SEQLEN}")
    tables = {}
    with torch.no_grad():
        tables["packed, inference"] = measure(packed_calls(grad=False), rounds, count)
        tables["dense, inference"] = measure(dense_calls(), rounds, count)
    tables["packed, forward of training"] = measure(packed_calls(grad=True), rounds, count)
    for title, times in tables.items():
        print_table(title, times)
    if output is not None:
        output.write_text(json.dumps({title: ratios(times) for title, times in tables.items()}))


if __name__ == "__main__":
    main()
