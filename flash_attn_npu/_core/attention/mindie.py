"""Huawei's `attention_forward_varlen`, to the letter of its contract.

Same parameters, defaults and refusals as the function of MindIE-SD 3.1, one call of
npu_fusion_attention in the TND layout with the same arguments, differentiable. Beyond it:
cumulative lengths may be tensors as well as lists, the mask is made once per device instead of
at every call, and tensors off an NPU are served exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ...errors import ArgumentError, UnsupportedError
from ..ground.arguments import require_plain, same
from ..ground.lengths import host_ends, host_lengths
from ..kernels.ascend.fusion_attention import UNLIMITED, causal_mask, fusion_attention
from ..problems.ask import Options
from . import call

__all__ = ["attention_forward_varlen"]


def attention_forward_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | Sequence[int],
    cu_seqlens_k: Tensor | Sequence[int],
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    deterministic: bool | None = None,
    return_attn_probs: bool | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    """Attention over packed sequences as MindIE-SD offers it.

    Args:
        q: (total_q, nheads, headdim), float16, bfloat16 or float32.
        k, v: (total_k, nheads_k, headdim).
        cu_seqlens_q, cu_seqlens_k: batch + 1 cumulative lengths, a list or an int32 tensor.
        dropout_p: within 1e-6 of 0.
        softmax_scale: headdim ** -0.5 if None.
        causal: aligned to the bottom right; the kernel refuses more queries than keys.

    max_seqlen_q, max_seqlen_k, window_size, softcap, alibi_slopes, deterministic,
    return_attn_probs and block_table must stay None. `flash_attn_varlen_func` honours them.

    Returns:
        (total_q, nheads, headdim).

    Raises:
        UnsupportedError: one of those arguments is not None.
        ArgumentError: dropout_p is not 0, or q, k or v is not three-dimensional.

    Contract: MindIE-SD 3.1.0, `mindiesd.attention_forward_varlen`.
    """
    # fmt: off
    if not (
        max_seqlen_q is None and max_seqlen_k is None and window_size is None and softcap is None
        and alibi_slopes is None and deterministic is None and return_attn_probs is None
        and block_table is None
    ):
        _refuse_reserved((
            max_seqlen_q, max_seqlen_k, window_size, softcap, alibi_slopes, deterministic,
            return_attn_probs, block_table,
        ))
    # fmt: on
    if dropout_p != 0.0 and not math.isclose(dropout_p, 0.0, abs_tol=1e-6):
        raise ArgumentError("dropout_p", dropout_p, "0.0 (evaluation)", "pass dropout_p=0.0")
    _check_rank(q, k, v)
    if not q.device == k.device == v.device:
        same("k", "device", k.device, q.device)
        same("v", "device", v.device, q.device)
    if q.device.type != "npu":
        return _off_device(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)
    # fmt: off
    out: Tensor = fusion_attention()(
        q, k, v, q.shape[1], "TND", None, None, causal_mask(q.device) if causal else None,
        q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale, 1 - dropout_p,
        UNLIMITED, UNLIMITED, 0, None, host_ends("cu_seqlens_q", cu_seqlens_q),
        host_ends("cu_seqlens_k", cu_seqlens_k), 3 if causal else 0,
    )[0]
    # fmt: on
    return out


RESERVED = (
    "max_seqlen_q",
    "max_seqlen_k",
    "window_size",
    "softcap",
    "alibi_slopes",
    "deterministic",
    "return_attn_probs",
    "block_table",
)


def _refuse_reserved(values: tuple[object, ...]) -> None:
    for argument, value in zip(RESERVED, values, strict=True):
        if value is not None:
            raise UnsupportedError(
                argument,
                value if isinstance(value, (int, float, tuple)) else type(value).__name__,
                "None in attention_forward_varlen",
                "leave it out, or call flash_attn_npu.flash_attn_varlen_func",
            )


def _check_rank(q: Tensor, k: Tensor, v: Tensor) -> None:
    require_plain(q=q, k=k, v=v)
    for argument, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 3:
            raise ArgumentError(
                argument,
                f"{tensor.dim()} dimensions",
                "3, (total, nheads, headdim)",
                f"pack the sequences of {argument} into one dimension",
            )


def _off_device(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | Sequence[int],
    cu_seqlens_k: Tensor | Sequence[int],
    softmax_scale: float | None,
    causal: bool,
) -> Tensor:
    longest_q = host_lengths("cu_seqlens_q", cu_seqlens_q).longest
    longest_k = host_lengths("cu_seqlens_k", cu_seqlens_k).longest
    lengths = (cu_seqlens_q, cu_seqlens_k, longest_q, longest_k)
    options = Options(softmax_scale=softmax_scale, causal=causal)
    out = call.attend("attention_forward_varlen", (q, k, v), lengths, options, None)
    assert isinstance(out, Tensor)
    return out
