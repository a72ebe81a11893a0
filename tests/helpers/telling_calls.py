"""Calls of public functions that show what a card that lies does, by name; small ones."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_npu import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn_npu._core.attention import cache_operators
from flash_attn_npu._core.attention import call as core
from flash_attn_npu._core.attention.decode import CacheCall
from flash_attn_npu._core.problems.ask import Options
from flash_attn_npu._core.rowwise.lookup import keep
from flash_attn_npu.layers.rotary import apply_rotary_emb
from flash_attn_npu.modules.mlp import GatedMlp
from flash_attn_npu.ops.activations import swiglu
from flash_attn_npu.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn_npu.ops.triton.layer_norm import layer_norm_fn
from tests.helpers import reference

Call = Callable[[torch.device], list[Tensor]]
Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
HALF = torch.bfloat16


def drawn(device: torch.device, *shape: int, dtype: torch.dtype = HALF, grad: bool = False):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_(grad)


def kept(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return k, v


def alike_values(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The same values in every head."""
    return k, v[:, :, :1].expand_as(v)


def differentiated(out: Tensor, *leaves: Tensor) -> list[Tensor]:
    dout = drawn(out.device, *out.shape, dtype=out.dtype)
    return [out, *torch.autograd.grad(out, [x for x in leaves if x.requires_grad], dout)]


def dense(
    lengths: tuple[int, int] = (140, 140), heads: tuple[int, int] = (4, 2), batch: int = 2,
    grad: bool = False, slopes: Tensor | None = None, change: Change = kept, **options: Any,
) -> Call:  # fmt: skip
    def run(device: torch.device) -> list[Tensor]:
        q = drawn(device, batch, lengths[0], heads[0], 32, grad=grad)
        k, v = (drawn(device, batch, lengths[1], heads[1], d)[..., :32] for d in (33, 34))
        k, v = (x.detach().requires_grad_(grad) for x in change(k, v))
        given = None if slopes is None else slopes.to(device)
        answer = flash_attn_func(q, k, v, alibi_slopes=given, **options)
        out, *more = answer if isinstance(answer, tuple) else (answer,)
        return [*differentiated(out, q, k, v), *more] if grad else [out, *more]

    return run


def packed(ends_q: list[int], ends_k: list[int], grad: bool = False, **options: Any) -> Call:
    def run(device: torch.device) -> list[Tensor]:
        q = drawn(device, ends_q[-1], 4, 32, grad=grad)
        k, v = (drawn(device, ends_k[-1], 2, d)[..., :32] for d in (33, 34))
        k, v = (x.detach().requires_grad_(grad) for x in (k, v))
        cu_seqlens = [torch.tensor(x, dtype=torch.int32).to(device) for x in (ends_q, ends_k)]
        answer = flash_attn_varlen_func(q, k, v, *cu_seqlens, 400, 400, **options)
        out, *more = answer if isinstance(answer, tuple) else (answer,)
        return [*differentiated(out, q, k, v), *more] if grad else [out, *more]

    return run


def sunk(grad: bool, sinks: tuple[float, float] = (1.5, -0.5)) -> Call:
    def run(device: torch.device) -> list[Tensor]:
        q = drawn(device, 2, 40, 2, 32, grad=grad)
        k, v = (drawn(device, 2, 40, 2, d)[..., :32] for d in (33, 34))
        k, v = (x.detach().requires_grad_(grad) for x in (k, v))
        sink = torch.tensor(sinks).to(device).requires_grad_(grad)
        out = core.attend("sunk", (q, k, v), None, Options(causal=True), None, sink)
        assert isinstance(out, Tensor)
        return differentiated(out, q, k, v, sink) if grad else [out]

    return run


def sunk_by_torch(dtype: torch.dtype, sinks: tuple[float, float] = (1.5, -0.5)) -> list[Tensor]:
    """What `sunk` answers with gradients, by plain operations in this precision on the host."""
    given = [drawn(torch.device("cpu"), 2, 40, 2, d)[..., :32] for d in (32, 33, 34)]
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in given)
    wide = torch.promote_types(dtype, torch.float32)
    sink = torch.tensor(sinks, dtype=wide).requires_grad_()
    outs = [
        reference.same_precision(*rows, causal=True, sink=sink)[0]
        for rows in zip(q, k, v, strict=True)
    ]
    return [x.detach() for x in differentiated(torch.stack(outs), q, k, v, sink)]


def sunk_pages(sinks: Tensor, filled: int = 70, **options: Any) -> Call:
    """One query of each of three sequences over pages, beside a sink; the last sees few keys."""

    def run(device: torch.device) -> list[Tensor]:
        q = drawn(device, 3, 1, 4, 64)
        k, v = (drawn(device, 15, 32, 2, 64 + i)[..., :64].contiguous() for i in (1, 2))
        table = torch.randperm(15, generator=torch.Generator().manual_seed(1)).view(3, 5)
        given = {"block_table": table.to(device, torch.int32), "sink": sinks.to(device, HALF)}
        lengths = torch.tensor([filled, filled + 3, 5], dtype=torch.int32).to(device)
        answer = cache_operators.attend(
            CacheCall(q, k, v, cache_seqlens=lengths, **given, **options)
        )
        return [x for x in answer if x is not None]

    return run


def cached(seqlen_q: int = 1, filled: int = 70, paged: bool = True, **options: Any) -> Call:
    def run(device: torch.device) -> list[Tensor]:
        q = drawn(device, 3, seqlen_q, 4, 64)
        shape = (15, 32, 2) if paged else (3, 160, 2)
        k, v = (drawn(device, *shape, 64 + i)[..., :64].contiguous() for i in (1, 2))
        table = torch.randperm(15, generator=torch.Generator().manual_seed(1)).view(3, 5)
        given = {"block_table": table.to(device, torch.int32)} if paged else {}
        lengths = torch.tensor([filled, filled + 3, 5], dtype=torch.int32).to(device)
        answer = flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, **given, **options)
        return list(answer) if isinstance(answer, tuple) else [answer]

    return run


def appended(filled: int = 31, page: int = 32, **options: Any) -> Call:
    """New keys across the end of a page, of a cache that is returned too."""

    def run(device: torch.device) -> list[Tensor]:
        q, k, v = (drawn(device, 3, 2, 4, 64 + i)[..., :64].contiguous() for i in range(3))
        shape = (3 * 96 // page, page, 4)
        caches = [drawn(device, *shape, 64 + i)[..., :64].contiguous() for i in (4, 5)]
        order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(2))
        table = order.view(3, -1).to(device, torch.int32)
        given = {"block_table": table, "cache_seqlens": filled} | options
        return [flash_attn_with_kvcache(q, *caches, k=k, v=v, **given), *caches]

    return run


def gathered(**options: Any) -> Call:
    """Keys that are copied out of pages, because of softcap."""
    return cached(softcap=5.0, window_size=(20, 0), **options)


def rotated(
    inplace: bool = False, interleaved: bool = False, grad: bool = False, tokens: int = 9
) -> Call:
    def run(device: torch.device) -> list[Tensor]:
        x = drawn(device, 2, tokens, 3, 64, grad=grad)
        angle = torch.rand(tokens, 32, generator=torch.Generator().manual_seed(3)) * 3
        cos, sin = (part.to(device, HALF) for part in (angle.cos(), angle.sin()))
        out = apply_rotary_emb(x, cos, sin, interleaved=interleaved, inplace=inplace)
        return differentiated(out, x) if grad else [out]

    return run


def looked_up(pair: bool = True, interleaved: bool = False, batch: int = 3) -> Call:
    """A step of decoding by the tables of an embedding: of q and k, or of q alone."""

    def run(device: torch.device) -> list[Tensor]:
        q, k, v = (drawn(device, batch, 1, n, 64) for n in (4, 2, 2))
        angle = torch.rand(20, 32, generator=torch.Generator().manual_seed(3)) * 3
        cos, sin = (part.to(device, HALF) for part in (angle.cos(), angle.sin()))
        keep(cos, sin)
        at = torch.tensor([5, 11, 2][:batch], dtype=torch.int32).to(device)
        # twice: where one operator is found wrong the next call asks the other one
        for _ in range(2):
            if pair:
                caches = [torch.zeros(batch, 32, 2, 64).to(device, HALF) for _ in "kv"]
                out = flash_attn_with_kvcache(
                    q, *caches, k, v, cos, sin, cache_seqlens=at, causal=True,
                    rotary_interleaved=interleaved,
                )  # fmt: skip
            else:
                out, caches = apply_rotary_emb(q, cos, sin, interleaved, seqlen_offsets=at), []
        return [out, *caches[:1]]

    return run


def normed(
    rms: bool, residual: bool = True, grad: bool = False, size: float = 1.0, new: bool = False,
    eps: float = 1e-5, prenorm: bool = False, of_sum: torch.dtype | None = None,
) -> Call:  # fmt: skip
    """new: with the weight and the bias of a model that was never trained. of_sum: its dtype."""

    def run(device: torch.device) -> list[Tensor]:
        x, r = (drawn(device, 3, 5, 64 + i)[..., :64] * size for i in range(2))
        x, r = x.detach().requires_grad_(grad), r.to(of_sum or r.dtype)
        weight = (drawn(device, 64) + 2).detach().requires_grad_(grad)
        bias = None if rms else drawn(device, 65)[:64].detach().requires_grad_(grad)
        if new:
            weight, bias = torch.ones_like(weight), None if rms else torch.zeros_like(weight)
        answer = layer_norm_fn(
            x, weight, bias, r if residual else None, eps=eps, prenorm=prenorm, is_rms_norm=rms
        )
        if prenorm:
            y, total = answer
            leaves = [t for t in (x, weight) if t.requires_grad]
            douts = [drawn(device, *t.shape) for t in answer]
            return [y, total, *torch.autograd.grad((y, total), leaves, douts)]
        return differentiated(answer, x, weight) if grad else [answer]

    return run


def gated(grad: bool) -> Call:
    def run(device: torch.device) -> list[Tensor]:
        x = drawn(device, 5, 7, 128, grad=grad)
        out = swiglu(*x.chunk(2, -1))
        return differentiated(out, x) if grad else [out]

    return run


def gated_by_gelu(dtype: torch.dtype = HALF) -> Call:
    def run(device: torch.device) -> list[Tensor]:
        module = GatedMlp(16, 24, activation=torch.nn.functional.gelu, multiple_of=8)
        for parameter in module.parameters():
            parameter.data = drawn(device, *parameter.shape, dtype=dtype) / 4
        with torch.no_grad():
            return [module(drawn(device, 5, 16, dtype=dtype))]

    return run


def lost(grad: bool, smoothing: float = 0.0, masked: bool = False, ignored: bool = False) -> Call:
    """masked: labels are ignored, as of a prompt and of padding, but for one. ignored: all are."""

    def run(device: torch.device) -> list[Tensor]:
        logits = drawn(device, 20, 50, dtype=torch.float32, grad=grad)
        labels = torch.arange(20) * 2
        if ignored:
            labels.fill_(-100)
        if masked:
            labels = labels.where(torch.arange(20) == 12, -100)
        losses, _ = cross_entropy_loss(logits, labels.to(device), label_smoothing=smoothing)
        return differentiated(losses, logits) if grad else [losses]

    return run


ENDS = [0, 90, 200, 201, 330]
LONGER = [0, 130, 200, 260, 400]
SLOPES = torch.tensor([0.3, 0.1, 0.05, 0.2])
SINKS = torch.tensor([4.0, 2.0, 3.0, 0.5])
SYMMETRIC = {"window_size": (7, 7)}
MANY = [0, 90, 200, 260, 270, 300, 330, 340]
OTHERS = [0, 130, 200, 250, 280, 290, 310, 340]
CALLS: dict[str, Call] = {
    "flash_attn_func": dense(),
    "flash_attn_func, 40 queries": dense((40, 40)),
    "flash_attn_func(softmax_scale)": dense(softmax_scale=0.3),
    "flash_attn_func, one sequence, gradient": dense(batch=1, grad=True),
    "flash_attn_varlen_func, as many keys": packed(MANY, OTHERS),
    "flash_attn_varlen_func, many sequences, gradient": packed(MANY, OTHERS, grad=True),
    "flash_attn_func(return_attn_probs)": dense(return_attn_probs=True),
    "flash_attn_func(causal)": dense(causal=True),
    "flash_attn_func(causal), more keys": dense((70, 140), causal=True),
    "flash_attn_func(causal), more queries": dense((140, 70), causal=True),
    "flash_attn_func(window)": dense(window_size=(7, 3)),
    "flash_attn_func(window), as long as the keys": dense((30, 30), window_size=(28, 27)),
    "flash_attn_func(long window)": dense((1100, 1100), (1, 1), 1, window_size=(900, 800)),
    "flash_attn_func, 300 keys": dense((40, 300)),
    "flash_attn_func(dropout_p)": dense(dropout_p=0.3),
    "flash_attn_func(alibi)": dense(slopes=SLOPES),
    "flash_attn_func(alibi, causal, lse)": dense(
        slopes=SLOPES, causal=True, return_attn_probs=True
    ),
    "flash_attn_func(alibi of each)": dense(slopes=torch.stack((SLOPES, SLOPES.flip(0)))),
    "flash_attn_func, gradient": dense(grad=True),
    "flash_attn_func(causal), gradient": dense((140, 90), causal=True, grad=True),
    "flash_attn_func(deterministic), gradient": dense(grad=True, deterministic=True),
    "flash_attn_func(dropout_p), gradient": dense(dropout_p=0.3, grad=True),
    "flash_attn_varlen_func": packed(ENDS, ENDS),
    "flash_attn_varlen_func(return_attn_probs)": packed(ENDS, LONGER, return_attn_probs=True),
    "flash_attn_varlen_func(causal)": packed(ENDS, LONGER, causal=True),
    "flash_attn_varlen_func(window)": packed(ENDS, LONGER, window_size=(20, 5)),
    "flash_attn_varlen_func, gradient": packed(ENDS, LONGER, grad=True),
    "flash_attn_varlen_func(causal), gradient": packed(LONGER, ENDS, grad=True, causal=True),
    "attention with a sink": sunk(grad=False),
    "attention with a sink, gradient": sunk(grad=True),
    "flash_attn_with_kvcache": cached(),
    "flash_attn_with_kvcache, unpaged": cached(paged=False),
    "flash_attn_with_kvcache(causal)": cached(seqlen_q=9, causal=True),
    "flash_attn_with_kvcache(window)": cached(window_size=(20, 0)),
    "flash_attn_with_kvcache(lse)": cached(return_softmax_lse=True),
    "flash_attn_with_kvcache, 150 keys": cached(filled=150),
    "flash_attn_with_kvcache, new keys": appended(),
    "flash_attn_with_kvcache, new keys in rows": appended(
        block_table=None, page=96, cache_seqlens=50
    ),
    "flash_attn_with_kvcache, gathered": gathered(),
    "flash_attn_with_kvcache(softmax_scale)": cached(softmax_scale=0.3),
    "a sink over pages": sunk_pages(SINKS),
    "a sink over pages (window)": sunk_pages(SINKS, window_size=(20, 0)),
    "a sink over pages (lse)": sunk_pages(SINKS, return_softmax_lse=True),
    "apply_rotary_emb": rotated(),
    "apply_rotary_emb(interleaved)": rotated(interleaved=True),
    "apply_rotary_emb(inplace)": rotated(inplace=True),
    "apply_rotary_emb, gradient": rotated(grad=True),
    "rotary of a step": looked_up(),
    "rotary of a step(interleaved)": looked_up(interleaved=True),
    "rotary of a step of one sequence": looked_up(batch=1),
    "rotary of a step, q alone": looked_up(pair=False),
    "rms norm": normed(rms=True, residual=False),
    "rms norm, gradient": normed(rms=True, residual=False, grad=True),
    "rms norm of eps 1e-8, gradient": normed(rms=True, residual=False, grad=True, eps=1e-8),
    "rms norm of a sum": normed(rms=True),
    "rms norm of small rows": normed(rms=True, residual=False, size=1e-3),
    "layer norm of a sum": normed(rms=False),
    "layer norm of a float32 sum": normed(rms=False, of_sum=torch.float32),
    "layer norm of a sum, gradient": normed(rms=False, grad=True),
    "layer norm and its sum, gradient": normed(rms=False, grad=True, prenorm=True),
    "swiglu": gated(grad=False),
    "swiglu, gradient": gated(grad=True),
    "exact geglu": gated_by_gelu(),
    "exact geglu, float32": gated_by_gelu(torch.float32),
    "cross entropy": lost(grad=False),
    "cross entropy, gradient": lost(grad=True),
    "cross entropy(label_smoothing)": lost(grad=False, smoothing=0.1),
    "cross entropy of one label": lost(grad=False, masked=True),
    "cross entropy of one label, gradient": lost(grad=True, masked=True),
}


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]


def alike(some: list[Tensor], others: list[Tensor]) -> bool:
    """Within the roundings of bfloat16, or of float32 for softmax_lse and losses."""
    for one, other in zip(some, others, strict=True):
        a, b = (x.detach().cpu().double() for x in (one, other))
        close = 2e-2 if one.dtype == HALF else 1e-4
        if not torch.allclose(a, b, atol=close, rtol=close, equal_nan=True):
            return False
    return True
