"""npu_scatter_pa_kv_cache and npu_gather_pa_kv_cache: tokens into the pages of a cache and out of
them. The real operators run first; the rules are those of the documents and of the kernels' source,
which copies whole units of 32 bytes and drops the rest, never tried on a card.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from ..machine.fused_call import is_ascend_310p
from ..machine.memory import host_view
from ..machine.refusal import require

Kernel = Callable[..., Any]

_LARGEST_TOKEN = 148 * 1024
_UNIT = 32
_DTYPES = (torch.int8, torch.float16, torch.bfloat16)
_INT32 = 1 << 31


def scatter_kernel(real: Kernel) -> Kernel:
    """A replacement for npu_scatter_pa_kv_cache's kernel."""

    def kernel(given: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            _check_scatter(given)
            slots = host_view(given["slot_mapping"]).long()
            for name in ("key", "value"):
                tokens, cache = host_view(given[name]), host_view(given[f"{name}_cache"])
                cache.flatten(0, 1)[slots] = tokens

    return kernel


def gather_kernel(real: Kernel) -> Kernel:
    """A replacement for npu_gather_pa_kv_cache's kernel."""

    def kernel(given: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            slots = _gathered_slots(given)
            for name in ("key", "value"):
                tokens, cache = host_view(given[name]), host_view(given[f"{name}_cache"])
                tokens.copy_(cache.flatten(0, 1)[slots])

    return kernel


def _check_scatter(given: dict[str, Any]) -> None:
    for name in ("compress_lens", "compress_seq_offsets", "seq_lens"):
        require(given[name] is None, f"{name} is not simulated")
    require(
        given["cache_mode"] in (None, "Norm"),
        f"an ND cache needs cache_mode 'Norm', got {given['cache_mode']!r} (PA_NZ is the default)",
    )
    _check_caches(given)
    slots = host_view(given["slot_mapping"])
    require(
        slots.dtype in (torch.int32, torch.int64) and slots.is_contiguous(),
        f"slot_mapping must be contiguous int32 or int64, got {slots.dtype}",
    )
    tokens, (blocks, size) = given["key"].shape[0], given["key_cache"].shape[:2]
    require(
        tuple(slots.shape) == (tokens,),
        f"slot_mapping must be [{tokens}], got {tuple(slots.shape)}",
    )
    require(
        bool(((slots >= 0) & (slots < blocks * size)).all()),
        f"slot_mapping must be in [0, {blocks * size}), got {slots.tolist()}",
    )
    require(
        slots.unique().numel() == tokens,
        f"slot_mapping must not repeat a slot: the result is undefined, got {slots.tolist()}",
    )


def _check_caches(given: dict[str, Any]) -> None:
    """What both operators ask of key, value and their caches."""
    require(not is_ascend_310p(), "the operator does not exist on a 310P")
    dtype = given["key"].dtype
    require(dtype in _DTYPES, f"key is {dtype}: only int8, float16 and bfloat16 exist")
    for name in ("key", "value"):
        tokens, cache = given[name], given[f"{name}_cache"]
        require(
            tokens.dim() == 3 and cache.dim() == 4,
            f"{name} must be [T, N, D] and its cache [blocks, block_size, N, D], got "
            f"{tuple(tokens.shape)} and {tuple(cache.shape)} (others are not simulated)",
        )
        require(
            tokens.shape[1:] == cache.shape[2:],
            f"{name} and its cache need the same N and D, got {tuple(tokens.shape)} and "
            f"{tuple(cache.shape)}",
        )
        require(tokens.numel() > 0 and cache.numel() > 0, f"{name} must not be empty")
        require(
            tokens.is_contiguous() and cache.is_contiguous(),
            f"{name} and its cache must be contiguous",
        )
        require(
            tokens.dtype == dtype and cache.dtype == dtype,
            f"key, value and their caches need one dtype, got {tokens.dtype} and {cache.dtype}",
        )
        size = tokens[0].numel() * tokens.element_size()
        require(size <= _LARGEST_TOKEN, f"a token of {name} must not exceed 148 KB, got {size}")
        require(
            size % _UNIT == 0,
            f"a token of {name} is copied in units of {_UNIT} bytes and would be cut, got {size}",
        )
    for name in ("", "_cache"):
        key, value = given[f"key{name}"], given[f"value{name}"]
        require(
            key.shape[:-1] == value.shape[:-1],
            f"key{name} and value{name} may differ in D only, got {tuple(key.shape)} and "
            f"{tuple(value.shape)}",
        )


def _gathered_slots(given: dict[str, Any]) -> torch.Tensor:
    """Where the tokens of all sequences lie in a cache without its blocks, in order."""
    _check_caches(given)
    key = given["key"]
    for name in ("key", "value", "key_cache", "value_cache"):
        require(
            given[name].numel() < _INT32, f"{name} is counted in int32, got {given[name].numel()}"
        )
    table = _index(given, "block_tables", 2)
    lengths = _lengths(given, table.shape[0])
    require(
        sum(lengths) == key.shape[0],
        f"key and value need a row for each of {sum(lengths)} tokens, got {key.shape[0]}",
    )
    offsets = [0] * len(lengths)
    if given["seq_offset"] is not None:
        offsets = _index(given, "seq_offset", 1).tolist()
        require(len(offsets) == len(lengths), "seq_offset needs an entry for each sequence")
    blocks, size = given["key_cache"].shape[:2]
    return _slots(table, list(zip(lengths, offsets, strict=True)), (blocks, size))


def _slots(
    table: torch.Tensor, spans: list[tuple[int, int]], cache: tuple[int, int]
) -> torch.Tensor:
    """The slots of (length, offset) of every sequence; an offset skips whole blocks only."""
    blocks, size = cache
    pieces = []
    for index, (length, offset) in enumerate(spans):
        pages = table[index, offset // size :][: -(-length // size)].long()
        require(
            pages.numel() * size >= length and bool(((pages >= 0) & (pages < blocks)).all()),
            f"block_tables row {index} would read outside the cache: {table[index].tolist()} for "
            f"{length} tokens after {offset}",
        )
        slots = pages[:, None] * size + torch.arange(size, device="cpu")
        pieces.append(slots.flatten()[:length])
    return torch.cat(pieces)


def _index(given: dict[str, Any], name: str, dims: int) -> torch.Tensor:
    tensor = host_view(given[name])
    require(
        tensor.dtype == torch.int32 and tensor.dim() == dims and tensor.is_contiguous(),
        f"{name} must be contiguous int32 of {dims} dimensions, got {tensor.dtype} "
        f"{tuple(tensor.shape)}",
    )
    return tensor


def _lengths(given: dict[str, Any], batch: int) -> list[int]:
    values = _index(given, "seq_lens", 1).tolist()
    if given["is_seq_lens_cumsum"]:
        require(
            len(values) == batch + 1 and values[0] == 0,
            f"cumulative seq_lens needs {batch + 1} entries, the first 0, got {values}",
        )
        values = [end - start for start, end in pairwise(values)]
    require(
        len(values) == batch and min(values) >= 0,
        f"seq_lens needs a length for each of {batch} sequences, got {values}",
    )
    return values
