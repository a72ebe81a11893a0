"""What is made in inference mode and kept must still serve training afterwards."""

from __future__ import annotations

import pytest
import torch

from flash_attn_npu import flash_attn_varlen_func
from flash_attn_npu.memory import forget_all


@pytest.mark.parametrize("lengths_k", [[0, 4, 10], [0, 4, 7]], ids=["plain", "blind rows"])
def test_training_after_inference(npu: torch.device, lengths_k: list[int]) -> None:
    forget_all()
    q = torch.randn(10, 2, 8, device=npu)
    k = torch.randn(lengths_k[-1], 2, 8, device=npu)
    cu_q, cu_k = (torch.tensor(cu, dtype=torch.int32, device=npu) for cu in ([0, 4, 10], lengths_k))
    with torch.inference_mode():
        before = flash_attn_varlen_func(q, k, k, cu_q, cu_k, 6, 6, causal=True)
    q.requires_grad_()
    after = flash_attn_varlen_func(q, k, k, cu_q, cu_k, 6, 6, causal=True)
    after.sum().backward()
    assert torch.equal(before, after)
    assert q.grad is not None
