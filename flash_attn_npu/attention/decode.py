"""Attention over a key-value cache: describe, check everything, append, attend.

Nothing is written before every argument is checked and a kernel has accepted the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from numbers import Integral
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from ..errors import ArgumentError, ArgumentTypeError, explain, renamed
from ..rowwise.rotation import rotate
from . import checks
from .buffers import share
from .cache import Cache, Span, host_values, pages_of
from .dispatch import Plan, lookup, permit
from .lengths import Lengths, interned
from .problem import Facts
from .support import INFER

__all__ = ["Rotary", "Scores", "cache_lengths", "with_kvcache"]


class Scores(NamedTuple):
    """The arguments of a call that say how scores are made and masked."""

    softmax_scale: float | None
    causal: bool
    window_size: tuple[int, int]
    softcap: float
    alibi_slopes: Tensor | None


class Rotary(NamedTuple):
    """Tables (seqlen_ro, rotary_dim / 2), and whether pairs are neighbours."""

    cos: Tensor
    sin: Tensor
    interleaved: bool


def cache_lengths(
    argument: str, value: int | Tensor | Sequence[int] | None, batch: int, default: int
) -> tuple[int, ...]:
    """One length for each sequence, from an int, a list, an int32 tensor (batch,) or None."""
    if value is None:
        return (default,) * batch
    if isinstance(value, Tensor):
        lengths = host_values(argument, value)
        lengths = lengths * batch if value.dim() == 0 else lengths
    elif _whole(value):
        lengths = (int(value),) * batch
    elif isinstance(value, (list, tuple)) and all(_whole(length) for length in value):
        lengths = tuple(int(length) for length in value)
    else:
        raise ArgumentTypeError(
            explain(
                argument,
                type(value).__name__,
                "an int, a list of ints, or an int32 tensor of shape (batch,)",
                f"pass {argument} as one of them",
            )
        )
    if len(lengths) != batch or any(length < 0 for length in lengths):
        raise ArgumentError(
            explain(
                argument,
                str(lengths),
                f"{batch} lengths of at least 0",
                "pass an int, or an int32 tensor with one length for each sequence",
            )
        )
    return lengths


def _whole(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _attend(
    function: str,
    q: Tensor,
    cache: Cache,
    new: tuple[Tensor, Tensor] | None,
    lengths: tuple[int, ...],
    leftpad: tuple[int, ...],
    rotary: Rotary | None,
    scores: Scores,
    want_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    batch, seqlen_q, nheads, headdim = q.shape
    added = new[0].shape[1] if new is not None else 0
    spans = [
        Span(min(pad, length + added), length + added)
        for length, pad in zip(lengths, leftpad, strict=True)
    ]
    cache.check(spans)
    found = _plan(function, q, cache, spans, scores, want_lse)
    if rotary is not None:
        _check_positions(rotary, lengths, added, seqlen_q if _turns(found) else 1)
    written = [Span(max(n, span.start), span.end) for n, span in zip(lengths, spans, strict=True)]
    if new is not None:
        cache.check_written(written)
    permit(found)
    with torch.no_grad():
        if rotary is not None and new is not None:
            q, k = _rotate(found, q, new[0], rotary, lengths)
            new = (k, new[1])
        if new is not None:
            q = q.clone() if share(q, cache.k) or share(q, cache.v) else q
            _append(cache, new, written)
        packed = q.reshape(batch * seqlen_q, nheads, headdim)
        found.tally.calls += 1
        out, lse = _run(found, packed, cache, spans, scores.alibi_slopes, want_lse)
    if lse is not None:
        lse = lse.view(nheads, batch, seqlen_q).transpose(0, 1).contiguous()
    return out.view(q.shape), lse


def _plan(
    function: str,
    q: Tensor,
    cache: Cache,
    spans: Sequence[Span],
    scores: Scores,
    want_lse: bool,
) -> Plan:
    batch, seqlen_q, nheads, headdim = q.shape
    lengths_q = _cumulative("q", [seqlen_q] * batch)
    lengths_k = _cumulative("cache_seqlens", [span.end - span.start for span in spans])
    keys = Facts((lengths_k.total, *cache.k.shape[2:]), cache.k.dtype, cache.k.device)
    pages = pages_of(cache, spans)
    try:
        # fmt: off
        return lookup(
            function, Facts((batch * seqlen_q, nheads, headdim), q.dtype, q.device), keys, keys,
            lengths_q, lengths_k, seqlen_q, cache.capacity, 0.0, *scores, False, False, want_lse,
            False, None, None, pages,
        )
        # fmt: on
    except ArgumentError as error:
        raise renamed(error, {"k": "k_cache", "v": "v_cache"}) from None


def _cumulative(argument: str, lengths: list[int]) -> Lengths:
    return interned((0, *accumulate(lengths)), argument)


def _run(
    found: Plan,
    q: Tensor,
    cache: Cache,
    spans: Sequence[Span],
    slopes: Tensor | None,
    want_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    if found.name == INFER:
        answer: tuple[Tensor, Tensor | None] = found.kernel.forward(
            found.problem, q, cache, spans, want_lse
        )
        return answer
    k, v = cache.gather(spans)
    result = found.kernel.forward(found.problem, q, k, v, slopes, None)
    return result.out, result.softmax_lse if want_lse else None


def _append(cache: Cache, new: tuple[Tensor, Tensor], spans: Sequence[Span]) -> None:
    """Write the new keys behind the old ones; those before leftpad belong to nobody."""
    k, v = new
    added = k.shape[1]
    kept = [span.end - span.start for span in spans]
    if all(count == added for count in kept):
        cache.write(spans, k.flatten(0, 1), v.flatten(0, 1))
        return
    parts = [(k[i, added - count :], v[i, added - count :]) for i, count in enumerate(kept)]
    cache.write(spans, torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))


def _turns(found: Plan) -> bool:
    """Whether each query is rotated at a position of its own."""
    return found.problem.causal or found.problem.windowed


def _check_positions(rotary: Rotary, lengths: tuple[int, ...], added: int, queries: int) -> None:
    last = max(lengths, default=0) + max(added, queries)
    if rotary.cos.shape[0] < last:
        raise ArgumentError(
            explain(
                "rotary_cos",
                f"{rotary.cos.shape[0]} positions",
                f"at least {last}, so many are rotated",
                "make longer tables",
            )
        )


def _rotate(
    found: Plan, q: Tensor, k: Tensor, rotary: Rotary, lengths: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """q and k at their positions; without causal or window all queries are at the first one."""
    offsets = torch.tensor(lengths, dtype=torch.int32, device="cpu")

    def rotated(x: Tensor) -> Tensor:
        return rotate(
            x,
            rotary.cos,
            rotary.sin,
            seqlen_offsets=offsets,
            interleaved=rotary.interleaved,
            function=f"{found.problem.function} (rotary)",
        )

    k = rotated(k)
    if _turns(found):
        return rotated(q), k
    at_one_position = q.flatten(1, 2)[:, None]
    return rotated(at_one_position).view(q.shape), k


def with_kvcache(
    function: str,
    q: Tensor,
    caches: tuple[Tensor, Tensor],
    new: tuple[Tensor | None, Tensor | None],
    tables: tuple[Tensor | None, Tensor | None, bool],
    cache_seqlens: int | Tensor | Sequence[int] | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    scores: Scores,
    want_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """The arguments of `flash_attn_with_kvcache`, checked against each other and served.

    Returns out (batch, seqlen_q, nheads, headdim), and softmax_lse (batch, nheads, seqlen_q) if
    wanted.
    """
    checks.require_plain(q=q, k_cache=caches[0], v_cache=caches[1])
    want_lse = checks.flag("return_softmax_lse", want_lse)
    if q.dim() != 4:
        raise ArgumentError(
            explain(
                "q",
                f"shape {tuple(q.shape)}",
                "4 dimensions, (batch, seqlen_q, nheads, headdim)",
                "add the missing dimension with unsqueeze",
            )
        )
    if scores.alibi_slopes is not None:
        checks.require_plain(alibi_slopes=scores.alibi_slopes)
    batch = q.shape[0]
    cache = Cache(*caches, batch, block_table, cache_batch_idx)
    checks.same("k_cache", "dtype", cache.k.dtype, q.dtype)
    checks.same("k_cache", "device", cache.k.device, q.device)
    appended = _new_keys(q, cache, *new)
    if appended is not None and cache_seqlens is None:
        raise _missing("cache_seqlens", "k and v", "the lengths before the new keys")
    lengths = cache_lengths("cache_seqlens", cache_seqlens, batch, cache.capacity)
    leftpad = cache_lengths("cache_leftpad", cache_leftpad, batch, 0)
    rotary = _rotary(q, appended, *tables)
    return _attend(function, q, cache, appended, lengths, leftpad, rotary, scores, want_lse)


def _new_keys(
    q: Tensor, cache: Cache, k: Tensor | None, v: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    if k is None and v is None:
        return None
    if k is None or v is None:
        given, absent = ("v", "k") if k is None else ("k", "v")
        raise _missing(absent, given, "the other half of the new keys and values")
    checks.require_plain(k=k, v=v)
    heads, headdim = cache.k.shape[2:]
    for argument, tensor in (("k", k), ("v", v)):
        expected = (q.shape[0], k.shape[1] if k.dim() == 4 else 0, heads, headdim)
        if tuple(tensor.shape) != expected or tensor.dtype != cache.k.dtype:
            raise ArgumentError(
                explain(
                    argument,
                    f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)}",
                    f"a {cache.k.dtype} tensor of shape (batch, seqlen_new, nheads_k, headdim) = "
                    f"({q.shape[0]}, ..., {heads}, {headdim})",
                    "pass the new keys and values laid out as the cache",
                )
            )
        if tensor.device != cache.k.device:
            raise ArgumentError(
                explain(argument, tensor.device, f"{cache.k.device}, as the cache", "move it there")
            )
    return k, v


def _rotary(
    q: Tensor,
    new: tuple[Tensor, Tensor] | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
) -> Rotary | None:
    interleaved = checks.flag("rotary_interleaved", interleaved)
    if cos is None and sin is None:
        return None
    if cos is None or sin is None:
        absent = "rotary_cos" if cos is None else "rotary_sin"
        raise _missing(absent, "the other table", "both tables")
    checks.require_plain(rotary_cos=cos, rotary_sin=sin)
    if new is None:
        raise _missing("k and v", "rotary_cos and rotary_sin", "the new keys that they rotate")
    if cos.dim() != 2 or cos.shape != sin.shape or 2 * cos.shape[1] > q.shape[-1]:
        raise ArgumentError(
            explain(
                "rotary_cos, rotary_sin",
                f"shapes {tuple(cos.shape)} and {tuple(sin.shape)}",
                f"(seqlen_ro, rotary_dim / 2) alike, rotary_dim at most {q.shape[-1]}",
                "pass both tables for the same part of the head",
            )
        )
    for argument, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        if not table.is_floating_point() or table.device != q.device:
            raise ArgumentError(
                explain(
                    argument,
                    f"a {table.dtype} tensor on {table.device}",
                    f"a floating dtype, on {q.device} as q",
                    f"pass {argument}.to(q)",
                )
            )
    return Rotary(cos, sin, interleaved)


def _missing(argument: str, beside: str, what: str) -> ArgumentError:
    return ArgumentError(
        explain(argument, "nothing", f"a value beside {beside}: {what}", f"pass {argument} too")
    )
