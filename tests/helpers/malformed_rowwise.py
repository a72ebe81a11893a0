"""Functions with arguments that fit, and values that fit nowhere or in some places only."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flash_attn_npu import bert_padding
from flash_attn_npu.layers import rotary
from flash_attn_npu.losses.cross_entropy import CrossEntropyLoss
from flash_attn_npu.ops import activations, fused_dense, layer_norm, rms_norm
from flash_attn_npu.ops.triton import layer_norm as of_triton
from flash_attn_npu.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn_npu.ops.triton.rotary import apply_rotary

Arguments = dict[str, Any]


def _norm(**more: Any) -> Arguments:
    return {"weight": torch.ones(8), "bias": torch.zeros(8), **more}


def _rotary(x: str, shape: tuple[int, ...], **more: Any) -> Arguments:
    return {x: torch.randn(shape), "cos": torch.randn(6, 2), "sin": torch.randn(6, 2), **more}


def _add(**more: Any) -> Arguments:
    return {
        **_norm(x0=torch.randn(2, 3, 8), residual=torch.randn(2, 3, 8)),
        "dropout_p": 0.1,
        "epsilon": 1e-5,
        **more,
    }


def _parallel() -> Arguments:
    names = ("x0", "x1", "residual")
    weights = {f"{kind}{i}": torch.ones(8) for i in (0, 1) for kind in ("weight", "bias")}
    return {**{n: torch.randn(2, 8) for n in names}, **weights, "dropout_p": 0.0, "epsilon": 1e-5}


def _padding() -> Arguments:
    return {"hidden_states": torch.randn(2, 3, 4), "attention_mask": torch.tensor([[1, 1, 0]] * 2)}


def _triton() -> Arguments:
    shape = (2, 3, 8)
    return _norm(
        x=torch.randn(shape), residual=torch.randn(shape), weight1=torch.ones(8),
        bias1=torch.ones(8), rowscale=torch.ones(2, 3), eps=1e-6, dropout_p=0.0,
        out=torch.empty(shape), residual_out=torch.empty(shape), out_dtype=torch.float32,
    )  # fmt: skip


def _subset() -> Arguments:
    return _add(
        x0=torch.randn(2, 8), residual=torch.randn(3, 8), layerscale=torch.ones(8),
        x0_subset=torch.tensor([1, 0, 2]), out_subset=torch.tensor([0, 1, 2]),
        rowscale_const=1.0, out_numrows=2,
    )  # fmt: skip


def _loss() -> Arguments:
    return {
        "logits": torch.randn(3, 5),
        "labels": torch.tensor([0, 4, -100]),
        "precomputed_lse": torch.ones(3),
        "label_smoothing": 0.1,
        "logit_scale": 1.0,
        "lse_square_scale": 0.0,
        "ignore_index": -100,
        "process_group": None,
    }


def _indices(**more: Any) -> Arguments:
    return {"indices": torch.tensor([0, 2, 3]), **more}


def _mlp() -> Arguments:
    return {
        "x": torch.randn(2, 4), "weight1": torch.randn(6, 4), "bias1": torch.randn(6),
        "weight2": torch.randn(3, 6), "bias2": torch.randn(3), "activation": "relu",
        "checkpoint_lvl": 0, "process_group": None,
    }  # fmt: skip


CU_SEQLENS = torch.tensor([0, 2, 5], dtype=torch.int32)
FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[[], Arguments]]] = {
    "apply_rotary": (
        apply_rotary,
        lambda: _rotary("x", (2, 3, 1, 4), seqlen_offsets=1, inplace=True),
    ),
    "apply_rotary_emb": (
        rotary.apply_rotary_emb,
        lambda: _rotary("x", (5, 1, 4), cu_seqlens=CU_SEQLENS, max_seqlen=3),
    ),
    "apply_rotary_emb_qkv_": (
        rotary.apply_rotary_emb_qkv_,
        lambda: _rotary(
            "qkv", (2, 3, 4, 4), num_heads_q=2, cos_k=torch.randn(6, 2), sin_k=torch.randn(6, 2),
            seqlen_offsets=torch.tensor([0, 1]),
        ),
    ),
    "apply_rotary_emb_kv_": (
        rotary.apply_rotary_emb_kv_,
        lambda: _rotary("kv", (2, 3, 2, 1, 4), seqlen_offsets=0),
    ),
    "apply_rotary_emb_torch": (
        rotary.apply_rotary_emb_torch,
        lambda: {
            "x": torch.randn(2, 6, 1, 4), "cos": torch.randn(6, 2), "sin": torch.randn(6, 2)
        },
    ),
    "layer_norm": (layer_norm.layer_norm, lambda: _norm(x=torch.randn(2, 8), epsilon=1e-5)),
    "rms_norm": (
        rms_norm.rms_norm,
        lambda: {"x": torch.randn(2, 8), "weight": torch.ones(8), "epsilon": 1e-5},
    ),
    "dropout_add_layer_norm": (
        layer_norm.dropout_add_layer_norm,
        lambda: _add(rowscale=torch.ones(2, 3), layerscale=torch.ones(8)),
    ),
    "dropout_add_rms_norm": (rms_norm.dropout_add_rms_norm, _add),
    "dropout_add_layer_norm_subset": (layer_norm.dropout_add_layer_norm_subset, _subset),
    "dropout_add_rms_norm_subset": (rms_norm.dropout_add_rms_norm_subset, _subset),
    "dropout_add_layer_norm_parallel_residual": (
        layer_norm.dropout_add_layer_norm_parallel_residual,
        _parallel,
    ),
    "layer_norm_fn": (of_triton.layer_norm_fn, lambda: {**_triton(), "rowscale": None}),
    "rms_norm_fn": (of_triton.rms_norm_fn, _triton),
    "layer_norm_linear_fn": (
        of_triton.layer_norm_linear_fn,
        lambda: {
            "x": torch.randn(2, 8), "norm_weight": torch.ones(8), "norm_bias": torch.ones(8),
            "linear_weight": torch.randn(4, 8), "linear_bias": torch.ones(4),
            "residual": torch.randn(2, 8), "eps": 1e-5,
        },
    ),
    "cross_entropy_loss": (cross_entropy_loss, _loss),
    "CrossEntropyLoss": (
        CrossEntropyLoss().forward,
        lambda: {"input": torch.randn(3, 5), "target": torch.tensor([0, 4, 1])},
    ),
    "unpad_input": (bert_padding.unpad_input, _padding),
    "unpad_input_for_concatenated_sequences": (
        bert_padding.unpad_input_for_concatenated_sequences,
        lambda: {
            "hidden_states": torch.randn(2, 3, 4),
            "attention_mask_in_length": torch.tensor([[1, 2, 0], [2, 0, 0]]),
        },
    ),
    "pad_input": (
        bert_padding.pad_input,
        lambda: _indices(hidden_states=torch.randn(3, 4), batch=2, seqlen=3),
    ),
    "index_first_axis": (
        bert_padding.index_first_axis,
        lambda: _indices(input=torch.randn(4, 2)),
    ),
    "index_first_axis_residual": (
        bert_padding.index_first_axis_residual,
        lambda: _indices(input=torch.randn(4, 2)),
    ),
    "index_put_first_axis": (
        bert_padding.index_put_first_axis,
        lambda: _indices(values=torch.randn(3, 2), first_axis_dim=4),
    ),
    "swiglu_fwd": (
        activations.swiglu_fwd,
        lambda: {"x": torch.randn(2, 4), "y": torch.randn(2, 4)},
    ),
    "swiglu_bwd": (
        activations.swiglu_bwd,
        lambda: {n: torch.randn(2, 4) for n in ("x", "y", "g")},
    ),
    "bias_gelu": (
        activations.bias_gelu,
        lambda: {"y": torch.randn(2, 4), "bias": torch.randn(4)},
    ),
    "fused_dense_func": (
        fused_dense.fused_dense_func,
        lambda: {
            "x": torch.randn(2, 4), "weight": torch.randn(3, 4), "bias": torch.randn(3),
            "process_group": None,
        },
    ),
    "fused_mlp_func": (fused_dense.fused_mlp_func, _mlp),
}  # fmt: skip


def wrong_values(value: Any) -> dict[str, Any]:
    """What may come in the place of an argument, by name; some of it is legal in some places."""
    like = value if isinstance(value, Tensor) else torch.ones(2, 3)
    wrong: dict[str, Any] = {
        "None": None, "int": 1, "negative": -1, "huge": 2**40, "beyond": 2**63, "fraction": 1.5,
        "nan": math.nan, "infinite": math.inf, "text": "x", "list": [1, 2], "object": object(),
        "scalar tensor": torch.tensor(1.0), "two": torch.tensor([1, 2]),
        "array": like.detach().numpy(), "dtype": torch.int32, "complex": like.to(torch.complex64),
        "integers": like.to(torch.int16), "bools": like.bool(), "doubles": like.double(),
        "meta": like.to("meta"), "nested": torch.nested.nested_tensor([torch.ones(2, 3)] * 2),
        "jagged": torch.nested.nested_tensor([torch.ones(2, 3)] * 2, layout=torch.jagged),
        "sparse": like.to_sparse(), "csr": torch.ones(2, 3).to_sparse_csr(),
        "longer": torch.cat((like, like)), "deeper": like[None], "empty": like[:0],
        "expanded": like[..., :1].expand(like.shape), "negated": -like.float(),
    }  # fmt: skip
    return wrong


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)
