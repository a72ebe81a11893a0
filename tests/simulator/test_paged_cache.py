"""The simulated operators that write tokens into the pages of a cache and gather them again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flash_attn_npu import _virtual_ascend as virtual_ascend
from tests.helpers.infer_cases import in_pages, infer, packed, random
from tests.helpers.old_torch import needs

pytestmark = pytest.mark.usefixtures("npu")

SCATTERS = needs("npu_scatter_pa_kv_cache", "cache_mode")
GATHERS = needs("npu_gather_pa_kv_cache")

BLOCKS, SIZE = 4, 16


def scatter(**given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Three tokens into caches of zeros, every argument replaceable."""
    import torch_npu

    arguments = {
        "key": random(3, 2, 8),
        "value": random(3, 2, 16),
        "key_cache": torch.zeros(BLOCKS, SIZE, 2, 8).half(),
        "value_cache": torch.zeros(BLOCKS, SIZE, 2, 16).half(),
        "slot_mapping": torch.tensor([17, 0, 63], dtype=torch.int32),
        "cache_mode": "Norm",
        **given,
    }
    placed = {n: x.npu() if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
    torch_npu.npu_scatter_pa_kv_cache(**placed)
    return placed["key_cache"], placed["value_cache"]


@SCATTERS
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_scatter_writes_in_place_and_nothing_else(dtype: torch.dtype) -> None:
    key, value = random(3, 2, 8), random(3, 2, 16)
    caches = random(BLOCKS, SIZE, 2, 8), random(BLOCKS, SIZE, 2, 16)
    before = [cache.flatten(0, 1).clone() for cache in caches]
    slots = torch.tensor([17, 0, 63], dtype=dtype)
    given = {"key": key.npu(), "value": value.npu(), "slot_mapping": slots.npu()}
    placed = [cache.npu() for cache in caches]
    with virtual_ascend.record() as rec:
        scatter(**given, key_cache=placed[0], value_cache=placed[1])
    assert [launch.name for launch in rec.launches] == ["npu_scatter_pa_kv_cache"]
    assert rec.allocated_bytes < 1024
    for tokens, cache, expected in zip((key, value), placed, before, strict=True):
        for token, slot in zip(tokens, [17, 0, 63], strict=True):
            expected[slot] = token
        assert torch.equal(cache.cpu().flatten(0, 1), expected)


def slots(*values: int) -> dict[str, torch.Tensor]:
    return {"slot_mapping": torch.tensor(values)}


NOT_SCATTERED: dict[str, tuple[str, dict[str, Any]]] = {
    "default mode": ("cache_mode 'Norm'", {"cache_mode": "PA_NZ"}),
    "unknown mode": ("cache_mode 'Norm'", {"cache_mode": "norm"}),
    "twice": ("must not repeat a slot", slots(5, 6, 5)),
    "beyond": ("slot_mapping must be in", slots(0, 1, 64)),
    "negative": ("slot_mapping must be in", slots(0, 1, -1)),
    "too few": ("slot_mapping must be \\[3\\]", slots(0, 1)),
    "float slots": ("int32 or int64", {"slot_mapping": torch.tensor([0.0, 1.0, 2.0])}),
    "empty": (
        "must not be empty",
        {"key": random(0, 2, 8), "value": random(0, 2, 16), **slots()},
    ),
    "another dtype": ("need one dtype", {"value": random(3, 2, 16).bfloat16()}),
    "another D": ("same N and D", {"key": random(3, 2, 16)}),
    "another T": ("may differ in D only", {"value": random(4, 2, 16)}),
    "flat cache": ("not simulated", {"key_cache": random(BLOCKS, SIZE, 16)}),
    "not contiguous": ("must be contiguous", {"key": random(2, 3, 8).transpose(0, 1)}),
    "float32": (
        "only int8, float16 and bfloat16",
        {n: torch.zeros(3, 2, 8) for n in ("key", "value")}
        | {f"{n}_cache": torch.zeros(BLOCKS, SIZE, 2, 8) for n in ("key", "value")},
    ),
    "cut": (
        "units of 32 bytes",
        {"value": random(3, 2, 4), "value_cache": torch.zeros(BLOCKS, SIZE, 2, 4).half()},
    ),
    "compressed": ("seq_lens is not simulated", {"seq_lens": torch.tensor([3])}),
}


@SCATTERS
@pytest.mark.parametrize("name", NOT_SCATTERED)
def test_scatter_refuses(name: str) -> None:
    rule, given = NOT_SCATTERED[name]
    with pytest.raises(RuntimeError, match=rule):
        scatter(**given)


@SCATTERS
def test_no_mode_is_the_plain_one() -> None:
    assert scatter(cache_mode=None)[0].count_nonzero() > 0


@SCATTERS
def test_a_token_scattered_is_the_token_attended() -> None:
    rows, size, width = [1, 1], 16, 64
    (q, k, v), arguments = packed(rows, [18, 3])
    table = index([[2, 0], [3, 9]])
    caches = [in_pages(x, [17, 2], size, table, BLOCKS).npu() for x in (but_last(k), but_last(v))]
    new = [x[[17, 20]].contiguous() for x in (k, v)]
    written = {"slot_mapping": torch.tensor([0 * size + 1, 3 * size + 2])}
    scatter(key=new[0], value=new[1], key_cache=caches[0], value_cache=caches[1], **written)
    views = [cache.view(BLOCKS, size, width) for cache in caches]
    paged = {"actual_seq_lengths_kv": [18, 3], "block_table": table, "block_size": size}
    out = infer(q, *views, "TND", **{**arguments, **paged})[0]
    assert torch.equal(out, infer(q, k, v, "TND", **arguments)[0])


def but_last(tokens: torch.Tensor) -> torch.Tensor:
    """Packed sequences of 18 and 3 tokens without the last of each."""
    return torch.cat([tokens[:17], tokens[18:20]])


def index(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def gather(**given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences of 18 and 3 tokens out of a cache, every argument replaceable."""
    import torch_npu

    arguments = {
        "key_cache": random(BLOCKS, SIZE, 2, 8),
        "value_cache": random(BLOCKS, SIZE, 2, 16),
        "block_tables": index([[2, 0, 9], [3, 9, 9]]),
        "seq_lens": index([18, 3]),
        "key": torch.zeros(21, 2, 8).half(),
        "value": torch.zeros(21, 2, 16).half(),
        **given,
    }
    placed = {n: x.npu() if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
    torch_npu.npu_gather_pa_kv_cache(**placed)
    return placed["key"], placed["value"]


@GATHERS
@pytest.mark.parametrize("cumulative", [False, True])
def test_gather(cumulative: bool) -> None:
    caches = random(BLOCKS, SIZE, 2, 8), random(BLOCKS, SIZE, 2, 16)
    lengths = {"seq_lens": index([0, 18, 21]), "is_seq_lens_cumsum": True} if cumulative else {}
    got = gather(key_cache=caches[0], value_cache=caches[1], **lengths)
    for tokens, cache in zip(got, caches, strict=True):
        expected = torch.cat([cache[2], cache[0, :2], cache[3, :3]])
        assert torch.equal(tokens.cpu(), expected)


@GATHERS
def test_gather_after_an_offset_of_whole_blocks() -> None:
    cache = random(BLOCKS, SIZE, 2, 8)
    given = {"block_tables": index([[9, 2, 0], [9, 3, 9]]), "seq_offset": index([16, 31])}
    key, _ = gather(key_cache=cache, **given)
    assert torch.equal(key.cpu(), torch.cat([cache[2], cache[0, :2], cache[3, :3]]))


NOT_GATHERED: dict[str, tuple[str, dict[str, Any]]] = {
    "int64 table": ("must be contiguous int32", {"block_tables": torch.zeros(2, 3).long()}),
    "int64 lengths": ("must be contiguous int32", {"seq_lens": torch.tensor([18, 3])}),
    "outside": ("outside the cache", {"block_tables": index([[2, 4, 9], [3, 9, 9]])}),
    "narrow table": ("outside the cache", {"block_tables": index([[2], [3]])}),
    "sizes": (
        "a row for each of 21",
        {n: random(20, 2, d) for n, d in (("key", 8), ("value", 16))},
    ),
    "not cumulative": ("the first 0", {"is_seq_lens_cumsum": True}),
    "lengths of another batch": ("each of 2 sequences", {"seq_lens": index([21])}),
    "offsets of another batch": ("each sequence", {"seq_offset": index([0])}),
    "large token": (
        "148 KB",
        {"key_cache": random(1, SIZE, 2, 40000), "value_cache": random(1, SIZE, 2, 16)}
        | {"key": random(21, 2, 40000)},
    ),
    "cut": (
        "units of 32 bytes",
        {"value": random(21, 2, 4), "value_cache": random(BLOCKS, SIZE, 2, 4)},
    ),
    "float": (
        "only int8, float16 and bfloat16",
        {n: torch.zeros(21, 2, 8) for n in ("key", "value")}
        | {f"{n}_cache": torch.zeros(BLOCKS, SIZE, 2, 8) for n in ("key", "value")},
    ),
}


@GATHERS
@pytest.mark.parametrize("name", NOT_GATHERED)
def test_gather_refuses(name: str) -> None:
    rule, given = NOT_GATHERED[name]
    with pytest.raises(RuntimeError, match=rule):
        gather(**given)
