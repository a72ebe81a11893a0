"""What the operators of `ops` do when they run: look the plan up and call its kernel.

Signatures are those of flash-attention 2.8's low-level functions, with `sink`, `deterministic`
(in the forward) and `function`, the public name to report, behind them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ArgumentError, explain
from ..rowwise.memory import require_writable
from . import checks, paged
from .buffers import require_apart
from .dispatch import Plan, decision, lookup, permit
from .lengths import Lengths, host_lengths
from .result import ROUNDING, Forward, Saved, accumulator, rounded_up
from .support import BLOCKWISE, FUSION

__all__ = ["backward", "forward", "varlen_backward", "varlen_forward"]

# fmt: off


def forward(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool,
    window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: Tensor | None,
    return_softmax: bool, sink: Tensor | None = None, deterministic: bool = False,
    function: str = "_flash_attn_forward",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, softmax_lse, S_dmask, rng_state) of dense attention."""
    found = decision(q, k, v) or lookup(
        function, q, k, v, None, None, None, None, dropout_p, softmax_scale, causal,
        (window_size_left, window_size_right), softcap, alibi_slopes, False, return_softmax,
        # who draws a dropout mask must be able to repeat it in the backward
        True, dropout_p > 0, sink,
    )
    return _run(found, q, k, v, alibi_slopes, sink)


def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool,
    window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, return_softmax: bool = False,
    block_table: Tensor | None = None, leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None, zero_tensors: bool = False, num_splits: int = 0,
    sink: Tensor | None = None, deterministic: bool = False,
    function: str = "_flash_attn_varlen_forward",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, softmax_lse, S_dmask, rng_state) of packed attention."""
    lengths_q, lengths_k = _lengths(cu_seqlens_q, cu_seqlens_k)
    if block_table is not None or leftpad_k is not None or seqused_k is not None:
        keys = paged.read_keys(k, v, lengths_k, block_table, seqused_k, leftpad_k)
        return paged.forward(
            function, q, keys, lengths_q, (max_seqlen_q, max_seqlen_k), dropout_p, softmax_scale,
            causal, (window_size_left, window_size_right), softcap, alibi_slopes, return_softmax,
            sink,
        )
    found = decision(q, k, v) or lookup(
        function, q, k, v, lengths_q, lengths_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, (window_size_left, window_size_right), softcap, alibi_slopes,
        False, return_softmax, True, dropout_p > 0, sink,
    )
    return _run(found, q, k, v, alibi_slopes, sink)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, dropout_p: float,
    softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int,
    softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
    rng_state: Tensor | None = None, function: str = "_flash_attn_backward",
) -> Tensor:
    """Write dq, dk, dv; returns rowsum(dout * out), (batch, nheads, seqlen_q rounded up to 128)."""
    found = decision(dout, q, k, v) or lookup(
        function, q, k, v, None, None, None, None, dropout_p, softmax_scale, causal,
        (window_size_left, window_size_right), softcap, alibi_slopes, deterministic, False,
        True, True, None, _mask_from(dropout_p, rng_state),
    )
    _run_backward(found, dout, Saved(q, k, v, out, softmax_lse), _written(dq, dk, dv),
                  alibi_slopes, rng_state)
    delta = _row_sums(dout, out).transpose(1, 2)
    rounded = delta.new_zeros(*delta.shape[:2], rounded_up(delta.shape[2]))
    rounded[..., : delta.shape[2]] = delta
    return rounded


def varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float,
    softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int,
    softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
    rng_state: Tensor | None = None, zero_tensors: bool = False,
    function: str = "_flash_attn_varlen_backward",
) -> Tensor:
    """Write dq, dk, dv; returns rowsum(dout * out), (nheads, total_q + 128 * batch).

    Sequence i starts there at the multiple of 128 below cu_seqlens_q[i] + 128 * i.
    """
    lengths_q, lengths_k = _lengths(cu_seqlens_q, cu_seqlens_k)
    found = decision(dout, q, k, v) or lookup(
        function, q, k, v, lengths_q, lengths_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, (window_size_left, window_size_right), softcap, alibi_slopes,
        deterministic, False, True, True, None, _mask_from(dropout_p, rng_state),
    )
    _run_backward(found, dout, Saved(q, k, v, out, softmax_lse), _written(dq, dk, dv),
                  alibi_slopes, rng_state)
    delta = _row_sums(dout, out).t()
    spread = delta.new_zeros(delta.shape[0], delta.shape[1] + ROUNDING * len(lengths_q.seqlens))
    starts = cu_seqlens_q.to(delta.device, torch.int64)
    sequence = torch.arange(len(lengths_q.seqlens), device=delta.device)
    shifts = (starts[:-1] + ROUNDING * sequence) // ROUNDING * ROUNDING - starts[:-1]
    places = torch.arange(lengths_q.total, device=delta.device)
    places += shifts.repeat_interleave(starts.diff(), output_size=lengths_q.total)
    spread.index_copy_(1, places, delta[:, : lengths_q.total])
    return spread


# fmt: on


def _lengths(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> tuple[Lengths, Lengths]:
    return host_lengths("cu_seqlens_q", cu_seqlens_q), host_lengths("cu_seqlens_k", cu_seqlens_k)


def _run(
    found: Plan, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, sink: Tensor | None
) -> Forward:
    checks.require_plain(q=q, k=k, v=v)
    for argument, tensor in (("alibi_slopes", slopes), ("sink", sink)):
        if tensor is not None:
            checks.require_plain(**{argument: tensor})
    permit(found)
    found.tally.calls += 1
    answer: Forward = found.kernel.forward(found.problem, q, k, v, slopes, sink)
    return answer


def _run_backward(
    found: Plan,
    dout: Tensor,
    saved: Saved,
    grads: tuple[Tensor, Tensor, Tensor],
    slopes: Tensor | None,
    rng_state: Tensor | None,
) -> None:
    q, k, v, out, lse = saved
    checks.require_plain(dout=dout, q=q, k=k, v=v, out=out, softmax_lse=lse)
    if slopes is not None:
        checks.require_plain(alibi_slopes=slopes)
    rows = (found.problem.rows_q,) if found.problem.varlen else (q.shape[0], q.shape[1])
    lse_shape = torch.Size((*rows[:-1], q.shape[-2], rows[-1]))
    lse = _as_it_lies(lse, lse_shape)
    saved = Saved(q, k, v, out, lse)
    expected = {
        "dout": (dout, q.shape, q.dtype),
        "out": (out, q.shape, q.dtype),
        "dq": (grads[0], q.shape, q.dtype),
        "dk": (grads[1], k.shape, q.dtype),
        "dv": (grads[2], v.shape, q.dtype),
        "softmax_lse": (lse, lse_shape, accumulator(q.dtype)),
    }
    for argument, (tensor, shape, dtype) in expected.items():
        if (tensor.shape, tensor.dtype, tensor.device) != (shape, dtype, q.device):
            raise ArgumentError(
                explain(
                    argument,
                    f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)} on {tensor.device}",
                    f"a {dtype} tensor of shape {tuple(shape)} on {q.device}",
                    f"pass {argument} as the forward returned it, or laid out as its tensor is",
                )
            )
    written = {"dq": grads[0], "dk": grads[1], "dv": grads[2]}
    require_writable(**written)
    require_apart(written, {"dout": dout, "q": q, "k": k, "v": v, "out": out, "softmax_lse": lse})
    if decision(dout, q, k, v) is None:
        # otherwise the forward was asked, in the name of the whole call
        permit(found)
    found.tally.calls += 1
    found.kernel.backward(found.problem, dout, saved, grads, slopes, rng_state)


def _written(
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    checks.require_plain(dq=dq, dk=dk, dv=dv)
    return dq, dk, dv  # type: ignore[return-value]


def _as_it_lies(lse: Tensor, shape: torch.Size) -> Tensor:
    """softmax_lse by its memory, as upstream reads it: diffusers passes it permuted."""
    if lse.dim() != len(shape):
        return lse
    turned = lse.transpose(-1, -2)
    permuted = lse.shape != shape or not lse.is_contiguous()
    return turned if permuted and turned.shape == shape and turned.is_contiguous() else lse


def _mask_from(dropout_p: float, rng_state: Tensor | None) -> str | None:
    """Which kernel drew the mask that `rng_state` stands for."""
    if not 1.0 - dropout_p < 1.0:
        return None
    if rng_state is None:
        raise ArgumentError(
            explain(
                "rng_state",
                None,
                "the rng_state that the forward returned, because dropout_p is not 0",
                "keep the fourth result of the forward and pass it here",
            )
        )
    checks.require_values(rng_state=rng_state)
    if tuple(rng_state.shape) != (2,) or rng_state.dtype != torch.int64:
        raise ArgumentError(
            explain(
                "rng_state",
                f"a {rng_state.dtype} tensor of shape {tuple(rng_state.shape)}",
                "the int64 tensor of 2 that the forward returned",
                "keep the fourth result of the forward and pass it here",
            )
        )
    return BLOCKWISE if int(rng_state[1]) < 0 else FUSION


def _row_sums(dout: Tensor, out: Tensor) -> Tensor:
    return (dout.to(accumulator(out.dtype)) * out).sum(-1)
