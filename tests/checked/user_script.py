"""A user's script: mypy and pyright check it in `tox -e lint`, and a test runs it.

What a line reveals is asserted, so that a type that got worse is an error as well.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from typing_extensions import assert_type

import flash_attn_npu
from flash_attn_npu import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from flash_attn_npu.bert_padding import pad_input, unpad_input

Probed = tuple[Tensor, Tensor, Tensor]


def dense(x: Tensor, probed: bool) -> None:
    out = flash_attn_func(x, x, x, causal=True, window_size=[2, 0])
    print(out.view(1, 4, 16).shape, flash_attn_func.__name__)
    assert_type(out, Tensor)
    assert_type(flash_attn_func(x, x, x, return_attn_probs=True), Probed)
    assert_type(flash_attn_func(x, x, x, return_attn_probs=probed), Tensor | Probed)
    scale = np.float32(0.5)
    assert_type(flash_attn_func(x, x, x, 0.0, scale, np.bool_(True), (1, 1), np.int64(0)), Tensor)
    packed = torch.stack((x, x, x), 2)
    assert_type(flash_attn_qkvpacked_func(packed), Tensor)
    assert_type(flash_attn_qkvpacked_func(packed, return_attn_probs=True), Probed)
    assert_type(flash_attn_kvpacked_func(x, packed[:, :, 1:]), Tensor)
    assert_type(flash_attn_kvpacked_func(x, packed[:, :, 1:], return_attn_probs=True), Probed)


def varlen(x: Tensor) -> None:
    cu = [0, 1, 4]
    assert_type(flash_attn_varlen_func(x, x, x, cu, cu, 3, 3), Tensor)
    longest, lengths = np.int32(3), torch.tensor(cu, dtype=torch.int32)
    out = flash_attn_varlen_func(x, x, x, lengths, lengths, longest, torch.tensor(3))
    assert_type(out, Tensor)
    assert_type(flash_attn_varlen_func(x, x, x, cu, cu, 3, 3, return_attn_probs=True), Probed)
    packed = torch.stack((x, x, x), 1)
    assert_type(flash_attn_varlen_qkvpacked_func(packed, cu, 3), Tensor)
    assert_type(flash_attn_varlen_kvpacked_func(x, packed[:, 1:], cu, cu, 3, 3), Tensor)


def cache(x: Tensor) -> None:
    assert_type(flash_attn_with_kvcache(x, x, x, cache_seqlens=3), Tensor)
    assert_type(flash_attn_with_kvcache(x, x, x, cache_seqlens=[3]), Tensor)
    found = flash_attn_with_kvcache(x, x, x, return_softmax_lse=True)
    assert_type(found, tuple[Tensor, Tensor])


def padding(x: Tensor) -> None:
    rows, indices, cu_seqlens, longest, _ = unpad_input(x, torch.ones(1, 4, dtype=torch.bool))
    out = flash_attn_varlen_func(rows, rows, rows, cu_seqlens, cu_seqlens, longest, longest)
    print(pad_input(out, indices, 1, 4).shape)


def main() -> None:
    x = torch.randn(1, 4, 2, 8)
    with flash_attn_npu.install(), flash_attn_npu.fallback("allow"):
        with flash_attn_npu.reporting() as report:
            dense(x, probed=False)
            varlen(x[0])
            cache(x)
            padding(x)
        print(report)
    flash_attn_npu.forget_lengths()


if __name__ == "__main__":
    main()
