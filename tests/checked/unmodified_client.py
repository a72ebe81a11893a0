"""A client of flash_attn, checked in an environment in which `activate` has placed stubs for it."""

from __future__ import annotations

import flash_attn
import torch
from flash_attn import flash_attn_func
from flash_attn.bert_padding import unpad_input
from flash_attn.flash_attn_interface import flash_attn_varlen_func
from flash_attn.layers.rotary import RotaryEmbedding
from flash_attn.losses.cross_entropy import CrossEntropyLoss
from torch import Tensor
from typing_extensions import assert_type


def main(x: Tensor) -> None:
    print(flash_attn.__version__.split("."))
    assert_type(flash_attn_func(x, x, x).view(-1), Tensor)
    assert_type(flash_attn_func(x, x, x, return_attn_probs=True), tuple[Tensor, Tensor, Tensor])
    rows, _, cu_seqlens, longest, _ = unpad_input(x, torch.ones(1, 4, dtype=torch.bool))
    out = flash_attn_varlen_func(rows, rows, rows, cu_seqlens, cu_seqlens, longest, longest)
    assert_type(out, Tensor)
    print(RotaryEmbedding(8), CrossEntropyLoss(label_smoothing=0.1))


main(torch.randn(1, 4, 2, 8))
