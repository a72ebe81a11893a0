"""A default device is for what users make: what is made here lies with the tensors of the call.

So it is in the first call of a process, which finds out what later ones know, and with another
default dtype.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flash_attn_npu
from flash_attn_npu import flash_attn_interface as interface
from flash_attn_npu._flash_attn_3 import flash_attn_interface as flash_attn_3
from flash_attn_npu._integrations.unpadding import memoised_upad_input
from flash_attn_npu.layers.rotary import RotaryEmbedding
from flash_attn_npu.utils import _sampling, generation, testing
from tests.helpers import malformed_rowwise as malformed

Made = Callable[[], Callable[[], Any]]
"""Makes the arguments, and returns the call."""


def _qkv(*shape: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape, requires_grad=True) for _ in range(3))


def _varlen() -> Callable[[], Any]:
    lengths = torch.tensor([0, 2, 5], dtype=torch.int32)
    args = (*_qkv(5, 2, 8), lengths, lengths, 3, 3)
    return partial(interface.flash_attn_varlen_func, *args, causal=True)


def _cache(paged: bool) -> Callable[[], Any]:
    q, k, v = (torch.randn(2, 1, 2, 8) for _ in range(3))
    shape = (4, 256, 2, 8) if paged else (2, 16, 2, 8)
    tables = torch.randn(16, 4), torch.randn(16, 4)
    table = torch.tensor([[0], [2]], dtype=torch.int32) if paged else None
    lengths = torch.tensor([3, 7], dtype=torch.int32)
    args = (q, torch.randn(shape), torch.randn(shape), k, v, *tables, lengths)
    call = interface.flash_attn_with_kvcache
    return partial(call, *args, block_table=table, causal=True)


def _cache_3() -> Callable[[], Any]:
    q, (k_cache, v_cache) = torch.randn(3, 2, 8), torch.randn(2, 2, 16, 2, 8)
    call = partial(flash_attn_3.flash_attn_with_kvcache, q, k_cache, v_cache, cache_seqlens=3)
    return partial(call, cu_seqlens_q=[0, 1, 3], max_seqlen_q=2)


def _varlen_3() -> Callable[[], Any]:
    lengths = torch.tensor([0, 2, 5], dtype=torch.int32)
    call = partial(flash_attn_3.flash_attn_varlen_func, *_qkv(5, 2, 8), lengths, lengths, 3, 3)
    return partial(call, seqused_q=torch.tensor([1, 3], dtype=torch.int32))


def _unpadding(queries: int) -> Callable[[], Any]:
    unpad = memoised_upad_input(lambda *_: pytest.fail("not asked"))
    mask, k = torch.tensor([[0, 1, 1], [1, 1, 1]]), torch.randn(2, 3, 2, 8)
    return partial(unpad, k[:, -queries:], k, k, mask, queries, lambda *_: None)


def _everything() -> Callable[[], Any]:
    return partial(
        interface.flash_attn_func, *_qkv(2, 5, 2, 8), dropout_p=0.5, causal=True,
        window_size=(2, 1), alibi_slopes=torch.ones(2), return_attn_probs=True,
        deterministic=True,
    )  # fmt: skip


MORE: dict[str, Made] = {
    "flash_attn_func": lambda: partial(interface.flash_attn_func, *_qkv(2, 5, 2, 8)),
    "flash_attn_func with fewer heads of k": lambda: partial(
        interface.flash_attn_func, torch.randn(2, 5, 4, 8), *_qkv(2, 5, 2, 8)[1:]
    ),
    "flash_attn_func with everything": _everything,
    "flash_attn_varlen_func": _varlen,
    "flash_attn_with_kvcache": partial(_cache, False),
    "flash_attn_with_kvcache, paged": partial(_cache, True),
    "FlashAttention 3's flash_attn_with_kvcache": _cache_3,
    "FlashAttention 3's flash_attn_varlen_func": _varlen_3,
    "unpadding, one query": partial(_unpadding, 1),
    "unpadding, two queries": partial(_unpadding, 2),
    "unpadding, all": partial(_unpadding, 3),
    "RotaryEmbedding": lambda: partial(
        RotaryEmbedding(8, scale_base=512, device="cpu"), torch.randn(2, 3, 3, 2, 8)
    ),
    "sample": lambda: partial(_sampling.sample, torch.randn(3, 9), top_k=4, top_p=0.5),
    "sample_speculative": lambda: partial(
        _sampling.sample_speculative, torch.randn(2, 3, 9), torch.randn(2, 2, 9),
        torch.tensor([[0, 1], [2, 3]]), top_k=4,
    ),
    "attention_ref": lambda: partial(testing.attention_ref, *_qkv(2, 5, 2, 8), causal=True),
    "generate_random_padding_mask": lambda: partial(
        testing.generate_random_padding_mask, 5, 2, torch.device("cpu")
    ),
    "allocate_inference_cache": lambda: partial(
        generation.allocate_inference_cache, 2, 8, 2, 8, 1, "cpu"
    ),
}  # fmt: skip


def prepared(name: str) -> Callable[[], Any]:
    """The call, with tensors on the host."""
    if name in MORE:
        return MORE[name]()
    function, make = malformed.FUNCTIONS[name]
    return partial(function, **make())


def tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (tuple, list, dict)):
        for one in result.values() if isinstance(result, dict) else result:
            yield from tensors(one)


def run(call: Callable[[], Any]) -> list[Tensor]:
    """The results, and the gradients of all leaves among the arguments."""
    results = list(tensors(call()))
    ends = [result for result in results if result.requires_grad]
    if not ends:
        return results
    torch.autograd.backward(ends, [torch.ones_like(end) for end in ends])
    given = tensors([*getattr(call, "args", ()), *getattr(call, "keywords", {}).values()])
    return results + [leaf.grad for leaf in given if leaf.is_leaf and leaf.grad is not None]


@pytest.mark.parametrize("name", [*malformed.FUNCTIONS, *MORE])
def test_nothing_is_made_on_the_default_device(name: str) -> None:
    torch.manual_seed(0)
    flash_attn_npu.forget_lengths()
    want = run(prepared(name))
    torch.manual_seed(0)
    flash_attn_npu.forget_lengths()
    call = prepared(name)
    with torch.device("meta"):
        got = run(call)
    assert len(got) == len(want) > 0
    for one, other in zip(got, want, strict=True):
        assert one.device.type == "cpu"
        # what is uninitialised by contract has a device and a shape only
        if name == "allocate_inference_cache":
            assert one.shape == other.shape
        else:
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def first_calls() -> None:
    """Everything on another default device and dtype, in a process that has called nothing."""
    torch.set_num_threads(1)
    calls = {name: prepared(name) for name in [*malformed.FUNCTIONS, *MORE]}
    torch.set_default_dtype(torch.float64)
    failed = []
    with torch.device("meta"):
        for name, call in calls.items():
            try:
                devices = {result.device.type for result in run(call)}
            except Exception as error:
                failed.append(f"{name}: {type(error).__name__}: {error}")
            else:
                failed += [name] if devices != {"cpu"} else []
    assert not failed, "\n".join(failed)


def test_first_calls_of_a_process_on_another_default_device() -> None:
    root = str(Path(__file__).parents[2])
    code = "from tests.rowwise import test_default_device as tests; tests.first_calls()"
    plain = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", code], env=plain, cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
