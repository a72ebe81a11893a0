"""`rearrange` without einops, against reshapes and permutations written out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flash_attn_npu._rearranging import rearrange
from flash_attn_npu.errors import ArgumentError, ArgumentTypeError

X = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
PATTERNS: list[tuple[str, dict[str, int], Callable[[Tensor], Tensor]]] = [
    ("b s h d -> b s h d", {}, lambda x: x),
    ("b s ... -> (b s) ...", {}, lambda x: x.flatten(0, 1)),
    ("c b s ... -> (b s) c ...", {}, lambda x: x.permute(1, 2, 0, 3).reshape(12, 2, 6)),
    ("b s h d->b h s d", {}, lambda x: x.transpose(1, 2)),
    ("... (two d) -> ... two d", {"two": 2}, lambda x: x.unflatten(-1, (2, 3))),
    ("... (d two) -> ... (two d)", {"two": 2}, lambda x: x.unflatten(-1, (3, 2)).mT.flatten(-2)),
    ("b s (h g) d -> (b g) s h d", {"g": 2}, lambda x: torch.stack(
        [x[b, :, g::2] for b in range(2) for g in range(2)])),
    ("b s h d -> b 1 s (h d)", {}, lambda x: x.flatten(2)[:, None]),
    ("b s h d -> (b s h d)", {}, lambda x: x.flatten()),
    ("b ... d -> d b ...", {}, lambda x: x.permute(3, 0, 1, 2)),
    ("b s h d -> b s () h d", {}, lambda x: x[:, :, None]),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "lengths", "want"), PATTERNS)
def test_patterns(pattern: str, lengths: dict[str, int], want: Callable[[Tensor], Tensor]) -> None:
    assert torch.equal(rearrange(X, pattern, **lengths), want(X))


def test_an_axis_of_length_1_can_be_dropped() -> None:
    assert torch.equal(rearrange(X[:, :1], "b 1 h d -> b h d"), X[:, 0])


def test_an_empty_batch_and_a_gradient() -> None:
    assert rearrange(X[:0], "b s ... -> (b s) ...").shape == (0, 4, 6)
    x = torch.randn(2, 3, requires_grad=True)
    rearrange(x, "a b -> (b a)").sum().backward()
    assert torch.equal(x.grad, torch.ones(2, 3))


@pytest.mark.parametrize(
    "pattern",
    [
        "b s h d",
        "b s h -> b s h",
        "b s h d e -> b s h d e",
        "b s h d -> b s h",
        "b s h d -> b s h d d",
        "b b h d -> b h d",
        "b s (h g) d -> b s h g d",
        "b s h d -> b s h ...",
        "... h ... d -> h d ...",
        "b s h (d -> b s h d",
        "b 1 h d -> b h d",
        "b s h d -> b -> d",
    ],
)
def test_patterns_that_do_not_fit(pattern: str) -> None:
    with pytest.raises(ArgumentError, match="pattern"):
        rearrange(X, pattern)


def test_lengths_that_do_not_divide() -> None:
    with pytest.raises(ArgumentError, match="pattern"):
        rearrange(X, "b s h d -> b s h d", e=4)
    with pytest.raises(ArgumentError, match="pattern"):
        rearrange(X, "2 s h d -> s h d 2")
    with pytest.raises(ArgumentError, match="multiply"):
        rearrange(X, "b s h (d e) -> b s h d e", e=4)
    with pytest.raises(ArgumentTypeError, match="tensor"):
        rearrange([X, X], "a b s h d -> b s h d a")
