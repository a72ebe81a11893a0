"""Buffers that a call writes: each has memory of its own, and is written whole or not at all."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_npu.errors import ArgumentError, ArgumentTypeError
from tests.helpers import every_function as every

BACKWARD = ["_flash_attn_backward", "_flash_attn_varlen_backward", "flash_attn_gpu.bwd"]
CACHED = ["flash_attn_with_kvcache", "flash_attn_gpu.fwd_kvcache"]
each_backward = pytest.mark.parametrize("name", BACKWARD)
each_cached = pytest.mark.parametrize("name", CACHED)


def refused(name: str, call: every.Call, *arguments: str) -> None:
    """By the name of one of the arguments, and without a trace in any tensor."""
    before = {x: y.to_dense().clone() for x, y in call.items() if isinstance(y, Tensor)}
    with pytest.raises((ArgumentError, ArgumentTypeError)) as caught:
        every.run(name, call)
    assert caught.value.argument in arguments
    for x, y in before.items():
        torch.testing.assert_close(call[x].to_dense(), y, rtol=0, atol=0, equal_nan=True)


@each_backward
@pytest.mark.parametrize("written", ["dq", "dk", "dv"])
@pytest.mark.parametrize("read", ["dout", "q", "k", "v", "out", "dq", "dk", "dv"])
def test_a_gradient_in_memory_that_is_in_use(
    name: str, written: str, read: str, device: torch.device
) -> None:
    if written == read:
        pytest.skip("itself")
    call = every.right(name, device)
    memory = torch.zeros(2 * call["q"].numel()).to(device)
    shapes = {x: call[x].shape for x in (written, read)}
    # their last and first rows are the same memory
    call[read] = memory[: shapes[read].numel()].view(shapes[read])
    call[written] = memory[shapes[read].numel() - 1 :][: shapes[written].numel()].view(
        shapes[written]
    )
    refused(name, call, written, read)


@each_backward
def test_a_gradient_over_its_own_tensor(name: str, device: torch.device) -> None:
    call = every.right(name, device)
    refused(name, call | {"dq": call["q"]}, "dq")
    refused(name, call | {"dq": call["dout"].view_as(call["q"])}, "dq")
    refused(name, call | {"dk": call["dv"]}, "dk", "dv")


@each_backward
def test_a_gradient_that_cannot_be_written(name: str, device: torch.device) -> None:
    call = every.right(name, device)
    with torch.inference_mode():
        made_in_inference = torch.zeros_like(call["dv"])
    refused(name, call | {"dv": made_in_inference}, "dv")
    refused(name, call | {"dv": call["dv"][..., :1].expand_as(call["dv"])}, "dv")
    if device.type == "cpu":
        refused(name, call | {"dv": torch.zeros_like(call["dv"]).to_sparse()}, "dv")


@each_backward
@pytest.mark.parametrize("dim", [-2, -3])
def test_gradients_between_each_other(name: str, dim: int, device: torch.device) -> None:
    """Upstream writes slices of one packed tensor, by heads or by parts."""
    call = every.right(name, device)
    for x in "kv":  # as many heads as q has
        call[x] = call[x].repeat_interleave(2, -2)
        call[f"d{x}"] = torch.empty_like(call["q"])
    every.run(name, call)
    expected = [call[x].clone() for x in ("dq", "dk", "dv")]
    memory = torch.stack(expected, -3) if dim == -3 else torch.cat(expected, -2)
    parts = (
        memory.fill_(torch.nan).unbind(-3) if dim == -3 else memory.fill_(torch.nan).chunk(3, -2)
    )
    every.run(name, call | dict(zip(("dq", "dk", "dv"), parts, strict=True)))
    assert all(torch.equal(x, y) for x, y in zip(parts, expected, strict=True))


def places(tensor: Tensor) -> list[int]:
    index = torch.zeros(1, dtype=torch.int64)
    for stride, size in zip(tensor.stride(), tensor.shape, strict=True):
        index = (index[:, None] + stride * torch.arange(size)).flatten()
    return (index + tensor.storage_offset()).tolist()


def any_strides(draw: random.Random, shape: tuple[int, ...]) -> list[int]:
    """Often those of a slice of something larger in any order of dimensions, else any."""
    if draw.random() < 0.2:
        return [draw.choice((1, 2, 3, 4, 8, 12, 16, 24)) for _ in shape]
    strides, step = [0] * len(shape), draw.choice((1, 2, 3))
    for dim in draw.sample(range(len(shape)), len(shape)):
        strides[dim] = step
        step *= shape[dim] * draw.choice((1, 1, 2))
    return strides


def test_it_is_exact_for_any_strides() -> None:
    """Against the places of all elements, one by one."""
    draw = random.Random(0)
    name, device = "_flash_attn_backward", torch.device("cpu")
    shape = (2, 3, 1, 4)
    call: dict[str, Any] = every.right(name, device)
    call |= {x: torch.randn(shape) for x in ("q", "k", "v", "dout", "out")}
    call |= {"softmax_lse": torch.zeros(2, 1, 3), "alibi_slopes": None, "dv": torch.empty(shape)}
    seen = [0, 0]
    for _ in range(300):
        memory = torch.zeros(700)
        dq, dk = (
            memory.as_strided(shape, any_strides(draw, shape), draw.randint(0, 60)) for _ in "qk"
        )
        taken = [*places(dq), *places(dk)]
        apart = len(set(taken)) == len(taken)
        seen[apart] += 1
        if apart:
            every.run(name, call | {"dq": dq, "dk": dk})
        else:
            refused(name, call | {"dq": dq, "dk": dk}, "dq", "dk")
    assert min(seen) > 20


@each_cached
def test_one_tensor_as_both_caches(name: str, device: torch.device) -> None:
    call = every.right(name, device)
    call["v_cache"] = call["k_cache"]
    refused(name, call, "k_cache", "v_cache")
    # one head behind the other, so that rows meet by halves
    memory = torch.zeros(call["k_cache"].numel() + 8).to(device)
    shifted = {"k_cache": memory[:-8], "v_cache": memory[8:]}
    shifted = {x: y.view_as(call["k_cache"]) for x, y in shifted.items()}
    refused(name, call | shifted, "v_cache")
    # nothing is written into them without new keys
    for x in ("k", "v", "rotary_cos", "rotary_sin"):
        call[x] = None
    out, _ = every.run(name, call)
    again, _ = every.run(name, call | {"v_cache": call["k_cache"].clone()})
    assert torch.equal(out, again)


@each_cached
@pytest.mark.parametrize("read", ["q", "k", "v"])
def test_what_lies_in_the_cache_is_read_first(name: str, read: str, device: torch.device) -> None:
    call = every.right(name, device) | {"rotary_cos": None, "rotary_sin": None}
    # over the position that the first sequence fills, and what is behind it
    cache = call["v_cache" if read == "v" else "k_cache"]
    inside = cache[2, 4:].reshape(-1)[: call[read].numel()].view_as(call[read])
    assert inside._base is not None
    given = {x: y.clone() if isinstance(y, Tensor) else y for x, y in call.items()}
    expected, _ = every.run(name, given | {read: inside.clone()})
    out, _ = every.run(name, call | {read: inside})
    assert torch.equal(out, expected)
    assert all(torch.equal(given[x], call[x]) for x in ("k_cache", "v_cache"))


def test_pages_of_one_buffer_that_both_caches_see(device: torch.device) -> None:
    """transformers numbers the pages of keys and values in one buffer, one behind the other."""
    call = every.paged("flash_attn_with_kvcache", device)
    pages = torch.stack((call["k_cache"], call["v_cache"]), 1).flatten(0, 1)
    both = {"k_cache": pages[:-1], "v_cache": pages[1:], "block_table": call["block_table"] * 2}
    out, _ = every.run("flash_attn_with_kvcache", call | both)
    expected, _ = every.run("flash_attn_with_kvcache", call)
    assert torch.equal(out, expected)
    assert torch.equal(pages[::2], call["k_cache"])
    assert torch.equal(pages[1::2], call["v_cache"])
    # a table that does not skip the pages of the other
    both["block_table"] = torch.tensor([[3, 1], [2, 0]], dtype=torch.int32, device=device)
    both["cache_seqlens"] = torch.tensor([4, 4], dtype=torch.int32, device=device)
    refused("flash_attn_with_kvcache", call | both, "v_cache")


@each_cached
def test_one_row_for_two_sequences(name: str, device: torch.device) -> None:
    call = every.right(name, device)
    call["cache_batch_idx"] = torch.tensor([1, 1], dtype=torch.int32, device=device)
    # the new keys go to positions 4 and 7: only where they meet is anything lost
    every.run(name, call)
    call["cache_seqlens"] = torch.tensor([4, 4], dtype=torch.int32, device=device)
    refused(name, call, "cache_batch_idx")
    for x in ("k", "v", "rotary_cos", "rotary_sin"):
        call[x] = None
    every.run(name, call)


@each_cached
def test_one_page_for_two_sequences(name: str, device: torch.device) -> None:
    call = every.paged(name, device)
    # positions 4 and 7, then 4 and 5, then 5 and 4, of the second page
    call["block_table"] = torch.tensor([[3, 1], [2, 1]], dtype=torch.int32, device=device)
    every.run(name, call)
    for lengths in ([4, 5], [5, 4]):
        call["cache_seqlens"] = torch.tensor(lengths, dtype=torch.int32, device=device)
        every.run(name, call)
    call["cache_seqlens"] = torch.tensor([4, 0], dtype=torch.int32, device=device)
    call["block_table"] = torch.tensor([[3, 1], [1, 2]], dtype=torch.int32, device=device)
    refused(name, call, "block_table")
    # a shared beginning that is only read
    call["cache_seqlens"] = torch.tensor([4, 5], dtype=torch.int32, device=device)
    call["block_table"] = torch.tensor([[3, 1], [3, 2]], dtype=torch.int32, device=device)
    every.run(name, call)


@each_cached
@pytest.mark.parametrize("cache", ["k_cache", "v_cache"])
def test_a_cache_made_in_inference_mode(name: str, cache: str, device: torch.device) -> None:
    call = every.right(name, device)
    given = {x: y.clone() if isinstance(y, Tensor) else y for x, y in call.items()}
    with torch.inference_mode():
        given[cache] = call[cache].clone()
    out, _ = every.run(name, given)
    expected, _ = every.run(name, call)
    assert torch.equal(out, expected)
    assert all(torch.equal(given[x], call[x]) for x in ("k_cache", "v_cache"))


UNWRITABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": lambda x: x.to_sparse(),
    "expanded": lambda x: x[:, :1].expand_as(x) if x.shape[1] > 1 else x[..., :1].expand_as(x),
}


@each_cached
@pytest.mark.parametrize("cache", ["k_cache", "v_cache"])
@pytest.mark.parametrize("kind", UNWRITABLE)
def test_a_cache_that_cannot_be_written(name: str, cache: str, kind: str) -> None:
    call = every.right(name, torch.device("cpu"))
    refused(name, call | {cache: UNWRITABLE[kind](call[cache])}, cache)


@pytest.mark.parametrize("name", [x for x in every.FUNCTIONS if "out" in every.annotations(x)])
def test_an_out_that_cannot_be_written(name: str) -> None:
    if "bwd" in name or "backward" in name:
        pytest.skip("reads it")
    call = every.right(name, torch.device("cpu"))
    out = torch.zeros_like(call["q"])
    for make in UNWRITABLE.values():
        refused(name, call | {"out": make(out)}, "out")
    with torch.inference_mode():
        out = torch.zeros_like(out)
    refused(name, call | {"out": out}, "out")
    if "k_cache" in call:
        memory = call["k_cache"].view(-1)[: out.numel()].view_as(out)
        refused(name, call | {"out": memory}, "out")
