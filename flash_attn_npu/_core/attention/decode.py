"""Attention over a key-value cache: describe, check everything, append, attend.

Nothing is written before every argument is checked and a kernel has accepted the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import ArgumentError, renamed
from ..ground import arguments
from ..ground.functions import EAGER, FORWARD, refuse_tangents
from ..ground.lengths import interned
from ..ground.records import named
from ..problems.ask import Ask, Facts, Options, Packed
from ..problems.buffers import sharing
from ..problems.cache import Cache, Span, cache_lengths
from ..problems.rowwise import Turn
from ..rowwise.rotation import rotate, rotate_alike
from ..table.choice import Plan, begin
from .asking import make_plan
from .moving import append
from .paged import Keys
from .serving import run_over

__all__ = ["CacheCall", "with_kvcache"]


class CacheCall(NamedTuple):
    """A call of `flash_attn_with_kvcache`: its arguments, in flash-attention 2.8's order.

    sink: (nheads,), one more logit in each softmax; transformers passes it as s_aux.
    """

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k: Tensor | None = None
    v: Tensor | None = None
    rotary_cos: Tensor | None = None
    rotary_sin: Tensor | None = None
    cache_seqlens: int | Tensor | Sequence[int] | None = None
    cache_batch_idx: Tensor | None = None
    cache_leftpad: Tensor | None = None
    block_table: Tensor | None = None
    softmax_scale: float | None = None
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    rotary_interleaved: bool = True
    alibi_slopes: Tensor | None = None
    num_splits: int = 0
    return_softmax_lse: bool = False
    sink: Tensor | None = None
    function: str = "flash_attn_with_kvcache"


class _Rotary(NamedTuple):
    """Tables (seqlen_ro, rotary_dim / 2), and whether pairs are neighbours."""

    cos: Tensor
    sin: Tensor
    interleaved: bool


class _Step(NamedTuple):
    """A call whose arguments were checked against each other.

    new: keys and values to append. lengths: before them. spans: what each sequence then sees.
    written: where the new keys go; those before the left padding belong to nobody.
    """

    call: CacheCall
    cache: Cache
    new: tuple[Tensor, Tensor] | None
    lengths: tuple[int, ...]
    spans: list[Span]
    written: list[Span]
    rotary: _Rotary | None

    @property
    def added(self) -> int:
        return 0 if self.new is None else self.new[0].shape[1]


def with_kvcache(call: CacheCall) -> tuple[Tensor, Tensor | None]:
    """Serve a call: out as q, and softmax_lse (batch, nheads, seqlen_q) if it is asked for."""
    if FORWARD._current_level >= 0:
        refuse_tangents(EAGER, **named(call))
    step = _checked(call)
    batch, seqlen_q, nheads, headdim = call.q.shape
    keys = _keys(step)
    try:
        found = make_plan(_ask(call, keys))
    except ArgumentError as error:
        raise renamed(error, {"k": "k_cache", "v": "v_cache"}) from None
    if step.rotary is not None:
        _check_positions(step, seqlen_q if _turns(found) else 1)
    if step.new is not None:
        step.cache.check_written(step.written)
    begin(found)
    with torch.no_grad():
        q, new = call.q, step.new
        if step.rotary is not None and new is not None:
            q, k = _rotate(found, step, step.rotary, new[0])
            new = (k, new[1])
        if new is not None:
            q = _append(step, q, new)
        packed = q.reshape(batch * seqlen_q, nheads, headdim)
        answer = run_over(found, packed, keys, call.alibi_slopes, call.sink)
    lse = None
    if found.problem.uses_lse:
        lse = answer.softmax_lse.view(nheads, batch, seqlen_q).transpose(0, 1).contiguous()
    return answer.out.view(q.shape), lse


def _checked(call: CacheCall) -> _Step:
    q = call.q
    arguments.require_plain(q=q, k_cache=call.k_cache, v_cache=call.v_cache)
    if call.alibi_slopes is not None or call.sink is not None:
        arguments.require_plain_or_none(alibi_slopes=call.alibi_slopes, sink=call.sink)
    arguments.flag("return_softmax_lse", call.return_softmax_lse)
    if q.dim() != 4:
        raise ArgumentError(
            "q",
            f"shape {tuple(q.shape)}",
            "4 dimensions, (batch, seqlen_q, nheads, headdim)",
            "add the missing dimension with unsqueeze",
        )
    batch = q.shape[0]
    cache = Cache(call.k_cache, call.v_cache, batch, call.block_table, call.cache_batch_idx)
    arguments.same("k_cache", "dtype", cache.k.dtype, q.dtype)
    arguments.same("k_cache", "device", cache.k.device, q.device)
    new = None
    if call.k is not None or call.v is not None:
        new = _new_keys(q, cache, call.k, call.v)
    if new is not None and call.cache_seqlens is None:
        raise _missing("cache_seqlens", "k and v", "the lengths before the new keys")
    lengths = cache_lengths("cache_seqlens", call.cache_seqlens, batch, cache.capacity)
    leftpad = cache_lengths("cache_leftpad", call.cache_leftpad, batch, 0)
    rotary = _rotary(q, new, call.rotary_cos, call.rotary_sin, call.rotary_interleaved)
    added = 0 if new is None else new[0].shape[1]
    spans = [
        Span(min(pad, length + added), length + added)
        for length, pad in zip(lengths, leftpad, strict=True)
    ]
    cache.check(spans)
    written = []
    if new is not None:
        both = zip(lengths, spans, strict=True)
        written = [Span(max(length, start), end) for length, (start, end) in both]
    return _Step(call, cache, new, lengths, spans, written, rotary)


def _keys(step: _Step) -> Keys:
    ends = accumulate([end - start for start, end in step.spans])
    lengths = interned((0, *ends), "cache_seqlens")
    return Keys(step.cache.k, step.cache.v, step.cache, step.spans, lengths)


def _ask(call: CacheCall, keys: Keys) -> Ask:
    batch, seqlen_q, nheads, headdim = call.q.shape
    assert keys.cache is not None
    total_q = batch * seqlen_q
    ends = range(0, total_q + 1, seqlen_q) if seqlen_q else (0,) * (batch + 1)
    lengths_q = interned(tuple(ends), "q")
    slopes = call.alibi_slopes
    return Ask(
        call.function,
        Facts((total_q, nheads, headdim), call.q.dtype, call.q.device),
        *keys.facts,
        Packed(lengths_q, keys.lengths, seqlen_q, keys.cache.capacity),
        Options(0.0, call.softmax_scale, call.causal, call.window_size, call.softcap),
        None if slopes is None else Facts.of(slopes),
        None if call.sink is None else Facts.of(call.sink),
        needs_grad=False,
        uses_lse=bool(call.return_softmax_lse),
        pages=keys.pages,
    )


def _append(step: _Step, q: Tensor, new: tuple[Tensor, Tensor]) -> Tensor:
    """Write the new keys behind the old ones; returns q, apart from them."""
    cache, added = step.cache, step.added
    (k, v), shared = new, sharing((q, *new), (cache.k, cache.v))
    if any(shared):
        # one of them may be a view of the caches
        q, k, v = (x.clone() if too else x for x, too in zip((q, k, v), shared, strict=True))
    packed = (k.flatten(0, 1), v.flatten(0, 1))
    kept = [end - start for start, end in step.written]
    if kept != [added] * len(kept):
        parts = [(k[i, added - count :], v[i, added - count :]) for i, count in enumerate(kept)]
        packed = (torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))
    append(step.call.function, cache, step.written, packed)
    return q


def _turns(found: Plan) -> bool:
    """Whether each query is rotated at a position of its own."""
    return bool(found.problem.causal or found.problem.windowed)


def _check_positions(step: _Step, queries: int) -> None:
    assert step.rotary is not None
    last = max(step.lengths, default=0) + max(step.added, queries)
    if step.rotary.cos.shape[0] < last:
        raise ArgumentError(
            "rotary_cos",
            f"{step.rotary.cos.shape[0]} positions",
            f"at least {last}, so many are rotated",
            "make longer tables",
        )


def _rotate(found: Plan, step: _Step, rotary: _Rotary, k: Tensor) -> tuple[Tensor, Tensor]:
    """q and k at their positions; without causal or window all queries are at the first one."""
    q = step.call.q
    turn = Turn(
        torch.tensor(step.lengths, dtype=torch.int32, device="cpu"),
        interleaved=rotary.interleaved,
        function=f"{step.call.function} (rotary)",
    )

    # q as one sequence position, if all of its queries are at the first one
    alike = q if _turns(found) else q.flatten(1, 2)[:, None]
    if alike.shape[:2] == k.shape[:2]:
        turned, k = rotate_alike((alike, k), rotary.cos, rotary.sin, turn)
    else:
        turned, k = (rotate(x, rotary.cos, rotary.sin, turn) for x in (alike, k))
    return turned.view(q.shape), k


def _new_keys(q: Tensor, cache: Cache, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor]:
    if k is None or v is None:
        given, absent = ("v", "k") if k is None else ("k", "v")
        raise _missing(absent, given, "the other half of the new keys and values")
    arguments.require_plain(k=k, v=v)
    heads, headdim = cache.k.shape[2:]
    for argument, tensor in (("k", k), ("v", v)):
        expected = (q.shape[0], k.shape[1] if k.dim() == 4 else 0, heads, headdim)
        if tuple(tensor.shape) != expected or tensor.dtype != cache.k.dtype:
            raise ArgumentError(
                argument,
                f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)}",
                f"a {cache.k.dtype} tensor of shape (batch, seqlen_new, nheads_k, headdim) = "
                f"({q.shape[0]}, ..., {heads}, {headdim})",
                "pass the new keys and values laid out as the cache",
            )
        if tensor.device != cache.k.device:
            raise ArgumentError(
                argument, tensor.device, f"{cache.k.device}, as the cache", "move it there"
            )
    return k, v


def _rotary(
    q: Tensor,
    new: tuple[Tensor, Tensor] | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
) -> _Rotary | None:
    interleaved = arguments.flag("rotary_interleaved", interleaved)
    if cos is None and sin is None:
        return None
    if cos is None or sin is None:
        absent = "rotary_cos" if cos is None else "rotary_sin"
        raise _missing(absent, "the other table", "both tables")
    arguments.require_plain(rotary_cos=cos, rotary_sin=sin)
    if new is None:
        raise _missing("k and v", "rotary_cos and rotary_sin", "the new keys that they rotate")
    if cos.dim() != 2 or cos.shape != sin.shape or 2 * cos.shape[1] > q.shape[-1]:
        raise ArgumentError(
            "rotary_cos, rotary_sin",
            f"shapes {tuple(cos.shape)} and {tuple(sin.shape)}",
            f"(seqlen_ro, rotary_dim / 2) alike, rotary_dim at most {q.shape[-1]}",
            "pass both tables for the same part of the head",
        )
    for argument, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        if not table.is_floating_point() or table.device != q.device:
            raise ArgumentError(
                argument,
                f"a {table.dtype} tensor on {table.device}",
                f"a floating dtype, on {q.device} as q",
                f"pass {argument}.to(q)",
            )
    return _Rotary(cos, sin, interleaved)


def _missing(argument: str, beside: str, what: str) -> ArgumentError:
    return ArgumentError(
        argument, "nothing", f"a value beside {beside}: {what}", f"pass {argument} too"
    )
