"""Calls of `flash_attn_with_kvcache`, and the float64 answer to them.

A call holds all arguments of the function, as host tensors. The reference walks through the
sequences one by one: their rows or pages, the appended keys, the rotation, then attention.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from flash_attn_npu import flash_attn_with_kvcache
from tests.helpers import reference
from tests.helpers.argument_harness import Answer, Arguments, int32
from tests.helpers.reference import assert_close_to_reference as assert_close

BATCH, ROWS, SEQLEN_Q, ADDED = 2, 3, 3, 2
NHEADS, NHEADS_K, HEADDIM, ROTARY_DIM = 4, 2, 64, 24
LENGTHS = (5, 9)
SEQUENCE = {"rows": 32, "pages": 16, "odd rows": 13, "odd pages": 5}
"""Positions of a row or of a page: those of the odd ones fit no kernel of Ascend."""


def arguments(layout: str, dtype: torch.dtype, **more: object) -> Arguments:
    """A complete call, its optional arguments neutral; `more` replaces them."""
    generator = torch.Generator().manual_seed(7)
    random = partial(torch.randn, generator=generator)
    blocks, seqlen = ROWS, SEQUENCE[layout]
    table = None
    if "pages" in layout:
        per_sequence = -(-13 // seqlen)
        blocks = BATCH * per_sequence + 1
        order = torch.randperm(blocks, generator=generator).to(torch.int32)
        table = order[: BATCH * per_sequence].view(BATCH, per_sequence)
    call = {
        "q": random(BATCH, SEQLEN_Q, NHEADS, HEADDIM),
        **{name: random(blocks, seqlen, NHEADS_K, HEADDIM) for name in ("k_cache", "v_cache")},
        **{name: random(BATCH, ADDED, NHEADS_K, HEADDIM) for name in ("k", "v")},
    }
    call = {name: tensor.to(dtype) for name, tensor in call.items()}
    call |= {"rotary_cos": None, "rotary_sin": None, "cache_seqlens": int32(LENGTHS)}
    call |= {"cache_batch_idx": None, "cache_leftpad": None, "block_table": table}
    call |= {"softmax_scale": HEADDIM**-0.5, "causal": False, "window_size": (-1, -1)}
    call |= {"softcap": 0.0, "rotary_interleaved": True, "alibi_slopes": None}
    return call | {"num_splits": 0, "return_softmax_lse": True} | more


def tables(dtype: torch.dtype, base: float = 100.0) -> Arguments:
    """Both rotary tables."""
    angles = torch.arange(16)[:, None] * base ** -torch.linspace(0, 1, ROTARY_DIM // 2)
    return {"rotary_cos": angles.cos().to(dtype), "rotary_sin": angles.sin().to(dtype)}


def run(call: Arguments, device: torch.device) -> Answer:
    """Make the call on copies: what it returns, and the caches behind it."""
    there = {
        name: value.clone().to(device) if isinstance(value, Tensor) else value
        for name, value in call.items()
    }
    result = flash_attn_with_kvcache(**there)
    names = ("out", "softmax_lse")
    answer = dict(zip(names, result if isinstance(result, tuple) else (result,), strict=False))
    return answer | {name: there[name] for name in ("k_cache", "v_cache")}


def places(call: Arguments) -> list[tuple[Tensor, Tensor]]:
    """For each sequence the (row or page, offset) of each of its positions."""
    seqlen = call["k_cache"].shape[1]
    if call["block_table"] is not None:
        position = torch.arange(call["block_table"].shape[1] * seqlen)
        return [(row[position // seqlen], position % seqlen) for row in call["block_table"].long()]
    rows = range(BATCH) if call["cache_batch_idx"] is None else call["cache_batch_idx"].tolist()
    position = torch.arange(seqlen)
    return [(torch.full_like(position, row), position) for row in rows]


def lengths(call: Arguments) -> list[int]:
    """The lengths before the new keys."""
    given = call["cache_seqlens"]
    if isinstance(given, Tensor):
        return given.tolist()
    return [len(places(call)[0][0]) if given is None else given] * BATCH


def rotated(x: Tensor, positions: Tensor, call: Arguments) -> Tensor:
    """x [seqlen, heads, headdim] turned by the angles of its positions, in its own precision."""
    if call["rotary_cos"] is None:
        return x
    cos, sin = (call[f"rotary_{name}"].to(x.dtype)[positions][:, None] for name in ("cos", "sin"))
    turning, rest = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
    if call["rotary_interleaved"]:
        a, b = turning[..., ::2], turning[..., 1::2]
        pairs = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    else:
        a, b = turning.chunk(2, -1)
        pairs = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    turned = torch.cat((pairs, rest), -1)
    return turned.to(call["stored_as"]).to(x.dtype) if "stored_as" in call else turned


def filled(call: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Both caches with the new keys in place, and where these are."""
    k_cache, v_cache = call["k_cache"].clone(), call["v_cache"].clone()
    written = torch.zeros(k_cache.shape[:2], dtype=torch.bool)
    if call["k"] is None:
        return k_cache, v_cache, written
    for index, (page, offset) in enumerate(places(call)):
        position = lengths(call)[index] + torch.arange(call["k"].shape[1])
        where = page[position], offset[position]
        k_cache[where] = rotated(call["k"][index], position, call)
        v_cache[where] = call["v"][index]
        written[where] = True
    return k_cache, v_cache, written


def solve(call: Arguments, attend: Callable[..., reference.Result]) -> tuple[Tensor, Tensor]:
    """out and softmax_lse, in the precision of the call's tensors."""
    k_cache, v_cache, _ = filled(call)
    results = []
    for index, where in enumerate(places(call)):
        length = lengths(call)[index]
        capacity = len(where[0])
        window = reference.normalise_window(call["window_size"], call["causal"], capacity)
        position = torch.full((call["q"].shape[1],), length)
        # without a mask upstream turns every query by the angles of the first one
        if window != (None, None):
            position += torch.arange(len(position))
        start = 0 if call["cache_leftpad"] is None else int(call["cache_leftpad"][index])
        end = length + (0 if call["k"] is None else call["k"].shape[1])
        keys = (cache[where][start:end] for cache in (k_cache, v_cache))
        names = ("softmax_scale", "causal", "window_size", "softcap")
        options = {name: call[name] for name in names}
        slopes = call["alibi_slopes"]
        options["alibi_slopes"] = slopes if slopes is None or slopes.ndim == 1 else slopes[index]
        q = rotated(call["q"][index], position, call)
        results.append(attend(q, *keys, max_seqlen_k=capacity, **options))
    return torch.stack([x.out for x in results]), torch.stack([x.softmax_lse for x in results])


def assert_right(answer: Answer, call: Arguments) -> None:
    """The answer to the call, by upstream's rule, and the caches that it left."""
    halves = ("q", "k", "v", "k_cache", "v_cache", "rotary_cos", "rotary_sin")
    doubles = call | {x: call[x].double() for x in halves if call[x] is not None}
    exact = solve(doubles, reference.attention)
    plain = solve(call, reference.same_precision)
    assert_close(answer["out"], exact[0], plain[0], "out")
    if "softmax_lse" in answer:
        lse = answer["softmax_lse"]
        if call["rotary_cos"] is None:
            reference.assert_lse_close(lse, exact[1])
        else:
            # what is turned is stored as the inputs are, the rest is float32
            stored = solve(doubles | {"stored_as": call["q"].dtype}, reference.attention)
            assert lse.dtype == torch.float32
            assert_close(lse, exact[1], stored[1], "softmax_lse")
    assert_filled(answer, call)


def assert_filled(answer: Answer, call: Arguments) -> None:
    """The new keys lie where they belong, and nothing else has changed."""
    exact = {x: call[x].double() for x in ("k", "k_cache") if call[x] is not None}
    *expected, written = filled(call | exact)
    eps = torch.finfo(call["q"].dtype).eps if call["rotary_cos"] is not None else 0.0
    for name, right in zip(("k_cache", "v_cache"), expected, strict=True):
        cache = answer[name].cpu()
        assert torch.equal(cache[~written], call[name][~written])
        torch.testing.assert_close(
            cache[written].double(), right[written].double(), rtol=eps, atol=4 * eps
        )
