"""Time of attention on the CPU beside torch's scaled_dot_product_attention (SDPA)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor

from flash_attn_npu import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn_npu._integrations.stand_ins import npu_flash_attn_func

from .figures import Call, Figure, Measure, Run

SDPA = torch.nn.functional.scaled_dot_product_attention
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HEADDIM = 64
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
WAYS = {False: "forward", True: "forward and backward"}
Attention = Callable[..., Tensor]


def heads_of(seqlen: int) -> int:
    """Fewer heads where they are long: a ratio on one thread does not depend on them."""
    return 8 if seqlen <= 1024 else 2 if seqlen <= 4096 else 1


def call_of(attention: Attention, tensors: list[Tensor], grad: bool) -> Call:
    if not grad:
        return partial(attention, *tensors)
    leaves = [x.detach().requires_grad_() for x in tensors]
    dout = torch.randn_like(attention(*tensors))
    return lambda: torch.autograd.grad(attention(*leaves), leaves, dout)


def calls(tensors: list[Tensor], ours: Attention, theirs: Attention, grad: bool) -> list[Call]:
    """Both over the same memory, (batch, seqlen, nheads, headdim), which SDPA sees transposed."""
    return [call_of(ours, tensors, grad), call_of(theirs, transposed(tensors), grad)]


def transposed(tensors: list[Tensor]) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def rand(*shape: int, dtype: torch.dtype = FP32) -> list[Tensor]:
    return [torch.randn(shape).to(dtype) for _ in range(3)]


def dense(causal: bool, dtype: torch.dtype, seqlen: int, grad: bool, run: Run) -> list[Figure]:
    tensors = rand(1, seqlen, heads_of(seqlen), HEADDIM, dtype=dtype)
    ours, theirs = calls(
        tensors, partial(flash_attn_func, causal=causal), partial(SDPA, is_causal=causal), grad
    )
    name = f"{'causal' if causal else 'full'} {NAMES[dtype]} {seqlen}, {WAYS[grad]}"
    return [run.beside(name, "training" if grad else "forward", ours, theirs)]


def short(causal: bool, grad: bool, run: Run) -> list[Figure]:
    tensors = rand(1, 16, 8, HEADDIM, dtype=BF16)
    ours, theirs = calls(
        tensors, partial(flash_attn_func, causal=causal), partial(SDPA, is_causal=causal), grad
    )
    name = f"{'causal' if causal else 'full'} bf16 16, {WAYS[grad]}"
    return [run.beside(name, "short", ours, theirs)]


def packs(run: Run) -> dict[str, list[int]]:
    low, high = run.sizes.ragged
    draw = torch.Generator().manual_seed(1)
    ragged = torch.randint(low, high + 1, (16,), generator=draw).tolist()
    longer = run.sizes.packed
    return {"64 x 32": [32] * 64, f"8 x {longer}": [longer] * 8, f"ragged {low}..{high}": ragged}


def looped(lengths: list[int], causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA sequence by sequence over packed tensors, and the outputs packed again."""
    parts = zip(*(x.transpose(0, 1)[None].split(lengths, dim=2) for x in (q, k, v)), strict=True)
    return torch.cat([SDPA(*part, is_causal=causal)[0].transpose(0, 1) for part in parts])


def packed(which: str, causal: bool, grad: bool, run: Run) -> list[Figure]:
    name = next(name for name in packs(run) if name.startswith(which))
    lengths = packs(run)[name]
    tensors, cu = rand(sum(lengths), 8, HEADDIM, dtype=BF16), cumulative(lengths)
    longest = max(lengths)
    ours = partial(varlen, cu, longest, causal)
    theirs = partial(looped, lengths, causal)
    both = [call_of(f, tensors, grad) for f in (ours, theirs)]
    told = f"{'causal' if causal else 'full'} bf16 {name}, {WAYS[grad]}"
    figures = [run.beside(told, "packed", both[0], both[1])]
    if which == "ragged":
        rows = rand(len(lengths), longest, 8, HEADDIM, dtype=BF16)
        padded = call_of(padded_sdpa(lengths, causal), transposed(rows), grad)
        figures.append(run.beside(f"{told}, padded", "padded", both[0], padded))
    return figures


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def varlen(cu: Tensor, longest: int, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=causal)


def padded_sdpa(lengths: list[int], causal: bool) -> Attention:
    """Causal rows that count see no padding: no mask is needed, which is the fastest there is."""
    if causal:
        return partial(SDPA, is_causal=True)
    seen = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return partial(SDPA, attn_mask=seen[:, None, None])


def window(dtype: torch.dtype, grad: bool, run: Run) -> list[Figure]:
    seqlen, width = run.sizes.long, run.sizes.window
    tensors = rand(1, seqlen, 1, HEADDIM, dtype=dtype)
    ours = partial(flash_attn_func, causal=True, window_size=(width - 1, 0))
    both = calls(tensors, ours, partial(SDPA, is_causal=True), grad)
    name = f"window {width} at {seqlen}, {NAMES[dtype]}, {WAYS[grad]}"
    return [run.beside(name, "window", both[0], both[1])]


def alibi(dtype: torch.dtype, seqlen: int, grad: bool, run: Run) -> list[Figure]:
    heads = heads_of(seqlen)
    slopes = 2.0 ** -torch.arange(1.0, heads + 1)
    place = torch.arange(seqlen)
    bias = -slopes[:, None, None] * (place[:, None] - place).abs()
    bias = bias.masked_fill(place > place[:, None], float("-inf"))[None].to(dtype)
    tensors = rand(1, seqlen, heads, HEADDIM, dtype=dtype)
    ours = partial(flash_attn_func, causal=True, alibi_slopes=slopes)
    both = calls(tensors, ours, partial(SDPA, attn_mask=bias), grad)
    return [run.beside(f"ALiBi {NAMES[dtype]} {seqlen}, {WAYS[grad]}", "bias", both[0], both[1])]


def sink(dtype: torch.dtype, seqlen: int, grad: bool, run: Run) -> list[Figure]:
    """Theirs has one more key, of zeros, whose score the mask sets to the sink."""
    heads = heads_of(seqlen)
    sinks = torch.randn(heads).to(dtype)
    mask = torch.full((seqlen, seqlen), float("-inf")).triu(1).expand(1, heads, -1, -1)
    mask = torch.cat((mask.to(dtype), sinks.view(1, heads, 1, 1).expand(-1, -1, seqlen, 1)), -1)
    tensors = rand(1, seqlen, heads, HEADDIM, dtype=dtype)
    more = [torch.cat((x, torch.zeros_like(x[:, :1])), 1) for x in tensors[1:]]
    ours = call_of(partial(npu_flash_attn_func, causal=True, s_aux=sinks), tensors, grad)
    views = transposed([tensors[0], *more])
    theirs = call_of(partial(SDPA, attn_mask=mask), views, grad)
    return [run.beside(f"sink {NAMES[dtype]} {seqlen}, {WAYS[grad]}", "bias", ours, theirs)]


def softcap(dtype: torch.dtype, seqlen: int, grad: bool, run: Run) -> list[Figure]:
    tensors = rand(1, seqlen, heads_of(seqlen), HEADDIM, dtype=dtype)
    ours = partial(flash_attn_func, causal=True, softcap=30.0)
    both = calls(tensors, ours, partial(SDPA, is_causal=True), grad)
    name = f"softcap {NAMES[dtype]} {seqlen}, {WAYS[grad]}"
    return [run.beside(name, "softcap", both[0], both[1])]


def decode(dtype: torch.dtype, batch: int, run: Run) -> list[Figure]:
    """One token of 32 heads over a cache of 8, as long as it is: SDPA needs no mask either."""
    cache, q = rand(batch, run.sizes.cache, 8, 128, dtype=dtype), rand(batch, 1, 32, 128)[0]
    q, k, v = q.to(dtype), cache[0], cache[1]
    used = torch.full((batch,), run.sizes.cache, dtype=torch.int32)
    views = transposed([q, k, v])
    ours = partial(flash_attn_with_kvcache, q, k, v, cache_seqlens=used, causal=True)
    theirs = partial(SDPA, *views, enable_gqa=True)
    name = f"decode {NAMES[dtype]}, batch {batch}, 32 heads over 8, cache {run.sizes.cache}"
    return [run.beside(name, "decode", ours, theirs)]


def cases(run: Run) -> dict[str, Measure]:
    """Everything that is timed against SDPA, by the name that `--only` looks for."""
    found: dict[str, Measure] = {}
    sizes, ways = run.sizes, (False, True)
    for grad, causal, dtype, seqlen in product(ways, ways, (BF16, FP16, FP32), sizes.lengths):
        name = f"dense {'causal' if causal else 'full'} {NAMES[dtype]} {seqlen} {WAYS[grad]}"
        found[name] = partial(dense, causal, dtype, seqlen, grad)
    for causal, grad in product(ways, ways):
        mask, way = "causal" if causal else "full", WAYS[grad]
        found[f"short {mask} {way}"] = partial(short, causal, grad)
        for which in ("64", "8", "ragged"):
            found[f"packed {mask} {which} {way}"] = partial(packed, which, causal, grad)
    for dtype, grad in product((BF16, FP32), ways):
        name = f"{NAMES[dtype]} {WAYS[grad]}"
        found[f"window {name}"] = partial(window, dtype, grad)
        for seqlen in sizes.medium:
            for kind in (alibi, sink, softcap):
                found[f"{kind.__name__} {name} {seqlen}"] = partial(kind, dtype, seqlen, grad)
    for dtype, batch in product((BF16, FP32), (1, 8)):
        found[f"decode {NAMES[dtype]} {batch}"] = partial(decode, dtype, batch)
    return found
