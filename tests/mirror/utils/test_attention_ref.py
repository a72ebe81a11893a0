"""`attention_ref` and its masks against attention written out token by token in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flash_attn_npu as fa
from flash_attn_npu.errors import ArgumentError, ArgumentTypeError
from flash_attn_npu.utils.testing import attention_ref, construct_chunk_mask, construct_local_mask

BATCH, HEADS, HEADS_K, SEQLEN_Q, SEQLEN_K, HEADDIM, HEADDIM_V = 2, 4, 2, 5, 7, 6, 3
QUERIES = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
KEYS = torch.tensor([[1, 1, 1, 1, 1, 1, 0], [1, 0, 1, 1, 1, 1, 1]], dtype=torch.bool)
LEFTPAD = torch.tensor([2, 0])
MASKS = {"query_padding_mask": QUERIES, "key_padding_mask": KEYS}


def is_visible(query: int, key: int, shift: int, options: dict[str, Any]) -> bool:
    """Whether token `query` sees token `key`; `shift` is how many more keys there are."""
    left, right = options.get("window_size", (None, None))
    if options.get("causal"):
        right = 0
    aligned = query + shift
    chunk = options.get("attention_chunk", 0)
    if chunk and key // chunk != aligned // chunk:
        return False
    if right is not None and right >= 0 and key > aligned + right:
        return False
    sink = key < options.get("sink_token_length", 0)
    return left is None or left < 0 or sink or key >= aligned - left


def written_out(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """(output, attention), one query and one head at a time."""
    queries = options.get("query_padding_mask", torch.ones(BATCH, SEQLEN_Q, dtype=torch.bool))
    keys = options.get("key_padding_mask", torch.ones(BATCH, SEQLEN_K, dtype=torch.bool))
    leftpad = options.get("key_leftpad", torch.zeros(BATCH, dtype=torch.int64))
    keep = options.get("dropout_mask", torch.ones(BATCH, HEADS, SEQLEN_Q, SEQLEN_K) > 0)
    factors = [options.get(f"{name}_descale", torch.ones(BATCH, HEADS_K).to(q)) for name in "qkv"]
    qv, sink, cap = options.get("qv"), options.get("learnable_sink"), options.get("softcap", 0.0)
    scale = (HEADDIM if qv is None else HEADDIM + HEADDIM_V) ** -0.5
    outputs, weights = [], []
    for b in range(BATCH):
        places_q = [i for i in range(SEQLEN_Q) if queries[b, i]]
        places_k = [j for j in range(SEQLEN_K) if keys[b, j] and j >= leftpad[b]]
        shift = len(places_k) - len(places_q)
        for h in range(HEADS):
            g = h // (HEADS // HEADS_K)
            q_factor, k_factor, v_factor = (factor[b, g] for factor in factors)
            for i in range(SEQLEN_Q):
                seen, scores = [], []
                for number, j in enumerate(places_k):
                    if i not in places_q:
                        continue
                    if not is_visible(places_q.index(i), number, shift, options):
                        continue
                    score = (q[b, i, h] * q_factor) @ (k[b, j, g] * k_factor)
                    if qv is not None:
                        score = score + (qv[b, i, h] * q_factor) @ (v[b, j, g] * v_factor)
                    score = score * scale
                    if cap:
                        score = cap * torch.tanh(score / cap)
                    if "attn_bias" in options:
                        score = score + options["attn_bias"][0, h, i, j]
                    seen.append(j)
                    scores.append(score)
                row, out = [q.new_zeros(())] * SEQLEN_K, q.new_zeros(HEADDIM_V)
                if seen:
                    every = scores if sink is None else [*scores, sink[h]]
                    for j, weight in zip(seen, torch.stack(every).softmax(0), strict=False):
                        row[j] = weight
                        if keep[b, h, i, j]:
                            kept = weight / (1 - options.get("dropout_p", 0.0))
                            out = out + kept * v[b, j, g] * v_factor
                outputs.append(out)
                weights.append(torch.stack(row))
    output = torch.stack(outputs).view(BATCH, HEADS, SEQLEN_Q, HEADDIM_V).transpose(1, 2)
    return output, torch.stack(weights).view(BATCH, HEADS, SEQLEN_Q, SEQLEN_K)


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = (
        (BATCH, SEQLEN_Q, HEADS, HEADDIM),
        (BATCH, SEQLEN_K, HEADS_K, HEADDIM),
        (BATCH, SEQLEN_K, HEADS_K, HEADDIM_V),
    )
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def random(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "causal window": {"causal": True, "window_size": (1, 4)},
    "window": {"window_size": (1, 2)},
    "left side": {"window_size": (2, None)},
    "right side, the other negative": {"window_size": (-1, 0)},
    "first keys stay": {"window_size": (0, 1), "sink_token_length": 2},
    "chunks": {"attention_chunk": 3},
    "causal chunks": {"attention_chunk": 2, "causal": True, **MASKS},
    "masks": MASKS,
    "masks and window": {**MASKS, "window_size": (1, 1)},
    "leftpad": {"key_leftpad": LEFTPAD},
    "leftpad, masks, causal": {**MASKS, "key_leftpad": LEFTPAD, "causal": True},
    "bias behind softcap": {"softcap": 0.7, "attn_bias": random(1, HEADS, SEQLEN_Q, SEQLEN_K)},
    "dropout": {
        "dropout_p": 0.25,
        "dropout_mask": random(BATCH, HEADS, SEQLEN_Q, SEQLEN_K) > 0.75,
    },
    "qv": {"qv": random(BATCH, SEQLEN_Q, HEADS, HEADDIM_V)},
    "descale": {
        "q_descale": random(BATCH, HEADS_K),
        "k_descale": random(BATCH, HEADS_K) + 1,
        "v_descale": random(BATCH, HEADS_K) + 2,
    },
    "descaled qv": {
        "q_descale": random(BATCH, HEADS_K) + 1,
        "qv": random(BATCH, SEQLEN_Q, HEADS, HEADDIM_V),
    },
    "sink": {"learnable_sink": random(HEADS), "window_size": (0, 0)},
    "k is scaled": {"reorder_ops": True, "softcap": 2.0},
}


@pytest.mark.parametrize("case", CASES)
def test_equals_attention_written_out(case: str) -> None:
    options = CASES[case]
    answers = []
    for function in (attention_ref, written_out):
        tensors = inputs()
        output, attention = function(*tensors, **options)
        weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
        (output * weight).sum().backward()
        answers.append([output, attention, *(x.grad for x in tensors)])
    for ours, theirs in zip(*answers, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_rows_without_keys_are_zeros_in_both_directions() -> None:
    tensors = inputs()
    nothing = torch.zeros(BATCH, SEQLEN_K, dtype=torch.bool)
    output, attention = attention_ref(*tensors, key_padding_mask=nothing)
    output.sum().backward()
    assert not output.any()
    assert not attention.any()
    assert all(not x.grad.any() for x in tensors)


def test_padding_may_hold_anything() -> None:
    tensors = inputs()
    poisoned = [x.detach().clone() for x in tensors]
    poisoned[0][~QUERIES] = torch.nan
    for x in poisoned[1:]:
        x[~KEYS] = torch.inf
    for x in poisoned:
        x.requires_grad_()
    clean, dirty = (attention_ref(*x, **MASKS, causal=True)[0] for x in (tensors, poisoned))
    assert torch.equal(clean, dirty)
    dirty.sum().backward()
    assert all(x.grad.isfinite().all() for x in poisoned)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_upcast_rounds_once(dtype: torch.dtype) -> None:
    tensors = [x.detach() for x in inputs(dtype)]
    exact = attention_ref(*(x.double() for x in tensors), causal=True)
    upcast = attention_ref(*tensors, causal=True)
    plain = attention_ref(*tensors, causal=True, upcast=False)
    for ours, rounded, reference in zip(upcast, plain, exact, strict=True):
        assert ours.dtype == rounded.dtype == dtype
        # half a unit in the last place, and what float32 leaves
        torch.testing.assert_close(
            ours.double(), reference, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-6
        )
        error = (ours.double() - reference).abs().mean()
        assert error < (rounded.double() - reference).abs().mean()


def test_intermediate_dtype_rounds_the_weights_alone() -> None:
    q, k, v = (x.detach() for x in inputs(torch.float32))
    output, attention = attention_ref(q, k, v, intermediate_dtype=torch.bfloat16)
    values = v.repeat_interleave(HEADS // HEADS_K, dim=2)
    rounded = torch.einsum("bhqk,bkhd->bqhd", attention.bfloat16().float(), values)
    torch.testing.assert_close(output, rounded)
    assert not torch.equal(attention, attention.bfloat16().float())


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (2, 1)}])
def test_agrees_with_the_function_it_is_a_reference_of(options: dict[str, Any]) -> None:
    q, k, _ = (x.detach() for x in inputs())
    out = fa.flash_attn_func(q, k, k.flip(1), **options)
    torch.testing.assert_close(out, attention_ref(q, k, k.flip(1), **options)[0])


def test_masks_are_true_where_a_key_is_hidden() -> None:
    local = construct_local_mask(2, 4, (1, 0))
    assert local.tolist() == [[True, False, False, True], [True, True, False, False]]
    assert not construct_local_mask(2, 4).any()
    chunks = construct_chunk_mask(2, 4, 2, key_padding_mask=torch.tensor([[1, 1, 1, 0]]) > 0)
    assert chunks.tolist() == [[[[False, False, True, True], [True, True, False, True]]]]
    kept = construct_local_mask(1, 4, (0, 0), sink_token_length=1, key_leftpad=torch.tensor([2]))
    assert kept.tolist() == [[[[True, True, False, False]]]]


def test_runs_where_the_inputs_are(device: torch.device) -> None:
    tensors = [x.detach() for x in inputs(torch.float32)]
    options = {**MASKS, "causal": True, "attention_chunk": 4, "key_leftpad": LEFTPAD}
    there = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    output, _ = attention_ref(*(x.to(device) for x in tensors), **there)
    assert output.device == device
    torch.testing.assert_close(output.cpu(), attention_ref(*tensors, **options)[0])


def test_bad_input_is_named() -> None:
    q, k, v = (x.detach() for x in inputs())
    with pytest.raises(ArgumentTypeError, match=r"^k: got .*; allowed: .*; to fix it: "):
        attention_ref(q, [k], v)
    with pytest.raises(ArgumentError, match=r"^v: got .*; allowed: \(batch.*; to fix it: "):
        attention_ref(q, k, v[0])
    with pytest.raises(ArgumentError, match=r"^k: got .*; allowed: nheads_k a divisor of"):
        attention_ref(q[:, :, :3], k, v)
    with pytest.raises(ArgumentError, match=r"^attention_chunk: got 0; allowed: at least 1"):
        construct_chunk_mask(2, 2, 0)
