"""FlashAttention 3's calls in terms of those of flash-attention 2, exactly.

What FlashAttention 3 has more is made of concatenation, zeros and selected rows: qv adds q k^T and
qv v^T, so (q, qv) and (k, v) are one longer head; a v of a smaller headdim goes to a kernel as it
is, or with zeros behind it; used queries are selected rows, and what is not used of the keys lies
between sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core.attention import call, operators, paged
from .._core.ground import arguments
from .._core.ground.lengths import host_lengths
from .._core.ground.records import named, replaced
from .._core.problems.cache import cache_lengths
from ..errors import ArgumentError, UnsupportedError

__all__ = [
    "Heads",
    "Options",
    "Pair",
    "combined",
    "dense",
    "joined",
    "looks_ahead",
    "narrowed",
    "packed",
    "refuse",
    "told",
    "widened",
]

Pair = tuple[Tensor, Tensor | None]
"""out, and softmax_lse where it was asked for."""


class Options(NamedTuple):
    """What every function takes."""

    softmax_scale: float | None
    causal: bool
    window_size: Any
    softcap: float
    deterministic: bool = False
    lse: Any = True


class Heads(NamedTuple):
    """q and k of one headdim, v of the same or of a smaller one, and that of the answer."""

    q: Tensor
    k: Tensor
    v: Tensor
    softmax_scale: float
    headdim_v: int


def refuse(**given: Any) -> None:
    """Refuse arguments that nothing here serves, where they are not their defaults."""
    for argument, value in given.items():
        if value is not None and not (argument == "attention_chunk" and value == 0):
            allowed, remedy = _REFUSED[argument]
            raise UnsupportedError(argument, _told(value), allowed, remedy)


_NO_FP8 = ("None: nothing is computed in float8", "dequantise q, k and v before the call")
_REFUSED = {
    "q_descale": _NO_FP8,
    "k_descale": _NO_FP8,
    "v_descale": _NO_FP8,
    "attention_chunk": (
        "0",
        "cut the sequences into chunks with cu_seqlens, as flash_attn_varlen_func takes them",
    ),
    "rotary_seqlens": (
        "None: new keys are rotated from cache_seqlens on",
        "rotate q and k before the call, with flash_attn.layers.rotary",
    ),
    "k": (
        "None beside cu_seqlens_q, cu_seqlens_k_new, qv or another headdim of v",
        "write the new keys and values into the cache before the call",
    ),
}


def joined(q: Tensor, k: Tensor, v: Tensor, qv: Tensor | None, scale: Any) -> Heads:
    """q and k at least as wide as v, with every product as it was."""
    arguments.require_plain(q=q, k=k, v=v)
    headdim_v = v.shape[-1]
    if qv is not None:
        arguments.require_plain(qv=qv)
        if qv.shape != (*q.shape[:-1], headdim_v) or qv.dtype != q.dtype:
            raise ArgumentError(
                "qv",
                f"a {qv.dtype} tensor of shape {tuple(qv.shape)}",
                f"a {q.dtype} tensor of shape {(*q.shape[:-1], headdim_v)}, as q but for the "
                "headdim of v",
                "pass one more query for each query, as long as a value",
            )
        q, k = torch.cat((q, qv), -1), torch.cat((k, v), -1)
    width = max(q.shape[-1], headdim_v)
    scale = q.shape[-1] ** -0.5 if scale is None and q.shape[-1] else scale
    q, k = (x if x.shape[-1] == width else _padded(x, width) for x in (q, k))
    return Heads(q, k, v, scale, headdim_v)


def widened(heads: Heads) -> Heads:
    """One headdim for all: zeros behind v."""
    width = heads.q.shape[-1]
    return heads if heads.v.shape[-1] == width else replaced(heads, v=_padded(heads.v, width))


def dense(function: str, heads: Heads, options: Options) -> Pair:
    """out and softmax_lse of a padded batch."""
    q, k = heads[:2]
    longer = q.dim() == 4 == k.dim() and q.shape[1] > k.shape[1]
    if longer and looks_ahead(options):
        return _dense_as_packed(function, heads, options)
    return _attend(function, heads, None, options)


def _attend(function: str, heads: Heads, lengths: Any, options: Options) -> Pair:
    """The call of flash-attention 2, with v as it is where a kernel takes it so."""
    raw = (0.0, *named(replaced(options, softmax_scale=heads.softmax_scale)).values())
    inputs = (heads.q, heads.k, heads.v)
    found: Any = None
    if heads.v.shape[-1] != heads.q.shape[-1]:
        found = call.attend_narrow(function, inputs, lengths, raw)
    if found is None:
        wide = widened(heads)
        found = call.attend(function, (wide.q, wide.k, wide.v), lengths, raw, None)
    return narrowed(found, heads)


def packed(
    function: str, heads: Heads, lengths: Sequence[Any], used: Sequence[Any], options: Options
) -> Pair:
    """out and softmax_lse of packed sequences.

    Args:
        lengths: cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k.
        used: seqused_q, seqused_k.
    """
    cu_q, cu_k, max_q, max_k = lengths
    q, k, v, rows = heads.q, heads.k, heads.v, None
    if used[0] is not None:
        q, cu_q, rows = _used_queries(q, cu_q, used[0])
    if used[1] is not None:
        keys = paged.read_keys(
            k, v, host_lengths("cu_seqlens_k", cu_k), paged.Placement(None, used[1])
        )
        lengths_q = host_lengths("cu_seqlens_q", cu_q)
        max_k = operators.number(max_k)
        spaced = paged.spaced(lengths_q, keys, max_k)
        if spaced is None:
            (k, v), cu_k = paged.gather(function, keys), keys.lengths.cumulative
        else:
            cu_q, cu_k = (lengths.cumulative for lengths in spaced)
    if looks_ahead(options):
        max_q = operators.number(max_q)
        max_k = max(max_q, operators.number(max_k))
    given = replaced(heads, q=q, k=k, v=v)
    out, lse = _attend(function, given, (cu_q, cu_k, max_q, max_k), options)
    if rows is None:
        return out, lse
    total = heads.q.shape[0]
    if lse is not None:
        lse = lse.new_full((lse.shape[0], total), float("inf")).index_copy(1, rows, lse)
    return out.new_zeros(total, *out.shape[1:]).index_copy(0, rows, out), lse


def combined(out_partial: Tensor, lse_partial: Tensor) -> tuple[Tensor, Tensor]:
    """Partial results over different keys as one: out in float32, and softmax_lse."""
    if (
        out_partial.dim() != 5
        or lse_partial.shape != out_partial.shape[:-1]
        or {out_partial.dtype, lse_partial.dtype} != {torch.float32}
    ):
        raise ArgumentError(
            "out_partial, lse_partial",
            f"{out_partial.dtype} {tuple(out_partial.shape)} and "
            f"{lse_partial.dtype} {tuple(lse_partial.shape)}",
            "float32 (num_splits, batch, seqlen, nheads, headdim_v) and the same without headdim_v",
            "stack the parts, with softmax_lse transposed to (batch, seqlen, nheads)",
        )
    seen = lse_partial.masked_fill(lse_partial == float("inf"), float("-inf"))
    lse = torch.logsumexp(seen, 0)
    none = lse == float("-inf")
    weights = torch.exp(seen - lse.masked_fill(none, 0.0)).unsqueeze(-1)
    # what a part holds for a query without keys may be anything
    out = out_partial.masked_fill(weights == 0, 0.0).mul_(weights).sum(0)
    return out, lse


def told(lse: Tensor) -> Tensor:
    """softmax_lse as FlashAttention 3 has it: -inf for a row without keys, where 2 says +inf."""
    return lse.masked_fill(lse == float("inf"), float("-inf"))


def looks_ahead(options: Options) -> bool:
    """Whether a window is open to the right, or bounds it.

    flash-attention 2 bounds such a window by the longest k, which hides keys from sequences with
    more queries than keys; FlashAttention 3 does not, and a larger bound takes it away.
    """
    try:
        return not options.causal and any(side >= 0 for side in options.window_size)
    except TypeError:
        # malformed; the checks will name it
        return False


def _dense_as_packed(function: str, heads: Heads, options: Options) -> Pair:
    (batch, seqlen_q, nheads), seqlen_k = heads.q.shape[:3], heads.k.shape[1]
    cu_q, cu_k = ([length * i for i in range(batch + 1)] for length in (seqlen_q, seqlen_k))
    flat = replaced(
        heads, q=heads.q.flatten(0, 1), k=heads.k.flatten(0, 1), v=heads.v.flatten(0, 1)
    )
    out, lse = packed(function, flat, (cu_q, cu_k, seqlen_q, seqlen_k), (None, None), options)
    if lse is not None:
        lse = lse.view(nheads, batch, seqlen_q).transpose(0, 1).contiguous()
    return out.view(batch, seqlen_q, *out.shape[1:]), lse


def _used_queries(q: Tensor, cu_q: Any, used: Any) -> tuple[Tensor, list[int], Tensor]:
    lengths = host_lengths("cu_seqlens_q", cu_q)
    counts = cache_lengths("seqused_q", used, len(lengths.seqlens), 0)
    if any(count > room for count, room in zip(counts, lengths.seqlens, strict=True)):
        raise ArgumentError(
            "seqused_q",
            str(counts),
            f"at most the lengths in cu_seqlens_q, {lengths.seqlens}",
            "let cu_seqlens_q leave room for every query that is used",
        )
    starts = lengths.cumulative
    pairs = zip(starts, counts, strict=False)
    rows = [row for start, count in pairs for row in range(start, start + count)]
    index = torch.tensor(rows, dtype=torch.int64, device="cpu").to(q.device)
    return q[index], [0, *accumulate(counts)], index


def _padded(x: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[-1]))


def narrowed(answer: Any, heads: Heads) -> Pair:
    out, lse = (answer, None) if isinstance(answer, Tensor) else answer[:2]
    if out.shape[-1] != heads.headdim_v:
        out = out[..., : heads.headdim_v].contiguous()
    return out, lse


def _told(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
