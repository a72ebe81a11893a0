"""Mirror of `flash_attn.utils.testing`: plain attention to compare with, masks and inputs.

What is here serves tests, not models: every matrix is written out, on any device and under
autograd. It shares nothing with the kernels. Upstream states no contract for these functions;
where the mathematics left a choice, the docstring says which one was made.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from .._core.ground.arguments import require_tensors
from .._core.problems.results import accumulator
from ..bert_padding import pad_input, unpad_input
from ..errors import ArgumentError

__all__ = [
    "attention_ref",
    "construct_chunk_mask",
    "construct_local_mask",
    "generate_qkv",
    "generate_random_padding_mask",
    "pad_input",
    "unpad_input",
]

_Window = tuple[int | None, int | None]
_Device = torch.device | str | None
_Pad = Callable[[Tensor], Tensor]

_MODES = ("full", "random", "third")
_NARROW = 20
"""How far below the longest the lengths of mode "random" may lie."""


def generate_random_padding_mask(
    max_seqlen: int,
    batch_size: int,
    device: _Device,
    mode: str = "random",
    zero_lengths: bool = False,
) -> Tensor:
    """(batch_size, max_seqlen) bool, True for tokens, which lie at the front of each row.

    Args:
        mode: lengths are max_seqlen ("full"), or drawn evenly from at most 20 below it
            ("random") or from max_seqlen // 3 ("third") up to it.
        zero_lengths: lengths may be 0, and those of every fifth row and of the last row are;
            otherwise they are at least 1.

    Contract: flash-attention 2.8, `generate_random_padding_mask`.
    """
    if mode not in _MODES:
        raise ArgumentError("mode", repr(mode), ", ".join(_MODES), "pass one of these")
    least = {"full": max_seqlen, "random": max_seqlen - _NARROW, "third": max_seqlen // 3}[mode]
    least = max(least, 0 if zero_lengths else 1)
    lengths = torch.randint(least, max_seqlen + 1, (batch_size, 1), device=device)
    if zero_lengths:
        lengths[::5] = 0
        lengths[-1:] = 0
    return torch.arange(max_seqlen, device=device) < lengths


def generate_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    qv: Tensor | None = None,
    kvpacked: bool = False,
    qkvpacked: bool = False,
    query_unused_mask: Tensor | None = None,
    key_unused_mask: Tensor | None = None,
) -> tuple[Any, ...]:
    """Inputs of the dense and of the packed functions from one padded batch.

    Args:
        q: (batch, seqlen_q, nheads, headdim). k, v: (batch, seqlen_k, nheads_k, headdim).
        query_padding_mask, key_padding_mask: (batch, seqlen) bool, True for tokens; None for
            all.
        qv: (batch, seqlen_q, nheads, headdim_v), packed as q is.
        kvpacked, qkvpacked: stack k and v, or all three, which then share mask and shape.
        query_unused_mask, key_unused_mask: rows that are packed and hold no token.

    Returns:
        plain: (q_unpad, k_unpad, v_unpad, qv_unpad, cu_seqlens_q, cu_seqlens_k, seqused_q,
        seqused_k, max_seqlen_q, max_seqlen_k, q, k, v, qv, output_pad_fn, dq_pad_fn, dk_pad_fn);
        kvpacked: (q_unpad, kv_unpad, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q,
        kv, output_pad_fn, dq_pad_fn, dkv_pad_fn);
        qkvpacked: (qkv_unpad, cu_seqlens, max_seqlen, qkv, output_pad_fn, dqkv_pad_fn).
        Queries, keys and values are new leaves that require a gradient, qv is detached; seqused
        is None without a mask; the functions pad packed rows of any shape with zeros.

    Contract: flash-attention 2.8, `generate_qkv`.
    """
    _check_packing(q, k, v, query_padding_mask, key_padding_mask, kvpacked, qkvpacked)
    q_unpad, rows_q, cu_q, longest_q, used_q = _pack(q, query_padding_mask, query_unused_mask)
    k_unpad, rows_k, cu_k, longest_k, used_k = _pack(k, key_padding_mask, key_unused_mask)
    v_unpad = v.flatten(0, 1)[rows_k]
    pad_q: _Pad = partial(pad_input, indices=rows_q, batch=q.shape[0], seqlen=q.shape[1])
    pad_k: _Pad = partial(pad_input, indices=rows_k, batch=k.shape[0], seqlen=k.shape[1])
    if qkvpacked:
        qkv_unpad = _leaf(torch.stack((q_unpad, k_unpad, v_unpad), dim=1))
        return qkv_unpad, cu_q, longest_q, _leaf(torch.stack((q, k, v), dim=2)), pad_q, pad_q
    if kvpacked:
        kv_unpad = _leaf(torch.stack((k_unpad, v_unpad), dim=1))
        kv = _leaf(torch.stack((k, v), dim=2))
        lengths = (cu_q, cu_k, longest_q, longest_k)
        return _leaf(q_unpad), kv_unpad, *lengths, _leaf(q), kv, pad_q, pad_q, pad_k
    qv_unpad = None
    if qv is not None:
        qv = qv.detach()
        qv_unpad = qv.flatten(0, 1)[rows_q]
    return (
        *(_leaf(q_unpad), _leaf(k_unpad), _leaf(v_unpad), qv_unpad),
        *(cu_q, cu_k, used_q, used_k, longest_q, longest_k),
        *(_leaf(q), _leaf(k), _leaf(v), qv),
        *(pad_q, pad_q, pad_k),
    )


def construct_local_mask(
    seqlen_q: int,
    seqlen_k: int,
    window_size: _Window = (None, None),
    sink_token_length: int = 0,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    key_leftpad: Tensor | None = None,
    device: _Device = None,
) -> Tensor:
    """True where a query does NOT see a key: bool (seqlen_q, seqlen_k), or (batch, 1, ., .).

    Query i of a sequence sees key j if i + n_k - n_q - left <= j <= i + n_k - n_q + right. Tokens
    alone are counted, n_q and n_k are how many there are; what is no token is never seen.

    Args:
        window_size: (left, right), None or negative for no limit.
        sink_token_length: so many first keys are seen whatever the left side.
        query_padding_mask, key_padding_mask: (batch, seqlen) bool, True for tokens.
        key_leftpad: (batch,), so many keys in front of a sequence are no tokens.

    Contract: flash-attention 2.8, `construct_local_mask`.
    """
    diagonal, keys, hidden = _places(
        seqlen_q, seqlen_k, query_padding_mask, key_padding_mask, key_leftpad, device
    )
    left, right = (None if side is None or side < 0 else side for side in window_size)
    if left is not None:
        hidden = hidden | ((keys < diagonal - left) & (keys >= sink_token_length))
    if right is not None:
        hidden = hidden | (keys > diagonal + right)
    return hidden


def construct_chunk_mask(
    seqlen_q: int,
    seqlen_k: int,
    attention_chunk: int,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    key_leftpad: Tensor | None = None,
    device: _Device = None,
) -> Tensor:
    """True where a query does NOT see a key, because that lies in another chunk of keys.

    Keys form chunks of attention_chunk; query i of a sequence sees that of key i + n_k - n_q.
    Shapes and the other arguments are those of `construct_local_mask`.

    Contract: flash-attention 2.8, `construct_chunk_mask`.
    """
    if attention_chunk < 1:
        raise ArgumentError(
            "attention_chunk", attention_chunk, "at least 1", "pass the length of a chunk"
        )
    diagonal, keys, hidden = _places(
        seqlen_q, seqlen_k, query_padding_mask, key_padding_mask, key_leftpad, device
    )
    chunk = diagonal.div(attention_chunk, rounding_mode="floor")
    return hidden | (keys.div(attention_chunk, rounding_mode="floor") != chunk)


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    key_leftpad: Tensor | None = None,
    attn_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_mask: Tensor | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: _Window = (None, None),
    attention_chunk: int = 0,
    sink_token_length: int = 0,
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    upcast: bool = True,
    reorder_ops: bool = False,
    intermediate_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention by plain torch operations, every score written out.

    softmax(softcap(scale * (q k^T + qv v^T)) + attn_bias) v, scale = 1 / sqrt(headdim), where
    headdim counts that of qv too.

    Args:
        q: (batch, seqlen_q, nheads, headdim). k: (batch, seqlen_k, nheads_k, headdim).
        v: (batch, seqlen_k, nheads_k, headdim_v).
        query_padding_mask, key_padding_mask: (batch, seqlen) bool, True for tokens.
        key_leftpad: (batch,), so many keys in front of a sequence are no tokens.
        attn_bias: broadcasts to (batch, nheads, seqlen_q, seqlen_k), added behind softcap.
        dropout_p, dropout_mask: weights are divided by 1 - dropout_p, and those dropped where
            the mask (batch, nheads, seqlen_q, seqlen_k) is False; without a mask none is.
        causal: sets the right side of the window to 0.
        qv: (batch, seqlen_q, nheads, headdim_v), scored against v.
        q_descale, k_descale, v_descale: (batch, nheads_k), factors of q (and qv), k and v.
        window_size, sink_token_length, attention_chunk: see `construct_local_mask` and
            `construct_chunk_mask`; a chunk of 0 is none.
        learnable_sink: (nheads,), one more score of each row, which has no value.
        softcap: scores become softcap * tanh(score / softcap); 0.0 for none.
        upcast: compute in float32 (float64 in float64), otherwise in the dtype of q.
        reorder_ops: scale k instead of q; equal but for rounding.
        intermediate_dtype: the weights are rounded to it before they meet v.

    Returns:
        (output, attention) in the dtype of q: (batch, seqlen_q, nheads, headdim_v), and the
        weights before dropout (batch, nheads, seqlen_q, seqlen_k). Rows of padding, and rows
        that see no key, are zeros.

    Contract: flash-attention 2.8, `attention_ref`.
    """
    _check_attention(q, k, v)
    original, dtype = q.dtype, accumulator(q.dtype) if upcast else q.dtype
    group = q.shape[2] // k.shape[2]
    tokens = _key_tokens(k.shape[1], key_padding_mask, key_leftpad, k.device)
    q = _prepared(q, query_padding_mask, q_descale, dtype, group)
    k, v = (
        _prepared(x, tokens, descale, dtype, 1).repeat_interleave(group, dim=2)
        for x, descale in ((k, k_descale), (v, v_descale))
    )
    if qv is not None:
        qv = _prepared(qv, query_padding_mask, q_descale, dtype, group)
        q, k = torch.cat((q, qv), dim=-1), torch.cat((k, v), dim=-1)
    scale = q.shape[-1] ** -0.5
    q, k = (q, k * scale) if reorder_ops else (q * scale, k)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if attn_bias is not None:
        scores = scores + attn_bias
    places = (query_padding_mask, tokens, key_leftpad, q.device)
    window = (window_size[0], 0) if causal else window_size
    hidden = construct_local_mask(*(q.shape[1], k.shape[1], window, sink_token_length, *places))
    if attention_chunk:
        chunks = construct_chunk_mask(*(q.shape[1], k.shape[1], attention_chunk, *places))
        hidden = hidden | chunks
    attention = _weights(scores, hidden, learnable_sink)
    if query_padding_mask is not None:
        attention = attention.masked_fill(~query_padding_mask[:, None, :, None], 0.0)
    kept = attention if dropout_mask is None else attention.masked_fill(~dropout_mask, 0.0)
    if intermediate_dtype is not None:
        kept = kept.to(intermediate_dtype).to(kept.dtype)
    output = torch.einsum("bhqk,bkhd->bqhd", kept, v / (1.0 - dropout_p))
    return output.to(original), attention.to(original)


def _prepared(
    x: Tensor, mask: Tensor | None, descale: Tensor | None, dtype: torch.dtype, group: int
) -> Tensor:
    """x in the dtype of the computation, multiplied out, with zeros for padding."""
    x = x.to(dtype)
    if descale is not None:
        x = x * descale.to(dtype).repeat_interleave(group, dim=1)[:, None, :, None]
    return x if mask is None else x.masked_fill(~mask[:, :, None, None], 0.0)


def _weights(scores: Tensor, hidden: Tensor, learnable_sink: Tensor | None) -> Tensor:
    """The softmax of the scores that are not hidden; zeros for a row without any."""
    scores = scores.masked_fill(hidden, float("-inf"))
    if learnable_sink is not None:
        sink = learnable_sink.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        return torch.cat((scores, sink), dim=-1).softmax(dim=-1)[..., :-1]
    nothing = scores.isneginf().all(dim=-1, keepdim=True)
    return scores.masked_fill(nothing, 0.0).softmax(dim=-1).masked_fill(nothing, 0.0)


def _places(
    seqlen_q: int,
    seqlen_k: int,
    query_padding_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    key_leftpad: Tensor | None,
    device: _Device,
) -> tuple[Tensor, Tensor, Tensor]:
    """The key each query is aligned with, the number of each key, and where there is none."""
    queries, n_q, _ = _numbered(seqlen_q, query_padding_mask, device)
    tokens = _key_tokens(seqlen_k, key_padding_mask, key_leftpad, device)
    keys, n_k, hidden = _numbered(seqlen_k, tokens, device)
    diagonal = queries.transpose(-1, -2) + n_k - n_q
    return diagonal, keys, hidden.expand(torch.broadcast_shapes(diagonal.shape, hidden.shape))


def _numbered(seqlen: int, mask: Tensor | None, device: _Device) -> tuple[Tensor, Any, Tensor]:
    """The tokens' numbers, how many there are, and what is none, each (batch, 1, 1, seqlen)."""
    if mask is None:
        places = torch.arange(seqlen, device=device)[None]
        return places, seqlen, torch.zeros_like(places, dtype=torch.bool)
    mask = mask.to(device)[:, None, None, :]
    return mask.cumsum(dim=-1) - 1, mask.sum(dim=-1, keepdim=True), ~mask


def _key_tokens(
    seqlen: int, mask: Tensor | None, leftpad: Tensor | None, device: _Device
) -> Tensor | None:
    """Which keys are tokens, (batch, seqlen); None if all are."""
    if leftpad is None:
        return mask
    inside = torch.arange(seqlen, device=device) >= leftpad.to(device)[:, None]
    return inside if mask is None else inside & mask.to(device)


def _pack(
    x: Tensor, mask: Tensor | None, unused_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor | None]:
    """What `unpad_input` returns; without a mask every row is a token."""
    if mask is not None:
        return unpad_input(x, mask, unused_mask)
    batch, seqlen = x.shape[:2]
    rows = torch.arange(batch * seqlen, device=x.device)
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=x.device) * seqlen
    return x.flatten(0, 1), rows, cu_seqlens, seqlen, None


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def _check_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    require_tensors(q=q, k=k, v=v)
    for argument, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            _refuse(argument, x, "(batch, seqlen, nheads, headdim)", "pass a padded batch")
    if q.shape[2] % k.shape[2]:
        _refuse("k", k, f"nheads_k a divisor of nheads = {q.shape[2]}", "pass fewer heads")


def _refuse(argument: str, x: Tensor, allowed: str, remedy: str) -> NoReturn:
    raise ArgumentError(argument, f"shape {tuple(x.shape)}", allowed, remedy)


def _check_packing(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_padding_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    kvpacked: bool,
    qkvpacked: bool,
) -> None:
    _check_attention(q, k, v)
    if kvpacked and qkvpacked:
        raise ArgumentError(
            "kvpacked", "True, with qkvpacked=True", "one of them", "choose one layout"
        )
    stacked = {"k": k, "v": v} if kvpacked else {"q": q, "k": k, "v": v} if qkvpacked else {}
    for argument, x in stacked.items():
        if x.shape != k.shape:
            _refuse(argument, x, f"{tuple(k.shape)}, as k", "pass one shape, or do not pack")
    mine, other = query_padding_mask, key_padding_mask
    same = mine is other
    if not same and mine is not None and other is not None:
        same = torch.equal(mine, other)
    if qkvpacked and not same:
        raise ArgumentError(
            "key_padding_mask",
            "another mask than query_padding_mask",
            "the same, with qkvpacked=True",
            "pass one mask as both",
        )
