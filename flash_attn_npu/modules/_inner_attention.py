"""Attention between projections: the four modules that `modules.mha` re-exports, and ALiBi slopes.

The Flash ones call the public attention functions; the others are plain softmax attention, with
memory quadratic in sequence length and a mask for padded keys. `registry()` is `modules.mha`:
clients replace names there, so whatever calls one of its names looks it up there, at call time.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .._core.ground.arguments import at_least, require_tensors
from ..errors import ArgumentError

__all__ = [
    "CrossAttention",
    "FlashCrossAttention",
    "FlashSelfAttention",
    "SelfAttention",
    "get_alibi_slopes",
    "registry",
]

MASKED = -10000.0
"""What a masked score becomes, or gets added. It is finite: a row that is masked throughout still
has weights that sum up to one."""


def registry() -> ModuleType:
    """`modules.mha`, whose names clients replace; looked up late: it imports this file."""
    return sys.modules[f"{__package__}.mha"]


def get_alibi_slopes(nheads: int) -> list[float]:
    """The slopes of ALiBi (arXiv:2108.12409), one for each head.

    For a power of two they are 2 ** (-8 i / nheads), i from 1 on. For another number: those of the
    largest power of two below, then every other one of twice that power.

    Raises:
        ArgumentError: nheads is not positive.

    Contract: flash-attention 2.8, `get_alibi_slopes`.
    """
    at_least(1, nheads=nheads)
    power: int = 1 << (int(nheads).bit_length() - 1)
    slopes = _geometric(power)
    return slopes + _geometric(2 * power)[::2][: nheads - power]


def _geometric(count: int) -> list[float]:
    return [2.0 ** (-8 * i / count) for i in range(1, count + 1)]


class _WithSlopes(nn.Module):
    alibi_slopes: Tensor | None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _WithSlopes:
        """Go where fn moves a module, but keep the slopes' dtype: rounded, they are others."""
        slopes = self.alibi_slopes
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = self.alibi_slopes
        if slopes is not None and moved is not None and moved.dtype != slopes.dtype:
            self.alibi_slopes = slopes.to(moved.device)
        return self


class FlashSelfAttention(_WithSlopes):
    """`flash_attn_qkvpacked_func` or `flash_attn_varlen_qkvpacked_func` as a module.

    Args:
        causal: what holds where a call does not say.
        softmax_scale: headdim ** -0.5 if None.
        attention_dropout: probability of dropping a weight, in training only; `drop.p` afterwards.
        window_size: (left, right), -1 for no limit.
        alibi_slopes: (nheads,) or (batch, nheads); a buffer that is not saved.
        deterministic: the backward gives the same bits at every run.

    Contract: flash-attention 2.8, `FlashSelfAttention`. Wider: any device, and the dtypes of the
    functions.
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.window_size = window_size
        self.deterministic = deterministic

    def forward(
        self,
        qkv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """Attend within each sequence.

        Args:
            qkv: (batch, seqlen, 3, nheads, headdim), or (total, 3, nheads, headdim) with
                cu_seqlens.
            causal: the module's own if None.
            cu_seqlens: (batch + 1,) int32, where sequences start; needs max_seqlen.

        Returns:
            qkv's shape without its dimension of 3.

        Raises:
            ArgumentError: cu_seqlens without max_seqlen; otherwise as the functions.
        """
        options = _flash_options(self, causal)
        if cu_seqlens is None:
            out: Tensor = registry().flash_attn_qkvpacked_func(qkv, **options)
        else:
            _require_beside_cu_seqlens(max_seqlen=max_seqlen)
            out = registry().flash_attn_varlen_qkvpacked_func(
                qkv, cu_seqlens, max_seqlen, **options
            )
        return out


class FlashCrossAttention(_WithSlopes):
    """`flash_attn_kvpacked_func` or `flash_attn_varlen_kvpacked_func` as a module.

    Its arguments are those of `FlashSelfAttention`, in another order.

    Contract: flash-attention 2.8, `FlashCrossAttention`. Wider: any device, and the dtypes of the
    functions.
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        alibi_slopes: Tensor | None = None,
        window_size: tuple[int, int] = (-1, -1),
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.window_size = window_size
        self.deterministic = deterministic

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> Tensor:
        """Attend from q to kv.

        Args:
            q: (batch, seqlen_q, nheads, headdim), or (total_q, nheads, headdim) with cu_seqlens.
            kv: (batch, seqlen_k, 2, nheads_k, headdim), or (total_k, 2, nheads_k, headdim).
            causal: the module's own if None; aligned to the bottom right.
            cu_seqlens, cu_seqlens_k: (batch + 1,) int32, where sequences of q and of kv start;
                all four of these arguments or none.

        Returns:
            q's shape.

        Raises:
            ArgumentError: some of the four arguments but not all; otherwise as the functions.
        """
        options = _flash_options(self, causal)
        if cu_seqlens is None:
            out: Tensor = registry().flash_attn_kvpacked_func(q, kv, **options)
        else:
            _require_beside_cu_seqlens(
                max_seqlen=max_seqlen, cu_seqlens_k=cu_seqlens_k, max_seqlen_k=max_seqlen_k
            )
            out = registry().flash_attn_varlen_kvpacked_func(
                q, kv, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k, **options
            )
        return out


class SelfAttention(nn.Module):
    """softmax(scale * q k^T) v in plain operations.

    Args:
        causal: what holds where a call does not say.
        softmax_scale: headdim ** -0.5 if None.
        attention_dropout: probability of dropping a weight, in training only.

    Contract: flash-attention 2.8, `SelfAttention`.
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)

    def forward(
        self, qkv: Tensor, causal: bool | None = None, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """Attend within each row of the batch.

        Args:
            qkv: (batch, seqlen, 3, nheads, headdim).
            causal: the module's own if None.
            key_padding_mask: (batch, seqlen) bool, True for keys to attend to.

        A masked score has -10000 added, once for padding and once for causality, so that rows with
        nothing but masked keys attend to those all the same.

        Returns:
            (batch, seqlen, nheads, headdim).

        Raises:
            ArgumentError: qkv or key_padding_mask has another shape or dtype.

        Contract: flash-attention 2.8, `SelfAttention.forward`.
        """
        _check_packed("qkv", qkv, 3)
        q, k, v = qkv.unbind(2)
        scores = _scores(q, k, self.softmax_scale, key_padding_mask)
        if self.causal if causal is None else causal:
            shape = (qkv.shape[1], qkv.shape[1])
            scores = scores + scores.new_full(shape, MASKED).triu(1)
        return _weighted(self.drop, scores, v)


class CrossAttention(nn.Module):
    """softmax(scale * q k^T) v in plain operations, for kv of its own length and number of heads.

    Its arguments are those of `SelfAttention`.

    Contract: flash-attention 2.8, `CrossAttention`.
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from q to kv.

        Args:
            q: (batch, seqlen_q, nheads, headdim).
            kv: (batch, seqlen_k, 2, nheads_k, headdim), nheads_k a divisor of nheads.
            causal: the module's own if None. Query i sees key j if j <= i + sk - seqlen_q, where
                sk is seqlen_k, or with key_padding_mask each sequence's number of True entries.
            key_padding_mask: (batch, seqlen_k) bool, True for keys to attend to.

        A padded score has -10000 added, and becomes -10000 if causality masks it.

        Returns:
            (batch, seqlen_q, nheads, headdim).

        Raises:
            ArgumentError: kv or key_padding_mask has another shape or dtype.

        Contract: flash-attention 2.8, `CrossAttention.forward`.
        """
        require_tensors(q=q)
        _check_packed("kv", kv, 2)
        _check_matches(q, kv)
        if kv.shape[3] != q.shape[2]:
            kv = kv.repeat_interleave(q.shape[2] // kv.shape[3], dim=3)
        k, v = kv.unbind(2)
        scores = _scores(q, k, self.softmax_scale, key_padding_mask)
        if self.causal if causal is None else causal:
            scores = scores.masked_fill(_later(q, k, key_padding_mask), MASKED)
        return _weighted(self.drop, scores, v)


def _flash_options(module: FlashSelfAttention | FlashCrossAttention, causal: Any) -> dict[str, Any]:
    slopes = module.alibi_slopes
    return {
        "dropout_p": module.drop.p if module.training else 0.0,
        "softmax_scale": module.softmax_scale,
        "causal": module.causal if causal is None else causal,
        "window_size": module.window_size,
        "alibi_slopes": None if slopes is None else slopes.float(),
        "deterministic": module.deterministic,
    }


def _require_beside_cu_seqlens(**arguments: Any) -> None:
    for argument, value in arguments.items():
        if value is None:
            raise ArgumentError(argument, None, "a value beside cu_seqlens", f"pass {argument} too")


def _check_packed(argument: str, packed: Tensor, parts: int) -> None:
    require_tensors(**{argument: packed})
    if packed.dim() != 5 or packed.shape[2] != parts:
        raise ArgumentError(
            argument,
            f"shape {tuple(packed.shape)}",
            f"(batch, seqlen, {parts}, nheads, headdim)",
            f"stack the {parts} tensors along axis 2",
        )


def _check_matches(q: Tensor, kv: Tensor) -> None:
    if q.dim() == 4 and kv.shape[0] == q.shape[0] and kv.shape[4] == q.shape[3]:
        heads, heads_k = q.shape[2], kv.shape[3]
        if heads_k > 0 and heads % heads_k == 0:
            return
    raise ArgumentError(
        "kv",
        f"shape {tuple(kv.shape)} beside q of shape {tuple(q.shape)}",
        "(batch, seqlen_k, 2, nheads_k, headdim) beside (batch, seqlen_q, nheads, headdim), "
        "nheads_k a divisor of nheads",
        "give q and kv the same batch and headdim",
    )


def _scores(q: Tensor, k: Tensor, scale: float | None, key_padding_mask: Tensor | None) -> Tensor:
    """(batch, nheads, seqlen_q, seqlen_k), padded keys lowered."""
    scale = scale or 1.0 / math.sqrt(q.shape[-1])
    scores = torch.einsum("bthd,bshd->bhts", q, k * scale)
    if key_padding_mask is None:
        return scores
    require_tensors(key_padding_mask=key_padding_mask)
    batch, seqlen_k = k.shape[:2]
    if key_padding_mask.shape != (batch, seqlen_k) or key_padding_mask.dtype != torch.bool:
        raise ArgumentError(
            "key_padding_mask",
            f"a {key_padding_mask.dtype} tensor of shape {tuple(key_padding_mask.shape)}",
            f"a torch.bool tensor of shape ({batch}, {seqlen_k}), True for keys to keep",
            "pass key_padding_mask.bool(), with one entry for each key",
        )
    lowered = scores.new_full((batch, seqlen_k), MASKED).masked_fill(key_padding_mask, 0.0)
    return scores + lowered[:, None, None]


def _later(q: Tensor, k: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """Which keys lie behind each query, (seqlen_q, seqlen_k) or (batch, 1, seqlen_q, seqlen_k)."""
    rows = torch.arange(q.shape[1], device=q.device)[:, None]
    columns = torch.arange(k.shape[1], device=q.device)
    if key_padding_mask is None:
        return columns > rows + (k.shape[1] - q.shape[1])
    return columns > rows + key_padding_mask.sum(-1)[:, None, None, None] - q.shape[1]


def _weighted(drop: nn.Dropout, scores: Tensor, v: Tensor) -> Tensor:
    weights = drop(torch.softmax(scores, dim=-1, dtype=v.dtype))
    return torch.einsum("bhts,bshd->bthd", weights, v).contiguous()
