"""flash_attn.layers.patch_embed."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flash_attn_npu.errors import ArgumentError, ArgumentTypeError
from flash_attn_npu.layers.patch_embed import PatchEmbed
from flash_attn_npu.ops.fused_dense import FusedDense
from tests.helpers import dense_reference as reference

DTYPES = [torch.bfloat16, torch.float32, torch.float64]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SIZES = {
    "square": ((6, 6), (2, 2), {"img_size": 6, "patch_size": 2}),
    "pairs": ((4, 9), (2, 3), {"img_size": (4, 9), "patch_size": [2, 3]}),
    "one patch": ((4, 4), (4, 4), {"img_size": 4, "patch_size": 4}),
}


def patches(x: Tensor, height: int, width: int) -> Tensor:
    """(batch, rows, columns, channel * height * width), cut out one by one."""
    rows = []
    for top in range(0, x.shape[2], height):
        cut = [
            x[:, :, top : top + height, left : left + width].reshape(x.shape[0], -1)
            for left in range(0, x.shape[3], width)
        ]
        rows.append(torch.stack(cut, dim=1))
    return torch.stack(rows, dim=1)


@each_dtype
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("flatten", [True, False], ids=["sequence", "grid"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_values_and_gradients(
    device: torch.device, dtype: torch.dtype, name: str, flatten: bool, fused: bool
) -> None:
    (height, width), patch, options = SIZES[name]
    layer = PatchEmbed(in_chans=3, embed_dim=8, flatten=flatten, fused_bias_fc=fused, **options).to(
        device, dtype
    )

    def formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = reference.affine(patches(x, *patch), weight, bias)
        return out.reshape(x.shape[0], -1, 8) if flatten else out

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        held = {"proj.weight": weight, "proj.bias": bias}
        return torch.func.functional_call(layer, held, (x,))

    x = torch.randn(2, 3, height, width).to(device, dtype)
    reference.compare(call, formula, [x, layer.proj.weight.detach(), layer.proj.bias.detach()])


def test_a_convolution_with_the_same_weight() -> None:
    layer = PatchEmbed(img_size=(4, 9), patch_size=(2, 3), embed_dim=8)
    kernel = layer.proj.weight.unflatten(1, (3, 2, 3))
    x = torch.randn(2, 3, 4, 9)
    want = nn.functional.conv2d(x, kernel, layer.proj.bias, stride=(2, 3))
    torch.testing.assert_close(layer(x), want.flatten(2).transpose(1, 2))


def test_attributes_and_defaults() -> None:
    layer = PatchEmbed()
    assert list(layer.state_dict()) == ["proj.weight", "proj.bias"]
    assert (layer.img_size, layer.patch_size, layer.grid_size) == ((224, 224), (16, 16), (14, 14))
    assert (layer.num_patches, layer.flatten) == (196, True)
    assert layer.proj.weight.shape == (768, 768)
    assert type(layer.proj) is nn.Linear
    assert isinstance(layer.norm, nn.Identity)
    assert type(PatchEmbed(fused_bias_fc=True).proj) is FusedDense
    wide = PatchEmbed(img_size=(4, 9), patch_size=(2, 3))
    assert (wide.grid_size, wide.num_patches) == ((2, 3), 6)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_norm_and_no_bias(fused: bool) -> None:
    layer = PatchEmbed(
        img_size=4, patch_size=2, embed_dim=8, bias=False, fused_bias_fc=fused,
        norm_layer=partial(nn.LayerNorm, eps=1e-3),
    )  # fmt: skip
    assert list(layer.state_dict()) == ["proj.weight", "norm.weight", "norm.bias"]
    x = torch.randn(2, 3, 4, 4)
    rows = (patches(x, 2, 2) @ layer.proj.weight.t()).flatten(1, 2)
    centred = rows - rows.mean(-1, keepdim=True)
    want = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(layer(x), want)


def test_layouts_and_empty_batches(device: torch.device) -> None:
    layer = PatchEmbed(img_size=(4, 6), patch_size=2, embed_dim=8).to(device)
    x = torch.randn(2, 3, 4, 6, device=device)
    want = layer(x)
    for strided in (
        x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        x.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        out = layer(strided)
        assert out.is_contiguous()
        torch.testing.assert_close(out, want)
    assert layer(x[:0]).shape == (0, 6, 8)


def bad(argument: str, error: type[Exception], **options: Any) -> Any:
    return pytest.param(argument, error, options)


@pytest.mark.parametrize(
    ("argument", "error", "options"),
    [
        bad("img_size", ArgumentError, img_size=5, patch_size=2),
        bad("img_size", ArgumentError, img_size=(4, 5), patch_size=2),
        bad("img_size", ArgumentTypeError, img_size=2.0),
        bad("img_size", ArgumentTypeError, img_size=(1, 2, 3)),
        bad("patch_size", ArgumentTypeError, patch_size=0),
        bad("patch_size", ArgumentTypeError, patch_size=None),
        bad("x", ArgumentError, img_size=6, patch_size=2),
        bad("x", ArgumentError, img_size=4, patch_size=2, in_chans=1),
    ],
)
def test_bad_input_is_named(argument: str, error: type[Exception], options: dict[str, Any]) -> None:
    with pytest.raises(error, match=f"^{argument}: got .*; allowed: .*; to fix it: "):
        PatchEmbed(**options)(torch.zeros(1, 3, 4, 4))


def test_the_sizes_are_in_the_message() -> None:
    with pytest.raises(ArgumentError, match=r"\(1, 3, 4, 4\).*\(batch, 3, 6, 6\)"):
        PatchEmbed(img_size=6, patch_size=2)(torch.zeros(1, 3, 4, 4))
