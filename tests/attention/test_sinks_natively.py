"""Sinks in one launch: with softmax_lse, deterministic, in float32, on every chip."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu import reporting
from flash_attn_npu._core.attention import call
from flash_attn_npu._core.attention.decode import CacheCall, with_kvcache
from flash_attn_npu._core.ground import chip
from flash_attn_npu._core.ground.memory import forget_all
from flash_attn_npu._core.problems.ask import Options
from tests.helpers import reference
from tests.helpers.old_torch import needs

LENGTHS = ([7, 5, 0, 9], [7, 8, 4, 3])
"""With more queries than keys, with empty queries, and without."""


@pytest.fixture(params=["Ascend910B3", "Ascend950PR_9589"])
def soc(request: pytest.FixtureRequest, npu: torch.device, monkeypatch: Any) -> Iterator[str]:
    monkeypatch.setenv("VIRTUAL_ASCEND_SOC", request.param)
    forget_all()
    chip._names.put(npu, request.param)
    yield request.param
    forget_all()


def tensors(dtype: torch.dtype, packed: bool) -> list[Tensor]:
    """q, k, v, a sink for each of 4 heads, and dout."""
    generator = torch.Generator().manual_seed(3)
    rows_q, rows_k = ((sum(n),) for n in LENGTHS) if packed else ((2, 9), (2, 6))
    shapes = ((*rows_q, 4, 16), (*rows_k, 2, 16), (*rows_k, 2, 16), (4,), (*rows_q, 4, 16))
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    made[3] = made[3].float()
    return made


def expected(given: list[Tensor], packed: bool, attend: Any, **options: Any) -> list[Tensor]:
    """out, softmax_lse and the gradients of q, k, v and the sink."""
    leaves = [x.clone().requires_grad_() for x in given[:4]]
    q, k, v, sink = leaves
    if packed:
        cu = ([0, *accumulate(lengths)] for lengths in LENGTHS)
        options["max_seqlen_k"] = max(LENGTHS[1])
        answer = reference.varlen(q, k, v, *cu, sink=sink, attend=attend, **options)
    else:
        answer = reference.dense(q, k, v, sink=sink, attend=attend, **options)
    grads = torch.autograd.grad(answer.out, leaves, given[4])
    return [answer.out, answer.softmax_lse, *grads]


@needs("npu_fusion_attention", "sink")
@pytest.mark.parametrize("asked", ["nothing", "softmax_lse", "deterministic"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "varlen"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_one_launch_forward_and_back(
    npu: torch.device, soc: str, dtype: torch.dtype, packed: bool, asked: str
) -> None:
    given = tensors(dtype, packed)
    *leaves, dout = (x.to(npu) for x in given)
    leaves = [x.requires_grad_() for x in leaves]
    options = Options(
        causal=True, return_attn_probs=asked == "softmax_lse", deterministic=asked != "nothing"
    )
    lengths = None
    if packed:
        lengths = (*([0, *accumulate(n)] for n in LENGTHS), *map(max, LENGTHS))
    with virtual_ascend.record() as recorded, reporting() as report:
        answer = call.attend("f", tuple(leaves[:3]), lengths, options, None, leaves[3])
        out, lse, *_ = answer if isinstance(answer, tuple) else (answer, None)
        grads = torch.autograd.grad(out, leaves, dout)
    assert {entry.kernel for entry in report.tallies} == {"npu_fusion_attention"}

    truth = expected([x.double() for x in given], packed, reference.attention, causal=True)
    plain = expected(given, packed, reference.same_precision, causal=True)
    if lse is not None:
        reference.assert_lse_close(lse, truth[1])
    for name, ours, exact, near in zip(
        ("out", "dq", "dk", "dv", "dsink"),
        (out, *grads),
        (truth[0], *truth[2:]),
        (plain[0], *plain[2:]),
        strict=True,
    ):
        reference.assert_close_to_reference(ours, exact, near, name)

    launches = [entry for entry in recorded.launches if "fusion_attention" in entry.name]
    forward, backward = launches
    takes = dtype == torch.bfloat16
    on_950 = soc.startswith("Ascend950")
    # the first operator would drop the sink on a 950
    assert forward.name == f"npu_fusion_attention{'_v2' if on_950 else ''}"
    assert (forward.arguments["sink"] is not None) == takes
    assert backward.name.startswith("npu_fusion_attention_grad")


@needs("npu_fusion_attention", "sink")
def test_a_950_drops_the_sink_of_the_first_operator(npu: torch.device, monkeypatch: Any) -> None:
    """What the simulated card does there; why the second is called."""
    import torch_npu

    q = torch.randn(1, 4, 2, 16).half().to(npu)
    sink = torch.full((2,), 30.0).to(npu)
    outs = []
    for name in ("Ascend910B3", "Ascend950PR_9589"):
        monkeypatch.setenv("VIRTUAL_ASCEND_SOC", name)
        for given in ({}, {"sink": sink}):
            outs.append(torch_npu.npu_fusion_attention(q, q, q, 2, "BSND", **given)[0].cpu())
    assert (outs[0] - outs[1]).abs().max() > 0.1
    assert torch.equal(outs[2], outs[3])
    second = torch_npu.npu_fusion_attention_v2(q, q, q, 2, "BSND", sink=sink)[0]
    assert torch.equal(second.cpu(), outs[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_over_keys_that_are_gathered(npu: torch.device, dtype: torch.dtype) -> None:
    """Keys that do not start at their first position: no other kernel reads them as they lie."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 4, 64).to(dtype) for n in (3, 16, 16))
    sink, pads, used = torch.tensor([2.0, -1.0, 0.5, 0.0]), [2, 5], [9, 12]
    with virtual_ascend.record() as recorded:
        lengths = {
            "cache_seqlens": torch.tensor(used, dtype=torch.int32, device=npu),
            "cache_leftpad": torch.tensor(pads, dtype=torch.int32, device=npu),
        }
        given = {"causal": True, "sink": sink.to(npu), **lengths}
        out, _ = with_kvcache(CacheCall(*(x.to(npu) for x in (q, k, v)), **given))
    (launch,) = (x for x in recorded.launches if "attention" in x.name)
    assert launch.name == "npu_fusion_attention"
    for row, (pad, end) in enumerate(zip(pads, used, strict=True)):
        tensors = (q[row], k[row, pad:end], v[row, pad:end])
        truth = reference.attention(*tensors, causal=True, sink=sink)
        plain = reference.same_precision(*tensors, causal=True, sink=sink)
        reference.assert_close_to_reference(out[row], truth.out, plain.out, "out")
