"""What norms, gates and rotations cost on the host, beside torch_npu's operators. Simulated.

    python benchmarks/rowwise.py [--rounds 40] [--calls 300] [--quick] [-o FILE]

As in overhead.py a call is all host work here: nothing says how long a kernel runs on a card, and
a card hides this time as long as it has work queued. `ratio` is the median over the rounds of
(time of ours / time of the direct call in the same round); compare ratios between runs.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Any

from overhead import asked, measure, ratio, torch

BATCH, SEQLEN, HEADS, HEADDIM = 4, 512, 8, 64
Pair = tuple[Callable[[], Any], Callable[[], Any]]


def tensor(*shape: int, grad: bool = True) -> Any:
    return torch.empty(shape, dtype=torch.bfloat16, device="npu:0", requires_grad=grad)


def pairs() -> dict[str, Pair]:
    """For each public function a direct call that does the same on the card."""
    import torch_npu

    from flash_attn_npu.layers.rotary import apply_rotary_emb
    from flash_attn_npu.ops.activations import swiglu
    from flash_attn_npu.ops.triton.layer_norm import layer_norm_fn, rms_norm_fn

    width = HEADS * HEADDIM
    x, residual, both = (tensor(BATCH, SEQLEN, size) for size in (width, width, 2 * width))
    weight, bias = tensor(width), tensor(width)
    heads, half = tensor(BATCH, SEQLEN, HEADS, HEADDIM), tensor(SEQLEN, HEADDIM // 2, grad=False)

    def turned() -> Any:
        table = torch.cat((half, half), dim=-1)[None, :, None]
        return torch_npu.npu_rotary_mul(heads, table, torch.cat((table,), dim=-1))

    return {
        "rms_norm_fn": (
            lambda: torch_npu.npu_rms_norm(x, weight, 1e-6),
            lambda: rms_norm_fn(x, weight, None),
        ),
        "rms_norm_fn, residual": (
            lambda: torch_npu.npu_rms_norm(x + residual, weight, 1e-6),
            lambda: rms_norm_fn(x, weight, None, residual, prenorm=True),
        ),
        "layer_norm_fn, residual": (
            lambda: torch_npu.npu_add_layer_norm(x, residual, weight, bias, 1e-6, True),
            lambda: layer_norm_fn(x, weight, bias, residual, prenorm=True),
        ),
        "swiglu": (
            lambda: torch_npu.npu_swiglu(both),
            lambda: swiglu(*both.chunk(2, dim=-1)),
        ),
        "apply_rotary_emb": (turned, lambda: apply_rotary_emb(heads, half, half)),
    }


def main() -> None:
    rounds, count, output = asked(__doc__.splitlines()[0], 40)
    print("simulated Ascend without arithmetic: host overhead only, forward of training")
    print(f"  {'microseconds per call':28} {'direct':>8} {'ours':>8} {'ratio':>8}")
    ratios = {}
    for name, (direct, ours) in pairs().items():
        times = measure({"direct": direct, "ours": ours}, rounds, count)
        medians = (statistics.median(times[key]) for key in ("direct", "ours"))
        row = " ".join(f"{median:8.2f}" for median in medians)
        ratios[name] = ratio(times["ours"], times["direct"])
        print(f"  {name:28} {row} {ratios[name]:8.3f}")
    if output is not None:
        output.write_text(json.dumps(ratios))


if __name__ == "__main__":
    main()
