"""`ParallelMHA`: attention whose heads are dealt to the ranks of a process group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._core.ground.arguments import require_tensors
from ..errors import ArgumentError
from ._cached_attention import CachedAttention, check_options
from ._inner_attention import registry

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ..utils.generation import InferenceParams

__all__ = ["ParallelMHA"]


class ParallelMHA(CachedAttention):
    """Self-attention over the heads of this rank, between a column and a row parallel projection.

    The Wqkv of a rank holds the rows of its own heads: q of all of them, then k, then v.

    Args:
        embed_dim, num_heads, num_heads_kv: of the whole layer. Each rank gets whole groups of
            num_heads / num_heads_kv heads, the first ranks one more where some are left over.
        process_group: the ranks that share the layer; None for one process.
        sequence_parallel: x and the answer are this rank's part of the rows, in each rank another;
            otherwise they are whole and the same in every rank.

    The other arguments are those of `MHA`; use_alibi takes the slopes of this rank's heads.

    Raises:
        ArgumentError: arguments that exclude each other, or heads that cannot be dealt.

    Contract: flash-attention 2.8, `ParallelMHA`. Wider: uneven heads with ALiBi.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        process_group: ProcessGroup | None,
        num_heads_kv: int | None = None,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        use_flash_attn: bool = False,
        checkpointing: bool = False,
        sequence_parallel: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._size(embed_dim, num_heads, num_heads_kv)
        self.causal = causal
        self.layer_idx = layer_idx
        self.use_flash_attn = use_flash_attn
        self.checkpointing = checkpointing
        self.process_group = process_group
        check_options(use_flash_attn, use_alibi, window_size)
        first = self._deal()
        slopes = None
        if use_alibi:
            slopes = registry().get_alibi_slopes(num_heads)[first:][: self.num_heads_per_rank]
        self._build(
            (rotary_emb_dim, rotary_emb_base, rotary_emb_scale_base, rotary_emb_interleaved),
            {"causal": causal, "softmax_scale": softmax_scale, "attention_dropout": dropout},
            slopes,
            window_size,
            device,
        )
        shared: dict[str, Any] = {
            "process_group": process_group,
            "sequence_parallel": sequence_parallel,
            "device": device,
            "dtype": dtype,
        }
        group = num_heads // self.num_heads_kv + 2
        self.Wqkv = registry().ColumnParallelLinear(
            embed_dim,
            self.head_dim * group * self.num_heads_kv,
            bias=qkv_proj_bias,
            multiple_of=self.head_dim * group,
            **shared,
        )
        self.out_proj = registry().RowParallelLinear(
            embed_dim, embed_dim, bias=out_proj_bias, multiple_of=self.head_dim, **shared
        )

    @property
    def _heads(self) -> tuple[int, int]:
        return self.num_heads_per_rank, self.num_heads_kv_per_rank

    def _deal(self) -> int:
        """Set how many heads this rank has; returns how many the ranks before it have."""
        size, rank = 1, 0
        if self.process_group is not None:
            size, rank = dist.get_world_size(self.process_group), dist.get_rank(self.process_group)
        dealt = registry().get_dim_for_local_rank
        per_rank = [dealt(self.num_heads, size, other) for other in range(size)]
        per_rank_kv = [dealt(self.num_heads_kv, size, other) for other in range(size)]
        group = self.num_heads // self.num_heads_kv
        if 0 in per_rank_kv or per_rank != [group * heads for heads in per_rank_kv]:
            raise ArgumentError(
                "num_heads, num_heads_kv",
                f"{self.num_heads} and {self.num_heads_kv} over {size} ranks",
                "at least one head of k and v for each rank, with all the heads of q that use it",
                "choose a number of ranks that divides num_heads_kv",
            )
        self.num_heads_per_rank, self.num_heads_kv_per_rank = per_rank[rank], per_rank_kv[rank]
        return sum(per_rank[:rank])

    def forward(
        self,
        x: Tensor,
        seqlen: int | None = None,
        inference_params: InferenceParams | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend over the heads of this rank.

        Args:
            x: (batch, seqlen, embed_dim), or with seqlen the rows of all sequences one after the
                other, (batch * seqlen, embed_dim). With sequence_parallel, the part of the first
                dimension that is this rank's.
            seqlen: the length of each sequence, where x has no dimension for it.
            inference_params: an `InferenceParams`: k and v are appended to the cache of this layer.
            kwargs: further arguments of the inner attention, as causal or key_padding_mask.

        Returns:
            x's shape.

        Raises:
            ArgumentError: seqlen does not divide the rows of all ranks; kwargs with
                inference_params.
            UnsupportedError: lengths_per_sample while decoding without use_flash_attn.

        Contract: flash-attention 2.8, `ParallelMHA.forward`.
        """
        require_tensors(x=x)
        qkv: Tensor = self.Wqkv(x.flatten(0, -2))
        length = x.shape[1] if seqlen is None else seqlen
        dims = 3 if seqlen is None else 2
        if x.dim() != dims or length < 1 or qkv.shape[0] % length:
            raise ArgumentError(
                "seqlen",
                f"{seqlen} for x of shape {tuple(x.shape)}",
                f"None for x (batch, seqlen, embed_dim), or a divisor of {qkv.shape[0]}, all "
                "rows, for x (batch * seqlen, embed_dim)",
                "pass the length that x was flattened with",
            )
        qkv = qkv.unflatten(0, (-1, length))
        context = self._attend_packed(qkv, None, inference_params, kwargs).flatten(-2)
        out: Tensor = self.out_proj(context.flatten(0, 1))
        return out if seqlen is not None else out.unflatten(0, (-1, length))
