"""Mirror of `flash_attn.layers.patch_embed`: an image as a sequence of embedded patches.

timm's layer of that name, with a linear layer where timm has a convolution: its weight is
(embed_dim, in_chans * patch height * patch width), timm's (embed_dim, in_chans, height, width)
flattened.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._core.ground.arguments import require_tensors
from ..errors import ArgumentError, ArgumentTypeError
from ..ops.fused_dense import FusedDense

__all__ = ["FusedDense", "PatchEmbed"]


class PatchEmbed(nn.Module):
    """Cut images into patches, embed each, and normalise.

    Args:
        img_size: height and width of the images in pixels, an int for both or a pair.
        patch_size: those of a patch, which divide img_size.
        in_chans: channels of the images.
        embed_dim: of a patch.
        norm_layer: a function that makes a module from embed_dim; none if None.
        flatten: a sequence of patches, row by row; else a grid.
        bias: whether `proj` has one.
        fused_bias_fc: `proj` is `FusedDense`; the numbers are those of nn.Linear.

    Attributes:
        img_size, patch_size: pairs.
        grid_size: patches along each of them; num_patches is their product.

    Raises:
        ArgumentError: patch_size does not divide img_size.
        ArgumentTypeError: one of them is no int and no pair.

    Contract: flash-attention 2.8, `PatchEmbed`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[[int], nn.Module] | None = None,
        flatten: bool = True,
        bias: bool = True,
        fused_bias_fc: bool = False,
    ) -> None:
        super().__init__()
        self.img_size = _pair("img_size", img_size)
        self.patch_size = _pair("patch_size", patch_size)
        (height, width), (patch_height, patch_width) = self.img_size, self.patch_size
        if height % patch_height or width % patch_width:
            raise ArgumentError(
                "img_size",
                self.img_size,
                f"multiples of patch_size = {self.patch_size}",
                "resize or pad the images",
            )
        self.grid_size = (height // patch_height, width // patch_width)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.flatten = flatten
        linear: type[nn.Linear] = FusedDense if fused_bias_fc else nn.Linear
        self.proj = linear(in_chans * patch_height * patch_width, embed_dim, bias=bias)
        self.norm = nn.Identity() if norm_layer is None else norm_layer(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Embed.

        Args:
            x: (batch, in_chans, *img_size).

        Returns:
            (batch, num_patches, embed_dim), or (batch, *grid_size, embed_dim) without flatten.

        Raises:
            ArgumentError: x has another shape.
        """
        require_tensors(x=x)
        (rows, columns), (height, width) = self.grid_size, self.patch_size
        channels = self.proj.in_features // (height * width)
        if x.dim() != 4 or x.shape[1:] != (channels, *self.img_size):
            raise ArgumentError(
                "x",
                f"shape {tuple(x.shape)}",
                f"(batch, {channels}, {self.img_size[0]}, {self.img_size[1]}), as img_size is",
                "resize the images, or make PatchEmbed with their img_size and in_chans",
            )
        patches = x.unflatten(3, (columns, width)).unflatten(2, (rows, height))
        # (batch, channel, row, y, column, x) to (batch, row, column, channel, y, x)
        embedded: Tensor = self.proj(patches.permute(0, 2, 4, 1, 3, 5).flatten(3))
        if self.flatten:
            embedded = embedded.flatten(1, 2)
        normed: Tensor = self.norm(embedded)
        return normed


def _pair(argument: str, size: Any) -> tuple[int, int]:
    both = (size, size) if isinstance(size, int) else size
    if (
        isinstance(both, (tuple, list, torch.Size))
        and len(both) == 2
        and all(isinstance(side, int) and side > 0 for side in both)
    ):
        return both[0], both[1]
    raise ArgumentTypeError(
        argument,
        repr(size),
        "a positive int, or a pair of them (height, width)",
        f"pass {argument} in pixels",
    )
