"""What is written in a way that PyTorch does not see: on the host it counts at once, on a device
after `forget_lengths`, for everything that is read from tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import flash_attn_npu
from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu import (
    attention_forward_varlen,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    forget_lengths,
)
from flash_attn_npu._core.ground.memory import memos
from flash_attn_npu._core.rowwise.lookup import keep
from flash_attn_npu.layers.rotary import apply_rotary_emb

flash = pytest.importorskip("transformers.modeling_flash_attention_utils")

Call = Callable[[Tensor], Tensor]
"""A call as a function of the tensor that is written behind PyTorch's back."""


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    # transformers keeps the first functions it found, ours or others'
    flash._loaded_implementation = None
    with flash_attn_npu.install():
        forget_lengths()
        yield
    flash._loaded_implementation = None


def states(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def int32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def from_transformers(mask: Tensor | None, queries: int, **given: Any) -> Tensor:
    device = (mask if mask is not None else given["position_ids"]).device
    batch = 1 if mask is None else mask.shape[0]
    q = states(0, batch, queries, 2, 8).to(device)
    k, v = (states(seed, batch, 6, 2, 8).to(device) for seed in (1, 2))
    out = flash._flash_attention_forward(
        q, k, v, mask, queries, True, attn_implementation="flash_attention_2", **given
    )
    return out if mask is None else out * mask[:, -queries:, None, None]


def packed(cu_seqlens: Tensor) -> Tensor:
    q, k, v = (states(seed, 9, 2, 8).to(cu_seqlens.device) for seed in range(3))
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 9, 9, causal=True)


def huawei(cu_seqlens: Tensor) -> Tensor:
    q, k, v = (states(seed, 9, 2, 8).to(cu_seqlens.device) for seed in range(3))
    return attention_forward_varlen(q, k, v, cu_seqlens, cu_seqlens, causal=True)


def turned(cu_seqlens: Tensor) -> Tensor:
    cos, sin = (states(seed, 9, 4).to(cu_seqlens.device) for seed in (1, 2))
    x = states(0, 9, 2, 8).to(cu_seqlens.device)
    return apply_rotary_emb(x, cos, sin, cu_seqlens=cu_seqlens, max_seqlen=9)


def cached(argument: str, value: Tensor, **options: Any) -> Tensor:
    q = states(0, 2, 1, 2, 64).to(value.device)
    k, v = (states(seed, 4, 16, 2, 64).to(value.device) for seed in (1, 2))
    given = {"cache_seqlens": 9, argument: value} | options
    return flash_attn_with_kvcache(q, k, v, **given)


def appended(argument: str, value: Tensor) -> Tensor:
    """New keys, and all of them gathered, from pages of a table that names none where none is."""
    q, new, k, v = (
        states(seed, *shape).half().to(value.device)
        for seed, shape in enumerate(((2, 2, 2, 64),) * 2 + ((4, 16, 2, 64),) * 2)
    )
    given = {"cache_seqlens": int32(9, 15), "block_table": int32([3, -1], [1, 2])}
    given |= {argument: value}
    return flash_attn_with_kvcache(q, k, v, new, new, softcap=3.0, **given)


def pages(argument: str) -> Call:
    def call(value: Tensor) -> Tensor:
        q = states(0, 2, 2, 64).to(value.device)
        k, v = (states(seed, 4, 16, 2, 64).to(value.device) for seed in (1, 2))
        given = {"cu_seqlens_k": int32(0, 9, 18), "block_table": int32([0], [1])}
        given |= {argument: value}
        cu_k, table = given["cu_seqlens_k"], given["block_table"]
        return flash_attn_varlen_func(q, k, v, int32(0, 1, 2), cu_k, 1, 16, block_table=table)

    return call


SINES: dict[torch.device, Tensor] = {}


def stepped(cos: Tensor) -> Tensor:
    """Three tokens at positions of the host, by tables of an embedding."""
    device = cos.device
    sin = SINES.setdefault(device, states(7, 9, 16).to(device))
    x = states(0, 3, 1, 2, 32).to(device)
    keep(cos, sin)
    return apply_rotary_emb(x, cos, sin, seqlen_offsets=int32(4, 0, 8))


MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
OTHER = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])
CASES: dict[str, tuple[Call, Tensor, Tensor]] = {
    "cu_seqlens": (packed, int32(0, 4, 9), int32(0, 2, 9)),
    "cu_seqlens, Huawei's function": (huawei, int32(0, 4, 9), int32(0, 2, 9)),
    "cu_seqlens, rotation": (turned, int32(0, 4, 9), int32(0, 2, 9)),
    "rotary tables": (stepped, states(8, 9, 16), states(9, 9, 16)),
    "cache_seqlens": (lambda x: cached("cache_seqlens", x), int32(3, 9), int32(7, 2)),
    "cache_seqlens, new keys": (
        lambda x: appended("cache_seqlens", x),
        int32(9, 15),
        int32(4, 16),
    ),
    "block_table, new keys": (
        lambda x: appended("block_table", x),
        int32([3, -1], [1, 2]),
        int32([0, -1], [2, 1]),
    ),
    "cache_leftpad": (lambda x: cached("cache_leftpad", x), int32(3, 1), int32(0, 2)),
    "cache_batch_idx": (lambda x: cached("cache_batch_idx", x), int32(3, 1), int32(0, 2)),
    "block_table": (lambda x: cached("block_table", x), int32([3], [1]), int32([0], [2])),
    "block_table, packed": (pages("block_table"), int32([3], [1]), int32([0], [2])),
    "cu_seqlens_k, pages": (pages("cu_seqlens_k"), int32(0, 9, 18), int32(0, 4, 18)),
    "mask": (lambda x: from_transformers(x, 6), MASK, OTHER),
    "mask, some queries": (lambda x: from_transformers(x, 3), MASK, OTHER),
    "mask, one query": (lambda x: from_transformers(x, 1), MASK, OTHER),
    "position_ids": (
        lambda x: from_transformers(None, 6, position_ids=x),
        torch.tensor([[0, 1, 2, 0, 1, 2]]),
        torch.tensor([[0, 0, 1, 2, 3, 4]]),
    ),
    "position_ids, no longer packed": (
        lambda x: from_transformers(None, 6, position_ids=x),
        torch.tensor([[0, 1, 2, 0, 1, 2]]),
        torch.tensor([[0, 1, 2, 3, 4, 5]]),
    ),
}


def written_through_data(tensor: Tensor, values: Tensor) -> None:
    tensor.data.copy_(values)


def written_by_numpy(tensor: Tensor, values: Tensor) -> None:
    tensor.numpy()[:] = values.numpy()


def written_in_memory(tensor: Tensor, values: Tensor) -> None:
    torch.from_dlpack(tensor.detach()).copy_(values)


@pytest.mark.parametrize("write", [written_through_data, written_by_numpy, written_in_memory])
@pytest.mark.parametrize("case", CASES)
def test_on_the_host_every_call_reads_anew(case: str, write: Callable[..., None]) -> None:
    call, before, after = CASES[case]
    expected = call(after.clone())
    written = before.clone()
    assert not torch.equal(call(written), expected)
    write(written, after)
    assert torch.equal(call(written), expected)


@pytest.mark.parametrize("case", CASES)
def test_on_a_device_one_call_forgets_it(case: str, npu: torch.device) -> None:
    call, before, after = CASES[case]
    expected = call(after.to(npu)).cpu()
    written = before.to(npu)
    assert not torch.equal(call(written).cpu(), expected)
    written.data.copy_(after)
    forget_lengths()
    assert torch.equal(call(written).cpu(), expected)


@pytest.mark.parametrize("case", [case for case in CASES if case != "rotary tables"])
def test_on_a_device_a_write_that_moves_no_version_is_heard(case: str, npu: torch.device) -> None:
    """`torch._foreach_copy_` of torch_npu: see `unseen_writes`."""
    call, before, after = CASES[case]
    expected = call(after.to(npu)).cpu()
    written = before.to(npu)
    version = written._version
    assert not torch.equal(call(written).cpu(), expected)
    torch._foreach_copy_([written], [after.to(npu)])
    assert written._version == version
    assert torch.equal(call(written).cpu(), expected)


@pytest.mark.parametrize("case", CASES)
def test_on_a_device_each_tensor_is_read_once(case: str, npu: torch.device) -> None:
    call, before, _ = CASES[case]
    tensor = before.to(npu)
    call(tensor)
    with virtual_ascend.record() as rec:
        call(tensor)
    assert not rec.device_to_host


def test_what_was_read_is_dropped_and_what_was_decided_stays(npu: torch.device) -> None:
    tensors = [before.to(npu) for _, before, _ in CASES.values()]
    for (call, _, _), tensor in zip(CASES.values(), tensors, strict=True):
        call(tensor)
    kept = {memo.name: len(memo) for memo in memos() if not memo.contents}
    assert all(len(memo) for memo in memos() if memo.contents)
    forget_lengths()
    assert not any(len(memo) for memo in memos() if memo.contents)
    assert {memo.name: len(memo) for memo in memos() if not memo.contents} == kept


def test_what_was_read_goes_with_its_tensor(npu: torch.device) -> None:
    mask = MASK.to(npu)
    from_transformers(mask, 6)
    (readings,) = (memo for memo in memos() if memo.name == "attention masks of transformers")
    assert len(readings) == 1
    del mask
    assert len(readings) == 0


def test_uninstalling_forgets_masks(npu: torch.device) -> None:
    mask = MASK.to(npu)
    from_transformers(mask, 6)
    flash_attn_npu.uninstall()
    assert not any(len(memo) for memo in memos() if memo.name == "attention masks of transformers")
