"""Attention over a cache as operators of torch's dispatcher, for graphs and tensors without values.

Lengths and block tables are tensors there, so one graph serves a growing cache. An operator that
appends writes its caches; one that reads leaves them alone, which a compiler has to know.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ground import arguments
from ..ground.records import named
from ..problems.attention import default_scale
from ..problems.results import accumulator
from .decode import CacheCall, with_kvcache
from .operators import number, register
from .records import NAMESPACE, CacheAppend, CacheRead

__all__ = ["attend"]

_compiling = torch.compiler.is_dynamo_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack

_NEW = ("k", "v", "rotary_cos", "rotary_sin")
_ON_HOST_TOO = ("cache_seqlens", "cache_batch_idx", "cache_leftpad", "block_table")


def attend(call: CacheCall) -> tuple[Tensor, Tensor | None]:
    """`with_kvcache`, through an operator where no value can be read."""
    q = call.q
    if not (_compiling() or _dispatch_modes() or (isinstance(q, Tensor) and q.is_meta)):
        return with_kvcache(call)
    scale = default_scale(q.shape[-1]) if call.softmax_scale is None else call.softmax_scale
    plain = {
        "cache_seqlens": _lengths(call.cache_seqlens, q),
        "cache_leftpad": _lengths(call.cache_leftpad, q),
        "softmax_scale": number(scale),
        "causal": number(call.causal),
        "window_size_left": number(call.window_size[0]),
        "window_size_right": number(call.window_size[1]),
        "softcap": number(call.softcap),
        "return_softmax_lse": number(call.return_softmax_lse),
    }
    reads = all(getattr(call, name) is None for name in _NEW)
    record: Any = CacheRead if reads else CacheAppend
    fields = {**named(call), **plain}
    given = [fields[name] for name in record._fields]
    ops = getattr(torch.ops, NAMESPACE)
    operator = ops._flash_attn_read_kvcache if reads else ops._flash_attn_append_kvcache
    with torch.no_grad():
        out, lse = operator(*given)
    return out, lse if call.return_softmax_lse else None


def _serve(call: CacheRead | CacheAppend) -> tuple[Tensor, Tensor]:
    fields = {name: x for name, x in call._asdict().items() if name in CacheCall._fields}
    window = (call.window_size_left, call.window_size_right)
    out, lse = with_kvcache(CacheCall(**fields, window_size=window))
    return out, _no_lse(call.q) if lse is None else lse


def _shapes(call: CacheRead | CacheAppend) -> tuple[Tensor, Tensor]:
    q = call.q
    tensors = {name: x for name, x in call._asdict().items() if isinstance(x, Tensor)}
    host = {name: tensors.pop(name) for name in _ON_HOST_TOO if name in tensors}
    arguments.together(tensors.pop("q"), tensors, host)
    batch, seqlen_q, nheads, _ = q.shape
    if not call.return_softmax_lse:
        return q.new_empty(q.shape), _no_lse(q)
    lse = q.new_empty((batch, nheads, seqlen_q), dtype=accumulator(q.dtype))
    return q.new_empty(q.shape), lse


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


register("_flash_attn_read_kvcache", CacheRead, _serve, _shapes, "(Tensor, Tensor)")
register(
    "_flash_attn_append_kvcache",
    CacheAppend,
    _serve,
    _shapes,
    "(Tensor, Tensor)",
    written=("k_cache", "v_cache"),
)
