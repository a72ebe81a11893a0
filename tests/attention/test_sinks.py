"""Attention sinks, as transformers asks for them: native where torch_npu has them."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu import install, reporting
from flash_attn_npu._core.ground import schemas
from flash_attn_npu._integrations.stand_ins import npu_flash_attn_func, npu_flash_attn_varlen_func
from flash_attn_npu.errors import ArgumentError
from tests.helpers import reference

LENGTHS_Q, LENGTHS_K = [7, 5, 0, 9], [7, 8, 4, 3]
WINDOWS = [{}, {"causal": True}, {"causal": True, "window_size": (3, 3)}]


def cumulative(lengths: list[int]) -> list[int]:
    return [0, *accumulate(lengths)]


def problem(dtype: torch.dtype, *, packed: bool) -> list[Tensor]:
    """q, k, v, dout and a sink for each of 4 heads."""
    generator = torch.Generator().manual_seed(3)
    rows_q = (sum(LENGTHS_Q),) if packed else (2, 9)
    rows_k = (sum(LENGTHS_K),) if packed else (2, 6)
    shapes = [(*rows_q, 4, 16), (*rows_k, 2, 16), (*rows_k, 2, 16), (*rows_q, 4, 16), (4,)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def solve(packed: bool, q: Tensor, k: Tensor, v: Tensor, sink: Tensor, **options: Any) -> Tensor:
    if not packed:
        return npu_flash_attn_func(q, k, v, s_aux=sink, **options)
    lengths = (
        torch.tensor(cumulative(lengths), dtype=torch.int32, device=q.device)
        for lengths in (LENGTHS_Q, LENGTHS_K)
    )
    longest = (max(LENGTHS_Q), max(LENGTHS_K))
    return npu_flash_attn_varlen_func(q, k, v, *lengths, *longest, s_aux=sink, **options)


def expected(packed: bool, tensors: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
    """The output and the gradients of q, k, v and the sink."""
    leaves = [x.clone().requires_grad_() for x in (*tensors[:3], tensors[4])]
    q, k, v, sink = leaves
    if packed:
        cu = (cumulative(LENGTHS_Q), cumulative(LENGTHS_K))
        result = reference.varlen(q, k, v, *cu, max_seqlen_k=max(LENGTHS_K), sink=sink, **options)
    else:
        result = reference.dense(q, k, v, sink=sink, **options)
    return result.out, *torch.autograd.grad(result.out, leaves, tensors[3])


@pytest.mark.parametrize("options", WINDOWS, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "varlen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_output_and_gradients(
    device: torch.device, dtype: torch.dtype, packed: bool, options: dict[str, Any]
) -> None:
    tensors = problem(dtype, packed=packed)
    q, k, v, dout, sink = (x.to(device) for x in tensors)
    leaves = [x.requires_grad_() for x in (q, k, v, sink)]
    with virtual_ascend.record() as recorded:
        out = solve(packed, *leaves, **options)
    answer = (out, *torch.autograd.grad(out, leaves, dout))

    exact = expected(packed, [x.double() for x in tensors], **options)
    plain = expected(packed, tensors, attend=reference.same_precision, **options)
    for name, ours, truth, same in zip(
        ("out", "dq", "dk", "dv", "dsink"), answer, exact, plain, strict=True
    ):
        reference.assert_close_to_reference(ours, truth, same, name)

    launches = [entry for entry in recorded.launches if entry.name == "npu_fusion_attention"]
    assert len(launches) == int(device.type == "npu")
    for launch in launches:
        sunk = launch.arguments["sink"]
        # the kernel takes none with float32, nor that of torch_npu 2.6: it is added to its answer
        added = dtype == torch.float32 or not schemas.has("npu_fusion_attention", "sink")
        assert (sunk is None) == added
        assert sunk is None or sunk.dtype == torch.float32


def test_a_wrong_sink_is_refused_by_name(device: torch.device) -> None:
    q, k, v, _, _ = (x.to(device) for x in problem(torch.float16, packed=False))
    with pytest.raises(ArgumentError, match=r"sink: got shape \(3,\); allowed: \(4,\)"):
        npu_flash_attn_func(q, k, v, s_aux=torch.zeros(3, device=device))


def gpt_oss(attention: str, weights: dict[str, Tensor] | None = None) -> Any:
    pytest.importorskip("transformers")
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=97,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        attn_implementation=attention,
        dtype=torch.float32,
    )
    model = GptOssForCausalLM(config).eval()
    if weights is None:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    else:
        model.load_state_dict(weights)
    return model


def test_gpt_oss_keeps_flash_attention_and_its_sinks(device: torch.device) -> None:
    torch.manual_seed(0)
    ids, mask = torch.randint(0, 97, (2, 40)), torch.ones(2, 40, dtype=torch.long)
    mask[0, :7] = 0
    eager = gpt_oss("eager")
    with install(), torch.no_grad(), reporting() as report:
        flash = gpt_oss("flash_attention_2", eager.state_dict())
        assert flash.config._attn_implementation == "flash_attention_2"
        ours = flash.to(device)(ids.to(device), attention_mask=mask.to(device)).logits.cpu()
    with torch.no_grad():
        theirs = eager(ids, attention_mask=mask).logits
    kept = mask.bool()
    assert (ours - theirs)[kept].abs().max() <= 2e-3 * theirs[kept].abs().max()
    assert sum(entry.calls for entry in report.tallies) == 2


def test_a_sink_that_is_trained_is_not_served_as_one_that_is_not(npu: torch.device) -> None:
    """Only the gradient of the sink is wanted, after the same call without: another decision."""
    q, k, v, dout, sink = (x.to(npu) for x in problem(torch.float16, packed=True))
    sink.requires_grad_()
    diagonal = {"causal": True, "window_size": (0, 0)}
    with torch.no_grad(), virtual_ascend.record() as fused:
        solve(True, q, k, v, sink, **diagonal)
    with virtual_ascend.record() as composed:
        out = solve(True, q, k, v, sink, **diagonal)
    assert any(entry.name == "npu_fusion_attention" for entry in fused.launches)
    # its packed backward takes no window of the diagonal
    assert not any("attention" in entry.name for entry in composed.launches)
    (dsink,) = torch.autograd.grad(out, sink, dout)
    host = [x.detach().cpu() for x in (q, k, v, dout, sink)]
    *_, truth = expected(True, [x.double() for x in host], **diagonal)
    *_, plain = expected(True, host, attend=reference.same_precision, **diagonal)
    reference.assert_close_to_reference(dsink, truth, plain, "dsink")
