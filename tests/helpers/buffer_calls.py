"""Right calls of the public attention functions, as arguments by name, to be spoilt one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import flash_attn_npu
from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu._core.ground import usage
from flash_attn_npu._core.ground.memory import memos
from flash_attn_npu.errors import ArgumentError, ArgumentTypeError, UnsupportedError

Call = dict[str, Any]

ROWS = 9


def _random(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape).to(device)


def _lengths(device: torch.device) -> Tensor:
    return torch.tensor([0, 4, ROWS], dtype=torch.int32, device=device)


def dense(device: torch.device) -> Call:
    q, k, v = (_random(device, 2, ROWS, heads, 16) for heads in (4, 2, 2))
    return {"q": q, "k": k, "v": v}


def packed(device: torch.device) -> Call:
    q, k, v = (_random(device, ROWS, heads, 16) for heads in (4, 2, 2))
    call: Call = {"q": q, "k": k, "v": v}
    call |= {"cu_seqlens_q": _lengths(device), "cu_seqlens_k": _lengths(device)}
    return call | {"max_seqlen_q": 5, "max_seqlen_k": 5}


def _varlen_kvpacked(device: torch.device) -> Call:
    call = packed(device)
    kv = torch.stack((call.pop("k"), call.pop("v")), 1)
    return {"q": call.pop("q"), "kv": kv, **call}


RIGHT: dict[str, Callable[[torch.device], Call]] = {
    "flash_attn_func": dense,
    "flash_attn_kvpacked_func": lambda device: {
        "q": _random(device, 2, ROWS, 4, 16),
        "kv": _random(device, 2, ROWS, 2, 2, 16),
    },
    "flash_attn_qkvpacked_func": lambda device: {"qkv": _random(device, 2, ROWS, 3, 4, 16)},
    "flash_attn_varlen_func": packed,
    "flash_attn_varlen_kvpacked_func": _varlen_kvpacked,
    "flash_attn_varlen_qkvpacked_func": lambda device: {
        "qkv": _random(device, ROWS, 3, 4, 16),
        "cu_seqlens": _lengths(device),
        "max_seqlen": 5,
    },
}
"""Name of a function -> a right call of it."""


def _paged(device: torch.device) -> Call:
    table = torch.tensor([[2, 0], [3, 1]], dtype=torch.int32, device=device)
    pages = {name: _random(device, 4, 4, 2, 16) for name in ("k", "v")}
    return packed(device) | pages | {"block_table": table}


def _cached(device: torch.device) -> Call:
    call = _paged(device)
    caches = {"k_cache": call["k"], "v_cache": call["v"], "block_table": call["block_table"]}
    call = {
        name: _random(device, 2, 1, heads, 16) for name, heads in (("q", 4), ("k", 2), ("v", 2))
    }
    lengths = torch.tensor([3, 4], dtype=torch.int32, device=device)
    return call | caches | {"cache_seqlens": lengths, "causal": True}


PAGED: dict[str, Callable[[torch.device], Call]] = {
    "flash_attn_varlen_func": _paged,
    "flash_attn_with_kvcache": _cached,
}
"""Right calls whose keys lie in 4 pages of 4: 4 and 5 keys, so one page and two."""


def run(function: str, call: Call) -> Any:
    return getattr(flash_attn_npu, function)(**call)


def plans_remembered() -> int:
    (plans,) = (memo for memo in memos() if memo.name == "plans of calls")
    return len(plans)


@contextmanager
def refused(argument: str, error: type[Exception] | None = None, came: str = "") -> Iterator[None]:
    """The block is refused with a message that answers all four questions, and nothing was done."""
    plans, randomness = plans_remembered(), torch.get_rng_state()
    kinds = (ArgumentError, ArgumentTypeError, UnsupportedError)
    with (
        virtual_ascend.record() as rec,
        usage.reporting() as served,
        pytest.raises(kinds, match=rf"^{argument}: got .+; allowed: .+; to fix it: .+") as caught,
    ):
        yield
    assert error is None or caught.type is error
    assert came in str(caught.value)
    assert not rec.launches
    assert not rec.host_to_device
    assert not served.tallies
    assert plans_remembered() == plans
    assert torch.equal(torch.get_rng_state(), randomness)


def other_device(device: torch.device) -> torch.device:
    if virtual_ascend.REASON is not None:
        pytest.skip("there is one device only: the virtual Ascend is not running")
    return torch.device("npu:0" if device.type == "cpu" else "cpu")
