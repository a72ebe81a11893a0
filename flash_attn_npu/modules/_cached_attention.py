"""What `MHA` and `ParallelMHA` are made of: heads, rotary embedding, attention over a cache.

A cache is a tensor (max_batch_size, max_seqlen, 2, nheads_k, headdim) for each layer, in
`inference_params.key_value_memory_dict[layer_idx]`. The first call of a generation has
seqlen_offset 0 and writes the prompt; later ones append to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .._core.ground.arguments import require_tensors
from ..errors import ArgumentError, UnsupportedError
from ._inner_attention import registry

if TYPE_CHECKING:
    from ..utils.generation import InferenceParams

__all__ = ["CachedAttention", "LinearResidual", "_update_kv_cache", "check_options"]


class LinearResidual(nn.Linear):
    """A linear layer that also returns its input, as `FusedDense` with return_residual does."""

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(output, input)."""
        return super().forward(input), input


def _update_kv_cache(kv: Tensor, inference_params: InferenceParams, layer_idx: int) -> Tensor:
    """Write kv into the cache of a layer, and return the cache as far as it is filled.

    Args:
        kv: (batch, seqlen, 2, nheads_k, headdim), written from row batch_size_offset and position
            seqlen_offset on.
        inference_params: an `InferenceParams`. A layer without a cache gets one, in kv's dtype and
            on its device.
        layer_idx: the key of the cache in key_value_memory_dict.

    Returns:
        A view (batch, seqlen_offset + seqlen, 2, nheads_k, headdim) of the cache.

    Raises:
        ArgumentError: kv does not fit into the cache; nothing is written then.

    Contract: flash-attention 2.8, `_update_kv_cache`.
    """
    require_tensors(kv=kv)
    caches = inference_params.key_value_memory_dict
    cache = caches.get(layer_idx)
    room = (inference_params.max_batch_size, inference_params.max_seqlen)
    first, start = inference_params.batch_size_offset, inference_params.seqlen_offset
    last, end = first + kv.shape[0], start + kv.shape[1] if kv.dim() == 5 else 0
    expected = (*room, 2, *kv.shape[3:]) if cache is None else tuple(cache.shape)
    if kv.dim() != 5 or kv.shape[2:] != expected[2:]:
        raise ArgumentError(
            "kv",
            f"shape {tuple(kv.shape)}",
            "(batch, seqlen, 2, nheads_k, headdim), as the cache of this layer",
            "pass keys and values stacked along axis 2, and a cache of this layer's shape",
        )
    _check_room(layer_idx, last, end, expected)
    if cache is None:
        cache = caches[layer_idx] = kv.new_empty(expected)
    cache[first:last, start:end] = kv
    return cache[first:last, :end]


def _check_room(layer_idx: int, last: int, end: int, shape: tuple[int, ...]) -> None:
    if layer_idx is None:
        raise ArgumentError(
            "layer_idx", None, "a number for each layer", "construct it with layer_idx"
        )
    for argument, needed, held in (
        ("inference_params.batch_size_offset", last, shape[0]),
        ("inference_params.seqlen_offset", end, shape[1]),
    ):
        if needed > held:
            raise ArgumentError(
                argument,
                f"a call that ends at {needed}",
                f"at most {held}, which the cache of layer {layer_idx} holds",
                "make InferenceParams with a larger max_batch_size or max_seqlen",
            )


def _filled(inference_params: InferenceParams, batch: int) -> int | Tensor:
    """How many positions of the batch's caches are filled."""
    lengths = inference_params.lengths_per_sample
    if lengths is None:
        return inference_params.seqlen_offset
    first = inference_params.batch_size_offset
    return lengths[first : first + batch]


def _refuse_options(options: dict[str, Any]) -> None:
    for argument, value in options.items():
        if value is not None:
            raise ArgumentError(
                argument,
                "a value beside inference_params",
                "None: the module's own options hold over a cache",
                f"leave {argument} away, or inference_params",
            )


def _check_heads(embed_dim: int, num_heads: int, num_heads_kv: int) -> None:
    """Raise ArgumentError unless the heads divide embed_dim, and those of kv those of q."""
    for argument, value, whole, of in (
        ("num_heads", num_heads, embed_dim, "embed_dim"),
        ("num_heads_kv", num_heads_kv, num_heads, "num_heads"),
    ):
        if value < 1 or whole % value:
            raise ArgumentError(
                argument,
                value,
                f"a divisor of {whole}, which is {of}",
                f"choose {of} and {argument} so that one divides the other",
            )


def check_options(use_flash_attn: bool, use_alibi: bool, window_size: tuple[int, int]) -> None:
    """Raise ArgumentError for what plain attention does not do."""
    if use_flash_attn:
        return
    for argument, value, wrong in (
        ("use_alibi", use_alibi, use_alibi),
        ("window_size", window_size, tuple(window_size) != (-1, -1)),
    ):
        if wrong:
            raise ArgumentError(
                argument,
                value,
                "the default, without use_flash_attn",
                "construct the module with use_flash_attn=True",
            )


class CachedAttention(nn.Module):
    """The part of `MHA` and `ParallelMHA` behind their first projection.

    Subclasses define `_heads`, call `_size` and `_build` in their constructor, and set out_proj.
    """

    use_flash_attn: bool
    checkpointing: bool
    embed_dim: int
    num_heads: int
    num_heads_kv: int
    head_dim: int
    inner_attn: nn.Module
    inner_cross_attn: nn.Module
    out_proj: nn.Module
    rotary_emb: Any
    layer_idx: int | None

    @property
    def _heads(self) -> tuple[int, int]:
        """How many heads of q and of kv this process has."""
        raise NotImplementedError

    def _size(self, embed_dim: int, num_heads: int, num_heads_kv: int | None) -> None:
        """Set the sizes of the whole layer; num_heads_kv is num_heads if None."""
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        _check_heads(embed_dim, num_heads, self.num_heads_kv)
        self.head_dim = embed_dim // num_heads

    def _build(
        self,
        rotary: tuple[int, float, float | None, bool],
        inner: dict[str, Any],
        alibi_slopes: list[float] | None,
        window_size: tuple[int, int],
        device: torch.device | str | None,
    ) -> None:
        """Make what has no parameters.

        Args:
            rotary: rotary_emb_dim, base, scale_base and interleaved.
            inner: arguments of every inner attention.
            alibi_slopes, window_size: further ones of the Flash kind.
        """
        names = registry()
        if rotary[0] > self.head_dim:
            raise ArgumentError(
                "rotary_emb_dim",
                rotary[0],
                f"at most {self.head_dim}, the size of a head",
                "rotate fewer dimensions",
            )
        self.rotary_emb_dim = rotary[0]
        if self.rotary_emb_dim > 0:
            self.rotary_emb = names.RotaryEmbedding(
                rotary[0],
                base=rotary[1],
                scale_base=rotary[2],
                interleaved=rotary[3],
                device=device,
            )
        if self.use_flash_attn:
            inner = {**inner, "window_size": window_size}
            if alibi_slopes is not None:
                slopes = torch.tensor(alibi_slopes, dtype=torch.float32, device=device)
                inner["alibi_slopes"] = slopes
            self.inner_attn = names.FlashSelfAttention(**inner)
            self.inner_cross_attn = names.FlashCrossAttention(**inner)
        else:
            self.inner_attn = names.SelfAttention(**inner)
            self.inner_cross_attn = names.CrossAttention(**inner)

    def _attend_packed(
        self,
        qkv: Tensor,
        max_seqlen: int | None,
        inference_params: InferenceParams | None,
        options: dict[str, Any],
    ) -> Tensor:
        """(..., nheads, headdim) from qkv (..., (nheads + 2 * nheads_k) * headdim)."""
        heads, heads_kv = self._heads
        if heads == heads_kv:
            qkv = qkv.unflatten(-1, (3, heads, self.head_dim))
        else:
            qkv = qkv.unflatten(-1, (heads + 2 * heads_kv, self.head_dim))
        if self.rotary_emb_dim > 0 and not self._rotates_inside(inference_params):
            qkv = self._rotated(qkv, max_seqlen, inference_params)
        if heads == heads_kv and inference_params is None:
            return self._inner(self.inner_attn, qkv, **options)
        if heads == heads_kv:
            return self._attend_pair(qkv[:, :, 0], qkv[:, :, 1:], inference_params, options)
        q, kv = qkv[..., :heads, :], qkv[..., heads:, :].unflatten(-2, (2, heads_kv))
        if options.get("cu_seqlens") is not None:
            same = {"cu_seqlens_k": options["cu_seqlens"], "max_seqlen_k": options["max_seqlen"]}
            options = {**same, **options}
        return self._attend_pair(q, kv, inference_params, options)

    def _rotated(
        self, qkv: Tensor, max_seqlen: int | None, inference_params: InferenceParams | None
    ) -> Tensor:
        """q and k rotated at their positions, in place, as one tensor."""
        options: dict[str, Any] = {"max_seqlen": max_seqlen}
        if inference_params is not None:
            options["max_seqlen"] = inference_params.max_seqlen
            options["seqlen_offset"] = _filled(inference_params, qkv.shape[0])
        if qkv.dim() == 4:
            options["num_heads_q"] = self._heads[0]
        out: Tensor = self.rotary_emb(qkv, **options)
        return out

    def _attend_pair(
        self,
        q: Tensor,
        kv: Tensor,
        inference_params: InferenceParams | None,
        options: dict[str, Any],
    ) -> Tensor:
        """q's shape from q (..., nheads, headdim) and kv (..., 2, nheads_k, headdim)."""
        if inference_params is None:
            return self._inner(self.inner_cross_attn, q, kv, **options)
        _refuse_options(options)
        self._require_layer_idx()
        decoding = inference_params.seqlen_offset > 0
        if decoding and self.use_flash_attn:
            return self._decode(q, kv, inference_params)
        if decoding and inference_params.lengths_per_sample is not None:
            raise UnsupportedError(
                "inference_params.lengths_per_sample",
                "a tensor",
                "None without use_flash_attn: all sequences have length seqlen_offset",
                "construct the module with use_flash_attn=True",
            )
        if decoding:
            # one that was made now would hold nothing before kv
            self._cache(q.shape[0], inference_params)
        kv = self._update_kv_cache(kv, inference_params)
        return self.inner_cross_attn(q, kv)  # type: ignore[no-any-return]

    def _inner(self, attention: nn.Module, *tensors: Tensor, **options: Any) -> Tensor:
        if self.checkpointing:
            out: Tensor = checkpoint(attention, *tensors, use_reentrant=False, **options)
            return out
        return attention(*tensors, **options)  # type: ignore[no-any-return]

    def _require_layer_idx(self) -> None:
        if self.layer_idx is None:
            raise ArgumentError(
                "layer_idx",
                None,
                "a number of its own for each layer, where inference_params is passed",
                "construct the module with layer_idx",
            )

    def _update_kv_cache(self, kv: Tensor, inference_params: InferenceParams) -> Tensor:
        out: Tensor = registry()._update_kv_cache(kv, inference_params, self.layer_idx)
        return out

    def _rotates_inside(self, inference_params: InferenceParams | None) -> bool:
        """Whether `flash_attn_with_kvcache` rotates; it takes no tables for k alone."""
        if inference_params is None or inference_params.seqlen_offset == 0:
            return False
        plain = self.rotary_emb_dim % 16 == 0 and self.rotary_emb.scale is None
        return self.use_flash_attn and plain

    def _decode(self, q: Tensor, kv: Tensor, inference_params: InferenceParams) -> Tensor:
        """Rotate where that is still to be done, append kv, and attend from q to all of it."""
        cache = self._cache(q.shape[0], inference_params)
        inner: Any = self.inner_cross_attn
        slopes = getattr(inner, "alibi_slopes", None)
        rotary: dict[str, Any] = {}
        if self.rotary_emb_dim > 0 and self._rotates_inside(inference_params):
            tables = self.rotary_emb
            tables._update_cos_sin_cache(inference_params.max_seqlen, q.device, q.dtype)
            rotary["rotary_cos"], rotary["rotary_sin"] = tables._cos_cached, tables._sin_cached
            rotary["rotary_interleaved"] = tables.interleaved
        out: Tensor = registry().flash_attn_with_kvcache(
            q,
            cache[:, :, 0],
            cache[:, :, 1],
            kv[:, :, 0],
            kv[:, :, 1],
            cache_seqlens=_filled(inference_params, q.shape[0]),
            softmax_scale=inner.softmax_scale,
            causal=inner.causal,
            window_size=getattr(inner, "window_size", (-1, -1)),
            alibi_slopes=None if slopes is None else slopes.float(),
            **rotary,
        )
        return out

    def _cache(self, batch: int, inference_params: InferenceParams) -> Tensor:
        """The rows of this layer's cache that belong to the batch."""
        cache: Tensor | None = inference_params.key_value_memory_dict.get(self.layer_idx)
        first = inference_params.batch_size_offset
        if cache is None or first + batch > cache.shape[0]:
            held = "no cache" if cache is None else f"a cache of {cache.shape[0]} rows"
            raise ArgumentError(
                "inference_params.key_value_memory_dict",
                f"{held} for layer {self.layer_idx}",
                f"{first + batch} rows, filled by a call with seqlen_offset 0",
                "run the prompt first, with the same inference_params",
            )
        return cache[first : first + batch]

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        """An empty cache for this layer.

        Args:
            batch_size, max_seqlen: how many sequences of which length it must hold.
            dtype: that of out_proj's weight if None.

        Returns:
            Uninitialised (batch_size, max_seqlen, 2, nheads_k, headdim), on out_proj's device;
            nheads_k counts the heads of this process.

        Contract: flash-attention 2.8, `allocate_inference_cache`.
        """
        weight: Any = self.out_proj.weight
        shape = (batch_size, max_seqlen, 2, self._heads[1], self.head_dim)
        return torch.empty(
            shape, dtype=weight.dtype if dtype is None else dtype, device=weight.device
        )
