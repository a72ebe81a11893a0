"""A transformers model that imports flash_attn finds us, and compiles without a graph break."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("transformers")

SCRIPT = """
import sys
sys.modules["torch_npu"] = None     # not installed, as far as anybody can tell
import flash_attn_npu
flash_attn_npu.install()

import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LlamaConfig, LlamaForCausalLM

def llama(attention):
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=64, vocab_size=50, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)
    # transformers casts float32 for flash_attention_2, and breaks the graph by saying so
    return LlamaForCausalLM._from_config(
        config, dtype=torch.bfloat16, attn_implementation=attention)

def close(got, plain, exact):
    # at most twice the error of eager attention in bfloat16, plus one rounding
    def error(x):
        return (x.double() - exact).abs().max()
    return error(got) <= 2 * error(plain) + torch.finfo(torch.bfloat16).eps * exact.abs().max()

eager, flash = llama("eager"), llama("flash_attention_2")
exact = llama("eager").double()
counter = CompileCounterWithBackend("aot_eager")
compiled = torch.compile(flash, fullgraph=True, backend=counter)
for seqlen in (12, 20, 31):
    ids = torch.randint(1, 50, (2, seqlen))
    inputs = dict(input_ids=ids, labels=ids, use_cache=False)
    with flash_attn_npu.reporting() as report:
        answers = exact(**inputs), eager(**inputs), compiled(**inputs)
        truth, plain, got = (answer.logits for answer in answers)
        assert close(got, plain, truth), seqlen
        models = exact, eager, flash
        for model, answer in zip(models, answers, strict=True):
            model.zero_grad()
            answer.loss.backward()
    assert [tally.calls for tally in report.tallies] == [2, 2], report
    for true, other, mine in zip(*(model.parameters() for model in models), strict=True):
        assert close(mine.grad, other.grad, true.grad), seqlen
assert counter.frame_count <= 2, counter.frame_count
"""


@pytest.mark.sweep
def test_llama_compiles_in_one_graph(run_python: Callable[..., str]) -> None:
    run_python("-c", SCRIPT)
