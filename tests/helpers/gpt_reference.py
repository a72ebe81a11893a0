"""A GPT of matrix products in the dtype of its weights, straight from the description of a config.

It shares no code with the package; weights are found by the names of a state_dict.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

VOCAB = 30
_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_positions": 16,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "n_inner": 40,
    "activation_function": "gelu",
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
}


def gpt_config(**more: Any) -> SimpleNamespace:
    """A small config without transformers."""
    return SimpleNamespace(**(_BASE | more))


def spread(model: Any, seed: int = 0) -> Any:
    """The model, with weights that let everything in it count."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        centre = parameter.detach().cpu() if parameter.dim() == 1 else 0.0
        parameter.data.copy_(centre + noise * 0.3)
    return model


def gpt_logits(config: Any, weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """(batch, seqlen, vocab_size) of ids (batch, seqlen)."""

    def get(name: str, default: Any = None) -> Any:
        return getattr(config, name, default)

    def linear(x: Tensor, name: str) -> Tensor:
        bias = weights.get(f"{name}.bias")
        return x @ weights[f"{name}.weight"].t() + (0.0 if bias is None else bias)

    def norm(x: Tensor, name: str) -> Tensor:
        if get("rms_norm"):
            mean = x.square().mean(-1, keepdim=True)
            return x / (mean + config.layer_norm_epsilon).sqrt() * weights[f"{name}.weight"]
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + config.layer_norm_epsilon).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def mixer(x: Tensor, index: int) -> Tensor:
        at = f"transformer.layers.{index}.mixer"
        heads, size = config.n_head, config.n_embd // config.n_head
        heads_kv = get("n_head_kv") or heads
        qkv = linear(x, f"{at}.Wqkv")
        if get("attn_dwconv"):
            qkv = _convolved(qkv, weights, at)
        qkv = qkv.unflatten(-1, (-1, size)).transpose(1, 2)
        q, k, v = qkv.split((heads, heads_kv, heads_kv), 1)
        q, k = _rotated(q, config), _rotated(k, config)
        k, v = (part.repeat_interleave(heads // heads_kv, 1) for part in (k, v))
        scores = q @ k.transpose(-1, -2) * _scale(config, index, size)
        distance = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
        if get("use_alibi"):
            slopes = torch.tensor(SLOPES[heads], dtype=x.dtype)
            scores = scores - slopes[:, None, None] * distance.abs()
        left = get("window_size", (-1, -1))[0]
        hidden = (distance < 0) | ((distance > left) if left >= 0 else False)
        context = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
        return linear(context.transpose(1, 2).flatten(2), f"{at}.out_proj")

    def mlp(x: Tensor, index: int) -> Tensor:
        at = f"transformer.layers.{index}.mlp"
        inner = linear(x, f"{at}.fc1")
        kind = config.activation_function
        if kind in GATES:
            up, gate = inner.chunk(2, -1)
            inner = up * GATES[kind](gate)
        else:
            inner = ACTIVATIONS[kind](inner)
        return linear(inner, f"{at}.fc2")

    at = "transformer.embeddings"
    x = weights[f"{at}.word_embeddings.weight"][ids]
    if get("word_embed_proj_dim"):
        x = linear(x, f"{at}.project_in")
    if config.n_positions > 0:
        x = x + weights[f"{at}.position_embeddings.weight"][: ids.shape[1]]
    x = x * get("mup_embeddings_multiplier", 1.0)
    for index in range(config.n_layer):
        norm1, norm2 = (f"transformer.layers.{index}.norm{half}" for half in (1, 2))
        if not get("prenorm", True):
            x = norm(x + mixer(x, index), norm1)
            x = norm(x + mlp(x, index), norm2)
        elif get("parallel_block"):
            both = norm1 if get("parallel_block_tied_norm") else norm2
            x = x + mixer(norm(x, norm1), index) + mlp(norm(x, both), index)
        else:
            x = x + mixer(norm(x, norm1), index)
            x = x + mlp(norm(x, norm2), index)
    if get("prenorm", True):
        x = norm(x, "transformer.ln_f")
    if get("word_embed_proj_dim"):
        x = linear(x, "project_out")
    head = weights[f"{at}.word_embeddings.weight"]
    if not get("tie_word_embeddings", True):
        head = weights["lm_head.weight"]
    if get("norm_head"):
        head = head / head.norm(dim=1, keepdim=True)
    x = x * get("mup_output_multiplier", 1.0) * get("mup_width_scale", 1.0)
    return x @ head.t() + weights.get("lm_head.bias", 0.0)


SLOPES = {3: [2**-4, 2**-8, 2**-2]}
"""Those of two heads, and of the first of four."""

GATES = {"glu": torch.sigmoid, "swiglu": lambda x: x * torch.sigmoid(x), "geglu": F.gelu}
ACTIVATIONS: dict[str, Any] = {
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "relu": lambda x: x.clamp(min=0),
    "sqrelu": lambda x: x.clamp(min=0) ** 2,
    **dict.fromkeys(
        ("gelu_new", "gelu_fast", "gelu_approx", "gelu_pytorch_tanh"),
        lambda x: x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
    ),
}


def _scale(config: Any, index: int, size: int) -> float:
    scale = size**-1.0 if getattr(config, "mup_scale_qk_dot_by_d", False) else size**-0.5
    if not getattr(config, "scale_attn_weights", True):
        scale = 1.0
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        scale /= index + 1
    return scale * getattr(config, "mup_attn_multiplier", 1.0)


def _rotated(x: Tensor, config: Any) -> Tensor:
    """x (batch, heads, seqlen, size), pairs turned by their positions."""
    dim = int(getattr(config, "rotary_emb_fraction", 0.0) * x.shape[-1])
    if dim == 0:
        return x
    base = getattr(config, "rotary_emb_base", 10000.0)
    angles = torch.outer(
        torch.arange(x.shape[2], dtype=torch.float64),
        base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim),
    )
    turns = torch.polar(torch.ones_like(angles), angles)
    pairs = x[..., :dim].unflatten(-1, (dim // 2, 2))
    if not getattr(config, "rotary_emb_interleaved", False):
        pairs = x[..., :dim].unflatten(-1, (2, dim // 2)).transpose(-1, -2)
    turned = torch.view_as_complex(pairs.double().contiguous()) * turns
    turned = torch.view_as_real(turned).to(x.dtype)
    if not getattr(config, "rotary_emb_interleaved", False):
        turned = turned.transpose(-1, -2)
    return torch.cat((turned.flatten(-2), x[..., dim:]), -1)


def _convolved(qkv: Tensor, weights: dict[str, Tensor], at: str) -> Tensor:
    """Each position from itself and the two before it, channel by channel."""
    taps, bias = weights[f"{at}.dwconv_qkv.weight"][:, 0], weights[f"{at}.dwconv_qkv.bias"]
    padded = F.pad(qkv, (0, 0, 2, 0))
    return sum(padded[:, i : i + qkv.shape[1]] * taps[:, i] for i in range(3)) + bias
