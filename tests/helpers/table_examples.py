"""For each row of the table, one call that has the property and few others."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch

from flash_attn_npu import (
    flash_attn_func,
    flash_attn_interface,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from flash_attn_npu._core.attention import cache_operators, call
from flash_attn_npu._core.attention.decode import CacheCall
from flash_attn_npu._core.problems.ask import Options
from flash_attn_npu._core.problems.attention import FEW_SINGLES
from flash_attn_npu._core.table.attention import (
    MAX_CACHED_HEADDIM,
    MAX_CACHED_SEQUENCES,
    MAX_GROUP,
    MAX_HEADDIM,
    MAX_HEADS,
    MAX_PAGE,
    MAX_PAGE_WIDTH,
    MAX_SEQUENCES,
    MAX_TOKENS,
)
from flash_attn_npu._flash_attn_3 import flash_attn_interface as version_3

SMALL_SEQUENCES, SMALL_TOKENS, SMALL_CACHED_SEQUENCES, SMALL_PAIRS = 3, 70, 2, 1000
"""Stand in for MAX_SEQUENCES and its like, so that crossing them is quick."""

Example = Callable[[torch.device], Any]


def tensor(device: torch.device, *shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype)


def dense(
    *, seqlens: tuple[int, int] = (6, 6), heads: tuple[int, int] = (2, 2), headdim: int = 8,
    dtype: torch.dtype = torch.float16, grad: bool = False, slopes: bool = False, **options: Any,
) -> Example:  # fmt: skip
    def run(device: torch.device) -> Any:
        q = tensor(device, 2, seqlens[0], heads[0], headdim, dtype=dtype).requires_grad_(grad)
        k = tensor(device, 2, seqlens[1], heads[1], headdim, dtype=dtype)
        if slopes:
            options["alibi_slopes"] = torch.rand(heads[0]).to(device)
        return flash_attn_func(q, k, k, **options)

    return run


def packed(
    lengths_q: list[int], lengths_k: list[int] | None = None, *, tail: int = 0,
    heads: tuple[int, int] = (2, 2), headdim: int = 8, dtype: torch.dtype = torch.float16,
    grad: bool = False, slopes: bool = False, **options: Any,
) -> Example:  # fmt: skip
    lengths_k = lengths_q if lengths_k is None else lengths_k
    cu_q, cu_k = ([0, *accumulate(lengths)] for lengths in (lengths_q, lengths_k))

    def run(device: torch.device) -> Any:
        q = tensor(device, cu_q[-1] + tail, heads[0], headdim, dtype=dtype).requires_grad_(grad)
        k = tensor(device, cu_k[-1] + tail, heads[1], headdim, dtype=dtype)
        if slopes:
            options["alibi_slopes"] = torch.rand(heads[0]).to(device)
        return flash_attn_varlen_func(
            q, k, k, cu_q, cu_k, max(lengths_q), max(lengths_k), **options
        )

    return run


def sunk(dtype: torch.dtype = torch.float16, **changed: Any) -> Example:
    def run(device: torch.device) -> Any:
        q = tensor(device, 2, 6, 2, 8, dtype=dtype)
        sink = torch.tensor([0.5, -1.0]).to(device)
        slopes = torch.rand(2).to(device) if "slopes" in changed else None
        given = {name: changed[name] for name in changed if name != "slopes"}
        options = Options(**{"causal": True, **given})
        return call.attend("sunk", (q, q, q), None, options, slopes, sink)

    return run


def narrow(device: torch.device) -> Any:
    """A v of 8 dimensions beside queries and keys of 12."""
    q, k, v = (tensor(device, 2, 6, 2, headdim) for headdim in (12, 12, 8))
    return version_3.flash_attn_func(q, k, v)


def backward(rng_offset: int, softcap: float) -> Example:
    def run(device: torch.device) -> Any:
        q = tensor(device, 2, 6, 2, 8)
        rng_state = torch.tensor([7, rng_offset])
        lse = torch.zeros(2, 2, 6).to(device)
        grads = [torch.empty_like(q) for _ in range(3)]
        return flash_attn_interface._flash_attn_backward(
            *(q, q, q, q, q, lse, *grads, 0.5, 0.3, False, -1, -1, softcap, None, False, rng_state)
        )

    return run


def cached(
    *, headdim: int = 64, page: int = 32, heads: int = 2, heads_k: int = 2, batch: int = 2,
    rows: int = 1, strided: bool = False, shared: bool = False, **options: Any,
) -> Example:  # fmt: skip
    """Sequences of 20 keys in pages of a cache."""

    def run(device: torch.device) -> Any:
        q = tensor(device, batch, rows, heads, headdim)
        cache = tensor(device, 1 if shared else batch * -(-20 // page), page, heads_k, headdim)
        if strided:
            cache = tensor(device, *cache.shape[:2], 2, *cache.shape[2:])[:, :, 0]
        pages = torch.arange(batch * -(-20 // page), dtype=torch.int32).view(batch, -1)
        table = torch.zeros_like(pages) if shared else pages
        given = {name: value.to(device) for name, value in options.items()}
        return flash_attn_with_kvcache(
            q, cache, cache.clone(), cache_seqlens=20, block_table=table.to(device), **given
        )

    return run


def sunk_cache(
    rows: int = 1, dtype: torch.dtype = torch.bfloat16, headdim: int = 64, **options: Any
) -> Example:
    """A sink over sequences of 5 and 20 keys in pages of a cache."""

    def run(device: torch.device) -> Any:
        q = tensor(device, 2, rows, 2, headdim, dtype=torch.bfloat16)
        cache = tensor(device, 2, 32, 2, headdim, dtype=torch.bfloat16)
        table = torch.tensor([[1], [0]], dtype=torch.int32).to(device)
        lengths = torch.tensor([5, 20], dtype=torch.int32).to(device)
        sink = torch.tensor([0.5, -1.0]).to(device, dtype)
        given = {"cache_seqlens": lengths, "block_table": table, "sink": sink, **options}
        return cache_operators.attend(CacheCall(q, cache, cache.clone(), causal=True, **given))

    return run


def unequal(device: torch.device) -> Any:
    """One and two queries of two sequences, in pages."""
    q, cache = tensor(device, 3, 2, 96), tensor(device, 2, 32, 2, 96)
    table = torch.tensor([[0], [1]], dtype=torch.int32).to(device)
    return flash_attn_varlen_func(
        q, cache, cache.clone(), [0, 1, 3], [0, 20, 40], 2, 20, block_table=table
    )


EXAMPLES: dict[str, Example] = {
    "no query sees a key": dense(seqlens=(6, 0)),
    "tensors outside an Ascend NPU": lambda _: dense()(torch.device("cpu")),
    "tensors outside a CPU": dense(),
    "Ascend 310P and 200I": dense(),
    "a torch_npu older than 2.6.0": dense(),
    "attention, a torch_npu without npu_fusion_attention and npu_fusion_attention_grad": dense(),
    "alibi_slopes, a torch_npu without npu_fusion_attention_v2 and npu_fusion_attention_grad_v2": (
        dense(slopes=True)
    ),
    "keys in a cache, a torch_npu without npu_fused_infer_attention_score": cached(),
    "float16": dense(),
    "bfloat16": dense(dtype=torch.bfloat16),
    "float32": dense(dtype=torch.float32),
    "float64": dense(dtype=torch.float64),
    "dense layout": dense(),
    "varlen layout": packed([4, 6]),
    f"varlen, more than {MAX_SEQUENCES} sequences": packed([1] * (SMALL_SEQUENCES + 1)),
    f"varlen, more than {MAX_TOKENS} tokens": packed([SMALL_TOKENS + 1]),
    f"dense, a seqlen above {MAX_TOKENS}": dense(seqlens=(SMALL_TOKENS + 1, SMALL_TOKENS + 1)),
    "varlen, sequences of length 0": packed([4, 0, 6], [4, 3, 6]),
    f"varlen, more than {FEW_SINGLES} sequences of one token": packed([4, 1, 1]),
    f"varlen, more than {FEW_SINGLES} sequences of one token, with dropout_p": packed(
        [4, 1, 1], dropout_p=0.5
    ),
    "varlen, rows past the last sequence": packed([4, 6], tail=3),
    "queries that see no key": packed([4, 6], [4, 3], causal=True),
    "MHA": dense(),
    "GQA and MQA": dense(heads=(4, 2)),
    "GQA and MQA, in a torch that does not share heads on a CPU": dense(heads=(4, 2)),
    f"more than {MAX_HEADS} heads": dense(heads=(MAX_HEADS + 1, 1), headdim=1),
    "headdim above upstream's 256": dense(headdim=320),
    f"headdim above {MAX_HEADDIM}": dense(headdim=MAX_HEADDIM + 1),
    "v of a smaller headdim (FlashAttention 3)": narrow,
    "causal": dense(causal=True),
    "window_size": dense(window_size=(2, 1)),
    "varlen, window_size (0, 0), with gradient or dropout": packed(
        [4, 6], window_size=(0, 0), grad=True
    ),
    "softmax_lse (return_attn_probs)": packed([4, 6], return_attn_probs=True),
    "dropout_p": dense(dropout_p=0.5),
    "S_dmask (dropout_p with return_attn_probs)": dense(dropout_p=0.5, return_attn_probs=True),
    "backward of a dropout mask drawn by blockwise": backward(rng_offset=-1, softcap=0.0),
    "backward of a dropout mask drawn by npu_fusion_attention": backward(0, softcap=1.0),
    "deterministic": dense(deterministic=True),
    "deterministic, with gradient": dense(deterministic=True, grad=True),
    "backward from softmax_lse": backward(0, softcap=0.0),
    "softcap": dense(softcap=5.0),
    "alibi_slopes": dense(slopes=True),
    "alibi_slopes, fewer queries than keys": packed([4, 6], [6, 6], slopes=True),
    "alibi_slopes, so few queries that computing as many as keys would cost more than tiles": (
        dense(seqlens=(1, 30), slopes=True)
    ),
    "alibi_slopes, more queries than keys, those that see no key apart": (
        packed([6, 6], [4, 6], slopes=True)
    ),
    "alibi_slopes, sequences of length 0": packed([4, 0], slopes=True),
    "alibi_slopes, varlen, softmax_lse": packed([4, 6], slopes=True, return_attn_probs=True),
    "sink (transformers' s_aux)": sunk(),
    "sink, float32": sunk(dtype=torch.float32),
    "sink, softmax_lse or a deterministic backward": sunk(return_attn_probs=True),
    "sink, alibi_slopes": sunk(slopes=True),
    "sink, Ascend 950": sunk(),
    "sink that the kernel's autograd does not take": sunk(dtype=torch.float32),
    "keys in a cache, under FLASH_ATTN_NPU_CONSISTENT=1": cached(),
    "keys in a cache": cached(),
    f"keys in a cache, more than {MAX_CACHED_SEQUENCES} sequences": cached(
        batch=SMALL_CACHED_SEQUENCES + 1
    ),
    f"keys in a cache, more than {MAX_GROUP} query heads for a key head": cached(
        heads=MAX_GROUP + 1, heads_k=1
    ),
    "keys in a cache, headdim other than 64 and 128": cached(headdim=96),
    "keys in a cache, headdim other than 64 and 128, queries of unequal lengths": unequal,
    f"keys in a cache, headdim above {MAX_CACHED_HEADDIM}": cached(headdim=528),
    "keys in a cache, headdim of no multiple of 16, unless of one query and up to 128": cached(
        headdim=72, page=128, rows=2
    ),
    f"keys in a cache, pages of no multiple of 16 up to {MAX_PAGE}": cached(page=5),
    "keys in a cache, headdim other than 64 and 128, several queries, pages of no multiple of "
    "128": cached(headdim=96, rows=2),
    "keys in a cache that is not contiguous": cached(strided=True),
    "keys in a cache, cache_leftpad": cached(cache_leftpad=torch.tensor([0, 3], dtype=torch.int32)),
    "keys in a cache, shared pages in a full cache": cached(shared=True),
    f"keys in a cache, nheads_k * headdim above {MAX_PAGE_WIDTH}": cached(
        heads=256, heads_k=256, headdim=257, page=16
    ),
    f"keys in a cache, headdim other than 64 and 128, nheads * headdim above {MAX_PAGE_WIDTH}": (
        cached(heads=256, heads_k=4, headdim=272, page=16)
    ),
    "keys in a cache, a sink": sunk_cache(),
    "keys in a cache, a sink, a torch_npu without npu_fused_infer_attention_score_v2": (
        sunk_cache()
    ),
    "keys in a cache, a sink, softmax_lse": sunk_cache(return_softmax_lse=True),
    "keys in a cache, a sink, another dtype than bfloat16": sunk_cache(dtype=torch.float32),
    "keys in a cache, a sink, headdim other than 64 and 128 or rows that are no pages": (
        sunk_cache(headdim=96)
    ),
    "keys in a cache, a sink, queries that see no key of their sequence": sunk_cache(rows=7),
}
