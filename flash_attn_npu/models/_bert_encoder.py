"""The layers of BERT, and how they run packed or on a subset of the tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .._core.ground.arguments import require_tensors
from ..bert_padding import index_first_axis, index_first_axis_residual, pad_input, unpad_input
from ..errors import ArgumentError
from ..modules.block import Block
from ..modules.mha import MHA
from ..modules.mlp import FusedMLP, Mlp
from ._bert_checks import as_mask
from ._bert_config import gelu_kind, rotary_options
from ._config_values import mlp_checkpoint_level

__all__ = ["BertEncoder", "create_block", "create_mixer_cls", "create_mlp_cls"]

_Make = Callable[..., nn.Module]


def create_mixer_cls(config: Any, cross_attn: bool = False, return_residual: bool = False) -> _Make:
    """What makes the `MHA` of a layer from its size.

    Raises:
        ArgumentError: rotary positions without config.rotary_emb_dim.

    Contract: flash-attention 2.8, `create_mixer_cls` of models.bert.
    """
    return partial(
        MHA,
        num_heads=config.num_attention_heads,
        cross_attn=cross_attn,
        dropout=config.attention_probs_dropout_prob,
        causal=False,
        fused_bias_fc=getattr(config, "fused_bias_fc", False),
        use_flash_attn=getattr(config, "use_flash_attn", False),
        return_residual=return_residual,
        **rotary_options(config),
    )


def create_mlp_cls(
    config: Any, layer_idx: int | None = None, return_residual: bool = False
) -> _Make:
    """What makes the `Mlp`, or with config.fused_mlp the `FusedMLP`, of a layer from its size.

    Raises:
        ArgumentError: config.hidden_act is no GELU, or with fused_mlp the exact one, or
            config.mlp_checkpoint_lvl has no level for layer_idx.

    Contract: flash-attention 2.8, `create_mlp_cls` of models.bert.
    """
    options = {"hidden_features": config.intermediate_size, "return_residual": return_residual}
    fused = getattr(config, "fused_mlp", False)
    approximate = gelu_kind(config, fused)
    if fused:
        level = mlp_checkpoint_level(config, layer_idx)
        return partial(FusedMLP, checkpoint_lvl=level, **options)
    return partial(Mlp, activation=partial(F.gelu, approximate=approximate), **options)


def create_block(config: Any, layer_idx: int | None = None) -> Block:
    """A layer: a postnorm `Block`, which in the last layer may run on a subset of the tokens.

    Raises:
        ArgumentError: as `create_mixer_cls` and `create_mlp_cls`.

    Contract: flash-attention 2.8, `create_block` of models.bert.
    """
    last = layer_idx == config.num_hidden_layers - 1
    cross_attn = last and getattr(config, "last_layer_subset", False)
    # x goes on as the residual; what cross-attention would return is x_kv
    residual = not cross_attn
    return Block(
        config.hidden_size,
        create_mixer_cls(config, cross_attn, return_residual=residual),
        create_mlp_cls(config, layer_idx, return_residual=residual),
        norm_cls=partial(nn.LayerNorm, eps=config.layer_norm_eps),
        prenorm=False,
        resid_dropout1=config.hidden_dropout_prob,
        resid_dropout2=config.hidden_dropout_prob,
        fused_dropout_add_ln=getattr(config, "fused_dropout_add_ln", False),
        return_residual=residual,
    )


class BertEncoder(nn.Module):
    """The layers.

    Contract: flash-attention 2.8, `BertEncoder`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.use_flash_attn = getattr(config, "use_flash_attn", False)
        self._rotary = bool(rotary_options(config))
        self.layers = nn.ModuleList(
            [create_block(config, layer_idx=i) for i in range(config.num_hidden_layers)]
        )

    def forward(
        self,
        hidden_states: Tensor,
        key_padding_mask: Tensor | None = None,
        subset_mask: Tensor | None = None,
    ) -> Tensor:
        """Run the layers.

        Args:
            hidden_states: (batch, seqlen, hidden_size).
            key_padding_mask: (batch, seqlen), bool or integers, nonzero for a token.
            subset_mask: (batch, seqlen) bool, True for the tokens to return. With use_flash_attn,
                last_layer_subset and key_padding_mask the last layer runs on these alone.

        Returns:
            (batch, seqlen, hidden_size); with use_flash_attn padding is zeros. With subset_mask
            (total, hidden_size), the tokens of it row by row, without padding.

        Raises:
            ArgumentError: a mask has another shape or is floating, or key_padding_mask stands
                beside rotary positions with use_flash_attn.

        Contract: flash-attention 2.8, `BertEncoder.forward`. Wider: subset_mask without
        last_layer_subset, integers, and a subset_mask that holds padding.
        """
        require_tensors(hidden_states=hidden_states)
        mask = as_mask("key_padding_mask", key_padding_mask, hidden_states)
        subset = as_mask("subset_mask", subset_mask, hidden_states)
        if subset is not None and mask is not None:
            subset = subset & mask
        if mask is not None and self.use_flash_attn:
            self._check_packs()
            return self._packed(hidden_states, mask, subset)
        options = None if mask is None else {"key_padding_mask": mask}
        for layer in self.layers:
            hidden_states = layer(hidden_states, mixer_kwargs=options)
        return hidden_states if subset is None else hidden_states[subset]

    def _check_packs(self) -> None:
        if self._rotary:
            raise ArgumentError(
                "key_padding_mask",
                "a mask beside rotary positions, with use_flash_attn",
                "None, as packed sequences are not rotated",
                "set config.use_flash_attn=False",
            )

    def _packed(self, hidden: Tensor, mask: Tensor, subset: Tensor | None) -> Tensor:
        batch, seqlen = mask.shape
        hidden, indices, cu_seqlens, longest, _ = unpad_input(hidden, mask)
        packing: dict[str, Any] = {"cu_seqlens": cu_seqlens, "max_seqlen": longest}
        for layer in self.layers[:-1]:
            hidden = layer(hidden, mixer_kwargs=packing)
        last: Any = self.layers[-1]
        if subset is None:
            return pad_input(last(hidden, mixer_kwargs=packing), indices, batch, seqlen)
        # where each token lies among the packed ones
        places = (mask.flatten().cumsum(0) - 1).view(batch, seqlen)
        rows, _, cu_seqlens_q, longest_q, _ = unpad_input(places, subset)
        if not last.mixer.cross_attn:
            return index_first_axis(last(hidden, mixer_kwargs=packing), rows)
        chosen, hidden = index_first_axis_residual(hidden, rows)
        out: Tensor = last(
            chosen,
            mixer_kwargs={
                "x_kv": hidden,
                "cu_seqlens": cu_seqlens_q,
                "max_seqlen": longest_q,
                "cu_seqlens_k": cu_seqlens,
                "max_seqlen_k": longest,
            },
        )
        return out
