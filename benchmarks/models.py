"""Training steps per second of tiny models of transformers, beside its sdpa and eager attention.

    python -m benchmarks.models [rounds] [threads]

Prints one line of JSON: [model, beside which attention, ratio of times, ours, theirs].
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable
from typing import Any

# transformers imports it where it is installed, which ends in an error without CANN
sys.modules["torch_npu"] = None  # type: ignore[assignment]

import torch  # noqa: E402
import transformers  # noqa: E402

import flash_attn_npu  # noqa: E402

from .figures import Clock  # noqa: E402

BATCH, SEQLEN = 2, 256


def configurations() -> dict[str, tuple[Any, Any]]:
    sizes = {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return {
        "BERT": (
            transformers.BertForMaskedLM,
            transformers.BertConfig(
                **sizes, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0
            ),
        ),
        "Llama": (
            transformers.LlamaForCausalLM,
            transformers.LlamaConfig(
                **sizes, num_key_value_heads=2, max_position_embeddings=SEQLEN, pad_token_id=0
            ),
        ),
    }


def step_of(kind: Any, config: Any, attention: str) -> Callable[[], None]:
    torch.manual_seed(0)
    model = kind._from_config(
        copy.deepcopy(config), attn_implementation=attention, dtype=torch.bfloat16
    ).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    ids = torch.randint(1, 512, (BATCH, SEQLEN), generator=torch.Generator().manual_seed(1))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    rounds, threads = (*(int(x) for x in sys.argv[1:]), 10, 1)[:2]
    torch.set_num_threads(threads)
    flash_attn_npu.install()
    clock = Clock(time.process_time if threads == 1 else time.perf_counter, 4.0, 2, rounds)
    told = []
    for name, (kind, config) in configurations().items():
        ours = step_of(kind, config, "flash_attention_2")
        for other in ("sdpa", "eager"):
            ratio, mine, theirs = clock.pair(ours, step_of(kind, config, other))
            told.append([name, other, ratio, 1 / mine, 1 / theirs])
    print(json.dumps(told))


if __name__ == "__main__":
    main()
