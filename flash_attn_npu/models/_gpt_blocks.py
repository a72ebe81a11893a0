"""What `models.gpt` is built of: mixers, MLPs and blocks from a config, and their first weights.

`models.gpt` re-exports it. Clients replace names there, so the modules that are built, and the
functions that build them, are looked up there when they are called.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ..errors import ArgumentError
from ._config_values import mlp_checkpoint_level
from ._gpt_config import GATED, gelu_kind, require, sizes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "CausalLMOutput",
    "_init_weights",
    "create_block",
    "create_mixer_cls",
    "create_mlp_cls",
    "first_weights",
    "make_norm",
    "mark_shared",
    "refuse_parts",
    "registry",
    "scattered",
    "share_tables",
]


class CausalLMOutput(NamedTuple):
    """What `GPTLMHeadModel` returns."""

    logits: Tensor


def registry() -> ModuleType:
    """`models.gpt`, whose names clients replace; looked up late: it imports this file."""
    return sys.modules[f"{__package__}.gpt"]


def create_mixer_cls(
    config: Any,
    layer_idx: int | None = None,
    process_group: ProcessGroup | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Callable[..., nn.Module]:
    """The causal attention of a layer, to be called with its embed_dim.

    Scores are scaled by head_dim ** -0.5, or by its square with mup_scale_qk_dot_by_d, by 1 if not
    scale_attn_weights; times mup_attn_multiplier; over layer_idx + 1 with
    scale_attn_by_inverse_layer_idx.

    Raises:
        ArgumentError: a scale that needs layer_idx, and none.
        ArgumentTypeError: no config.
        UnsupportedError: attn_dwconv with a process_group.

    Contract: flash-attention 2.8, `create_mixer_cls`.
    """
    hidden = sizes(config)
    scale = hidden.head_dim ** (-1.0 if getattr(config, "mup_scale_qk_dot_by_d", False) else -0.5)
    if not getattr(config, "scale_attn_weights", True):
        scale = 1.0
    scale *= getattr(config, "mup_attn_multiplier", 1.0)
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        if layer_idx is None:
            raise ArgumentError(
                "layer_idx",
                None,
                "a number, with config.scale_attn_by_inverse_layer_idx",
                "pass the number of the layer, from 0 on",
            )
        scale /= layer_idx + 1
    fraction = getattr(config, "rotary_emb_fraction", 0.0)
    dwconv = getattr(config, "attn_dwconv", getattr(config, "dwconv", False))
    require(
        not dwconv or process_group is None,
        "config.attn_dwconv",
        "True with process_group",
        "False with a process_group",
        "run the model on one process",
    )
    apart: dict[str, Any] = {
        "fused_bias_fc": getattr(config, "fused_bias_fc", False),
        "dwconv": dwconv,
    }
    if process_group is not None:
        apart = {"process_group": process_group, "sequence_parallel": scattered(config)}
    return partial(
        registry().MHA if process_group is None else registry().ParallelMHA,
        num_heads=hidden.heads,
        num_heads_kv=hidden.heads_kv,
        qkv_proj_bias=getattr(config, "qkv_proj_bias", True),
        out_proj_bias=getattr(config, "out_proj_bias", True),
        dropout=config.attn_pdrop,
        softmax_scale=scale,
        causal=True,
        layer_idx=layer_idx,
        rotary_emb_dim=int(fraction * hidden.head_dim),
        rotary_emb_base=getattr(config, "rotary_emb_base", 10000.0),
        rotary_emb_scale_base=getattr(config, "rotary_emb_scale_base", None),
        rotary_emb_interleaved=getattr(config, "rotary_emb_interleaved", False),
        use_alibi=getattr(config, "use_alibi", False),
        window_size=getattr(config, "window_size", (-1, -1)),
        use_flash_attn=getattr(config, "use_flash_attn", False),
        device=device,
        dtype=dtype,
        **apart,
    )


def create_mlp_cls(
    config: Any,
    layer_idx: int | None = None,
    process_group: ProcessGroup | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Callable[..., nn.Module]:
    """The MLP of a layer, to be called with its in_features.

    Raises:
        ArgumentError: config.mlp_checkpoint_lvl has no level for layer_idx.
        UnsupportedError: fused_mlp or fused_dense_sqrelu_dense with an activation that has no
            fused MLP.

    Contract: flash-attention 2.8, `create_mlp_cls`. Different: fused_dense_sqrelu_dense gives the
    `FusedMLP` of sqrelu, with the same parameters and numbers, and takes a process_group.
    """
    names, name = registry(), config.activation_function
    options: dict[str, Any] = {
        "hidden_features": config.n_inner,
        "bias1": getattr(config, "mlp_fc1_bias", True),
        "bias2": getattr(config, "mlp_fc2_bias", True),
        "device": device,
        "dtype": dtype,
    }
    if process_group is not None:
        options |= {"process_group": process_group, "sequence_parallel": scattered(config)}
    sqrelu = getattr(config, "fused_dense_sqrelu_dense", False)
    if sqrelu or getattr(config, "fused_mlp", False):
        fused = "gelu_approx" if gelu_kind(config) == "tanh" else name
        allowed = ("sqrelu",) if sqrelu else ("gelu_approx", "relu", "sqrelu")
        require(
            fused in allowed,
            "config.activation_function",
            f"{name!r} with {'fused_dense_sqrelu_dense' if sqrelu else 'fused_mlp'}",
            "'sqrelu'" if sqrelu else "'gelu_new' and other names of its kind, 'relu', 'sqrelu'",
            "leave the fused MLP out",
        )
        options["checkpoint_lvl"] = mlp_checkpoint_level(config, layer_idx)
        fused_cls = names.FusedMLP if process_group is None else names.ParallelFusedMLP
        return partial(fused_cls, activation=fused, **options)
    if name in GATED:
        options["multiple_of"] = getattr(config, "mlp_multiple_of", 128)
        mlp_cls = names.GatedMlp if process_group is None else names.ParallelGatedMlp
    else:
        mlp_cls = names.Mlp if process_group is None else names.ParallelMLP
    return partial(mlp_cls, activation=_activation(config), **options)


def create_block(
    config: Any,
    layer_idx: int | None = None,
    process_group: ProcessGroup | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """A layer: `Block`, or `ParallelBlock` if config.parallel_block. It has a layer_idx.

    Raises:
        As `create_mixer_cls` and `create_mlp_cls`.

    Contract: flash-attention 2.8, `create_block`.
    """
    names = registry()
    where = (config, layer_idx, process_group, device, dtype)
    parallel = process_group is not None
    options: dict[str, Any] = {
        "mixer_cls": names.create_mixer_cls(*where),
        "mlp_cls": names.create_mlp_cls(*where),
        "norm_cls": partial(make_norm, config, device=device, dtype=dtype),
        # what enters the first layer comes from the embeddings
        "resid_dropout1": config.resid_pdrop if layer_idx != 0 else config.embd_pdrop,
        "resid_dropout2": config.resid_pdrop,
        "fused_dropout_add_ln": getattr(config, "fused_dropout_add_ln", False),
        "residual_in_fp32": getattr(config, "residual_in_fp32", False),
        "sequence_parallel": parallel and scattered(config),
        "mark_shared_params": parallel,
    }
    hidden = sizes(config).hidden
    block: Any
    if getattr(config, "parallel_block", False):
        tied = getattr(config, "parallel_block_tied_norm", False)
        block = names.ParallelBlock(hidden, tied_norm=tied, **options)
    else:
        block = names.Block(hidden, prenorm=getattr(config, "prenorm", True), **options)
    block.layer_idx = layer_idx
    made: nn.Module = block
    return made


def _init_weights(
    module: nn.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    mup_width_scale: float = 1.0,
    rescale_prenorm_residual: bool = True,
) -> None:
    """Draw the first weights of one module; for `nn.Module.apply`.

    Linear weights are normal with standard deviation initializer_range * sqrt(mup_width_scale),
    those that end in the residual stream (out_proj, fc2) over sqrt(2 * n_layer) if
    rescale_prenorm_residual. Embeddings are normal with initializer_range, linear biases zero.
    Linear weights get an attribute `_optim`, with the "lr_multiplier" mup_width_scale.

    Contract: flash-attention 2.8, `_init_weights`.
    """
    std = initializer_range * math.sqrt(mup_width_scale)
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=std)
        weight: Any = module.weight
        weight._optim = {**getattr(weight, "_optim", {}), "lr_multiplier": mup_width_scale}
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    if rescale_prenorm_residual:
        for name, parameter in module.named_parameters():
            if name in ("out_proj.weight", "fc2.weight"):
                nn.init.normal_(parameter, std=std / math.sqrt(2 * n_layer))


def first_weights(config: Any, layers: int) -> Callable[[nn.Module], None]:
    """`_init_weights` as the config wants it."""
    return partial(
        _init_weights,
        n_layer=layers,
        initializer_range=config.initializer_range,
        mup_width_scale=getattr(config, "mup_width_scale", 1.0),
    )


def make_norm(
    config: Any,
    dim: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """`RMSNorm` if config.rms_norm, else nn.LayerNorm."""
    norm: Any = registry().RMSNorm if getattr(config, "rms_norm", False) else nn.LayerNorm
    made: nn.Module = norm(dim, eps=config.layer_norm_epsilon, device=device, dtype=dtype)
    return made


def mark_shared(norm: nn.Module, sequence_parallel: bool) -> None:
    """Mark parameters that all ranks hold, as `utils.distributed` looks for."""
    for parameter in norm.parameters():
        marked: Any = parameter
        marked._shared_params = True
        if sequence_parallel:
            marked._sequence_parallel = True


def share_tables(layers: nn.ModuleList) -> None:
    """Give the mixers of all layers the rotary embedding of the first one, and so its tables."""
    mixers: list[Any] = [layer.mixer for layer in layers]
    for mixer in mixers[1:]:
        if hasattr(mixers[0], "rotary_emb"):
            mixer.rotary_emb = mixers[0].rotary_emb


def scattered(config: Any) -> bool:
    """Whether, over a process group, each rank has its own part of the rows."""
    return bool(getattr(config, "sequence_parallel", True))


def refuse_parts(wrong: bool, argument: str) -> None:
    """Raise ArgumentError if wrong: an argument that needs whole sequences in every rank."""
    if wrong:
        raise ArgumentError(
            argument,
            "a value, with sequence_parallel",
            "the default, where each rank has its own part of the rows",
            "set config.sequence_parallel to False",
        )


def _activation(config: Any) -> Callable[[Tensor], Tensor]:
    kind = gelu_kind(config)
    if kind is not None:
        return partial(F.gelu, approximate=kind)
    found: Any = {
        "relu": F.relu,
        "sqrelu": registry().sqrelu_fwd,
        "glu": F.sigmoid,
        "swiglu": F.silu,
        "geglu": F.gelu,
    }[config.activation_function]
    return found  # type: ignore[no-any-return]
