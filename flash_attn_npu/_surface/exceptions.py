"""The names of flash-attention that we leave out, add or change, each with its reason.

Data only. A rule that no longer holds fails the tests, so the list says what is true today.
"""

from __future__ import annotations

from .rules import Absent, Added, Different, Rules

__all__ = ["RULES"]

_TRITON = "Triton kernels, with their launchers and tables"
_EXTENSION = "launchers of upstream's CUDA extension"
_UPSTREAM_FAILS = "cannot be imported on an ordinary installation of upstream either"
_NO_ORACLE = "a model that is remote code only, so that nothing is at hand to check a key map with"

_ABSENT = (
    Absent("flash_attn_triton*", _UPSTREAM_FAILS),
    Absent("flash_blocksparse_att*", _UPSTREAM_FAILS),
    Absent("ops.triton.linear", _TRITON),
    Absent("ops.triton.k_activations", _TRITON),
    Absent(
        "ops.triton.mlp", "built on ops.triton.linear; `FusedMLP` has the same activation, sqrelu"
    ),
    Absent("models.baichuan", _NO_ORACLE),
    Absent("models.btlm", _NO_ORACLE),
    Absent(
        "models.gpt",
        "built on ops.triton.linear; `FusedMLP` has the same parameters and activation, sqrelu",
        ("FusedDenseSqreluDense",),
    ),
    Absent(
        "models.gpt",
        "the names that Megatron-LM gave its weights depend on its version, and none is at hand "
        "to check a key map with",
        ("remap_state_dict_megatron",),
    ),
    Absent(
        "flash_attn_interface",
        "tells the block size of a CUDA kernel, by which nothing is laid out here",
        ("_get_block_size_n",),
    ),
    Absent("ops.triton.rotary", _TRITON, ("rotary_kernel",)),
    Absent(
        "ops.triton.cross_entropy",
        _TRITON,
        ("cross_entropy_fwd_kernel", "cross_entropy_bwd_kernel"),
    ),
    Absent(
        "ops.triton.layer_norm",
        _TRITON,
        (
            "_layer_norm_fwd",
            "_layer_norm_fwd_impl",
            "_layer_norm_fwd_1pass_kernel",
            "_layer_norm_bwd",
            "_layer_norm_bwd_impl",
            "_layer_norm_bwd_kernel",
            "triton_autotune_configs",
        ),
    ),
    Absent("ops.layer_norm", _EXTENSION, ("_dropout_add_layer_norm_*",)),
    Absent("ops.activations", "CUDA source text", ("swiglu_*_codestring",)),
)

_ADDED = (
    Added(
        "",
        "what flash-attention has no need of: being installed under its name, telling which "
        "kernels served, deciding about the others",
        (
            *("install", "installed", "uninstall", "register_torch"),
            *("fallback", "report", "reporting", "forget_lengths", "doctor"),
        ),
    ),
    Added("", "Huawei's function, with Huawei's contract", ("attention_forward_varlen",)),
    Added(
        "",
        "the errors that are raised, to catch them by",
        ("ActivationError", "ArgumentError", "ArgumentTypeError", "UnsupportedError"),
    ),
)

_DIFFERENT: tuple[Different, ...] = ()

RULES = Rules(_ABSENT, _ADDED, _DIFFERENT)
