"""The small names of the interface: fakes, wrappers that register nothing, two helpers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_npu import flash_attn_interface as interface

OPTIONS = (0.25, 0.5, False, -1, -1, 0.0, None)


def facts(answer: Any) -> list[tuple[Any, ...]]:
    tensors = (answer,) if isinstance(answer, Tensor) else answer
    return [(x.shape, x.dtype, x.device) for x in tensors]


@pytest.mark.parametrize("packed", [False, True])
def test_fakes_have_the_shapes_of_the_operators(packed: bool, device: torch.device) -> None:
    kind = "_varlen" if packed else ""
    forward = f"_flash_attn{kind}_forward"
    backward = f"_flash_attn{kind}_backward"
    q, k, v = (
        torch.randn(5, heads, 16, dtype=torch.float16, device=device).expand(
            *(() if packed else (2,)), 5, heads, 16
        )
        for heads in (4, 2, 2)
    )
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
    lengths = (cu_seqlens, cu_seqlens, 3, 3) if packed else ()
    given = (q, k, v, *lengths, *OPTIONS, True)
    real = getattr(interface, forward)(*given)
    assert facts(getattr(interface, f"{forward}_fake")(*given)) == facts(real)
    out, lse, _, rng_state = real
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    given = (out, q, k, v, out, lse, *grads, *lengths, *OPTIONS, False, rng_state)
    fake = getattr(interface, f"{backward}_fake")(*given)
    assert not any(x.any() for x in grads)
    assert facts(fake) == facts(getattr(interface, backward)(*given))


def test_wrappers_that_register_nothing() -> None:
    def one(x: int) -> int:
        return x

    custom_op, fake = interface.noop_custom_op_wrapper, interface.noop_register_fake_wrapper
    assert custom_op("a::b", one, mutates_args=()) is one
    assert custom_op("a::b", mutates_args=(), device_types="npu")(one) is one
    assert fake("a::b", one) is fake("a::b")(one) is one
    assert not hasattr(torch.ops.a, "b")
    assert interface._torch_custom_op_wrapper is torch.library.custom_op
    assert interface._torch_register_fake_wrapper is torch.library.register_fake
    assert interface.USE_TRITON_ROCM is False


def test_maybe_contiguous_looks_at_the_last_stride() -> None:
    x = torch.arange(12.0).view(3, 4)
    assert interface.maybe_contiguous(x[:, :2]).data_ptr() == x.data_ptr()
    copied = interface.maybe_contiguous(x.t())
    assert copied.is_contiguous()
    assert torch.equal(copied, x.t())
    assert interface.maybe_contiguous(None) is None


def test_round_multiple() -> None:
    assert [interface.round_multiple(x, 32) for x in (0, 1, 32, 33)] == [0, 32, 32, 64]
