"""What kernels do not take by themselves: nested tensors, batches of vmap, v of another headdim."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flash_attn_npu import flash_attn_func, flash_attn_varlen_func
from flash_attn_npu.errors import ArgumentError, ArgumentTypeError


def test_a_jagged_tensor_is_named(device: torch.device) -> None:
    rows = [torch.randn(n, 4, 32, device=device) for n in (3, 5)]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
    with pytest.raises(ArgumentTypeError, match=r"^q: got a nested tensor; .* q\.values\(\)"):
        flash_attn_func(nested, nested, nested)


def dense(x: Tensor) -> Tensor:
    out: Tensor = flash_attn_func(x, x, x, causal=True)
    return out


def lse(x: Tensor) -> Tensor:
    return flash_attn_func(x, x, x, return_attn_probs=True)[1]


def packed(x: Tensor) -> Tensor:
    out: Tensor = flash_attn_varlen_func(x[0], x[0], x[0], [0, 2, 5], [0, 2, 5], 3, 3)
    return out


@pytest.mark.parametrize("call", [dense, lse, packed])
def test_vmap_is_one_call_for_each_element(
    device: torch.device, call: Callable[[Tensor], Tensor]
) -> None:
    x = torch.randn(3, 2, 5, 4, 32).to(device, torch.float16)
    assert torch.equal(torch.vmap(call)(x), torch.stack([call(one) for one in x]))


@pytest.mark.parametrize(
    ("headdim", "argument", "remedy"),
    [
        ((80, 80, 64), "v", r"pad\(v, \(0, 16\)\), and cut out to out\[\.\.\., :64\]"),
        ((64, 64, 80), "v", r"pad q and k with 16 zeros as well, .*softmax_scale=64 \*\* -0\.5"),
        ((64, 80, 80), "k", "pass q and k of one headdim"),
    ],
)
def test_which_headdim_is_to_change(headdim: tuple[int, ...], argument: str, remedy: str) -> None:
    q, k, v = (torch.randn(1, 5, 2, d) for d in headdim)
    with pytest.raises(ArgumentError, match=rf"^{argument}: got headdim .*to fix it: .*{remedy}"):
        flash_attn_func(q, k, v)
