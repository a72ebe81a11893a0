"""Mirror of `flash_attn.modules.mha`: multi-head attention with its projections, as modules.

`MHA` is defined here; what stands between its projections is in `_inner_attention`, what it shares
with `ParallelMHA` in `_cached_attention`. Clients replace names of this module (the attention
functions, the linear layers), and every use of them looks them up here, at call time.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._core.ground.arguments import require_tensors
from ..errors import ArgumentError
from ..flash_attn_interface import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from ..layers.rotary import RotaryEmbedding
from ..ops.fused_dense import ColumnParallelLinear, FusedDense, RowParallelLinear
from ..utils.distributed import get_dim_for_local_rank
from ._cached_attention import (
    CachedAttention,
    LinearResidual,
    _update_kv_cache,
    check_options,
)
from ._inner_attention import (
    CrossAttention,
    FlashCrossAttention,
    FlashSelfAttention,
    SelfAttention,
    get_alibi_slopes,
)
from ._parallel_mha import ParallelMHA

if TYPE_CHECKING:
    from ..utils.generation import InferenceParams

__all__ = [
    "MHA",
    "ColumnParallelLinear",
    "CrossAttention",
    "FlashCrossAttention",
    "FlashSelfAttention",
    "ParallelMHA",
    "RotaryEmbedding",
    "RowParallelLinear",
    "SelfAttention",
    "_update_kv_cache",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "get_alibi_slopes",
    "get_dim_for_local_rank",
]


class MHA(CachedAttention):
    """Multi-head self-attention or cross-attention, with grouped keys, rotary embedding and cache.

    Args:
        embed_dim: size of x's last dimension; head_dim is embed_dim / num_heads.
        num_heads, num_heads_kv: heads of q, and of k and v (num_heads if None), a divisor of it.
        cross_attn: q and kv come from projections of their own, Wq and Wkv, instead of Wqkv.
        qkv_proj_bias, out_proj_bias: whether the projections have biases.
        dropout: probability of dropping an attention weight, in training.
        softmax_scale: head_dim ** -0.5 if None.
        causal: aligned to the bottom right.
        layer_idx: the key of this layer's cache; needed with inference_params.
        dwconv: a depthwise causal convolution over three positions behind the first projection.
        rotary_emb_dim: how many dimensions of a head are rotated; 0 for none.
        rotary_emb_base, rotary_emb_scale_base, rotary_emb_interleaved: see `RotaryEmbedding`.
        use_alibi: ALiBi, with the slopes of `get_alibi_slopes`; needs use_flash_attn.
        window_size: (left, right), -1 for no limit; needs use_flash_attn.
        fused_bias_fc: `FusedDense` projections.
        use_flash_attn: the Flash kind of inner attention. The other kind takes key_padding_mask.
        return_residual: forward also returns x, so that its gradient can be added up early.
        checkpointing: compute the inner attention again in backward instead of saving its tensors.
        device, dtype: of the parameters.

    Raises:
        ArgumentError: arguments that exclude each other.

    Contract: flash-attention 2.8, `MHA`. Wider: dwconv with cross_attn, xPos with a cache.
    Stricter: what would be ignored (mixer_subset or x_kv without cross_attn) is refused.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        cross_attn: bool = False,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        dwconv: bool = False,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        fused_bias_fc: bool = False,
        use_flash_attn: bool = False,
        return_residual: bool = False,
        checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._size(embed_dim, num_heads, num_heads_kv)
        self.cross_attn = cross_attn
        self.causal = causal
        self.layer_idx = layer_idx
        self.dwconv = dwconv
        self.use_flash_attn = use_flash_attn
        self.return_residual = return_residual
        self.checkpointing = checkpointing
        check_options(use_flash_attn, use_alibi, window_size)
        if cross_attn and rotary_emb_dim > 0:
            raise ArgumentError(
                "rotary_emb_dim",
                f"{rotary_emb_dim} with cross_attn",
                "0 with cross_attn: its queries and keys share no positions",
                "pass rotary_emb_dim=0",
            )
        self._build(
            (rotary_emb_dim, rotary_emb_base, rotary_emb_scale_base, rotary_emb_interleaved),
            {"causal": causal, "softmax_scale": softmax_scale, "attention_dropout": dropout},
            get_alibi_slopes(num_heads) if use_alibi else None,
            window_size,
            device,
        )
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self._project_with(fused_bias_fc, qkv_proj_bias, out_proj_bias, place)

    @property
    def _heads(self) -> tuple[int, int]:
        return self.num_heads, self.num_heads_kv

    def _project_with(
        self, fused_bias_fc: bool, qkv_bias: bool, out_bias: bool, place: dict[str, Any]
    ) -> None:
        linear: Any = FusedDense if fused_bias_fc else nn.Linear
        first = linear
        if self.return_residual:
            first = partial(FusedDense, return_residual=True) if fused_bias_fc else LinearResidual
        size = self.embed_dim
        kv_size = 2 * self.num_heads_kv * self.head_dim
        if self.cross_attn:
            self.Wq = linear(size, size, bias=qkv_bias, **place)
            self.Wkv = first(size, kv_size, bias=qkv_bias, **place)
        else:
            self.Wqkv = first(size, size + kv_size, bias=qkv_bias, **place)
        if self.dwconv and not self.cross_attn and self.num_heads == self.num_heads_kv:
            self.dwconv_qkv = _depthwise(size + kv_size, place)
        elif self.dwconv:
            self.dwconv_q = _depthwise(size, place)
            self.dwconv_kv = _depthwise(kv_size, place)
        self.out_proj = linear(size, size, bias=out_bias, **place)

    def forward(
        self,
        x: Tensor,
        x_kv: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        mixer_subset: Any = None,
        inference_params: InferenceParams | None = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend.

        Args:
            x: (batch, seqlen, embed_dim), or (total, embed_dim) with cu_seqlens.
            x_kv: what k and v are made of, x if None; (batch, seqlen_k, embed_dim). With cu_seqlens
                it needs cu_seqlens_k and max_seqlen_k.
            key_padding_mask: (batch, seqlen_k) bool, True for keys to attend to; without
                use_flash_attn only.
            cu_seqlens: (batch + 1,) int32, where sequences start; needs max_seqlen and
                use_flash_attn, and excludes rotary embedding and dwconv.
            max_seqlen: the longest sequence; also how long rotary tables must be.
            mixer_subset: an index of the positions that queries are made of; needs cross_attn.
            inference_params: an `InferenceParams`: k and v are appended to the cache of this layer.
            kwargs: further arguments of the inner attention, as causal or cu_seqlens_k.

        Returns:
            x's shape (as many positions as mixer_subset keeps), or (that, x) with return_residual.

        Raises:
            ArgumentError: arguments that exclude each other.
            UnsupportedError: lengths_per_sample while decoding without use_flash_attn.

        Contract: flash-attention 2.8, `MHA.forward`.
        """
        packed = cu_seqlens is not None
        self._check_rows("x", x, packed)
        if x_kv is not None:
            self._check_rows("x_kv", x_kv, packed)
        self._check_call(x_kv, key_padding_mask, packed, max_seqlen, mixer_subset, inference_params)
        if self.use_flash_attn:
            options = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, **kwargs}
        else:
            options = {"key_padding_mask": key_padding_mask, **kwargs}
        if self.cross_attn:
            q, kv, x = self._pair(x, x_kv, mixer_subset)
            if packed and x_kv is None:
                options = {"cu_seqlens_k": cu_seqlens, "max_seqlen_k": max_seqlen, **options}
            context = self._attend_pair(q, kv, inference_params, options)
        else:
            qkv, x = self._first(self.Wqkv, x)
            context = self._attend_packed(
                self._convolved(qkv), max_seqlen, inference_params, options
            )
        out: Tensor = self.out_proj(context.flatten(-2))
        return (out, x) if self.return_residual else out

    def _check_rows(self, argument: str, x: Tensor, packed: bool) -> None:
        require_tensors(**{argument: x})
        if x.dim() == (2 if packed else 3) and x.shape[-1] == self.embed_dim:
            return
        padded, flat = f"(batch, seqlen, {self.embed_dim})", f"(total, {self.embed_dim})"
        raise ArgumentError(
            argument,
            f"shape {tuple(x.shape)} {'with' if packed else 'without'} cu_seqlens",
            f"{flat} with cu_seqlens, {padded} without",
            "pass cu_seqlens and max_seqlen for packed sequences, a padded batch otherwise",
        )

    def _check_call(
        self,
        x_kv: Tensor | None,
        key_padding_mask: Tensor | None,
        packed: bool,
        max_seqlen: int | None,
        mixer_subset: Any,
        inference_params: InferenceParams | None,
    ) -> None:
        """What excludes each other; a module that attends within x alone ignores no argument."""
        mask, generating = key_padding_mask is not None, inference_params is not None
        apart = self.dwconv or self.rotary_emb_dim > 0
        # fmt: off
        for argument, wrong, where, remedy in (
            ("x_kv", x_kv is not None and not self.cross_attn,
             "without cross_attn", "construct the module with cross_attn=True"),
            ("mixer_subset", mixer_subset is not None and not self.cross_attn,
             "without cross_attn", "construct the module with cross_attn=True"),
            ("mixer_subset", mixer_subset is not None and packed,
             "with cu_seqlens", "pack the rows to keep yourself, and pass all rows as x_kv"),
            ("key_padding_mask", mask and self.use_flash_attn,
             "with use_flash_attn", "pass packed sequences and cu_seqlens"),
            ("cu_seqlens", packed and not self.use_flash_attn,
             "without use_flash_attn", "construct the module with use_flash_attn=True"),
            ("cu_seqlens", packed and apart,
             "with dwconv or rotary embedding", "pass a padded batch"),
            ("inference_params", generating and (mask or packed or max_seqlen is not None),
             "beside key_padding_mask, cu_seqlens or max_seqlen", "pass a batch without padding"),
            ("inference_params", generating and self.dwconv,
             "with dwconv, whose past is not cached", "run the whole sequence at every step"),
        ):
            if wrong:
                raise ArgumentError(argument, "a value", f"None {where}", remedy)
        # fmt: on

    def _first(self, projection: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """The projection of x, and x."""
        answer: Any = projection(x)
        return answer if self.return_residual else (answer, x)

    def _pair(
        self, x: Tensor, x_kv: Tensor | None, mixer_subset: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q and kv by heads, and x."""
        kv, source = self._first(self.Wkv, x if x_kv is None else x_kv)
        if x_kv is None:
            x = source
        q = self.Wq(x if mixer_subset is None else x[:, mixer_subset])
        if self.dwconv:
            q, kv = _convolved(self.dwconv_q, q), _convolved(self.dwconv_kv, kv)
        kv = kv.unflatten(-1, (2, self.num_heads_kv, self.head_dim))
        return q.unflatten(-1, (self.num_heads, self.head_dim)), kv, x

    def _convolved(self, qkv: Tensor) -> Tensor:
        if not self.dwconv:
            return qkv
        if self.num_heads == self.num_heads_kv:
            return _convolved(self.dwconv_qkv, qkv)
        q, kv = qkv[..., : self.embed_dim], qkv[..., self.embed_dim :]
        parts = (_convolved(self.dwconv_q, q), _convolved(self.dwconv_kv, kv))
        return torch.cat(parts, dim=-1)


def _depthwise(channels: int, place: dict[str, Any]) -> nn.Conv1d:
    return nn.Conv1d(channels, channels, kernel_size=3, padding=2, groups=channels, **place)


def _convolved(convolution: nn.Module, x: Tensor) -> Tensor:
    """Each position of x (batch, seqlen, channels) from itself and the two before it."""
    out: Tensor = convolution(x.transpose(1, 2))
    return out[..., : x.shape[1]].transpose(1, 2).contiguous()
