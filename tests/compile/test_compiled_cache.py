"""Attention over a cache while compiling: one graph for a cache that grows, written in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from flash_attn_npu import flash_attn_varlen_func, flash_attn_with_kvcache

OPS = torch.ops.flash_attn_npu_shim
Call = dict[str, Any]


def int32(device: torch.device, *values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def caches(device: torch.device, paged: bool) -> Call:
    shape = (8, 4, 2, 8) if paged else (3, 16, 2, 8)
    call: Call = {x: torch.randn(shape).to(device) for x in ("k_cache", "v_cache")}
    if paged:
        return call | {"block_table": int32(device, [3, 1, 6, 0], [2, 4, 7, 5])}
    return call | {"cache_batch_idx": int32(device, 2, 0)}


def tokens(device: torch.device, append: bool) -> Call:
    heads = {"q": 4, "k": 2, "v": 2} if append else {"q": 4}
    call: Call = {x: torch.randn(2, 1, count, 8).to(device) for x, count in heads.items()}
    if append:
        call |= {x: torch.rand(20, 4).to(device) for x in ("rotary_cos", "rotary_sin")}
    return call


each_layout = pytest.mark.parametrize("paged", [False, True], ids=["rows", "pages"])
each_way = pytest.mark.parametrize("append", [False, True], ids=["reads", "appends"])
OPTIONS: Call = {"causal": True, "window_size": (9, 0), "return_softmax_lse": True}


@each_layout
@each_way
@pytest.mark.parametrize("given", ["tensor", "host tensor", "int"])
def test_one_graph_for_a_growing_cache(
    device: torch.device, paged: bool, append: bool, given: str
) -> None:
    counter = CompileCounter()
    compiled = torch.compile(flash_attn_with_kvcache, backend=counter, fullgraph=True, dynamic=True)
    kept = caches(device, paged)
    for length in range(2, 14):
        seqlens: Any = length
        if given != "int":
            where = device if given == "tensor" else torch.device("cpu")
            seqlens = int32(where, length, length - 1)
        call = kept | tokens(device, append) | OPTIONS | {"cache_seqlens": seqlens}
        eager = {x: y.clone() if x.endswith("_cache") else y for x, y in call.items()}
        answer, wanted = compiled(**call), flash_attn_with_kvcache(**eager)
        for actual, expected in zip(answer, wanted, strict=True):
            assert torch.equal(actual, expected)
        assert torch.equal(call["k_cache"], eager["k_cache"])
        assert torch.equal(call["v_cache"], eager["v_cache"])
    assert counter.frame_count == 1


def test_caches_that_are_slices_of_one_tensor(device: torch.device) -> None:
    call = caches(device, False) | tokens(device, True) | {"cache_seqlens": int32(device, 3, 4)}
    expected = {x: y.clone() for x, y in call.items()}
    wanted = flash_attn_with_kvcache(**expected)
    both = torch.stack((call["k_cache"], call["v_cache"]), 2)

    def step(both: Tensor, **call: Any) -> Any:
        return flash_attn_with_kvcache(
            **{**call, "k_cache": both[:, :, 0], "v_cache": both[:, :, 1]}
        )

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(both, **call), wanted)
    assert torch.equal(both[:, :, 0], expected["k_cache"])
    assert torch.equal(both[:, :, 1], expected["v_cache"])


@each_layout
@each_way
def test_the_operators_keep_the_dispatchers_contract(
    device: torch.device, paged: bool, append: bool
) -> None:
    call = caches(device, paged) | tokens(device, append) | {"cache_seqlens": int32(device, 3, 4)}
    call |= {"softmax_scale": 0.5, "causal": True, "return_softmax_lse": True, "softcap": 0.0}
    call |= {"window_size_left": -1, "window_size_right": -1, "alibi_slopes": None}
    call |= {"cache_leftpad": int32(device, 1, 0), "rotary_interleaved": False}
    operator = OPS._flash_attn_append_kvcache if append else OPS._flash_attn_read_kvcache
    names = [x.name for x in operator.default._schema.arguments if x.name != "function"]
    checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(operator.default, [call.get(x) for x in names], test_utils=checks)


@pytest.mark.parametrize("kind", ["fake", "meta"])
@each_way
def test_without_values(append: bool, kind: str) -> None:
    cpu = torch.device("cpu")
    call = caches(cpu, False) | tokens(cpu, append) | {"cache_seqlens": 3, **OPTIONS}
    real = flash_attn_with_kvcache(**call)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {x: mode.from_tensor(y) if isinstance(y, Tensor) else y for x, y in call.items()}
        answer = flash_attn_with_kvcache(**fake)
    if kind == "meta":
        meta = {x: y.to("meta") if isinstance(y, Tensor) else y for x, y in call.items()}
        answer = flash_attn_with_kvcache(**meta)
        assert answer[0].is_meta
    assert [(x.shape, x.dtype, x.stride()) for x in answer] == [
        (x.shape, x.dtype, x.stride()) for x in real
    ]


def test_one_graph_for_packed_queries_over_pages(device: torch.device) -> None:
    counter = CompileCounter()
    compiled = torch.compile(flash_attn_varlen_func, backend=counter, fullgraph=True, dynamic=True)
    k, v = (torch.randn(8, 4, 2, 8).to(device) for _ in "kv")
    table = int32(device, [3, 1, 6, 0], [2, 4, 7, 5])
    for length in range(3, 12):
        q = torch.randn(length + 2, 4, 8).to(device)
        cu_q, cu_k = int32(device, 0, 2, length + 2), int32(device, 0, 5, 5 + length)
        call = (q, k, v, cu_q, cu_k, length, max(5, length))
        options = {"causal": True, "block_table": table}
        assert torch.equal(compiled(*call, **options), flash_attn_varlen_func(*call, **options))
    assert counter.frame_count == 1
