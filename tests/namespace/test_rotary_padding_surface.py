"""The names and signatures of flash-attention 2.8 in the rotary and padding modules."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch

SURFACE: dict[str, dict[str, str]] = {
    "bert_padding": {
        "IndexFirstAxis.forward": "ctx input indices",
        "IndexFirstAxis.backward": "ctx grad_output",
        "IndexPutFirstAxis.forward": "ctx values indices first_axis_dim",
        "IndexPutFirstAxis.backward": "ctx grad_output",
        "IndexFirstAxisResidual.forward": "ctx input indices",
        "IndexFirstAxisResidual.backward": "ctx grad_output grad_residual",
        "index_first_axis": "input indices",
        "index_put_first_axis": "values indices first_axis_dim",
        "index_first_axis_residual": "input indices",
        "pad_input": "hidden_states indices batch seqlen",
        "unpad_input": "hidden_states attention_mask unused_mask=None",
        "unpad_input_for_concatenated_sequences": "hidden_states attention_mask_in_length",
    },
    "ops.triton.rotary": {
        "apply_rotary": "x cos sin seqlen_offsets=0 cu_seqlens=None max_seqlen=None "
        "interleaved=False inplace=False conjugate=False",
    },
    "layers.rotary": {
        "rotate_half": "x interleaved=False",
        "apply_rotary_emb_torch": "x cos sin interleaved=False",
        "ApplyRotaryEmb.forward": "ctx x cos sin interleaved=False inplace=False "
        "seqlen_offsets=0 cu_seqlens=None max_seqlen=None",
        "ApplyRotaryEmb.backward": "ctx do",
        "apply_rotary_emb": "x cos sin interleaved=False inplace=False seqlen_offsets=0 "
        "cu_seqlens=None max_seqlen=None",
        "apply_rotary_emb_func": "x cos sin interleaved=False inplace=False seqlen_offsets=0 "
        "cu_seqlens=None max_seqlen=None",
        "apply_rotary": "x cos sin seqlen_offsets=0 cu_seqlens=None max_seqlen=None "
        "interleaved=False inplace=False conjugate=False",
        "_apply_rotary_emb_qkv": "qkv cos sin cos_k=None sin_k=None interleaved=False "
        "inplace=False conjugate=False seqlen_offsets=0 num_heads_q=None",
        "ApplyRotaryEmbQKV_.forward": "ctx qkv cos sin cos_k=None sin_k=None interleaved=False "
        "seqlen_offsets=0 num_heads_q=None",
        "ApplyRotaryEmbQKV_.backward": "ctx dqkv",
        "apply_rotary_emb_qkv_": "qkv cos sin cos_k=None sin_k=None interleaved=False "
        "seqlen_offsets=0 num_heads_q=None",
        "ApplyRotaryEmbKV_.forward": "ctx kv cos sin interleaved=False seqlen_offsets=0",
        "ApplyRotaryEmbKV_.backward": "ctx dkv",
        "apply_rotary_emb_kv_": "kv cos sin interleaved=False seqlen_offsets=0",
        "RotaryEmbedding.__init__": "self dim base=10000.0 interleaved=False scale_base=None "
        "device=None",
        "RotaryEmbedding.forward": "self qkv kv=None seqlen_offset=0 max_seqlen=None "
        "num_heads_q=None",
    },
}
CLASSES = {
    "bert_padding": ("IndexFirstAxis", "IndexPutFirstAxis", "IndexFirstAxisResidual"),
    "layers.rotary": ("ApplyRotaryEmb", "ApplyRotaryEmbQKV_", "ApplyRotaryEmbKV_"),
}


def find(module: str, name: str) -> Any:
    found: Any = importlib.import_module(f"flash_attn_npu.{module}")
    for part in name.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in SURFACE.items() for name in names]
)
def test_signature(module: str, name: str) -> None:
    parameters = inspect.signature(find(module, name)).parameters.values()
    written = [
        parameter.name
        if parameter.default is parameter.empty
        else f"{parameter.name}={parameter.default!r}"
        for parameter in parameters
    ]
    assert all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in parameters)
    assert " ".join(written) == SURFACE[module][name]


@pytest.mark.parametrize("module", CLASSES)
def test_autograd_classes(module: str) -> None:
    for name in CLASSES[module]:
        assert issubclass(find(module, name), torch.autograd.Function)
    assert issubclass(find("layers.rotary", "RotaryEmbedding"), torch.nn.Module)


def test_the_triton_kernel_is_absent() -> None:
    with pytest.raises(AttributeError):
        find("ops.triton.rotary", "rotary_kernel")
