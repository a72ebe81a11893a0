"""Attention over a cache as operators of torch's dispatcher, for graphs and tensors without values.

Lengths and block tables are tensors there, so one graph serves a growing cache. An operator that
appends writes its caches; one that reads leaves them alone, which a compiler has to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks
from .decode import Scores, with_kvcache
from .ops import NAMESPACE, number
from .problem import default_scale
from .result import accumulator

__all__ = ["attend"]

_compiling = torch.compiler.is_dynamo_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack

_WHERE = (
    "Tensor? cache_seqlens, Tensor? cache_batch_idx, Tensor? cache_leftpad, Tensor? block_table"
)
_SCORES = (
    "float softmax_scale, bool causal, SymInt window_size_left, SymInt window_size_right, "
    "float softcap, Tensor? alibi_slopes, bool return_softmax_lse, "
    "str function='flash_attn_with_kvcache'"
)
_ROTARY = "Tensor k, Tensor v, Tensor? rotary_cos, Tensor? rotary_sin, bool rotary_interleaved"

# fmt: off


def attend(
    function: str, q: Tensor, caches: tuple[Tensor, Tensor],
    new: tuple[Tensor | None, Tensor | None],
    tables: tuple[Tensor | None, Tensor | None, bool],
    where: tuple[int | Tensor | Sequence[int] | None, Tensor | None, Tensor | None, Tensor | None],
    scores: Scores, want_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """`decode.with_kvcache`, through an operator where no value can be read.

    Args:
        where: cache_seqlens, cache_batch_idx, cache_leftpad and block_table.
    """
    traced = _compiling() or _dispatch_modes() or (isinstance(q, Tensor) and q.is_meta)
    if not traced:
        return with_kvcache(function, q, caches, new, tables, *where, scores, want_lse)
    scale = default_scale(q.shape[-1]) if scores.softmax_scale is None else scores.softmax_scale
    window = scores.window_size
    seqlens, batch_idx, leftpad, block_table = where
    places = (_lengths(seqlens, q), batch_idx, _lengths(leftpad, q), block_table)
    options = (
        number(scale), number(scores.causal), number(window[0]), number(window[1]),
        number(scores.softcap), scores.alibi_slopes, number(want_lse), function,
    )
    ops = getattr(torch.ops, NAMESPACE)
    with torch.no_grad():
        if all(x is None for x in (*new, *tables[:2])):
            out, lse = ops._flash_attn_read_kvcache(q, *caches, *places, *options)
        else:
            out, lse = ops._flash_attn_append_kvcache(q, *caches, *new, *tables, *places, *options)
    return out, lse if want_lse else None


def _append(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, rotary_cos: Tensor | None,
    rotary_sin: Tensor | None, rotary_interleaved: bool, cache_seqlens: Tensor | None,
    cache_batch_idx: Tensor | None, cache_leftpad: Tensor | None, block_table: Tensor | None,
    softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int,
    softcap: float, alibi_slopes: Tensor | None, return_softmax_lse: bool,
    function: str = "flash_attn_with_kvcache",
) -> tuple[Tensor, Tensor]:
    """Write k and v into the caches, and attend."""
    scores = Scores(
        softmax_scale, causal, (window_size_left, window_size_right), softcap, alibi_slopes
    )
    out, lse = with_kvcache(
        function, q, (k_cache, v_cache), (k, v), (rotary_cos, rotary_sin, rotary_interleaved),
        cache_seqlens, cache_batch_idx, cache_leftpad, block_table, scores, return_softmax_lse,
    )
    return out, _no_lse(q) if lse is None else lse


def _append_fake(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, rotary_cos: Tensor | None,
    rotary_sin: Tensor | None, rotary_interleaved: bool, cache_seqlens: Tensor | None,
    cache_batch_idx: Tensor | None, cache_leftpad: Tensor | None, block_table: Tensor | None,
    softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int,
    softcap: float, alibi_slopes: Tensor | None, return_softmax_lse: bool,
    function: str = "flash_attn_with_kvcache",
) -> tuple[Tensor, Tensor]:
    """Shapes of the answer."""
    beside = {"k": k, "v": v, "rotary_cos": rotary_cos, "rotary_sin": rotary_sin}
    checks.together(q, beside, {})
    return _read_fake(
        q, k_cache, v_cache, cache_seqlens, cache_batch_idx, cache_leftpad, block_table,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax_lse, function,
    )


def _read(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor | None,
    cache_batch_idx: Tensor | None, cache_leftpad: Tensor | None, block_table: Tensor | None,
    softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int,
    softcap: float, alibi_slopes: Tensor | None, return_softmax_lse: bool,
    function: str = "flash_attn_with_kvcache",
) -> tuple[Tensor, Tensor]:
    """Attend to what the caches hold."""
    scores = Scores(
        softmax_scale, causal, (window_size_left, window_size_right), softcap, alibi_slopes
    )
    out, lse = with_kvcache(
        function, q, (k_cache, v_cache), (None, None), (None, None, True), cache_seqlens,
        cache_batch_idx, cache_leftpad, block_table, scores, return_softmax_lse,
    )
    return out, _no_lse(q) if lse is None else lse


def _read_fake(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor | None,
    cache_batch_idx: Tensor | None, cache_leftpad: Tensor | None, block_table: Tensor | None,
    softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int,
    softcap: float, alibi_slopes: Tensor | None, return_softmax_lse: bool,
    function: str = "flash_attn_with_kvcache",
) -> tuple[Tensor, Tensor]:
    """Shapes of the answer."""
    checks.together(
        q, {"k_cache": k_cache, "v_cache": v_cache, "alibi_slopes": alibi_slopes},
        {"cache_seqlens": cache_seqlens, "cache_batch_idx": cache_batch_idx,
         "cache_leftpad": cache_leftpad, "block_table": block_table},
    )
    batch, seqlen_q, nheads, _ = q.shape
    if not return_softmax_lse:
        return q.new_empty(q.shape), _no_lse(q)
    lse = q.new_empty((batch, nheads, seqlen_q), dtype=accumulator(q.dtype))
    return q.new_empty(q.shape), lse


# fmt: on


def _no_lse(q: Tensor) -> Tensor:
    return q.new_empty(0, dtype=accumulator(q.dtype))


def _lengths(value: Any, q: Tensor) -> Tensor | None:
    """Lengths as a graph may hold them: an int that grows must not be part of it."""
    if value is None or (isinstance(value, Tensor) and value.dim()):
        return value
    if isinstance(value, (list, tuple)):
        return torch.tensor(value, dtype=torch.int32, device="cpu")
    if isinstance(value, Tensor):
        return value.expand(q.shape[0])
    return torch.full((q.shape[0],), value, dtype=torch.int32, device="cpu")


for _name, _run, _fake, _new, _written in (
    ("_flash_attn_append_kvcache", _append, _append_fake, f"{_ROTARY}, ", ("k_cache", "v_cache")),
    ("_flash_attn_read_kvcache", _read, _read_fake, "", ()),
):
    _k, _v = ("Tensor(a!)", "Tensor(b!)") if _written else ("Tensor", "Tensor")
    torch.library.custom_op(
        f"{NAMESPACE}::{_name}",
        _run,
        mutates_args=_written,
        schema=f"(Tensor q, {_k} k_cache, {_v} v_cache, {_new}{_WHERE}, {_SCORES})"
        " -> (Tensor, Tensor)",
    ).register_fake(_fake)
