"""A sink in the same launch: `torch_npu.npu_fused_infer_attention_score_v2` over a cache's pages.

Contract: torch_npu's operator documentation, and Huawei's test of `learnable_sink` in op-plugin: it
is one more score of each query head, unscaled, without a value. What its kernels do with it:
m = max(m, sink), sum += exp(sink - m). Whether softmax_lse counts it depends on the kernel and its
release, so it is not asked for. Forward only.
"""

from __future__ import annotations

from ...problems.attention import Problem
from ...problems.results import Forward, Inputs
from ..kernel import Kernel
from . import infer_attention

__all__ = ["KERNEL", "hides_keys_from_a_query"]


def hides_keys_from_a_query(problem: Problem) -> bool:
    """Whether some query sees no key of a sequence that has keys."""
    return any(k > 0 and problem.blind(q, k) > 0 for q, k in problem.sequences)


def forward(problem: Problem, inputs: Inputs) -> Forward:
    """Attention over the keys of `inputs.cache`; rows of no sequence give 0."""
    if problem.uses_lse:
        # a comparison of a first call asks for it
        return infer_attention.forward(problem, inputs)
    import torch_npu

    assert problem.lengths_q is not None
    assert inputs.sink is not None
    k, v, shared = infer_attention.over_pages(problem, inputs)
    out, lse = torch_npu.npu_fused_infer_attention_score_v2(
        inputs.q[: problem.total_q].contiguous(),
        k,
        v,
        actual_seq_qlen=problem.lengths_q.ends,
        actual_seq_kvlen=[span.end for span in inputs.spans],
        learnable_sink=inputs.sink.contiguous(),
        num_query_heads=problem.nheads,
        softmax_scale=problem.softmax_scale,
        **shared,
    )
    return infer_attention.finished(problem, out, lse)


KERNEL = Kernel(forward, reads_pages=True)
