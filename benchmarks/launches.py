"""What calls ask of a card: launches, copies to and from the host, bytes allocated. No time.

    python benchmarks/launches.py [--tree FOLDER] [-o FILE] [--before FILE] [--only TEXT]

The real torch_npu wheel runs over the simulated card of this checkout. `--tree` counts the
flash_attn_npu of another checkout over the same card, as `-o` keeps it; `--before` prints the table
of both. Masks and tables are there already, and lengths are those of a next step. One layer each.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Step = Callable[[int], Any]
STEPS = 3


def card() -> Any:
    """The simulated card of this checkout, whatever flash_attn_npu is measured."""
    folder = ROOT / "flash_attn_npu" / "_virtual_ascend"
    spec = importlib.util.spec_from_file_location(
        "simulated_card", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["simulated_card"] = module
    spec.loader.exec_module(module)
    return module


def tensor(*shape: int, dtype: Any = None, grad: bool = False) -> Any:
    import torch

    made = torch.randn(shape, dtype=torch.float32).to(dtype or torch.bfloat16)
    return made.to("npu:0").requires_grad_(grad)


def decoding(
    heads: tuple[int, int],
    headdim: int,
    page: int = 0,
    sink: bool = False,
    rotary: str = "",
    **options: Any,
) -> Step:
    """One token for each of four sequences with up to 1200 keys, appended and attended."""
    import torch

    from flash_attn_npu import flash_attn_with_kvcache
    from flash_attn_npu._integrations.stand_ins import npu_flash_attn_with_kvcache

    q, k, v = tensor(4, 1, heads[0], headdim), *(tensor(4, 1, heads[1], headdim) for _ in "kv")
    shape = (4 * 1280 // page, page) if page else (4, 1280)
    caches = [tensor(*shape, heads[1], headdim) for _ in "kv"]
    if page:
        table = torch.randperm(shape[0]).to(torch.int32).view(4, -1)
        options["block_table"] = table.to("npu:0")
    if sink:
        # what transformers' continuous batching calls
        options["s_aux"] = torch.randn(heads[0]).to("npu:0", torch.bfloat16)
    if rotary:
        # as transformers has it; flash-attn's own default is interleaved
        options |= {**angles(rotary, headdim), "rotary_interleaved": False}
    function = npu_flash_attn_with_kvcache if sink else flash_attn_with_kvcache
    lengths = places()
    given = {"causal": True, **options}
    return lambda count: function(q, *caches, k, v, cache_seqlens=lengths[count], **given)


def angles(whose: str, headdim: int) -> dict[str, Any]:
    """Tables of the caller, or those that a RotaryEmbedding has made, as MHA passes them."""
    import torch

    from flash_attn_npu.layers.rotary import RotaryEmbedding

    if whose == "caller":
        return {name: tensor(4096, headdim // 2) for name in ("rotary_cos", "rotary_sin")}
    module = RotaryEmbedding(headdim, device="npu:0")
    module._update_cos_sin_cache(4096, torch.device("npu:0"), torch.bfloat16)
    return {"rotary_cos": module._cos_cached, "rotary_sin": module._sin_cached}


def places() -> list[Any]:
    """Where four sequences are, at each of some steps."""
    import torch

    first = torch.tensor([1000, 37, 1200, 640], dtype=torch.int32)
    return [(first + count).to("npu:0") for count in range(STEPS)]


def gemma() -> Step:
    """Attention of a forward of Gemma 2: softcap, 8 heads over 4 of 256, 4096 tokens."""
    from flash_attn_npu import flash_attn_func

    q, k, v = tensor(1, 4096, 8, 256), tensor(1, 4096, 4, 256), tensor(1, 4096, 4, 256)
    return lambda count: flash_attn_func(q, k, v, causal=True, softcap=50.0)


def normed() -> Step:
    """A training step of a residual block's norm: forward with prenorm, and backward."""
    import torch

    from flash_attn_npu.ops.triton.layer_norm import rms_norm_fn

    x, residual = (tensor(2, 1024, 2048, grad=True) for _ in range(2))
    weight, dout = tensor(2048, grad=True), tensor(2, 1024, 2048)

    def step(count: int) -> Any:
        out, total = rms_norm_fn(x, weight, None, residual=residual, prenorm=True, eps=1e-6)
        return torch.autograd.grad((out, total), (x, residual, weight), (dout, dout))

    return step


def rotated() -> Step:
    """q and k of a step of decoding, four sequences, rotated at their positions."""
    from flash_attn_npu.layers.rotary import apply_rotary_emb

    q, k = tensor(4, 1, 32, 128), tensor(4, 1, 8, 128)
    cos, sin, offsets = tensor(4096, 64), tensor(4096, 64), places()
    return lambda count: [
        apply_rotary_emb(x, cos, sin, seqlen_offsets=offsets[count]) for x in (q, k)
    ]


def gated() -> Step:
    """A step of decoding through a GatedMlp of exact gelu, without a gradient."""
    import torch

    from flash_attn_npu.modules.mlp import GatedMlp

    activation = torch.nn.functional.gelu
    module = GatedMlp(1024, 2816, activation=activation, device="npu:0", dtype=torch.bfloat16)
    module.requires_grad_(requires_grad=False)
    x = tensor(4, 1, 1024)
    return lambda count: module(x)


def short() -> Step:
    """64 packed sequences of 32 tokens with softcap."""
    import torch

    from flash_attn_npu import flash_attn_varlen_func

    q, k, v = (tensor(64 * 32, 8, 64) for _ in "qkv")
    ends = torch.arange(0, 64 * 32 + 1, 32, dtype=torch.int32).to("npu:0")
    options = {"causal": True, "softcap": 30.0}
    return lambda count: flash_attn_varlen_func(q, k, v, ends, ends, 32, 32, **options)


CASES: dict[str, Callable[[], Step]] = {
    "decode, Llama (32 over 8 heads of 128)": lambda: decoding((32, 8), 128),
    "decode, Llama, in pages of 128": lambda: decoding((32, 8), 128, page=128),
    "decode, Gemma (8 over 4 heads of 256)": lambda: decoding((8, 4), 256),
    "decode, Phi (32 heads of 96)": lambda: decoding((32, 32), 96),
    "decode, GPT-OSS (64 over 8 of 64, a sink), in pages of 128": lambda: decoding(
        (64, 8), 64, page=128, sink=True
    ),
    "decode, softcap (8 over 4 heads of 256), in pages of 128": lambda: decoding(
        (8, 4), 256, page=128, softcap=50.0
    ),
    "forward, Gemma 2 (softcap, 4096 tokens)": gemma,
    "training step of an RMS norm of a sum": normed,
    "decode, rotary of q and k": rotated,
    "decode, Llama 128 and its rotary": lambda: decoding((32, 8), 128, rotary="caller"),
    "decode, Llama 128, rotary by tables of RotaryEmbedding": lambda: decoding(
        (32, 8), 128, rotary="embedding"
    ),
    "decode, gated MLP of exact gelu": gated,
    "forward, 64 packed sequences of 32 tokens, softcap": short,
}
Counts = dict[str, int]


def counted(simulated: Any, step: Step) -> Counts:
    """Of the last step; those before it have made what is kept."""
    import torch

    for count in range(STEPS - 1):
        step(count)
    torch.npu.synchronize()
    with simulated.record() as seen:
        step(STEPS - 1)
    return {
        "launches": len(seen.operators),
        "copies": len(seen.device_to_host) + len(seen.host_to_device),
        "bytes": seen.allocated_bytes,
    }


def measured(simulated: Any, only: str) -> dict[str, Counts | str]:
    found: dict[str, Counts | str] = {}
    for name, make in CASES.items():
        if only not in name:
            continue
        try:
            found[name] = counted(simulated, make())
        except Exception as error:
            # an older checkout may refuse what this one serves
            found[name] = f"refused: {type(error).__name__}: {str(error)[:90]}"
        print(f"{name}: {found[name]}", flush=True)
    return found


def table(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Markdown: before and after of each call that both have counted."""
    lines = ["| one call | launches | copies | bytes allocated |", "| --- | --- | --- | --- |"]
    for name, now in after.items():
        was = before.get(name, "not counted")
        cells = (_cell(was, now, key) for key in ("launches", "copies", "bytes"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(was: Counts | str, now: Counts | str, key: str) -> str:
    return " → ".join(_told(one, key) for one in (was, now))


def _told(counts: Counts | str, key: str) -> str:
    if isinstance(counts, str):
        return counts.partition(":")[0]
    return f"{counts[key] / 1024:,.0f} KiB" if key == "bytes" else f"{counts[key]:,}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--tree", type=Path, default=ROOT, help="checkout that is measured")
    parser.add_argument("-o", "--output", type=Path, help="write the counts as JSON")
    parser.add_argument("--before", type=Path, help="print a table against these counts")
    parser.add_argument("--only", default="", help="calls whose name has this in it")
    options = parser.parse_args(arguments)
    # torch must not load torch_npu before the stubs are there
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    # the comparison of first calls is no part of a step
    os.environ["FLASH_ATTN_NPU_VERIFY"] = "off"
    os.environ["FLASH_ATTN_NPU_FALLBACK"] = "allow"
    sys.path.insert(0, str(options.tree.resolve()))
    simulated = card()
    reason = simulated.start()
    if reason is not None:
        print(f"nothing counted: {reason}", file=sys.stderr)
        return 1
    simulated.enable()
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = measured(simulated, options.only)
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")
    if options.before:
        print("\n" + table(json.loads(options.before.read_text()), found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
