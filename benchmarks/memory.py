"""Memory and time of the exact kernel that serves what no fused kernel takes, on the CPU.

    python benchmarks/memory.py [--seqlen 2048 4096 8192] [--dtype float32] [--quick]

Memory: causal attention with softcap, forward and backward, batch 1, 16 heads of headdim 64.
Each length runs in a fresh process. `tensors` are the bytes of q, k, v, out and their gradients;
`additional` is what the peak of the resident set holds beyond those and what was there before;
`ratio` is additional / tensors, and the aim is at most 4. Linear memory shows as a ratio that
does not grow with the length. `scores` is what the float32 score matrix would take alone, which
is never held whole. Linux only: the peak is read from /proc.

Time: the same call with a sliding window of 256 keys, forward and backward. `ratio` is the time
against that of the length before: 2 for a doubled length is linear, 4 would be quadratic.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"

import torch

from flash_attn_npu import flash_attn_func

HEADS, HEADDIM = 16, 64
WINDOW = 256
MIB = 1 << 20


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found is not None, field
    return int(found[1]) * 1024


def forget_peak() -> None:
    """VmHWM counts from here on."""
    Path("/proc/self/clear_refs").write_text("5")


def inputs(seqlen: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v and dout, touched."""
    shape = (1, seqlen, HEADS, HEADDIM)
    tensors = [torch.randn(shape).to(dtype) for _ in range(4)]
    for x in tensors[:3]:
        x.requires_grad_()
    return tensors


def attend(tensors: list[torch.Tensor], window: int = -1) -> tuple[torch.Tensor, ...]:
    """out, dq, dk, dv."""
    *leaves, dout = tensors
    options = {"causal": True, "window_size": (window, window), "softcap": 30.0}
    out = flash_attn_func(*leaves, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def measure_memory(seqlen: int, dtype: torch.dtype) -> dict[str, int]:
    """Run in a process of its own: a peak says nothing about what was freed before it."""
    # the libraries' own buffers are not the call's
    attend(inputs(64, dtype))
    tensors = inputs(seqlen, dtype)
    each = tensors[0].numel() * tensors[0].element_size()
    # q, k, v and dout are held already; out, dq, dk and dv come
    held = resident("VmRSS") + 4 * each
    forget_peak()
    attend(tensors)
    return {"tensors": 8 * each, "additional": max(0, resident("VmHWM") - held)}


def in_fresh_process(seqlen: int, dtype: str) -> dict[str, int]:
    command = [sys.executable, __file__, "--child", "--seqlen", str(seqlen), "--dtype", dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(done.stderr)
    measured: dict[str, int] = json.loads(done.stdout)
    return measured


def print_memory(seqlens: list[int], dtype: str) -> None:
    print(f"causal, softcap, forward and backward, {dtype}, {HEADS} heads of {HEADDIM}, MiB")
    print(f"{'seqlen':>8} {'tensors':>10} {'additional':>11} {'scores':>10} {'ratio':>7}")
    for seqlen in seqlens:
        measured = in_fresh_process(seqlen, dtype)
        tensors, additional = measured["tensors"], measured["additional"]
        scores = HEADS * seqlen * seqlen * 4
        print(
            f"{seqlen:8} {tensors / MIB:10.1f} {additional / MIB:11.1f} {scores / MIB:10.1f} "
            f"{additional / tensors:7.2f}"
        )


def print_window_time(seqlens: list[int], dtype: torch.dtype) -> None:
    print(f"\nwindow of {WINDOW}, forward and backward, seconds, best of 3")
    print(f"{'seqlen':>8} {'seconds':>10} {'ratio':>7}")
    before = None
    for seqlen in seqlens:
        tensors = inputs(seqlen, dtype)
        attend(tensors, WINDOW)
        taken = min(timed(tensors) for _ in range(3))
        print(f"{seqlen:8} {taken:10.3f} {'' if before is None else f'{taken / before:7.2f}'}")
        before = taken


def timed(tensors: list[torch.Tensor]) -> float:
    start = time.perf_counter()
    attend(tensors, WINDOW)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seqlen", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    if options.child:
        print(json.dumps(measure_memory(options.seqlen[0], dtype)))
        return
    print_memory([256, 512] if options.quick else options.seqlen, options.dtype)
    print_window_time([256, 512] if options.quick else [4096, 8192, 16384], dtype)


if __name__ == "__main__":
    main()
