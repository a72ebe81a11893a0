"""The documentation's page of models.

`python -m tests.helpers.model_page --jobs 2 > docs/models.md` runs the sweep and prints it. With
results at hand, from runs of `tests.helpers.model_sweep`, name their files instead.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

RIGHT = 2e-3
"""Against the largest of eager's values."""
OWN_FAULTS = {
    "T5Gemma": "its encoder's window is `abs(q_idx - kv_idx) <= sliding_window` for eager "
    "attention (masking_utils.py, `sliding_window_bidirectional_overlay`) and one less at each "
    "side for flash attention (modeling_flash_attention_utils.py, "
    "`(sliding_window - 1, sliding_window - 1)`)",
    "PegasusX": "its decoder's self-attention is made without `is_causal=True` "
    "(modeling_pegasus_x.py, `PegasusXAttention.__init__`), so it sees what comes later",
    "GPTNeo": "`GPTNeoFlashAttention2` calls `_flash_attention_forward` without the window of its "
    "local layers (modeling_gpt_neo.py)",
    "Phimoe": "`PhimoeAttention` hands no `sliding_window` on (modeling_phimoe.py)",
    "Aimv2Text": "`Aimv2Attention` has `self.is_causal = False` (modeling_aimv2.py), and a mask "
    "without padding is left out, so its text tower sees what comes later",
}
"""Class name's beginning -> what transformers itself does, with the real flash-attn too."""


ELSEWHERE = {"OpenAIPrivacyFilterModel": "its experts, with eager attention too"}
"""Class -> which other part of it differs on the simulated card from a CPU."""


def rows_of(files: list[Path]) -> list[dict[str, Any]]:
    lines = [line for file in files for line in file.read_text().splitlines()]
    return sorted((json.loads(line) for line in lines), key=lambda row: str(row["class"]))


def run(jobs: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{part}.json") for part in range(jobs)]
        environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
        running = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.helpers.model_sweep", str(file)]
                + ["--shard", f"{part}/{jobs}"],
                env=environment,
                stdout=subprocess.DEVNULL,
            )
            for part, file in enumerate(files)
        ]
        if any(process.wait() for process in running):
            raise SystemExit("a part of the sweep has failed")
        return rows_of(files)


def kind(row: dict[str, Any]) -> str:
    if row["end"].startswith("refused"):
        return "Refused"
    if row["end"] != "compared":
        return "Not covered"
    own = any(row["class"].startswith(name) for name in OWN_FAULTS)
    if max(row["cpu"], row["npu"]) >= RIGHT:
        elsewhere = row["class"] in ELSEWHERE and row["cpu"] < RIGHT
        return "Elsewhere" if elsewhere else "Transformers' own" if own else "Wrong"
    return "Fused" if row["npu kernels"] == ["npu_fusion_attention"] else "Composed"


TITLES = {
    "Wrong": "Wrong, and not known why",
    "Fused": "Right, by the fused kernel",
    "Composed": "Right, composed of torch's operations (no kernel has what they ask)",
    "Transformers' own": "Wrong by transformers' own doing",
    "Elsewhere": "Right, in a model of which another part differs on the simulated card",
    "Refused": "Refused, by transformers for a part of the model or by the card",
    "Not covered": "Not covered: not made small by the sweep's rules, or attention was not called",
}
HEAD = """# Models of transformers

Every class of transformers {version} that its automatic classes would pick and that knows flash
attention, made small, float32, padded where it takes a mask: `flash_attention_2` on a CPU and on
the simulated card against eager attention on the CPU. Right is within {right:g} of the largest of
eager's values. A class in which attention was never called is not counted as right. Printed by
`python -m tests.helpers.model_page --jobs 2`; no Ascend machine was asked.

Ten families (Llama, Mistral, Qwen2, Qwen3-MoE, Gemma2, GPT-OSS, Phi3, ModernBERT, Whisper,
Qwen2.5-VL) are tested further: gradients, checkpointing, generation with dynamic and static caches,
left padding, packed sequences, bfloat16, torch.compile.

transformers 4.57.6 and 5.20 to 5.24 are tested. 4.51 hands windows over one wider than its eager
attention has them, by its own doing, and knows no sinks.

Lengths, masks and position ids on a card are read once in a forward, whatever the number of layers.
Under `torch.inference_mode` that needs tensors that were made outside of it, or that transformers
makes for a forward (masks, the lengths of images): of those flash_attn_npu makes copies with a
version counter. Position ids that are made inside it are asked once in every layer, where a batch
has one row: without a counter a remembered answer could be stale. Others are no safer: an answer
for one forward (a write between two layers would go unseen), a counted tensor in its place
(`torch.utils.swap_tensors` moves it away under whoever holds its memory), a copy where it
enters the model (most models make it themselves). `torch.no_grad` has one copy.

## What transformers itself loses

These are wrong with the real flash-attn too, as what is missing is gone before flash attention is
called; flash_attn_npu says so in its log, once. There, use `attn_implementation="eager"`.

"""
ALSO = {
    "Gemma3, PaliGemma": "the tokens of an image see each other both ways in eager attention's "
    "mask (`token_type_ids`), of which flash attention gets the padding only",
}


def page(rows: list[dict[str, Any]], version: str) -> str:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if not row["end"].startswith("knows no"):
            found[kind(row)].append(row)
    text = HEAD.format(version=version, right=RIGHT)
    text += "".join(f"- {name}: {fault}.\n" for name, fault in OWN_FAULTS.items())
    text += "".join(f"- {name}: {lost}.\n" for name, lost in ALSO.items())
    text += "\n| | classes |\n|---|---|\n"
    text += "".join(f"| {title} | {len(found[name])} |\n" for name, title in TITLES.items())
    for name, title in TITLES.items():
        if found[name]:
            text += f"\n## {title}\n\n" + section(name, found[name])
    return text


def section(name: str, rows: list[dict[str, Any]]) -> str:
    if name in ("Fused", "Composed"):
        worst = max(max(row["cpu"], row["npu"]) for row in rows)
        names = ", ".join(row["class"] for row in rows)
        return f"{names}.\n\nThe largest difference among them is {worst:.1g}.\n"
    if name in ("Refused", "Not covered"):
        reasons: dict[str, list[str]] = defaultdict(list)
        for row in rows:
            reasons[row["end"].replace("|", "/")].append(row["class"])
        lines = [f"- {', '.join(names)}: `{reason}`" for reason, names in sorted(reasons.items())]
        return "\n".join(lines) + "\n"
    lines = [f"| {r['class']} | {r['cpu']:.1g} | {r['npu']:.1g} |" for r in rows]
    lines += [f"\n{r['class']}: {ELSEWHERE[r['class']]}." for r in rows if name == "Elsewhere"]
    return "| class | CPU | simulated card |\n|---|---|---|\n" + "\n".join(lines) + "\n"


def main() -> None:
    from importlib.metadata import version

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="*")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    rows = rows_of(options.results) if options.results else run(options.jobs)
    print(page(rows, version("transformers")), end="")


if __name__ == "__main__":
    main()
