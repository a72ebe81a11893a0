"""Mirror of `flash_attn.models.vit`: timm's vision transformer out of the blocks of this package.

It classifies by the class token, so `forward` computes no other token in the last layer, whose
mixer has Wq and Wkv for that. Checkpoints of timm load as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._core.ground.arguments import require_tensors
from ..errors import ArgumentError
from ..layers.patch_embed import PatchEmbed
from ..modules._residual import StochasticDepth, as_weight
from ..modules.block import Block
from ..modules.mha import MHA
from ..modules.mlp import FusedMLP, Mlp
from ..ops.triton.layer_norm import RMSNorm, layer_norm_fn
from ._vit_blocks import create_block, create_mixer_cls, create_mlp_cls

__all__ = [
    "MHA",
    "Block",
    "FusedMLP",
    "Mlp",
    "PatchEmbed",
    "VisionTransformer",
    "create_block",
    "create_mixer_cls",
    "create_mlp_cls",
    "init_weights_vit_timm",
    "layer_norm_fn",
    "vit_base_patch16_224",
]

_Make = Callable[..., nn.Module]

_TIMM = re.compile(r"(blocks\.\d+\.)attn\.(qkv|proj)(\..+)")
_OURS = {"qkv": "mixer.Wqkv", "proj": "mixer.out_proj"}


class VisionTransformer(nn.Module):
    """A vision transformer (arXiv:2010.11929) that classifies by its class token.

    Dropout, addition and norm stand in this order, so that they can be one: a layer's first half
    drops and adds what the layer before returned, and `norm` does so for the last.

    Args:
        img_size, patch_size, in_chans, embed_dim: as `PatchEmbed`.
        num_classes: 0 for no head.
        depth: layers.
        num_heads: divides embed_dim.
        mlp_ratio: hidden features of an MLP for each of embed_dim.
        qkv_bias: whether the first projection has one.
        no_embed_class: the class token has no position.
        drop_rate, attn_drop_rate: dropout of the residual branches and of what enters the first
            layer, and of attention weights.
        drop_path_rate: stochastic depth of the last layer; that of the others grows up to it.
        embed_layer: makes the patch embedding.
        norm_layer, act_layer: make a norm from embed_dim, and an activation; layer norm with an
            eps of 1e-6, and GELU, if None.
        use_flash_attn, fused_bias_fc: as `MHA`.
        fused_mlp: `FusedMLP`, whose GELU is approximated by tanh.
        fused_dropout_add_ln: as `Block`.
        global_pool, init_values, class_token, pre_norm, fc_norm, weight_init: of timm; they can
            only be what they are by default.

    Raises:
        ArgumentError, ArgumentTypeError: a value that there is not, or sizes that do not fit.

    Contract: flash-attention 2.8, `VisionTransformer`.
    """

    patch_embed: Any
    norm: Any
    head: nn.Module

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        init_values: float | None = None,
        class_token: bool = True,
        no_embed_class: bool = False,
        pre_norm: bool = False,
        fc_norm: bool | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: str = "",
        embed_layer: _Make = PatchEmbed,
        norm_layer: _Make | None = None,
        act_layer: _Make | None = None,
        use_flash_attn: bool = False,
        fused_bias_fc: bool = False,
        fused_mlp: bool = False,
        fused_dropout_add_ln: bool = False,
    ) -> None:
        super().__init__()
        _only("global_pool", global_pool, "token")
        _only("class_token", class_token, True)
        _only("init_values", init_values, None)
        _only("weight_init", weight_init, "")
        _only("fc_norm", fc_norm, None)
        _only("pre_norm", pre_norm, False)
        if depth < 1:
            raise ArgumentError("depth", depth, "1 or more", "pass the number of layers")
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.num_features = self.embed_dim = embed_dim
        self.num_prefix_tokens = 1
        self.no_embed_class = no_embed_class
        self.fused_dropout_add_ln = fused_dropout_add_ln
        make_norm = partial(nn.LayerNorm, eps=1e-6) if norm_layer is None else norm_layer
        options = {"fused_bias_fc": fused_bias_fc} if embed_layer is PatchEmbed else {}
        self.patch_embed = embed_layer(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            bias=not pre_norm,
            **options,
        )
        tokens = self.patch_embed.num_patches + (0 if no_embed_class else 1)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim))
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            [
                create_block(
                    embed_dim,
                    num_heads,
                    mlp_ratio,
                    qkv_bias,
                    drop_rate,
                    attn_drop_rate,
                    # what enters a layer is the mlp of the one before
                    drop_path1=rates[i - 1] if i else 0.0,
                    drop_path2=rates[i],
                    norm_layer=make_norm,
                    act_layer=act_layer,
                    use_flash_attn=use_flash_attn,
                    fused_bias_fc=fused_bias_fc,
                    fused_mlp=fused_mlp,
                    fused_dropout_add_ln=fused_dropout_add_ln,
                    layer_idx=i,
                    n_layer=depth,
                    last_layer_subset=True,
                )
                for i in range(depth)
            ]
        )
        self.dropout = nn.Dropout(drop_rate)
        self.drop_path = StochasticDepth(rates[-1])
        self.norm = make_norm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.init_weights(weight_init)

    def init_weights(self, mode: str = "") -> None:
        """Draw all weights anew, as timm does.

        Args:
            mode: "", the only one.

        Raises:
            ArgumentError: another mode.

        Contract: flash-attention 2.8, `VisionTransformer.init_weights`.
        """
        _only("mode", mode, "")
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        for name, module in self.named_modules():
            if module is not self:
                init_weights_vit_timm(module, name)

    def no_weight_decay(self) -> set[str]:
        """Parameters that an optimizer should not decay.

        Contract: flash-attention 2.8, `VisionTransformer.no_weight_decay`.
        """
        return {"pos_embed", "cls_token"}

    def forward_features(self, x: Tensor, all_tokens: bool = True) -> Tensor:
        """Everything below the head.

        Args:
            x: (batch, in_chans, *img_size).
            all_tokens: False computes only the class token in the last layer.

        Returns:
            (batch, 1 + num_patches, embed_dim), or (batch, 1, embed_dim) without all_tokens.

        Raises:
            ArgumentError: x has another shape.

        Contract: flash-attention 2.8, `VisionTransformer.forward_features`.
        """
        require_tensors(x=x)
        hidden, residual = self._with_positions(self.patch_embed(x)), None
        for block in self.blocks[:-1]:
            hidden, residual = block(hidden, residual)
        kept = None if all_tokens else slice(0, 1)
        hidden, residual = self.blocks[-1](hidden, residual, mixer_subset=kept)
        return self._final_norm(hidden, residual)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The logits (batch, num_classes) of the class token, or with pre_logits that token.

        Args:
            x: (batch, 1 or more, embed_dim), as `forward_features` returns it.

        Contract: flash-attention 2.8, `VisionTransformer.forward_head`.
        """
        token = x[:, 0]
        logits: Tensor = token if pre_logits else self.head(token)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """The logits (batch, num_classes) of x (batch, in_chans, *img_size).

        Raises:
            ArgumentError: x has another shape.

        Contract: flash-attention 2.8, `VisionTransformer.forward`.
        """
        return self.forward_head(self.forward_features(x, all_tokens=False))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any:  # type: ignore[override]
        """Load weights by our names or by those of timm.

        Args:
            state_dict: left as it is. The patch embedding may be a convolution's, (embed_dim,
                in_chans, height, width), and the last layer may have Wqkv.
            strict: as nn.Module has it.

        Returns:
            (missing_keys, unexpected_keys).

        Contract: flash-attention 2.8, `VisionTransformer.load_state_dict`.
        """
        return super().load_state_dict(self._by_our_names(state_dict), strict=strict)

    def _with_positions(self, patches: Tensor) -> Tensor:
        # the first block has the dropout
        token = self.cls_token.expand(patches.shape[0], -1, -1)
        if self.no_embed_class:
            return torch.cat((token, patches + self.pos_embed), dim=1)
        return torch.cat((token, patches), dim=1) + self.pos_embed

    def _final_norm(self, hidden: Tensor, residual: Tensor) -> Tensor:
        norm = self.norm
        if not self.fused_dropout_add_ln:
            total = self.drop_path(self.dropout(hidden)) + residual
            normed: Tensor = norm(as_weight(total, norm))
            return normed
        rows = None
        if self.training and self.drop_path.p > 0.0:
            rows = self.drop_path(hidden.new_ones(hidden.shape[:-1]))
        return layer_norm_fn(  # type: ignore[no-any-return]
            hidden,
            norm.weight,
            norm.bias,
            residual=residual,
            eps=norm.eps,
            dropout_p=self.dropout.p if self.training else 0.0,
            rowscale=rows,
            zero_centered_weight=getattr(norm, "zero_centered_weight", False),
            is_rms_norm=isinstance(norm, RMSNorm),
        )

    def _by_our_names(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        found = {_TIMM.sub(_renamed, name): tensor for name, tensor in state_dict.items()}
        embedding = "patch_embed.proj.weight"
        if embedding in found and isinstance(self.patch_embed, PatchEmbed):
            found[embedding] = found[embedding].flatten(1)
        last = f"blocks.{len(self.blocks) - 1}.mixer."
        for kind in ("weight", "bias"):
            joined = found.pop(f"{last}Wqkv.{kind}", None)
            if joined is not None:
                found[f"{last}Wq.{kind}"] = joined[: self.embed_dim]
                found[f"{last}Wkv.{kind}"] = joined[self.embed_dim :]
        return found


def init_weights_vit_timm(module: nn.Module, name: str = "") -> None:
    """Draw the weight of a linear layer, or call the init_weights that a module has.

    Args:
        name: of the module; of no effect.

    Contract: flash-attention 2.8, `init_weights_vit_timm`.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
        return
    own: Any = getattr(module, "init_weights", None)
    if own is not None:
        own()


def vit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT-B/16 for images of 224 pixels.

    Args:
        pretrained: False, as there are no weights to fetch.
        kwargs: further arguments of `VisionTransformer`.

    Raises:
        ArgumentError: pretrained.

    Contract: flash-attention 2.8, `vit_base_patch16_224`.
    """
    if pretrained:
        raise ArgumentError(
            "pretrained",
            pretrained,
            "False",
            "load a state_dict of timm's vit_base_patch16_224 with load_state_dict",
        )
    return VisionTransformer(patch_size=16, embed_dim=768, depth=12, num_heads=12, **kwargs)


def _renamed(found: re.Match[str]) -> str:
    return f"{found[1]}{_OURS[found[2]]}{found[3]}"


def _only(argument: str, came: Any, allowed: Any) -> None:
    if came != allowed:
        raise ArgumentError(
            argument, repr(came), repr(allowed), f"leave {argument} out, or take timm's"
        )
