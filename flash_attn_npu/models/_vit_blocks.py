"""The layers of `models.vit`, and what makes their parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from ..errors import ArgumentError
from ..modules.block import Block
from ..modules.mha import MHA
from ..modules.mlp import FusedMLP, Mlp

__all__ = ["create_block", "create_mixer_cls", "create_mlp_cls"]

_Make = Callable[..., nn.Module]


def create_mixer_cls(
    num_heads: int,
    qkv_bias: bool,
    attn_drop: float,
    use_flash_attn: bool,
    fused_bias_fc: bool,
    cross_attn: bool = False,
) -> _Make:
    """What makes the `MHA` of a layer from its size.

    Contract: flash-attention 2.8, `create_mixer_cls` of models.vit.
    """
    return partial(
        MHA,
        num_heads=num_heads,
        cross_attn=cross_attn,
        qkv_proj_bias=qkv_bias,
        dropout=attn_drop,
        fused_bias_fc=fused_bias_fc,
        use_flash_attn=use_flash_attn,
    )


def create_mlp_cls(
    embed_dim: int, mlp_ratio: float, act_layer: _Make | None, fused_mlp: bool
) -> _Make:
    """What makes the `Mlp`, or with fused_mlp the `FusedMLP`, of a layer from its size.

    Args:
        mlp_ratio: hidden features for each of embed_dim.
        act_layer: makes the activation. `FusedMLP` has its own, GELU approximated by tanh.

    Raises:
        ArgumentError: an act_layer other than nn.GELU with fused_mlp.

    Contract: flash-attention 2.8, `create_mlp_cls` of models.vit. Stricter: an act_layer that
    fused_mlp would ignore is refused.
    """
    hidden = int(embed_dim * mlp_ratio)
    make = nn.GELU if act_layer is None else act_layer
    if not fused_mlp:
        return partial(Mlp, hidden_features=hidden, activation=make())
    if make is not nn.GELU:
        raise ArgumentError(
            "act_layer",
            f"{make} with fused_mlp",
            "None or nn.GELU, for which GELU approximated by tanh is taken",
            "pass fused_mlp=False",
        )
    return partial(FusedMLP, hidden_features=hidden)


def create_block(
    embed_dim: int,
    num_heads: int,
    mlp_ratio: float,
    qkv_bias: bool,
    drop_rate: float,
    attn_drop_rate: float,
    drop_path1: float,
    drop_path2: float,
    norm_layer: _Make,
    act_layer: _Make | None,
    use_flash_attn: bool,
    fused_bias_fc: bool,
    fused_mlp: bool,
    fused_dropout_add_ln: bool,
    layer_idx: int | None = None,
    n_layer: int | None = None,
    last_layer_subset: bool = False,
) -> Block:
    """A layer: a prenorm `Block` with a residual in float32.

    Args:
        drop_path1, drop_path2: for what enters the layer, and for what its mixer returns.
        layer_idx, n_layer, last_layer_subset: the last layer may run on a subset of the tokens.
        others: as `VisionTransformer`.

    Raises:
        ArgumentError, ArgumentTypeError: as `create_mlp_cls`, `MHA` and `Block`.

    Contract: flash-attention 2.8, `create_block` of models.vit.
    """
    last = layer_idx is not None and n_layer is not None and layer_idx == n_layer - 1
    return Block(
        embed_dim,
        create_mixer_cls(
            num_heads,
            qkv_bias,
            attn_drop_rate,
            use_flash_attn,
            fused_bias_fc,
            cross_attn=last_layer_subset and last,
        ),
        create_mlp_cls(embed_dim, mlp_ratio, act_layer, fused_mlp),
        norm_cls=norm_layer,
        prenorm=True,
        resid_dropout1=drop_rate,
        resid_dropout2=drop_rate,
        drop_path1=drop_path1,
        drop_path2=drop_path2,
        fused_dropout_add_ln=fused_dropout_add_ln,
        residual_in_fp32=True,
    )
