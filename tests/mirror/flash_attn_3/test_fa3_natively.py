"""On the simulated Ascend: a v of a smaller headdim, and keys of nobody, in one launch each."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu import flash_attn_interface as second
from flash_attn_npu import reporting
from flash_attn_npu._core.attention import paged
from flash_attn_npu._core.ground.settings import verifying
from flash_attn_npu._flash_attn_3 import flash_attn_interface as interface
from tests.helpers import fa3_reference, reference

FUSION, BACKWARD = "npu::npu_fusion_attention", "npu::npu_fusion_attention_grad"
HALF = torch.bfloat16
CU_Q, CU_K = [0, 9, 20], [0, 14, 25]


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(HALF)


def inputs(packed: bool, wide: tuple[int, int] = (192, 128)) -> list[Tensor]:
    """q, k, v and dout as DeepSeek's attention has them before its weights are absorbed."""
    q, k = ((20,), (25,)) if packed else ((2, 10), (2, 12))
    shapes = ((*q, 4, wide[0]), (*k, 2, wide[0]), (*k, 2, wide[1]), (*q, 4, wide[1]))
    return [drawn(*shape, seed=seed) for seed, shape in enumerate(shapes)]


def solve(tensors: list[Tensor], options: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """out, dq, dk and dv by the formula."""
    *leaves, dout = (x.to(dtype) for x in tensors)
    leaves = [x.requires_grad_() for x in leaves]
    if leaves[0].dim() == 4:
        out, _ = fa3_reference.dense(*leaves, **options)
    else:
        cu = (torch.tensor(CU_Q), torch.tensor(CU_K))
        out, _ = fa3_reference.varlen(*leaves, *cu, **options)
    return [out, *torch.autograd.grad(out, leaves, dout)]


def call(tensors: list[Tensor], npu: torch.device, **options: Any) -> tuple[list[Tensor], Any]:
    """The same by the function, and what the card was asked for."""
    *leaves, dout = (x.to(npu) for x in tensors)
    leaves = [x.requires_grad_() for x in leaves]
    lengths: tuple[Any, ...] = ()
    function = interface.flash_attn_func
    if leaves[0].dim() == 3:
        function, lengths = interface.flash_attn_varlen_func, (CU_Q, CU_K, 11, 14)
    with virtual_ascend.record() as seen:
        answer = function(*leaves, *lengths, **options)
        out = answer[0] if isinstance(answer, tuple) else answer
        gradients = torch.autograd.grad(out, leaves, dout)
    return [out.detach(), *gradients], seen


def assert_right(answer: list[Tensor], tensors: list[Tensor], **options: Any) -> None:
    exact, plain = (solve(tensors, options, dtype) for dtype in (torch.float64, HALF))
    for name, *three in zip(("out", "dq", "dk", "dv"), answer, exact, plain, strict=True):
        reference.assert_close_to_reference(*three, name)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (5, 2)},
    "scale": {"softmax_scale": 0.05, "causal": True},
}


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_v_of_a_smaller_headdim_goes_as_it_is(
    npu: torch.device, packed: bool, options: dict[str, Any]
) -> None:
    """One launch forward and one backward, of a v and an out of 128, and nothing filled up."""
    tensors = inputs(packed)
    # the first call makes the mask
    call(tensors, npu, **options)
    with reporting() as region:
        answer, seen = call(tensors, npu, **options)
    assert_right(answer, tensors, **options)
    assert seen.operators == [FUSION, BACKWARD]
    assert seen.launches[0].arguments["value"].shape[-1] == 128
    assert [tally.reasons for tally in region.tallies] == [()]


def test_what_no_kernel_takes_is_filled_up(npu: torch.device) -> None:
    """Exactly, forward and backward, with softcap."""
    for packed in (False, True):
        tensors = inputs(packed, (24, 16))
        answer, seen = call(tensors, npu, softcap=3.0, causal=True)
        assert not seen.launches
        assert_right(answer, tensors, softcap=3.0, causal=True)


@pytest.mark.parametrize("more", [{"return_attn_probs": True}, {"deterministic": True}], ids=repr)
def test_its_statistics_and_a_deterministic_backward(npu: torch.device, more: Any) -> None:
    tensors = inputs(packed=True)
    answer, seen = call(tensors, npu, causal=True, **more)
    assert_right(answer, tensors, causal=True)
    assert {launch.name for launch in seen.launches} == {
        "npu_fusion_attention",
        "npu_fusion_attention_grad",
    }


def test_qv_is_part_of_the_same_launch(npu: torch.device) -> None:
    """As absorbed weights have it: 64 of the rotation and 512 of the latent, 576 in all."""
    q, k, v, _ = inputs(packed=False, wide=(64, 512))
    qv = drawn(2, 10, 4, 512, seed=7)
    with virtual_ascend.record() as seen:
        out = interface.flash_attn_func(*(x.to(npu) for x in (q, k, v)), qv=qv.to(npu), causal=True)
    (launch,) = seen.launches
    widths = [launch.arguments[name].shape[-1] for name in ("query", "key", "value")]
    assert widths == [576, 576, 512]
    exact, plain = (
        fa3_reference.dense(*(x.to(dtype) for x in (q, k, v, qv)), causal=True)[0]
        for dtype in (torch.float64, HALF)
    )
    reference.assert_close_to_reference(out, exact, plain, "out")


def test_a_wrong_launch_is_caught_by_the_first_call(
    npu: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = inputs(packed=True)
    with verifying("compose"), virtual_ascend.lying("gradients of v halved"):
        answer, _ = call(tensors, npu, causal=True)
        assert_right(answer, tensors, causal=True)
    with verifying("compose"), virtual_ascend.lying("causal from the top left"):
        answer, _ = call(tensors, npu, causal=True, softmax_scale=0.2)
        assert_right(answer, tensors, causal=True, softmax_scale=0.2)
    told = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
    assert told
    assert all("headdim 128 of v" in text for text in told)


# between the keys of two sequences, before the first and behind the last, NaN
USED, PADS, ROOM = [5, 9, 0, 1], [2, 0, 0, 1], [0, 8, 17, 20, 24]
STARTS = [0, 3, 9, 10, 14]


def gaps(npu: torch.device, grad: bool) -> tuple[list[Tensor], list[slice]]:
    q, k, v = (drawn(rows, 2, 64, seed=rows) for rows in (14, 24, 25))
    v = v[:24]
    spans = [slice(a + pad, a + n) for a, n, pad in zip(ROOM, USED, PADS, strict=False)]
    hidden = torch.ones(24, dtype=torch.bool)
    for span in spans:
        hidden[span] = False
    k, v = (x.masked_fill(hidden[:, None, None], torch.nan) for x in (k, v))
    return [x.to(npu).requires_grad_(grad) for x in (q, k, v)], spans


def expected(tensors: list[Tensor], spans: list[slice], dtype: torch.dtype) -> Tensor:
    q, k, v = (x.detach().cpu().to(dtype) for x in tensors)
    parts = [
        fa3_reference.attention(q[a:b], k[span], v[span], causal=True)[0]
        for a, b, span in zip(STARTS, STARTS[1:], spans, strict=False)
    ]
    return torch.cat(parts)


def test_keys_of_nobody_stay_where_they_are(npu: torch.device) -> None:
    """No key is copied: what lies between is a sequence without queries."""
    tensors, spans = gaps(npu, grad=False)
    cu = [torch.tensor(x, dtype=torch.int32).to(npu) for x in (STARTS, ROOM, USED, PADS)]
    forward = second._flash_attn_varlen_forward
    given = (*tensors, *cu[:2], 6, 9, 0.0, 0.125, True)
    forward(*given, seqused_k=cu[2], leftpad_k=cu[3])
    with virtual_ascend.record() as seen:
        out, lse, *_ = forward(*given, seqused_k=cu[2], leftpad_k=cu[3])
    (launch,) = seen.launches
    assert launch.name == "npu_fusion_attention"
    assert launch.arguments["key"].data_ptr() == tensors[1].data_ptr()
    assert launch.arguments["value"].data_ptr() == tensors[2].data_ptr()
    exact, plain = (expected(tensors, spans, dtype) for dtype in (torch.float64, HALF))
    reference.assert_close_to_reference(out, exact, plain, "out")
    assert lse.isposinf().all(0).tolist() == exact.eq(0).all(-1).all(-1).tolist()


def test_their_gradient_is_none(npu: torch.device) -> None:
    tensors, _ = gaps(npu, grad=True)
    used = torch.tensor([3, 9, 0, 1], dtype=torch.int32)
    lengths = [torch.tensor(x, dtype=torch.int32) for x in (STARTS, ROOM)]
    with torch.no_grad():
        for x in tensors[1:]:
            x.nan_to_num_(1.0)
    with virtual_ascend.record() as seen:
        out = interface.flash_attn_varlen_func(*tensors, *lengths, 6, 9, seqused_k=used)
        out.sum().backward()
    names = [launch.name for launch in seen.launches]
    assert names == ["npu_fusion_attention", "npu_fusion_attention_grad"]
    hidden = torch.ones(24, dtype=torch.bool)
    for start, count in zip(ROOM, used.tolist(), strict=False):
        hidden[start : start + count] = False
    for x in tensors[1:]:
        assert not x.grad.cpu()[hidden].any()
        assert x.grad.cpu()[~hidden].any()


def test_a_gap_is_no_longer_than_the_longest_that_a_caller_speaks_of() -> None:
    keys = paged.read_keys(
        *(torch.zeros(40, 1, 8),) * 2,
        paged.interned((0, 30, 40), "cu_seqlens_k"),
        paged.Placement(seqused_k=torch.tensor([3, 10], dtype=torch.int32)),
    )
    q = paged.interned((0, 4, 8), "cu_seqlens_q")
    lengths_q, lengths_k = paged.spaced(q, keys, 10)
    assert lengths_q.seqlens == (4, 0, 0, 0, 4)
    assert lengths_k.seqlens == (3, 10, 10, 7, 10)
