"""The call behind every public attention function.

Where the fused kernel is differentiable by itself it is called at once: this path is written
for speed, and adds about 3 us to a launch of 17 us. Everything else, and everything that is
being traced, goes through the operators of `ops`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ArgumentError, UnsupportedError, explain
from . import checks, ops, paged
from .dispatch import decided, lookup, recall_plan, remember_plan
from .lengths import host_lengths, recall_lengths
from .problem import Facts

__all__ = ["Answer", "attend", "attend_paged", "unpacked"]

Answer = Tensor | tuple[Tensor, Tensor, Tensor]

_compiling = torch.compiler.is_dynamo_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_grad_enabled = torch.is_grad_enabled
_forward_ad = torch.autograd.forward_ad


def attend(
    function: str,
    packed: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | Sequence[int] | None,
    cu_seqlens_k: Tensor | Sequence[int] | None,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    return_attn_probs: bool,
    sink: Tensor | None = None,
) -> Answer:
    """Attention over packed tensors, or over dense ones, which have no lengths."""
    # fmt: off
    if _compiling() or _dispatch_modes():
        return ops.attend(
            function, packed, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            dropout_p, softmax_scale, causal, window_size, softcap, deterministic,
            return_attn_probs, alibi_slopes, sink,
        )
    if _forward_ad._current_level >= 0:
        _refuse_tangents(q=q, k=k, v=v, sink=sink)
    lengths_q = lengths_k = longest_q = longest_k = key = found = None
    if packed:
        lengths_q = recall_lengths(cu_seqlens_q) or host_lengths("cu_seqlens_q", cu_seqlens_q)
        if cu_seqlens_k is cu_seqlens_q:
            lengths_k = lengths_q
        else:
            lengths_k = recall_lengths(cu_seqlens_k) or host_lengths("cu_seqlens_k", cu_seqlens_k)
        longest_q = (
            max_seqlen_q if type(max_seqlen_q) is int
            else checks.longest("max_seqlen_q", max_seqlen_q, lengths_q.longest)
        )
        longest_k = (
            max_seqlen_k if type(max_seqlen_k) is int
            else checks.longest("max_seqlen_k", max_seqlen_k, lengths_k.longest)
        )
    try:
        key = (
            function, q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype,
            q.device, k.device, v.device, lengths_q, lengths_k, longest_q, longest_k,
            dropout_p, softmax_scale, causal, window_size, softcap, deterministic,
            return_attn_probs, None if alibi_slopes is None else Facts.of(alibi_slopes),
            None if sink is None else Facts.of(sink),
            _grad_enabled() and (
                q.requires_grad or k.requires_grad or v.requires_grad
                or (sink is not None and sink.requires_grad)
            ),
        )
        found = recall_plan(key)
    except (AttributeError, TypeError):
        # not a tensor, or not hashable: the checks of `lookup` accept it or name it
        checks.require_plain(q=q, k=k, v=v, sink=q if sink is None else sink)
        key = None
    if found is None:
        checks.plain(
            dropout_p, softmax_scale, causal, window_size, softcap, deterministic, return_attn_probs
        )
        tensors = (q, k, v) if sink is None else (q, k, v, sink)
        needs_grad = _grad_enabled() and any(x.requires_grad for x in tensors)
        found = lookup(
            function, q, k, v, lengths_q, lengths_k, longest_q, longest_k, dropout_p,
            softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
            # torch_npu's own autograd has no deterministic backward; ours needs softmax_lse
            return_attn_probs, return_attn_probs or (deterministic and needs_grad), needs_grad,
            sink,
        )
        remember_plan(key, found)
    if found.direct is not None:
        found.tally.calls += 1
        try:
            return found.direct(q, k, v, alibi_slopes, sink)  # type: ignore[no-any-return]
        except Exception:
            # what no kernel takes looks to a remembered plan like any tensor of its shape
            checks.require_plain(q=q, k=k, v=v)
            raise
    checks.require_plain(q=q, k=k, v=v)
    plain = checks.plain(
        dropout_p, softmax_scale, causal, window_size, softcap, deterministic, return_attn_probs
    )
    with decided(found, q, k, v):
        return ops.attend(
            function, packed, q, k, v, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, *plain,
            alibi_slopes, sink,
        )
    # fmt: on


def _refuse_tangents(**tensors: Tensor | None) -> None:
    """No kernel has forward-mode derivatives; without this they would silently be zero."""
    for argument, tensor in tensors.items():
        if tensor is not None and _forward_ad.unpack_dual(tensor).tangent is not None:
            raise UnsupportedError(
                explain(
                    argument,
                    "a tensor with a forward-mode tangent",
                    "reverse-mode differentiation, as in flash-attention",
                    "use torch.autograd.grad or backward() here, or eager attention",
                )
            )


def unpacked(argument: str, packed: Tensor, parts: int, dims: int) -> tuple[Tensor, ...]:
    """The parts of a (batch, seqlen, parts, nheads, headdim) or (total, ...) tensor, as views.

    Args:
        dims: 5 for a padded batch, 4 for packed sequences.
    """
    checks.require_plain(**{argument: packed})
    if packed.dim() != dims or packed.shape[-3] != parts:
        tokens = "(batch, seqlen" if dims == 5 else "(total"
        raise ArgumentError(
            explain(
                argument,
                f"shape {tuple(packed.shape)}",
                f"{tokens}, {parts}, nheads, headdim)",
                f"stack the {parts} tensors along dimension -3; packed sequences go to the varlen "
                "functions, padded batches to the others",
            )
        )
    return packed.unbind(-3)


def attend_paged(
    function: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | Sequence[int],
    cu_seqlens_k: Tensor | Sequence[int],
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    return_attn_probs: bool,
    block_table: Tensor,
) -> Answer:
    """`attend` over keys in pages; where a gradient is wanted they are gathered first."""
    checks.require_plain(q=q, k=k, v=v, block_table=block_table)
    # fmt: off
    needs_grad = torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad
    )
    if not needs_grad and (_compiling() or _dispatch_modes()):
        return ops.attend(
            function, True, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            dropout_p, softmax_scale, causal, window_size, softcap, deterministic,
            return_attn_probs, alibi_slopes, None, block_table,
        )
    # fmt: on
    if _forward_ad._current_level >= 0:
        _refuse_tangents(q=q, k=k, v=v)
    if alibi_slopes is not None:
        checks.require_plain(alibi_slopes=alibi_slopes)
    lengths_q = host_lengths("cu_seqlens_q", cu_seqlens_q)
    lengths_k = host_lengths("cu_seqlens_k", cu_seqlens_k)
    longest_q = checks.longest("max_seqlen_q", max_seqlen_q, lengths_q.longest)
    longest_k = checks.longest("max_seqlen_k", max_seqlen_k, lengths_k.longest)
    plain = checks.plain(
        *(dropout_p, softmax_scale, causal, window_size, softcap),
        *(deterministic, return_attn_probs),
    )
    # fmt: off
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        keys = paged.read_keys(k, v, lengths_k, block_table, None, None)
        return attend(
            function, True, q, *paged.gather(keys), cu_seqlens_q, keys.lengths.cumulative,
            longest_q, longest_k, dropout_p, softmax_scale, causal, window_size, softcap,
            alibi_slopes, deterministic, return_attn_probs,
        )
    return ops.attend(
        function, True, q, k, v, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, *plain,
        alibi_slopes, None, block_table,
    )
    # fmt: on
