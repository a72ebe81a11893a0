"""Forward-mode tangents are refused by name wherever attention would lose them without a word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.forward_ad import dual_level, make_dual

from flash_attn_npu import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from flash_attn_npu import flash_attn_interface as interface
from flash_attn_npu.errors import UnsupportedError

# the first dual of a process compiles torch's own formulas
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

MIDDLE = (0.0, 0.2, False, -1, -1, 0.0)
Function = Callable[[dict[str, Any]], Any]


def lengths(x: dict[str, Any]) -> tuple[Tensor, Tensor, int, int]:
    cu_seqlens = torch.tensor([0, 5], dtype=torch.int32, device=x["q"].device)
    return cu_seqlens, cu_seqlens, 5, 5


def flat(x: dict[str, Any]) -> tuple[Tensor, ...]:
    return x["q"][0], x["k"][0], x["v"][0]


def cached(x: dict[str, Any], **more: Any) -> Any:
    caches = x["k_cache"] * 1, x["v_cache"] * 1
    return flash_attn_with_kvcache(x["q"], *caches, alibi_slopes=x["alibi_slopes"], **more)


def backward(x: dict[str, Any]) -> Any:
    q, k, v = (x[name].detach() for name in "qkv")
    out, lse, _, rng = interface._flash_attn_forward(q, k, v, *MIDDLE, None, False)
    grads = [torch.empty_like(y) for y in (q, k, v)]
    saved = x["dout"], x["q"], x["k"], x["v"], out, lse
    return interface._flash_attn_backward(
        *saved, *grads, *MIDDLE, x["alibi_slopes"], False, rng_state=rng
    )


TRIPLE, SLOPES, CACHES = ("q", "k", "v"), ("alibi_slopes",), ("q", "k_cache", "v_cache")
CALLS: dict[str, tuple[tuple[str, ...], Function]] = {
    "flash_attn_func": (
        (*TRIPLE, *SLOPES),
        lambda x: flash_attn_func(*(x[y] for y in "qkv"), alibi_slopes=x["alibi_slopes"]),
    ),
    "flash_attn_qkvpacked_func": (("qkv",), lambda x: flash_attn_qkvpacked_func(x["qkv"])),
    "flash_attn_kvpacked_func": (
        ("q", "kv"), lambda x: flash_attn_kvpacked_func(x["q"], x["qkv"][:, :, 1:])
    ),
    "flash_attn_varlen_func": (
        (*TRIPLE, *SLOPES),
        lambda x: flash_attn_varlen_func(*flat(x), *lengths(x), alibi_slopes=x["alibi_slopes"]),
    ),
    "flash_attn_varlen_func over pages": (
        (*TRIPLE, *SLOPES),
        lambda x: flash_attn_varlen_func(
            x["q"][0], x["k"], x["v"], *lengths(x), alibi_slopes=x["alibi_slopes"],
            block_table=torch.zeros(1, 1, dtype=torch.int32, device=x["q"].device),
        ),
    ),
    "_flash_attn_forward": (
        (*TRIPLE, *SLOPES),
        lambda x: interface._flash_attn_forward(
            *(x[y] for y in "qkv"), *MIDDLE, x["alibi_slopes"], False
        ),
    ),
    "_flash_attn_varlen_forward": (
        (*TRIPLE, *SLOPES),
        lambda x: interface._flash_attn_varlen_forward(
            *flat(x), *lengths(x), *MIDDLE, alibi_slopes=x["alibi_slopes"]
        ),
    ),
    "_flash_attn_backward": (("dout", *TRIPLE, *SLOPES), backward),
    "flash_attn_with_kvcache": ((*CACHES, *SLOPES), cached),
    "flash_attn_with_kvcache, new keys": (
        (*CACHES, "k", "v", "rotary_cos"),
        lambda x: cached(
            x, k=x["k"], v=x["v"], cache_seqlens=3, rotary_cos=x["rotary_cos"],
            rotary_sin=x["rotary_cos"],
        ),
    ),
}  # fmt: skip


def given(device: torch.device) -> dict[str, Any]:
    shapes = dict.fromkeys((*TRIPLE, "dout"), (1, 5, 2, 16)) | {"qkv": (1, 5, 3, 2, 16)}
    shapes |= {"k_cache": (1, 9, 2, 16), "v_cache": (1, 9, 2, 16), "rotary_cos": (9, 4)}
    made = {name: torch.randn(shape).to(device, torch.float16) for name, shape in shapes.items()}
    return {**made, "alibi_slopes": torch.rand(2).to(device)}


@pytest.mark.parametrize("name", CALLS)
def test_a_tangent_is_refused_by_name(device: torch.device, name: str) -> None:
    arguments, call = CALLS[name]
    tensors = given(device)
    # remembered plans must not forget to look
    call(tensors)
    for argument in arguments:
        with dual_level():
            # there may be others
            call(tensors)
            key = "qkv" if argument == "kv" else argument
            for x in (tensors[key], tensors[key].clone().requires_grad_()):
                dual = make_dual(x, torch.ones_like(x))
                with pytest.raises(
                    UnsupportedError, match=rf"^{argument}: got a tensor with a forward-mode tan"
                ):
                    call({**tensors, key: dual})


def test_an_operator_that_is_called_as_such_loses_none_either(device: torch.device) -> None:
    x = given(device)
    call = interface._wrapped_flash_attn_forward
    with dual_level():
        dual = make_dual(x["v"], torch.ones_like(x["v"]))
        with pytest.raises(UnsupportedError, match=r"^v: got a tensor with a forward-mode"):
            call(x["q"], x["k"], dual, *MIDDLE, None, False)


def test_outside_of_a_dual_level_nobody_looks(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    monkeypatch.setattr(torch.autograd.forward_ad, "unpack_dual", looks.append)
    for _, call in CALLS.values():
        call(given(device))
    assert not looks
