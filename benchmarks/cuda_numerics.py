"""The composed kernel on a GPU, beside torch's own flash attention and beside float64.

    PYTHONPATH=. python benchmarks/cuda_numerics.py [--quick]

`aten::_flash_attention_forward` is flash-attention 2 itself, with its windows, alignment,
softmax_lse and packed sequences. Each case compares, forward and backward, ours, torch's, and plain
PyTorch in the same precision with float64, by upstream's rule (at most twice the error of plain
PyTorch, plus one rounding). Then come the times of both. Prints one JSON object; `failed` names
what of ours broke the rule, and makes the exit status 1. Without a GPU it runs tiny cases on the
CPU, to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flash_attn_npu import flash_attn_func, flash_attn_varlen_func

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NOISE = 512 * torch.finfo(torch.float32).eps
NAMES = ("out", "dq", "dk", "dv")
Answer = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A problem: seqlens are (seqlen_q, seqlen_k) of each sequence, alike where it is dense."""

    name: str
    seqlens: tuple[tuple[int, int], ...]
    packed: bool = False
    heads: tuple[int, int] = (8, 8)
    headdim: int = 64
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    slopes: bool = False
    softcap: float = 0.0

    def tensors(self, dtype: torch.dtype) -> list[Tensor]:
        """q, k, v and dout."""
        torch.manual_seed(0)
        rows_q, rows_k = (sum(lengths) for lengths in zip(*self.seqlens, strict=True))
        shapes = [(rows_q, self.heads[0]), (rows_k, self.heads[1]), (rows_k, self.heads[1])]
        made = [torch.randn(*s, self.headdim).to(DEVICE, dtype) for s in (*shapes, shapes[0])]
        if self.packed:
            return made
        return [x.unflatten(0, (len(self.seqlens), -1)) for x in made]

    def alibi(self) -> Tensor | None:
        heads = torch.arange(1, self.heads[0] + 1, dtype=torch.float32, device=DEVICE)
        return 2.0 ** (-8.0 * heads / self.heads[0]) if self.slopes else None

    def ends(self, side: int) -> list[int]:
        ends = [0]
        for lengths in self.seqlens:
            ends.append(ends[-1] + lengths[side])
        return ends

    def cumulative(self, side: int) -> Tensor:
        return torch.tensor(self.ends(side), dtype=torch.int32, device=DEVICE)

    def longest(self) -> tuple[int, int]:
        return max(q for q, _ in self.seqlens), max(k for _, k in self.seqlens)


def cases(quick: bool) -> list[Case]:
    side = 48 if quick else 512
    square, wide = ((side, side),) * 2, ((side, 2 * side + 5),) * 2
    ragged = tuple((side - 37 * i % side, side - 11 * i % side) for i in range(6))
    alike = tuple((q, q) for q, _ in ragged)
    full = Case("full", square)
    return [
        full,
        replace(full, name="causal", causal=True),
        replace(full, name="causal, headdim 128", causal=True, headdim=128),
        replace(full, name="causal, GQA", causal=True, heads=(8, 2)),
        replace(full, name="causal, fewer queries", causal=True, seqlens=wide),
        replace(full, name="causal, more queries", causal=True, seqlens=((2 * side, side),) * 2),
        replace(full, name="window", window=(side // 4, side // 8)),
        replace(
            full, name="causal, window, unequal", window=(side // 4, 0), causal=True, seqlens=wide
        ),
        replace(full, name="causal, alibi", causal=True, slopes=True),
        replace(full, name="alibi, unequal", slopes=True, seqlens=wide),
        replace(full, name="causal, softcap", causal=True, softcap=20.0),
        Case("packed, causal", alike, packed=True, causal=True),
        Case("packed, causal, GQA, unequal", ragged, packed=True, causal=True, heads=(8, 2)),
        Case("packed, window", alike, packed=True, window=(side // 8, side // 4)),
        Case("packed, 64 alike", ((32, 32),) * 64, packed=True, causal=True),
        Case("packed, one query", ((1, side),) * 8, packed=True, heads=(8, 2)),
    ]


def ours(case: Case, tensors: list[Tensor]) -> Answer:
    leaves = [x.detach().clone().requires_grad_() for x in tensors[:3]]
    out, lse, _ = our_forward(case, leaves)
    return answer(out, lse, torch.autograd.grad(out, leaves, tensors[3]))


def our_forward(case: Case, inputs: list[Tensor]) -> Any:
    options = {"causal": case.causal, "window_size": case.window, "softcap": case.softcap}
    options |= {"alibi_slopes": case.alibi(), "return_attn_probs": True}
    if not case.packed:
        return flash_attn_func(*inputs, **options)
    lengths = (case.cumulative(0), case.cumulative(1), *case.longest())
    return flash_attn_varlen_func(*inputs, *lengths, **options)


def answer(out: Tensor, lse: Tensor, gradients: tuple[Tensor, ...]) -> Answer:
    return dict(zip((*NAMES, "lse"), (out.detach(), *gradients, lse.detach()), strict=True))


def flash_forward(case: Case, inputs: list[Tensor]) -> Any:
    """torch's flash-attention 2, as it is behind scaled_dot_product_attention."""
    lengths = (case.cumulative(0), case.cumulative(1)) if case.packed else (None, None)
    window = dict(zip(("window_size_left", "window_size_right"), case.window, strict=True))
    alibi = {"alibi_slopes": case.alibi()} if case.slopes else {}
    return torch.ops.aten._flash_attention_forward(
        *inputs, *lengths, *case.longest(), 0.0, case.causal, False, **window, **alibi
    )


def flash(case: Case, tensors: list[Tensor]) -> Answer:
    if case.softcap:
        raise NotImplementedError("torch's flash attention has no softcap")
    out, lse, *state = flash_forward(case, tensors[:3])
    found = {"out": out, "lse": lse}
    if not case.slopes:
        # its backward takes no slopes
        found |= dict(zip(NAMES[1:], flash_backward(case, tensors, out, lse, state), strict=True))
    return found


def flash_backward(
    case: Case, tensors: list[Tensor], out: Tensor, lse: Tensor, state: list[Tensor]
) -> Any:
    *inputs, dout = tensors
    lengths = (case.cumulative(0), case.cumulative(1)) if case.packed else (None, None)
    window = dict(zip(("window_size_left", "window_size_right"), case.window, strict=True))
    return torch.ops.aten._flash_attention_backward(
        dout, *inputs, out, lse, *lengths, *case.longest(), 0.0, case.causal, *state[:2], **window
    )


def plain(case: Case, tensors: list[Tensor], out_dtype: torch.dtype | None = None) -> Answer:
    """Whole matrices in the dtype of the tensors; the gradients may start from a rounded out."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors[:3]]
    q, k, v = leaves if case.packed else [x.flatten(0, 1) for x in leaves]
    outs, statistics_ = [], []
    ends = [case.ends(side) for side in (0, 1)]
    for i in range(len(case.seqlens)):
        rows, keys = (slice(e[i], e[i + 1]) for e in ends)
        out, lse = _plain_sequence(case, q[rows], k[keys], v[keys])
        outs.append(out)
        statistics_.append(lse)
    out, lse = torch.cat(outs).view_as(leaves[0]), torch.cat(statistics_, 1)
    if not case.packed:
        lse = lse.unflatten(1, (len(case.seqlens), -1)).transpose(0, 1)
    outputs, given = [out], [tensors[3]]
    if out_dtype is not None:
        lost = out.detach() - out.detach().to(out_dtype)
        outputs.append(lse)
        given.append((tensors[3] * lost).sum(-1).transpose(-1, -2))
    return answer(out, lse, torch.autograd.grad(outputs, leaves, given))


def _plain_sequence(case: Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    group = case.heads[0] // case.heads[1]
    k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    scores = q.transpose(0, 1) @ k.transpose(1, 2) * case.headdim**-0.5
    if case.softcap:
        scores = torch.tanh(scores / case.softcap) * case.softcap
    i = torch.arange(q.shape[0], device=DEVICE)[:, None] + k.shape[1] - q.shape[0]
    distance = torch.arange(k.shape[1], device=DEVICE)[None] - i
    slopes = case.alibi()
    if slopes is not None:
        scores = scores - slopes[:, None, None].to(scores.dtype) * distance.abs()
    left, right = case.window
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    hidden |= (distance < -left) if left >= 0 else False
    hidden |= (distance > (0 if case.causal else right)) if case.causal or right >= 0 else False
    blind = hidden.all(-1)
    scores = scores.masked_fill(hidden, -math.inf).masked_fill(blind[:, None], 0.0)
    lse = torch.logsumexp(scores, -1).masked_fill(blind, math.inf)
    weights = torch.softmax(scores, -1).masked_fill(blind[:, None], 0.0)
    return (weights @ v).transpose(0, 1), lse


def judged(found: Answer, truth: Answer, same: Answer, stored: Answer) -> dict[str, Any]:
    """For each result its error, what plain PyTorch is off by, and whether the rule holds."""
    verdict = {}
    for name, actual in found.items():
        exact = truth[name]
        finite = exact.isfinite()
        places = bool(torch.equal(actual.isfinite(), finite))

        def off(x: Tensor, exact: Tensor = exact, finite: Tensor = finite) -> float:
            wrong = (x.double() - exact).masked_fill(~finite, 0.0).abs()
            return wrong.max().item() if wrong.numel() else 0.0

        largest = exact.masked_fill(~finite, 0.0).abs().max().item()
        if name == "lse":
            allowed = 64 * torch.finfo(torch.float32).eps * max(1.0, largest)
        else:
            allowed = 2 * off(same[name]) + torch.finfo(actual.dtype).eps * largest
            allowed += NOISE + off(stored[name])
        verdict[name] = {
            "error": off(actual),
            "plain": off(same[name]),
            "allowed": allowed,
            "met": places and off(actual) <= allowed,
        }
    return verdict


def timed(call: Callable[[], Any], rounds: int = 7) -> float:
    """Milliseconds, the median."""
    call()
    taken = []
    for _ in range(rounds):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        taken.append((time.perf_counter() - start) * 1e3)
    return statistics.median(taken)


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def launches(call: Callable[[], Any]) -> int:
    """How many kernels a call launches; on a CPU, how many aten operators it runs."""
    if DEVICE.type == "cuda":
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            call()
            synchronize()
        return sum(e.count for e in profile.key_averages() if "LaunchKernel" in e.key)
    with torch.autograd.profiler.profile() as profile:
        call()
    return sum(event.count for event in profile.key_averages() if event.key.startswith("aten::"))


def times(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    tensors = case.tensors(dtype)
    *inputs, dout = tensors
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    taken: dict[str, Any] = {"case": case.name, "dtype": str(dtype)}
    with torch.no_grad():
        taken["ours_forward_ms"] = timed(lambda: our_forward(case, inputs))
        taken["ours_forward_launches"] = launches(lambda: our_forward(case, inputs))
    out = our_forward(case, leaves)[0]
    taken["ours_backward_ms"] = timed(
        lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)
    )
    if case.softcap or DEVICE.type != "cuda":
        return taken
    out, lse, *state = flash_forward(case, inputs)
    taken["flash_forward_ms"] = timed(lambda: flash_forward(case, inputs))
    if not case.slopes:
        taken["flash_backward_ms"] = timed(lambda: flash_backward(case, tensors, out, lse, state))
    return taken


def timed_cases(quick: bool) -> list[Case]:
    side = 64 if quick else 4096
    square = ((side, side),)
    many = {"heads": (32, 8), "headdim": 128}
    return [
        Case("causal", square, causal=True, **many),
        Case("full", square, **many),
        Case("causal, softcap", square, causal=True, softcap=30.0, **many),
        Case("window of 256", square, causal=True, window=(256, 0), **many),
        Case("packed, 64 of 32", ((32, 32),) * 64, packed=True, causal=True, **many),
        Case("packed, 64 of 32, softcap", ((32, 32),) * 64, packed=True, softcap=30.0, **many),
    ]


def numerics(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    tensors = case.tensors(dtype)
    doubles = [x.double() for x in tensors]
    references = (plain(case, doubles), plain(case, tensors), plain(case, doubles, dtype))
    row: dict[str, Any] = {"case": case.name, "dtype": str(dtype)}
    for name, solve in (("ours", ours), ("flash", flash)):
        try:
            row[name] = judged(solve(case, tensors), *references)
        except Exception as error:
            row[name] = {"error": f"{type(error).__name__}: {str(error)[:120]}"}
    return row


def broken(row: dict[str, Any], which: str) -> list[str]:
    """What of ours, or of torch's, broke the rule in a case."""
    verdict = row[which]
    where = f"{which}: {row['case']}, {row['dtype']}"
    if isinstance(verdict.get("error"), str):
        return [f"{where}: {verdict['error']}"]
    return [f"{where}: {name}" for name, result in verdict.items() if not result["met"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    quick = parser.parse_args().quick or DEVICE.type != "cuda"
    rows = [
        numerics(case, dtype) for dtype in (torch.bfloat16, torch.float16) for case in cases(quick)
    ]
    failed = [name for row in rows for name in broken(row, "ours")]
    report = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        "failed": failed,
        "flash_failed": [name for row in rows for name in broken(row, "flash")],
        "numerics": rows,
        "times": [times(case, torch.bfloat16) for case in timed_cases(quick)],
    }
    print(json.dumps(report))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
