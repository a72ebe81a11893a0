"""Every model class of transformers that knows flash attention, made small, against eager.

`python -m tests.helpers.model_sweep RESULTS [--shard I/N]` appends one line of JSON for each class;
on a machine without CANN with TORCH_DEVICE_BACKEND_AUTOLOAD=0. `model_page` prints what it found.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import inspect
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

SMALL: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "hidden_dim", "width",
         "embedding_size", "encoder_hidden_size", "decoder_hidden_size", "out_hidden_size",
         "projection_dim", "d_kv_hidden", "cross_attention_hidden_size"), 64),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner",
         "moe_intermediate_size", "shared_expert_intermediate_size", "d_ff", "mlp_dim"), 64),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers",
         "decoder_layers", "depth", "num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
         "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "d_kv"), 16),
    "vocab_size": 128,
    "image_size": 32,
    "patch_size": 8,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "n_group", "topk_group", "moe_topk"), 1),
    "sliding_window": 8,
    "max_position_embeddings": 128,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 16),
    "num_mel_bins": 16,
    "max_source_positions": 24,
    "max_target_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MAPPINGS = {
    f"MODEL_{kind}MAPPING_NAMES"
    for kind in ("", "FOR_CAUSAL_LM_", "FOR_SEQ_TO_SEQ_CAUSAL_LM_", "FOR_SPEECH_SEQ_2_SEQ_")
}
"""Heads for classification and the like add nothing to the attention beneath."""
DROPOUTS = ("dropout", "drop_path", "layerdrop", "_pdrop", "drop_rate")
SECONDS = 40


class TooLongError(Exception):
    """A class took longer than is sensible for a small model."""


def classes() -> list[str]:
    """Names of the classes that transformers' automatic ones would pick, in order."""
    import transformers
    from transformers.models.auto import modeling_auto

    names = set()
    for label, table in vars(modeling_auto).items():
        if label in MAPPINGS:
            for entry in table.values():
                names.update([entry] if isinstance(entry, str) else entry)
    return sorted(name for name in names if isinstance(name, str) and hasattr(transformers, name))


def shrink(config: Any) -> None:
    """Make a configuration small, and those inside it."""
    for name in list(vars(config)):
        # some are said by properties, or of each layer by itself
        with contextlib.suppress(AttributeError, TypeError):
            value = getattr(config, name)
            if hasattr(value, "to_diff_dict"):
                shrink(value)
            elif isinstance(value, (int, float)) and any(part in name for part in DROPOUTS):
                setattr(config, name, type(value)(0))
            elif name in SMALL and isinstance(value, int) and not isinstance(value, bool):
                setattr(config, name, SMALL[name])
            elif isinstance(value, dict) and name in ("rope_parameters", "rope_scaling"):
                value["mrope_section"] = [2, 3, 3]
    with contextlib.suppress(AttributeError, TypeError, IndexError):
        config.layer_types = [config.layer_types[0], config.layer_types[-1]]


def inputs_of(model: Module, config: Any) -> dict[str, Any]:
    """Random inputs of the kinds that the model names, with padding where it has a mask."""
    named = inspect.signature(model.forward).parameters
    text = getattr(config, "get_text_config", lambda: config)()
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 32)
    size = size if isinstance(size, int) else size[0]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, min(100, getattr(text, "vocab_size", 100)), (2, 20), generator=generator)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 13:] = 0
    given: dict[str, Any] = {}
    main = getattr(model, "main_input_name", "input_ids")
    if main == "pixel_values":
        channels = getattr(vision, "num_channels", 3)
        given["pixel_values"] = torch.randn(2, channels, size, size, generator=generator)
    elif main == "input_features":
        bins, length = getattr(config, "num_mel_bins", 16), 48
        given["input_features"] = torch.randn(2, bins, length, generator=generator)
    elif main == "input_values":
        given["input_values"] = torch.randn(2, 4000, generator=generator)
    if main == "input_ids" or ("input_ids" in named and main == "pixel_values"):
        given |= {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    if "decoder_input_ids" in named:
        given["decoder_input_ids"] = torch.randint(3, 100, (2, 9), generator=generator)
    if "use_cache" in named:
        given["use_cache"] = False
    return {name: value for name, value in given.items() if name in named}


def on(device: str, inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def floats(out: Any) -> list[Tensor]:
    """The first tensors of an answer: logits, or the last hidden state, and what stands beside."""
    values = out.to_tuple() if hasattr(out, "to_tuple") else out
    values = values if isinstance(values, (tuple, list)) else (values,)
    return [x for x in values if isinstance(x, Tensor) and x.is_floating_point()][:2]


def difference(got: Any, expected: Any, inputs: dict[str, Any]) -> float:
    """Against eager's largest value, where there is no padding."""
    worst = 0.0
    mask = inputs.get("attention_mask")
    for mine, other in zip(floats(got), floats(expected), strict=True):
        if mask is not None and other.shape[:2] == mask.shape:
            mine, other = mine[mask.bool().to(mine.device)], other[mask.bool()]
        off = (mine.cpu() - other).abs().max() / other.abs().max().clamp_min(1e-6)
        worst = max(worst, off.item() if torch.isfinite(off) else float("inf"))
    return worst


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooLongError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def make(kind: Any, config: Any, attention: str) -> Module:
    torch.manual_seed(0)
    model = kind._from_config(
        copy.deepcopy(config), attn_implementation=attention, dtype=torch.float32
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.15)
    return model.eval()


def examine(name: str) -> dict[str, Any]:
    """One class: what it is, or where it ended."""
    import transformers

    import flash_attn_npu

    kind = getattr(transformers, name)
    row: dict[str, Any] = {"class": name}
    if not getattr(kind, "_supports_flash_attn", False):
        return row | {"end": "knows no flash attention"}
    try:
        config = kind.config_class()
        shrink(config)
        eager = make(kind, config, "eager")
        inputs = inputs_of(eager, config)
        with torch.no_grad():
            expected = eager(**inputs)
            noise = difference(eager(**inputs), expected, inputs)
        if noise or not floats(expected):
            return row | {"end": "not made small: two runs of eager differ"}
    except Exception as error:
        return row | {"end": "not made small: " + told(error)}
    for device in ("cpu", "npu"):
        try:
            model = make(kind, config, "flash_attention_2")
            model.load_state_dict(eager.state_dict())
            model.to(device)
            with torch.no_grad(), flash_attn_npu.reporting() as report:
                got = model(**on(device, inputs))
            row[device] = difference(got, expected, inputs)
            row[f"{device} kernels"] = sorted({str(tally.kernel) for tally in report.tallies})
        except Exception as error:
            return row | {"end": f"refused on {device}: " + told(error)}
    covered = row["cpu kernels"] and row["npu kernels"]
    return row | {"end": "compared" if covered else "attention was never called"}


def told(error: Exception) -> str:
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0][:160] if first else ''}"


def sweep(results: Path, shard: tuple[int, int]) -> None:
    done = set()
    if results.exists():
        done = {json.loads(line)["class"] for line in results.read_text().splitlines()}
    for name in classes()[shard[0] :: shard[1]]:
        if name in done:
            continue
        try:
            with limited(SECONDS):
                row = examine(name)
        except BaseException as error:
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            row = {"class": name, "end": "not made small: " + told(error)}  # type: ignore[arg-type]
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--shard", default="0/1")
    options = parser.parse_args()
    from flash_attn_npu import _virtual_ascend as virtual_ascend

    if reason := virtual_ascend.start():
        sys.exit(f"the simulated card is not running: {reason}")
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    torch.set_num_threads(1)
    virtual_ascend.enable()
    warnings.simplefilter("ignore")
    import transformers

    import flash_attn_npu

    transformers.logging.set_verbosity_error()
    part, parts = map(int, options.shard.split("/"))
    with flash_attn_npu.install():
        sweep(options.results, (part, parts))


if __name__ == "__main__":
    main()
