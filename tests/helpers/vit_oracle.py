"""A tiny ViT of transformers with random weights, and its weights by the names of timm."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

SIZES = {
    "img_size": 8,
    "patch_size": (4, 2),
    "in_chans": 3,
    "num_classes": 5,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 1.5,
}
_LAYER = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.o_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_ELSEWHERE = {
    "vit.embeddings.cls_token": "cls_token",
    "vit.embeddings.position_embeddings": "pos_embed",
    "vit.embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "vit.embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "vit.layernorm.weight": "norm.weight",
    "vit.layernorm.bias": "norm.bias",
    "classifier.weight": "head.weight",
    "classifier.bias": "head.bias",
}


def make_oracle(dtype=torch.float32, activation="gelu", qkv_bias=True):
    """A classifier, the same for every dtype but for rounding to float32."""
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=(4, 2),
        num_labels=5,
        layer_norm_eps=1e-6,
        hidden_act=activation,
        qkv_bias=qkv_bias,
    )
    model = transformers.ViTForImageClassification(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.4)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model.to(dtype)


def images(dtype=torch.float32):
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def by_timm_names(named):
    """Tensors by transformers' names, those of the model or their gradients, by timm's."""
    found = {timm: named[theirs] for theirs, timm in _ELSEWHERE.items()}
    for i in range(2):
        before = f"vit.layers.{i}."
        for kind in ("weight", "bias"):
            for theirs, timm in _LAYER.items():
                found[f"blocks.{i}.{timm}.{kind}"] = named[f"{before}{theirs}.{kind}"]
            if f"{before}attention.q_proj.{kind}" in named:
                found[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(
                    [named[f"{before}attention.{part}_proj.{kind}"] for part in "qkv"]
                )
    return found
