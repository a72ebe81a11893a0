"""Our `_upad_input` against transformers' own: same results, one reading per mask."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

import flash_attn_npu
from flash_attn_npu._core.ground.memory import forget_all
from flash_attn_npu._integrations import unpadding

theirs = pytest.importorskip("transformers.modeling_flash_attention_utils")
# as on disk, even if a test before this one has installed us
ORIGINAL = theirs._upad_input

BATCH, WIDTH, HEADS, DIM = 3, 7, 2, 4
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7, [0, 0, 0, 0, 0, 1, 1]])
RIGHT = LEFT.flip(1)


@pytest.fixture
def upad() -> Callable[..., Any]:
    forget_all()
    return unpadding.memoised_upad_input(ORIGINAL)


def states(queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    query = torch.randn(BATCH, HEADS, queries, DIM).transpose(1, 2)
    key, value = torch.randn(2, BATCH, keys, HEADS, DIM)
    return query, key, value


def assert_same(ours: Any, expected: Any) -> None:
    assert type(ours) is type(expected)
    if isinstance(expected, tuple):
        assert len(ours) == len(expected)
        for mine, other in zip(ours, expected, strict=True):
            assert_same(mine, other)
    elif isinstance(expected, torch.Tensor):
        assert ours.dtype == expected.dtype
        assert torch.equal(ours, expected)
    else:
        assert ours == expected


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32])
@pytest.mark.parametrize(
    ("mask", "queries", "keys"),
    [
        (LEFT, WIDTH, WIDTH),
        (RIGHT, WIDTH, WIDTH),
        (LEFT, 1, WIDTH),
        (LEFT, 3, WIDTH),
        (LEFT, 1, WIDTH + 5),
        (LEFT, WIDTH, WIDTH + 5),
        (LEFT, 3, WIDTH + 5),
        (torch.tensor([[1], [0], [1]]), 1, 1),
    ],
    ids=["prefill", "right padded", "decode", "chunk", "static decode", "static prefill",
         "static chunk", "one token"],
)  # fmt: skip
def test_same_as_transformers(
    upad: Callable[..., Any], mask: torch.Tensor, queries: int, keys: int, dtype: torch.dtype
) -> None:
    mask = mask.to(dtype)
    for _ in range(2):
        args = (*states(queries, keys), mask, queries, theirs._unpad_input)
        assert_same(upad(*args), ORIGINAL(*args))


@pytest.mark.parametrize("queries", [WIDTH, 1, 3])
def test_every_layer_on_a_device_gets_the_same_objects(
    upad: Callable[..., Any], queries: int, npu: torch.device
) -> None:
    mask = LEFT.bool().to(npu)
    first, second = (
        upad(*(x.to(npu) for x in states(queries, WIDTH)), mask, queries, theirs._unpad_input)
        for _ in range(2)
    )
    assert first[3] is second[3]
    for one, other in zip(first[4], second[4], strict=True):
        assert one is other
    assert all(type(longest) is int for longest in first[5])


def test_a_mask_changed_in_place_is_read_again(upad: Callable[..., Any]) -> None:
    mask = LEFT.clone()
    args = (*states(WIDTH, WIDTH), mask, WIDTH, theirs._unpad_input)
    upad(*args)
    mask[0, :] = 1
    assert_same(upad(*args), ORIGINAL(*args))


def test_inference_tensors_are_never_remembered(upad: Callable[..., Any]) -> None:
    with torch.inference_mode():
        mask = LEFT.clone()
        args = (*states(WIDTH, WIDTH), mask, WIDTH, theirs._unpad_input)
        upad(*args)
        mask[0, :] = 1
        assert_same(upad(*args), ORIGINAL(*args))


def test_what_is_remembered_is_bounded(upad: Callable[..., Any], npu: torch.device) -> None:
    masks = [LEFT.to(npu) for _ in range(3 * unpadding.MASKS_REMEMBERED)]
    for mask in masks:
        upad(*(x.to(npu) for x in states(WIDTH, WIDTH)), mask, WIDTH, theirs._unpad_input)
    assert 0 < len(unpadding._memo) <= unpadding.MASKS_REMEMBERED


def test_gradients_pass(upad: Callable[..., Any]) -> None:
    query, key, value = (state.clone().requires_grad_() for state in states(WIDTH, WIDTH))
    out = upad(query, key, value, LEFT, WIDTH, theirs._unpad_input)
    (out[0].sum() + 2 * out[1].sum() + 3 * out[2].sum()).backward()
    for factor, state in enumerate((query, key, value), start=1):
        assert torch.equal(state.grad[..., 0, 0], factor * LEFT.float())


def test_compilation_traces_the_original(
    upad: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    args = (*states(WIDTH, WIDTH), LEFT, WIDTH, theirs._unpad_input)
    assert_same(upad(*args), ORIGINAL(*args))
    assert len(unpadding._memo) == 0


def test_uninstalling_forgets_masks_and_position_ids(npu: torch.device) -> None:
    mask = LEFT.bool().to(npu)
    positions = torch.tensor([[0, 1, 2, 0, 1]], device=npu)
    query, key, value = (state.to(npu) for state in states(WIDTH, WIDTH))
    with flash_attn_npu.install():
        unpadded = theirs._upad_input(query, key, value, mask, WIDTH, theirs._unpad_input)
        packed = theirs.prepare_fa_kwargs_from_position_ids(positions)
        remembered = [weakref.ref(unpadded[4][0]), weakref.ref(packed[0][0])]
        del unpadded, packed
        gc.collect()
        assert all(reference() is not None for reference in remembered)
    gc.collect()
    assert [reference() for reference in remembered] == [None, None]
    # they outlived what was remembered of them
    assert (mask.shape, positions.shape) == ((BATCH, WIDTH), (1, 5))
