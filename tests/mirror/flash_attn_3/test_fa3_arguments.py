"""Every argument of FlashAttention 3's functions does what float64 says, is refused, or is inert.

The arguments are read from the signatures, and each stands in exactly one table.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_npu._flash_attn_3 import flash_attn_interface as interface
from flash_attn_npu.errors import ArgumentError, UnsupportedError
from tests.helpers import cache_reference
from tests.helpers.fa3_reference import attention, dense, varlen

Arguments = dict[str, Any]
B, SQ, SK, H, HK, D, DV = 2, 4, 6, 4, 2, 8, 12
CU_Q, CU_K = torch.tensor([0, 3, 8]).int(), torch.tensor([0, 6, 11]).int()
NO_NEW = ("k", "v", "rotary_cos", "rotary_sin")


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def table() -> Tensor:
    return torch.tensor([[3, 0], [2, 4]], dtype=torch.int32)


BASES: dict[str, Callable[[], Arguments]] = {
    "flash_attn_func": lambda: {
        "q": normal(B, SQ, H, D), "k": normal(B, SK, HK, D), "v": normal(B, SK, HK, DV),
    },
    "flash_attn_varlen_func": lambda: {
        "q": normal(8, H, D), "k": normal(11, HK, D), "v": normal(11, HK, DV),
        "cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K, "max_seqlen_q": 5, "max_seqlen_k": 6,
    },
    "flash_attn_qkvpacked_func": lambda: {"qkv": normal(B, SQ, 3, HK, D)},
    "flash_attn_with_kvcache, appending": lambda: {
        "q": normal(B, 2, H, D), "k_cache": normal(3, 12, HK, D), "v_cache": normal(3, 12, HK, D),
        "k": normal(B, 2, HK, D), "v": normal(B, 2, HK, D),
        "rotary_cos": normal(12, 4), "rotary_sin": normal(12, 4),
        "cache_seqlens": torch.tensor([3, 5]).int(), "causal": True,
    },
    "flash_attn_with_kvcache, packed": lambda: {
        "q": normal(8, H, D), "k_cache": normal(5, 7, HK, D), "v_cache": normal(5, 7, HK, DV),
        "cu_seqlens_q": CU_Q, "max_seqlen_q": 5, "cache_seqlens": torch.tensor([6, 4]).int(),
    },
    "flash_attn_combine": lambda: {
        "out_partial": normal(3, B, SQ, H, D).float(), "lse_partial": normal(3, B, SQ, H).float(),
    },
}  # fmt: skip


def other(name: str) -> Callable[[Arguments], Arguments]:
    return lambda call: {name: call[name].flip(0) * 0.5 + 0.25}


def moved(name: str, by: int) -> Callable[[Arguments], Arguments]:
    return lambda call: {name: call[name] + torch.tensor([0, by, 0]).int()}


def to(**values: Any) -> Callable[[Arguments], Arguments]:
    return lambda call: values


def heads_joined(call: Arguments) -> Arguments:
    return {"qkv": torch.cat([call["qkv"].flatten(2, 3)] * 2, 2)[:, :, : H + 2 * HK]}


CHANGES: dict[str, Callable[[Arguments], Arguments]] = {
    **{name: other(name) for name in ("q", "k", "v", "qkv", "k_cache", "v_cache")},
    **{name: other(name) for name in ("rotary_cos", "rotary_sin", "out_partial", "lse_partial")},
    "cu_seqlens_q": moved("cu_seqlens_q", 1),
    "cu_seqlens_k": moved("cu_seqlens_k", -1),
    "qv": lambda call: {"qv": normal(*call["q"].shape[:-1], DV)},
    "softmax_scale": to(softmax_scale=0.6),
    "causal": lambda call: {"causal": not call.get("causal", False)},
    "window_size": to(window_size=(1, 1)),
    "softcap": to(softcap=0.7),
    "seqused_q": to(seqused_q=torch.tensor([2, 4]).int()),
    "seqused_k": to(seqused_k=torch.tensor([5, 2]).int()),
    "num_heads_q": lambda call: {**heads_joined(call), "num_heads_q": H},
    "cache_seqlens": to(cache_seqlens=torch.tensor([2, 6]).int()),
    "cache_batch_idx": to(cache_batch_idx=torch.tensor([2, 1]).int()),
    "cache_leftpad": to(cache_leftpad=torch.tensor([2, 1]).int()),
    "page_table": lambda call: {"page_table": table()[:, :1] - 2 if "k" in call else table()},
    "rotary_interleaved": to(rotary_interleaved=False),
    "out_dtype": to(out_dtype=torch.bfloat16),
    "return_attn_probs": to(return_attn_probs=False),
    "return_softmax_lse": to(return_softmax_lse=False),
    "out": lambda call: {"out": torch.full(call["out_partial"].shape[1:], torch.nan)},
}
SAME_NUMBERS = ("out", "out_dtype", "return_attn_probs", "return_softmax_lse")
"""These change the form of the answer, or where it lies."""

REFUSED: dict[str, Any] = {
    "q_descale": torch.ones(B, HK),
    "k_descale": torch.ones(B, HK),
    "v_descale": torch.ones(B, HK),
    "attention_chunk": 2,
    "rotary_seqlens": torch.tensor([1, 2]).int(),
}
INERT: dict[str, Any] = {
    "num_splits": 3,
    "pack_gqa": True,
    "sm_margin": 8,
    "scheduler_metadata": torch.zeros(0, dtype=torch.int32),
    "deterministic": True,
    "max_seqlen_q": 9,
    "max_seqlen_k": 9,
    "cu_seqlens_k_new": CU_K,
}
ONLY_IN = {
    "appending": (*NO_NEW, "rotary_interleaved", "causal"),
    "packed": ("cu_seqlens_q", "max_seqlen_q", "cu_seqlens_k_new", "qv"),
}
"""Of the two calls over a cache, the one that an argument belongs to."""


def function(base: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(interface, base.partition(",")[0])
    return found


def parameters(base: str) -> list[str]:
    names = list(inspect.signature(function(base)).parameters)
    there = [mine for kind, mine in ONLY_IN.items() if f", {kind}" not in base]
    absent = {name for mine in there for name in mine} if "kvcache" in base else set()
    return [name for name in names if name not in absent]


def asked(base: str, call: Arguments) -> Arguments:
    """With softmax_lse, unless the call says otherwise."""
    names = inspect.signature(function(base)).parameters
    return {**{n: True for n in ("return_attn_probs", "return_softmax_lse") if n in names}, **call}


def answer(base: str, call: Arguments) -> tuple[Tensor, ...]:
    copies = {n: x.clone() if isinstance(x, Tensor) else x for n, x in call.items()}
    found = function(base)(**asked(base, copies))
    return found if isinstance(found, tuple) else (found,)


def truth(base: str, call: Arguments) -> tuple[Tensor, Tensor]:
    call = {n: x for n, x in call.items() if n not in (*INERT, *SAME_NUMBERS) or n == "out_dtype"}
    if base == "flash_attn_func":
        return dense(**call)
    if base == "flash_attn_varlen_func":
        return varlen(**call)
    if base == "flash_attn_qkvpacked_func":
        qkv, heads = call.pop("qkv"), call.pop("num_heads_q", None)
        q, k, v = qkv.unbind(2) if heads is None else qkv.split([heads, HK, HK], 2)
        return dense(q, k, v, **call)
    if base == "flash_attn_combine":
        weights = torch.softmax(call["lse_partial"].double(), 0)
        out = (call["out_partial"].double() * weights[..., None]).sum(0)
        return out, torch.logsumexp(call["lse_partial"].double(), 0)
    if base.endswith("appending"):
        call["block_table"] = call.pop("page_table", None)
        found = cache_reference.solve(**call)
        return found.out, found.softmax_lse
    return over_pages(**call)


def over_pages(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cu_seqlens_q: Tensor, cache_seqlens: Tensor,
    page_table: Tensor | None = None, cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None, qv: Tensor | None = None, **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    outs, lses = [], []
    for i in range(B):
        rows = slice(int(cu_seqlens_q[i]), int(cu_seqlens_q[i + 1]))
        if page_table is None:
            row = i if cache_batch_idx is None else int(cache_batch_idx[i])
            k, v = k_cache[row], v_cache[row]
        else:
            k, v = (cache[page_table[i].long()].flatten(0, 1) for cache in (k_cache, v_cache))
        seen = slice(0 if cache_leftpad is None else int(cache_leftpad[i]), int(cache_seqlens[i]))
        mine = None if qv is None else qv[rows]
        out, lse = attention(q[rows], k[seen], v[seen], qv=mine, **options)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses, -1)


CASES = [(base, name) for base in BASES for name in parameters(base)]


@pytest.mark.parametrize(("base", "name"), CASES)
def test_every_argument(base: str, name: str) -> None:
    torch.manual_seed(7)
    call = BASES[base]()
    before = answer(base, call)
    if name in REFUSED:
        assert name not in INERT
        assert name not in CHANGES
        with pytest.raises(UnsupportedError) as caught:
            answer(base, {**call, name: REFUSED[name]})
        assert caught.value.argument == name
    elif name in INERT:
        assert name not in CHANGES
        after = answer(base, {**call, name: INERT[name]})
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    else:
        changed = {**call, **CHANGES[name](call)}
        after = answer(base, changed)
        expected = truth(base, changed)
        close = 1e-5 if base == "flash_attn_combine" else 1e-10
        close = 1e-2 if name == "out_dtype" else close
        for found, true in zip(after, expected, strict=False):
            assert found.shape == true.shape
            torch.testing.assert_close(found.double(), true, rtol=close, atol=close)
        if name not in SAME_NUMBERS:
            assert before[0].shape != after[0].shape or (before[0] - after[0]).abs().max() > 1e-3


def test_every_argument_is_somewhere() -> None:
    for base in BASES:
        mine = [name for other, name in CASES if other.partition(",")[0] == base.partition(",")[0]]
        assert set(mine) == set(inspect.signature(function(base)).parameters)


def test_signatures_are_upstreams() -> None:
    win = "window_size=(-1, -1)"
    scales = "q_descale=None, k_descale=None, v_descale=None"
    tail = f"{scales}, {win}, attention_chunk=0, softcap=0.0, "
    after = "num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False"
    expected = {
        "flash_attn_func": f"q, k, v, softmax_scale=None, causal=False, qv=None, {tail}{after}",
        "flash_attn_varlen_func": (
            "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, "
            f"seqused_k=None, softmax_scale=None, causal=False, qv=None, {tail}{after}"
        ),
        "flash_attn_qkvpacked_func": (
            f"qkv, softmax_scale=None, causal=False, {tail}deterministic=False, num_heads_q=None, "
            "sm_margin=0, return_attn_probs=False"
        ),
        "flash_attn_with_kvcache": (
            "q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, "
            "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None, "
            "cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None, "
            f"{scales}, softmax_scale=None, causal=False, {win}, attention_chunk=0, softcap=0.0, "
            "rotary_interleaved=True, scheduler_metadata=None, num_splits=0, pack_gqa=None, "
            "sm_margin=0, return_softmax_lse=False"
        ),
        "flash_attn_combine": "out_partial, lse_partial, out=None, out_dtype=None",
        "get_scheduler_metadata": (
            "batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, "
            "cache_seqlens, qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None, "
            "cu_seqlens_k_new=None, cache_leftpad=None, page_size=None, max_seqlen_k_new=0, "
            f"causal=False, {win}, attention_chunk=0, has_softcap=False, num_splits=0, "
            "pack_gqa=None, sm_margin=0"
        ),
    }
    assert set(expected) == set(interface.__all__)
    for name, text in expected.items():
        signature = inspect.signature(getattr(interface, name))
        bare = [
            p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()
        ]
        assert str(inspect.Signature(bare)) == f"({text})"


@pytest.mark.parametrize("window", [(1, -1), (-1, 2), (0, 3), (2, 9)])
def test_more_queries_than_keys_see_all_that_a_window_allows(window: tuple[int, int]) -> None:
    """Where flash-attention 2 bounds a window by the longest k; FlashAttention 3 does not."""
    q, k, v = normal(B, 9, H, D), normal(B, 2, HK, D), normal(B, 2, HK, D)
    expected = dense(q, k, v, window_size=window)
    found = interface.flash_attn_func(q, k, v, window_size=window, return_attn_probs=True)
    torch.testing.assert_close(found, expected)
    flat, cu_q, cu_k = [x.flatten(0, 1) for x in (q, k, v)], [0, 9, 18], [0, 2, 4]
    lengths = [torch.tensor(x, dtype=torch.int32) for x in (cu_q, cu_k)]
    out = interface.flash_attn_varlen_func(*flat, *lengths, 9, 2, window_size=window)
    torch.testing.assert_close(out, expected[0].flatten(0, 1))
    out = interface.flash_attn_with_kvcache(
        flat[0], k, v, cu_seqlens_q=lengths[0], max_seqlen_q=9, window_size=window
    )
    torch.testing.assert_close(out, expected[0].flatten(0, 1))
    with pytest.raises(UnsupportedError, match="window_size"):
        interface.flash_attn_with_kvcache(q, k, v, window_size=window)


def test_gradients_are_those_of_float64() -> None:
    call = BASES["flash_attn_varlen_func"]()
    call |= {"seqused_q": torch.tensor([2, 5]).int(), "seqused_k": torch.tensor([6, 3]).int()}
    call |= {"qv": normal(8, H, DV), "causal": True}
    names = ("q", "k", "v", "qv")
    leaves = {name: call[name].requires_grad_() for name in names}
    grad = normal(8, H, DV)
    found = torch.autograd.grad(interface.flash_attn_varlen_func(**call), leaves.values(), grad)
    true = {n: x for n, x in call.items() if not n.startswith("max")}
    expected = torch.autograd.grad(varlen(**true)[0], leaves.values(), grad)
    torch.testing.assert_close(found, expected)


def test_parts_are_combined_to_the_whole() -> None:
    q, k, v = (x.float() for x in BASES["flash_attn_func"]().values())
    whole, lse = interface.flash_attn_func(q, k, v, return_attn_probs=True)
    parts = [
        interface.flash_attn_func(q, k[:, i : i + 2], v[:, i : i + 2], return_attn_probs=True)
        for i in (0, 2, 4)
    ]
    # a part without keys may hold anything
    outs = torch.stack([*(out for out, _ in parts), torch.full_like(whole, torch.nan)])
    lses = [*(part.transpose(1, 2) for _, part in parts), torch.full_like(lse, -torch.inf).mT]
    for none in (-torch.inf, torch.inf):
        lses[-1] = torch.full_like(lses[0], none)
        out, found = interface.flash_attn_combine(outs, torch.stack(lses))
        torch.testing.assert_close(out, whole)
        torch.testing.assert_close(found, lse.transpose(1, 2))
        nothing = interface.flash_attn_combine(outs[-1:], lses[-1][None])
        assert torch.equal(nothing[0], torch.zeros_like(whole))
        assert torch.equal(nothing[1], torch.full_like(found, -torch.inf))


def test_new_keys_are_refused_where_they_cannot_be_written() -> None:
    appending = BASES["flash_attn_with_kvcache, appending"]()
    before = appending["k_cache"].clone()
    for more in ({"cu_seqlens_k_new": CU_K}, {"qv": normal(B, 2, H, D)}, {"cu_seqlens_q": CU_Q}):
        with pytest.raises(UnsupportedError) as caught:
            interface.flash_attn_with_kvcache(**appending, **more)
        assert caught.value.argument == "k"
    assert torch.equal(appending["k_cache"], before)


WRONG: dict[str, tuple[str, Arguments, str]] = {
    "a short qv": ("flash_attn_func", {"qv": torch.zeros(1)}, "qv"),
    "float8": ("flash_attn_func", {"q": torch.zeros(B, SQ, H, D).to(torch.float8_e4m3fn)}, "k"),
    "no heads": ("flash_attn_qkvpacked_func", {"num_heads_q": 4, "qkv": normal(2, 4, 5, 8)}, "qkv"),
    "too many used": (
        "flash_attn_varlen_func", {"seqused_q": torch.tensor([4, 1]).int()}, "seqused_q"
    ),
    "too long": (
        "flash_attn_with_kvcache, packed",
        {"cache_seqlens": torch.tensor([8, 1]).int()},
        "cache_seqlens",
    ),
    "a table of one row": (
        "flash_attn_with_kvcache, packed", {"page_table": table()[:1]}, "page_table"
    ),
    "rotary alone": ("flash_attn_with_kvcache, packed", {"rotary_cos": normal(9, 4)}, "rotary_cos"),
    "half": ("flash_attn_combine", {"lse_partial": normal(3, 2, 4, 4)}, "out_partial, lse_partial"),
    "another out": ("flash_attn_combine", {"out": normal(1)}, "out"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_as_the_caller_knows_it(case: str) -> None:
    base, change, argument = WRONG[case]
    with pytest.raises(ArgumentError) as caught:
        answer(base, {**BASES[base](), **change})
    assert caught.value.argument == argument


@pytest.mark.parametrize("base", [base for base in BASES if base != "flash_attn_combine"])
def test_on_a_card(base: str, npu: torch.device) -> None:
    """Within twice the error of the same mathematics in the inputs' own precision."""
    torch.manual_seed(3)
    call = {
        name: x.bfloat16() if isinstance(x, Tensor) and x.dtype == torch.float64 else x
        for name, x in BASES[base]().items()
    }
    exact = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
             for n, x in call.items()}  # fmt: skip
    true, plain = truth(base, exact)[0], truth(base, call)[0].double()
    if base.endswith("appending"):
        plain = cache_reference.solve(**call).plain.double()
    there = {name: x.to(npu) if isinstance(x, Tensor) else x for name, x in call.items()}
    found = answer(base, there)[0].cpu().double()
    assert (found - true).abs().max() <= 2 * (plain - true).abs().max() + 1e-5


def test_metadata_of_the_scheduler_is_taken(npu: torch.device) -> None:
    call = BASES["flash_attn_with_kvcache, packed"]()
    lengths = call["cache_seqlens"].to(npu)
    made = interface.get_scheduler_metadata(B, 5, 7, H, HK, D, lengths, headdim_v=DV, causal=True)
    assert (made.numel(), made.dtype, made.device) == (0, torch.int32, lengths.device)
    plain = interface.flash_attn_with_kvcache(**call)
    assert torch.equal(interface.flash_attn_with_kvcache(**call, scheduler_metadata=made), plain)


def test_rows_without_keys_merge_as_nothing() -> None:
    """FlashAttention 3 says -inf there (hopper/softmax.h, finalize), where 2 says +inf."""
    q, k, other = torch.randn(1, 3, 1, 8), torch.randn(1, 1, 1, 8), torch.randn(1, 4, 1, 8)
    parts = [
        interface.flash_attn_func(q, k, k, causal=True, return_attn_probs=True),
        interface.flash_attn_func(q, other, other, return_attn_probs=True),
    ]
    assert parts[0][1][0, 0].isneginf().tolist() == [True, True, False]
    weights = torch.stack([lse for _, lse in parts]).softmax(0).transpose(2, 3).unsqueeze(-1)
    merged = (weights * torch.stack([out for out, _ in parts])).sum(0)
    assert merged.isfinite().all()
    torch.testing.assert_close(merged[:, :2], parts[1][0][:, :2])
