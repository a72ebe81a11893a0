"""torch's own varlen attention on devices that it has no kernel for, by `register_torch()`."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import flash_attn_npu
from flash_attn_npu import _virtual_ascend as virtual_ascend
from tests.helpers import reference

varlen = pytest.importorskip("torch.nn.attention.varlen")
ENDS = [0, 5, 12]
OPERATOR = "aten::_flash_attention_forward"


def inputs(device: torch.device, nheads_k: int = 2) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    shapes = ((12, 4, 32), (12, nheads_k, 32), (12, nheads_k, 32))
    return tuple(torch.randn(shape).to(device).requires_grad_() for shape in shapes)


def ends(device: torch.device) -> Tensor:
    return torch.tensor(ENDS, dtype=torch.int32, device=device)


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (3, 0), (2, 1)], ids=str)
@pytest.mark.parametrize("nheads_k", [4, 2])
def test_varlen_attn_is_right(device: torch.device, window: tuple[int, int], nheads_k: int) -> None:
    q, k, v = inputs(device, nheads_k)
    dout = torch.randn_like(q)
    with flash_attn_npu.register_torch():
        out, lse = varlen.varlen_attn(
            q, k, v, ends(device), ends(device), 7, 7,
            window_size=window, enable_gqa=nheads_k < 4, scale=0.3,
            return_aux=varlen.AuxRequest(lse=True),
        )  # fmt: skip
        gradients = torch.autograd.grad(out, (q, k, v), dout)
    exact, plain = (
        reference.with_gradients(
            partial(reference.varlen, attend=attend),
            *(x.detach().cpu().to(dtype) for x in (q, k, v, dout)),
            cu_seqlens_q=ENDS, cu_seqlens_k=ENDS, max_seqlen_k=7, window_size=window,
            softmax_scale=0.3,
        )
        for dtype, attend in (
            (torch.float64, reference.attention),
            (torch.float32, reference.same_precision),
        )
    )  # fmt: skip
    reference.assert_close_to_reference(out, exact[0].out, plain[0].out, "out")
    reference.assert_close_to_reference(
        lse, exact[0].softmax_lse, plain[0].softmax_lse, "softmax_lse"
    )
    for name, got, expected, rounded in zip(
        ("dq", "dk", "dv"), gradients, exact[1], plain[1], strict=True
    ):
        reference.assert_close_to_reference(got, expected, rounded, name)


def test_on_ascend_it_is_one_launch(npu: torch.device) -> None:
    q, k, v = inputs(npu)
    with flash_attn_npu.register_torch(), virtual_ascend.record() as record:
        varlen.varlen_attn(q, k, v, ends(npu), ends(npu), 7, 7, enable_gqa=True)
    assert [launch.name for launch in record.launches] == ["npu_fusion_attention"]


@pytest.mark.parametrize("paged", [False, True], ids=["packed", "pages"])
def test_keys_in_use_and_pages(device: torch.device, paged: bool) -> None:
    q, k, v = (x.detach() for x in inputs(device))
    used = torch.tensor([2, 6], dtype=torch.int32, device=device)
    given: dict[str, Any] = {"seqused_k": used, "enable_gqa": True}
    with flash_attn_npu.register_torch():
        if paged:
            pages_k, pages_v = (x.new_full((3, 16, 2, 32), float("nan")) for x in (k, v))
            for page, start, count in ((2, 0, 2), (0, 5, 6)):
                pages_k[page, :count] = k[start : start + count]
                pages_v[page, :count] = v[start : start + count]
            table = torch.tensor([[2], [0]], dtype=torch.int32, device=device)
            out = varlen.varlen_attn(
                q, pages_k, pages_v, ends(device), None, 7, 16, block_table=table, **given
            )
        else:
            out = varlen.varlen_attn(q, k, v, ends(device), ends(device), 7, 7, **given)
    parts = [
        reference.attention(*(x.cpu().double() for x in (q[a:b], k[c:d], v[c:d]))).out
        for a, b, c, d in ((0, 5, 0, 2), (5, 12, 5, 11))
    ]
    torch.testing.assert_close(out.cpu().double(), torch.cat(parts), rtol=0, atol=1e-5)


def test_into_a_buffer(device: torch.device) -> None:
    q, k, v = (x.detach() for x in inputs(device))
    out = torch.full_like(q, float("nan"))
    with flash_attn_npu.register_torch():
        varlen.varlen_attn_out(out, q, k, v, ends(device), ends(device), 7, 7, enable_gqa=True)
        whole = varlen.varlen_attn(q, k, v, ends(device), ends(device), 7, 7, enable_gqa=True)
    assert torch.equal(out, whole)


def test_dense_by_the_operator_itself(device: torch.device) -> None:
    q, k, v = (x.detach().reshape(2, 6, -1, 32).requires_grad_() for x in inputs(device))
    with flash_attn_npu.register_torch():
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, 6, 6, 0.0, True, False
        )
        (dq,) = torch.autograd.grad(out.sum(), q)
    expected = reference.dense(*(x.detach().cpu().double() for x in (q, k, v)), causal=True)
    torch.testing.assert_close(out.detach().cpu().double(), expected.out, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse.cpu().double(), expected.softmax_lse, rtol=0, atol=1e-5)
    assert dq.shape == q.shape
    assert dq.isfinite().all()


def test_only_while_somebody_claims_it() -> None:
    def registered() -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key(OPERATOR, "CPU")

    with flash_attn_npu.install():
        assert not registered()
    first, second = flash_attn_npu.register_torch(), flash_attn_npu.register_torch()
    first.remove()
    first.remove()
    assert registered()
    second.remove()
    assert not registered()
    q, k, v = inputs(torch.device("cpu"), 4)
    with pytest.raises(NotImplementedError):
        varlen.varlen_attn(q, k, v, ends(q.device), ends(q.device), 7, 7)


def test_a_provider_of_torch() -> None:
    attention = torch.nn.attention
    attention.register_flash_attention_impl("NPU", register_fn=flash_attn_npu.register_torch)
    try:
        attention.activate_flash_attention_impl("NPU")
        q, k, v = inputs(torch.device("cpu"), 4)
        assert varlen.varlen_attn(q, k, v, ends(q.device), ends(q.device), 7, 7).isfinite().all()
    finally:
        attention.restore_flash_attention_impl()
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(OPERATOR, "CPU")


def test_what_it_does_not_know_is_refused() -> None:
    from flash_attn_npu._integrations import torch_attention

    schema = torch.ops.aten._flash_attention_forward.default._schema
    newer = type(
        "Schema",
        (),
        {
            "name": schema.name,
            "arguments": [
                *schema.arguments,
                type("Argument", (), {"name": "softcap", "default_value": None}),
            ],
        },
    )
    kernel = torch_attention._by_name(newer, lambda **given: given)
    with pytest.raises(flash_attn_npu.UnsupportedError, match="softcap"):
        kernel(softcap=3.0)
    assert kernel(softcap=None) == {}
    q, k, v = (x.detach().reshape(2, 6, -1, 32) for x in inputs(torch.device("cpu")))
    with (
        flash_attn_npu.register_torch(),
        pytest.raises(flash_attn_npu.UnsupportedError, match="seqused_k"),
    ):
        torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, 6, 6, 0.0, True, False,
            seqused_k=torch.tensor([3, 4], dtype=torch.int32),
        )  # fmt: skip
