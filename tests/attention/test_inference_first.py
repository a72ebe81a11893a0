"""What is made in inference mode and kept must still serve training afterwards."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from flash_attn_npu import flash_attn_varlen_func
from flash_attn_npu._core.ground.memory import forget_all
from tests.helpers import reference


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
    exact, plain = (
        reference.with_gradients(
            partial(reference.varlen, attend=attend),
            *(x.detach().cpu().to(dtype) for x in (q, k, k)),
            torch.ones(q.shape, dtype=dtype),
            cu_seqlens_q=cu_q.tolist(),
            cu_seqlens_k=cu_k.tolist(),
            max_seqlen_k=6,
            causal=True,
        )
        for dtype, attend in (
            (torch.float64, reference.attention),
            (torch.float32, reference.same_precision),
        )
    )
    reference.assert_close_to_reference(after, exact[0].out, plain[0].out, "out")
    reference.assert_close_to_reference(q.grad, exact[1][0], plain[1][0], "dq")
