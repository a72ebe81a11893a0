"""Inside of torch.func.functionalize, whose tensors have no memory, calls answer as outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_npu import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn_npu._core.ground.memory import forget_all
from flash_attn_npu._core.kernels.host import flash
from flash_attn_npu.errors import ArgumentError
from flash_attn_npu.layers.rotary import apply_rotary_emb

Call = Callable[..., tuple[Tensor, ...]]


def append(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None) -> tuple[Tensor, ...]:
    new, lengths = torch.full_like(q[:, :1], 3.0), q.new_tensor([2, 5], dtype=torch.int32)
    out = flash_attn_with_kvcache(
        q, k, v, new, new * 2, cache_seqlens=lengths, block_table=table, causal=True
    )
    # what was written, too
    return out, k + 0, v + 0


def packed(x: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
    return (flash_attn_varlen_func(x, x, x, lengths, lengths, 6, 6, causal=True),)


def rotated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    new, lengths = torch.full_like(q, 3.0), q.new_tensor([2, 5], dtype=torch.int32)
    tables = TABLE[:9, :4].to(q), TABLE[:9, :4].to(q)
    out: Tensor = flash_attn_with_kvcache(q, k, v, new, new * 2, *tables, cache_seqlens=lengths)
    return out


TABLE = torch.rand(12, 8)
Q, CACHE, BOTH = (2, 1, 4, 16), (2, 9, 4, 16), (2, 2, 9, 4, 16)
CALLS: dict[str, tuple[Call, tuple[Any, ...]]] = {
    "fewer heads of k": (lambda q, k: (flash_attn_func(q, k[:, :, :2], k[:, :, :2]),), (Q, CACHE)),
    "append": (append, (Q, CACHE, CACHE)),
    "append to one buffer": (lambda q, kv: append(q, kv[0], kv[1]), (Q, BOTH)),
    "append, q in the cache": (lambda k, v: append(k[:, 5:6], k, v), (CACHE, CACHE)),
    "append to pages": (append, (Q, (4, 16, 4, 16), (4, 16, 4, 16), [[0, 3], [2, 1]])),
    "rotated at positions": (
        lambda x, starts: (apply_rotary_emb(x, TABLE.to(x), TABLE.to(x), seqlen_offsets=starts),),
        (CACHE, [3, 0]),
    ),
    "append, rotated": (
        lambda q, k, v: (rotated(q, k, v), k + 0),
        (Q, CACHE, CACHE),
    ),
    "packed": (packed, ((9, 4, 16), [0, 3, 9])),
}


def made(what: Any, device: torch.device) -> Tensor:
    if isinstance(what, tuple):
        return torch.randn(what).to(device, torch.float16)
    return torch.tensor(what, dtype=torch.int32, device=device)


@pytest.mark.parametrize("name", CALLS)
def test_the_first_call_is_functionalized(device: torch.device, name: str) -> None:
    call, shapes = CALLS[name]
    if device.type == "npu" and name.startswith("append"):
        pytest.skip("the simulated card has no functional twin of the operator that writes")
    forget_all()
    flash.shares_heads.cache_clear()
    given = [made(what, device) for what in shapes]
    copies = [[x.clone() for x in given] for _ in range(3)]
    inside = torch.func.functionalize(call)(*copies[0])
    # nothing that is made there may be found later
    for outside in (call(*copies[1]), call(*copies[2])):
        for one, other in zip(inside, outside, strict=True):
            assert torch.equal(one, other)
    assert [x.tolist() for x in copies[0]] == [x.tolist() for x in copies[1]]


def test_a_cache_that_is_both_is_refused_there_too() -> None:
    def call(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return append(q, k, k)

    with pytest.raises(ArgumentError, match=r"^v_cache: got a tensor that shares"):
        torch.func.functionalize(call)(torch.randn(Q), torch.randn(CACHE))
