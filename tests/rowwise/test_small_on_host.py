"""What a call of a few rows on a CPU costs before and beside torch's kernels: counted, not timed.

The shortest expression of the same numbers is that of `benchmarks.rows`, which is timed there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.rows import MAKES, call_of
from flash_attn_npu._core.ground import padding_arguments
from flash_attn_npu._core.ground.memory import forget_all
from flash_attn_npu._core.rowwise import small
from flash_attn_npu.bert_padding import unpad_input
from flash_attn_npu.ops.triton.layer_norm import layer_norm_fn, rms_norm_fn
from flash_attn_npu.ops.triton.rotary import apply_rotary
from tests.helpers.frames import frames
from tests.helpers.old_torch import TORCH

SHAPE = (2, 8, 64)

MORE: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    # 16-bit tables are widened at every call, the expression has prepared its own
    "rotary": ((4, 8), (7, 20)),
    "rotary interleaved": ((2, 8), (3, 20)),
    "rms_norm": ((0, 9), (0, 12)),
    "rms_norm with residual": ((0, 10), (0, 18)),
    "layer_norm": ((0, 9), (0, 12)),
    # a gradient in 16 bit is rounded for each tensor that has it
    "layer_norm with residual": ((0, 10), (3, 17)),
    # what is dropped becomes 0 in a view as integers, in less time than by one torch.where
    "dropout_add_layer_norm": ((2, 14), (8, 22)),
    "parallel residual": ((0, 13), (4, 25)),
    "cross entropy": ((1, 7), (1, 8)),
    "cross entropy smoothing": ((1, 7), (1, 8)),
    "cross entropy z-loss": ((1, 8), (0, 8)),
    "cross entropy inplace": ((1, 7), (0, 12)),
    "unpad_input": ((-5, 7), (-5, 7)),
    "pad_input": ((0, 5), (1, 5)),
    "index_first_axis": ((0, 9), (0, 9)),
}
"""Forward, and forward with backward: (operations more than torch's, frames of this package)."""


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(call: Callable[[], Any]) -> int:
    with _Operations() as seen:
        call()
    return seen.count


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "with backward"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", MORE)
def test_a_small_call_does_little_beside_what_torch_does(
    name: str, dtype: torch.dtype, grad: bool
) -> None:
    pair = MAKES[name](dtype, SHAPE)
    ours, theirs = (call_of(function, pair, grad) for function in (pair.ours, pair.theirs))
    for _ in range(2):
        ours()
    more, most = MORE[name][grad]
    # torch before 2.9 asks for one operation more
    more += TORCH < (2, 9) and "cross entropy" in name
    assert operations(ours) <= operations(theirs) + more
    assert len(frames(ours)) <= most


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "whole": lambda x: x,
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "one of three": lambda x: torch.stack((x, x, x), 2)[:, :, 1],
    "an odd place": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
    "every other": lambda x: torch.stack((x, x), -1)[..., 0],
    "one head for all": lambda x: x[:, :, :1].expand(x.shape),
    "two axes of heads": lambda x: x.unflatten(2, (2, 2)),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_few_rows_are_rotated_as_many_are(
    monkeypatch: pytest.MonkeyPatch, layout: str, interleaved: bool, dtype: torch.dtype
) -> None:
    """Bit by bit, into a contiguous tensor of its own."""
    x = LAYOUTS[layout](torch.randn(2, 5, 4, 16).to(dtype))
    wide = torch.randn(2, 9, 8)
    for start, table_dtype, conjugate in ((0, dtype, False), (3, torch.float32, True)):
        cos, sin = wide.to(table_dtype)
        call = partial(
            apply_rotary, x, cos, sin, start, interleaved=interleaved, conjugate=conjugate
        )
        call()
        before = x.clone()
        few = call()
        with monkeypatch.context() as patched:
            patched.setattr(small, "SMALL", 0)
            # what is known of calls that were small
            forget_all()
            many = call()
        forget_all()
        assert torch.equal(few, many)
        assert torch.equal(x, before)
        assert few.is_contiguous()
        assert not few._is_view()
        assert few.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize("inferring", [False, True], ids=["", "inference mode"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16], ids=str)
def test_a_few_tokens_are_packed_as_many_are(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, inferring: bool
) -> None:
    """The mask read as a list, and computed with: 0 and -0 are no tokens, NaN is one."""
    mask = (torch.rand(4, 7) < 0.6).to(dtype)
    mask[1], mask[2] = 0, 1
    if dtype.is_floating_point:
        mask[0, :2] = torch.tensor([float("nan"), -0.0])
    for shape in (mask.shape, (0, 7), (2, 0)):
        x, part = torch.randn(*shape, 3, 2), mask[: shape[0], : shape[1]]
        with torch.inference_mode() if inferring else nullcontext():
            few = unpad_input(x, part)
            with monkeypatch.context() as patched:
                patched.setattr(padding_arguments, "FEW", -1)
                many = unpad_input(x, part)
        assert type(few[3]) is type(many[3]) is int
        assert few[3] == many[3]
        for one, other in zip(few[:3] + few[4:], many[:3] + many[4:], strict=True):
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            assert torch.equal(one, other)
        assert not few[2].is_inference()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_norm_of_a_few_transposed_rows_is_contiguous(dtype: torch.dtype) -> None:
    """With and without a bias, at the first call and after it."""
    x, weight = torch.randn(4, 3, 8, dtype=dtype).transpose(0, 1), torch.rand(8)
    for function in (layer_norm_fn, rms_norm_fn):
        for bias in (None, weight, None, weight):
            y = function(x, weight, bias)
            assert y.is_contiguous()
            assert torch.equal(y, function(x.contiguous(), weight, bias))
