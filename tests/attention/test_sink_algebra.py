"""A sink added to the answer of a kernel that knows none is attention with that sink."""

from __future__ import annotations

import pytest
import torch

from flash_attn_npu._core.kernels.sinks import counting, take_share, with_sink
from tests.helpers import reference


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "varlen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_attention_with_the_sink(packed: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows, keys = ((9,), (7,)) if packed else ((2, 9), (2, 7))
    q, k, v = (torch.randn(*n, 4, 16).to(dtype) for n in (rows, keys, keys))
    # one that takes all, one that takes nothing, two between
    sink = torch.tensor([60.0, -60.0, 0.5, -1.0]).to(dtype)
    lengths = ([0, 4, 9], [0, 2, 7]) if packed else ()
    given = {"max_seqlen_k": 5} if packed else {}
    solve = reference.varlen if packed else reference.dense
    # causal, with more queries than keys: the first see none
    bare = solve(q, k, v, *lengths, causal=True, **given)
    truth = solve(q, k, v, *lengths, causal=True, sink=sink, **given)
    same = solve(
        q, k, v, *lengths, causal=True, sink=sink, attend=reference.same_precision, **given
    )
    assert truth.softmax_lse.isinf().any()
    out, lse = with_sink(bare.out.to(dtype), bare.softmax_lse.float(), sink)
    assert out.dtype == dtype
    reference.assert_close_to_reference(out, truth.out, same.out, "out")
    reference.assert_lse_close(lse, truth.softmax_lse)
    # where it lies, and of a sink in any dtype
    bare_lse = bare.softmax_lse.float()
    for kind in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        written = bare.out.to(dtype)
        take_share(written, bare_lse, sink.to(kind))
        again = counting(bare_lse, sink.to(kind))
        assert (written.dtype, again.dtype) == (dtype, torch.float32)
        if sink.to(kind).double().equal(sink.double()):
            assert torch.equal(written, out)
            assert torch.equal(again, lse)
