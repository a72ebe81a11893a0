"""The simulated inference attention against an independent restatement, row by row, and against
what is reported of it: rows and keys that it silently treats otherwise than asked.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flash_attn_npu import _virtual_ascend as virtual_ascend
from tests.helpers.infer_cases import (
    by_rows,
    close,
    in_pages,
    infer,
    packed,
    random,
    sequences_by_rows,
    triangle,
)
from tests.helpers.old_torch import PAGES_OF_TWO_WIDTHS, TORCH, needs

pytestmark = pytest.mark.usefixtures("npu")

KEPT = {
    "all": ({"sparse_mode": 0}, lambda i, j, rows, columns: True),
    "causal": (
        {"sparse_mode": 3, "atten_mask": triangle()},
        lambda i, j, rows, columns: j <= i + columns - rows,
    ),
    "band": (
        {"sparse_mode": 4, "atten_mask": triangle(), "pre_tokens": 2, "next_tokens": 1},
        lambda i, j, rows, columns: -2 <= j - i - (columns - rows) <= 1,
    ),
    "from the top left": (
        {"sparse_mode": 2, "atten_mask": triangle()},
        lambda i, j, rows, columns: j <= i,
    ),
}


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """From BSND."""
    if layout == "BNSD":
        return tensor.transpose(1, 2).contiguous()
    return tensor.flatten(2) if layout == "BSH" else tensor


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("layout", ["BSND", "BNSD", "BSH"])
def test_dense(layout: str, kind: str, dtype: torch.dtype) -> None:
    given, keeps = KEPT[kind]
    rows, columns = [5, 3], [4, 7]
    q, k, v = random(2, 6, 4, 16), random(2, 8, 2, 16), random(2, 8, 2, 16)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    for index, length in enumerate(columns):
        k[index, length:] = v[index, length:] = torch.nan
    out, lse = infer(
        *(laid_out(x, layout) for x in (q, k, v)),
        layout,
        num_heads=4,
        num_key_value_heads=2,
        actual_seq_lengths=rows,
        actual_seq_lengths_kv=columns,
        **given,
    )
    assert lse.shape == (2, 4, 6, 1)
    assert lse.dtype == torch.float32
    expected, sums = torch.full((2, 6, 4, 16), torch.nan), torch.full((2, 6, 4, 1), torch.nan)
    for index, (r, c) in enumerate(zip(rows, columns, strict=True)):
        one = q[index, :r], k[index, :c], v[index, :c]
        results = by_rows(*one, lambda i, j, r=r, c=c: keeps(i, j, r, c))
        expected[index, :r], sums[index, :r] = results
    close(out, laid_out(expected, layout), 1e-2 if dtype == torch.bfloat16 else 2e-3)
    close(lse, sums.transpose(1, 2), 1e-4)


@pytest.mark.parametrize("kind", ["all", "causal", "band"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
def test_packed(heads: tuple[int, int], kind: str) -> None:
    given, keeps = KEPT[kind]
    rows, columns = [3, 0, 1, 5], [3, 4, 6, 9]
    tensors, arguments = packed(rows, columns, heads, **given)
    out, lse = infer(*tensors, "TND", **arguments)
    expected, sums = sequences_by_rows(tensors, rows, columns, keeps)
    assert lse.shape == (9, heads[0], 1)
    close(out, expected)
    close(lse, sums, 1e-4)


@pytest.mark.parametrize("kind", ["all", "causal", "band"])
@pytest.mark.parametrize("cache_dims", [3, 4])
@pytest.mark.parametrize("layout", ["TND", "BSND"])
def test_pages_give_what_contiguous_keys_give(layout: str, cache_dims: int, kind: str) -> None:
    given, keeps = KEPT[kind]
    rows, columns = [2, 2, 2], [20, 0 if kind == "all" else 2, 33]
    (q, k, v), arguments = packed(rows, columns, (4, 2), **given)
    table = torch.tensor([[7, 2, 99], [5, 99, 99], [0, 3, 6]], dtype=torch.int32)
    caches = [in_pages(x, columns, 16, table, 8) for x in (k, v)]
    if cache_dims == 3:
        caches = [cache.flatten(2) for cache in caches]
    else:
        caches = [cache.transpose(1, 2).contiguous() for cache in caches]
    arguments |= {"actual_seq_lengths_kv": columns, "block_table": table, "block_size": 16}
    if layout == "BSND":
        arguments["actual_seq_lengths"] = None
    shaped = q if layout == "TND" else q.unflatten(0, (3, 2))
    out, lse = infer(shaped, *caches, layout, **arguments)
    expected, sums = sequences_by_rows((q, k, v), rows, columns, keeps)
    close(out.reshape(expected.shape), expected)
    if layout == "BSND":
        lse = lse.transpose(1, 2)
    close(lse.reshape(sums.shape), sums, 1e-4)


def narrow(columns: list[int]) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Packed sequences of two rows, with values narrower than keys."""
    (q, k, _), arguments = packed([2] * len(columns), columns, (4, 2), 192)
    return [q, k, random(sum(columns), 2, 128)], arguments


@PAGES_OF_TWO_WIDTHS
def test_pages_with_values_narrower_than_keys() -> None:
    columns = [140, 2, 260]
    given, keeps = KEPT["causal"]
    tensors, arguments = narrow(columns)
    table = torch.tensor([[7, 2, 99], [5, 99, 99], [0, 3, 6]], dtype=torch.int32)
    caches = [in_pages(x, columns, 128, table, 8).flatten(2) for x in tensors[1:]]
    arguments |= {"actual_seq_lengths_kv": columns, "block_table": table, "block_size": 128}
    out, lse = infer(tensors[0], *caches, "TND", **arguments | given)
    assert out.shape == (6, 4, 128)
    expected, sums = sequences_by_rows(tensors, [2] * 3, columns, keeps)
    close(out, expected)
    close(lse, sums, 1e-4)


@PAGES_OF_TWO_WIDTHS
@pytest.mark.parametrize("layout", ["BSND", "BSH"])
def test_dense_values_narrower_than_keys_on_a_950(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIRTUAL_ASCEND_SOC", "Ascend950PR_9589")
    tensors, _ = narrow([5, 5])
    dense = [laid_out(x.unflatten(0, (2, -1)), layout) for x in tensors]
    out, _ = infer(*dense, layout, num_heads=4, num_key_value_heads=2)
    expected, _ = sequences_by_rows(tensors, [2, 2], [5, 5], KEPT["all"][1])
    assert out.shape[-1] == (128 if layout == "BSND" else 4 * 128)
    close(out.reshape(expected.shape), expected)


def test_a_950_takes_caches_that_are_strided_over_their_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    columns, given = [20, 33], KEPT["causal"][0]
    (q, k, v), arguments = packed([2, 2], columns, (4, 2), **given)
    table = torch.tensor([[2, 4, 99], [5, 0, 3]], dtype=torch.int32)
    arguments |= {"actual_seq_lengths_kv": columns, "block_table": table, "block_size": 16}
    # keys and values of one block lie beside each other
    both = torch.stack([in_pages(x, columns, 16, table, 8).flatten(2) for x in (k, v)], 1).npu()

    def read(*caches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return infer(q, *caches, "TND", **arguments)

    expected = read(*(cache.contiguous() for cache in both.unbind(1)))
    with pytest.raises(RuntimeError, match="key must be contiguous"):
        read(*both.unbind(1))
    monkeypatch.setenv("VIRTUAL_ASCEND_SOC", "Ascend950PR_9589")
    for got, wanted in zip(read(*both.unbind(1)), expected, strict=True):
        assert torch.equal(got, wanted)
    with pytest.raises(RuntimeError, match="key must be contiguous"):
        read(*(cache.contiguous().transpose(1, 2) for cache in both.unbind(1)))


def test_a_length_of_one_is_every_sequences_and_surplus_entries_are_cut() -> None:
    q, k = random(3, 2, 1, 16), random(3, 6, 1, 16)
    short = infer(q, k, k, "BSND", actual_seq_lengths_kv=[4])
    long = infer(q, k, k, "BSND", actual_seq_lengths_kv=[4, 4, 4, 9])
    assert torch.equal(short[0], long[0])
    assert torch.equal(short[0], infer(q, k[:, :4].contiguous(), k[:, :4].contiguous(), "BSND")[0])


def test_a_sequence_without_keys_gives_zeros_and_infinity() -> None:
    tensors, arguments = packed([2, 1], [0, 3])
    out, lse = infer(*tensors, "TND", **arguments)
    assert torch.equal(out[:2].cpu(), torch.zeros(2, 2, 64).half())
    assert (lse[:2] == torch.inf).all()
    assert lse[2:].isfinite().all()


def test_no_keys_at_all_give_zeros_and_infinity() -> None:
    out, lse = infer(random(1, 2, 1, 16), *(random(1, 0, 1, 16) for _ in "kv"), "BSND")
    assert not out.any()
    assert (lse == torch.inf).all()


def test_without_the_flag_there_are_no_statistics() -> None:
    q = random(1, 2, 1, 16)
    # torch_npu 2.6 gives a number that says nothing
    assert infer(q, q, q, "BSND", softmax_lse_flag=False)[1].shape == (int(TORCH < (2, 8)),)


def test_the_scale_is_one_unless_given() -> None:
    q, k, v = (random(1, 3, 1, 16) for _ in "qkv")
    expected = by_rows(q[0], k[0], v[0], lambda i, j: True, 1.0)[0]
    import torch_npu

    out = torch_npu.npu_fused_infer_attention_score(q.npu(), k.npu(), v.npu(), input_layout="BSND")[
        0
    ]
    close(out[0], expected)


def test_the_gradient_is_lost_without_an_error() -> None:
    q, k = random(1, 2, 1, 16).npu().requires_grad_(), random(1, 2, 1, 16)
    out = infer(q, k, k, "BSND")[0]
    assert out.requires_grad
    out.sum().backward()
    assert q.grad is None


@pytest.mark.parametrize("mode", [3, 4])
def test_dense_decode_takes_no_notice_of_sparse_modes(mode: int) -> None:
    q, k, v = random(1, 1, 2, 16), random(1, 6, 1, 16), random(1, 6, 1, 16)
    window = {"pre_tokens": 2, "next_tokens": 0} if mode == 4 else {}
    heads = {"num_heads": 2, "num_key_value_heads": 1}
    given = {"sparse_mode": mode, "atten_mask": triangle(), "actual_seq_lengths": [0], **window}
    out = infer(q, k, v, "BSND", **given, **heads)[0]
    close(out[0], by_rows(q[0], k[0], v[0], lambda i, j: True)[0])
    tensors, arguments = packed([1], [6], sparse_mode=4, atten_mask=triangle(), pre_tokens=2)
    arguments["next_tokens"] = 0
    out = infer(*tensors, "TND", **arguments)[0]
    close(out, by_rows(*tensors, lambda i, j: j >= 3)[0])


def test_packed_causal_rows_beyond_the_keys_count_from_the_top_left() -> None:
    rows, columns = [5, 2], [3, 4]
    causal = {"sparse_mode": 3, "atten_mask": triangle()}
    tensors, arguments = packed(rows, columns, **causal)
    out = infer(*tensors, "TND", **arguments)[0]
    top_left = sequences_by_rows(tensors, rows, columns, lambda i, j, r, c: j <= i + max(0, c - r))
    close(out, top_left[0])
    band = {"sparse_mode": 4, "atten_mask": triangle(), "next_tokens": 0}
    out, lse = infer(*tensors, "TND", **{**arguments, **band})
    right = sequences_by_rows(tensors, rows, columns, lambda i, j, r, c: j <= i + c - r)
    close(out, right[0])
    close(lse, right[1], 1e-4)
    assert (lse[:2] == torch.inf).all()


def test_a_matrix_masks_and_repairs_empty_rows_only_if_asked() -> None:
    q, k, v = random(1, 3, 1, 16), random(1, 5, 1, 16), random(1, 5, 1, 16)
    mask = torch.rand(3, 5) < 0.5
    mask[:, 0], mask[1] = False, True
    expected = by_rows(q[0], k[0], v[0], lambda i, j: not mask[i, j])[0]
    out = infer(q, k, v, "BSND", atten_mask=mask.to(torch.int8), sparse_mode=1)[0]
    assert out[0, 1].isnan().all()
    close(out[0, ::2], expected[::2])
    close(infer(q, k, v, "BSND", atten_mask=mask, inner_precise=2)[0][0], expected)


def test_the_reported_averages_come_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, arguments = packed([2], [5], (1, 1))
    right = infer(*tensors, "TND", **arguments)[0]
    close(right, by_rows(*tensors, lambda i, j: True)[0])
    monkeypatch.setenv("VIRTUAL_ASCEND_ISSUE_13699", "1")
    wrong = infer(*tensors, "TND", **arguments)[0]
    close(wrong, tensors[2].double().mean(0, keepdim=True).expand(2, 1, 64))


@needs("npu_fused_infer_attention_score_v2")
def test_the_second_version_computes_the_same() -> None:
    import torch_npu

    tensors, arguments = packed([2, 3], [4, 3], sparse_mode=3, atten_mask=triangle())
    first = infer(*tensors, "TND", **arguments)
    second = torch_npu.npu_fused_infer_attention_score_v2(
        *(x.npu() for x in tensors),
        input_layout="TND",
        actual_seq_qlen=arguments["actual_seq_lengths"],
        actual_seq_kvlen=arguments["actual_seq_lengths_kv"],
        num_query_heads=2,
        num_key_value_heads=1,
        sparse_mode=3,
        atten_mask=triangle().npu(),
        softmax_scale=0.3,
        return_softmax_lse=True,
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_a_step_is_journalled_and_its_memory_counted() -> None:
    (q, _, _), arguments = packed([1], [40])
    table = torch.tensor([[0, 1, 2]], dtype=torch.int32).npu()
    cache = random(4, 16, 64).npu()
    arguments |= {"actual_seq_lengths_kv": [40], "block_table": table, "block_size": 16}
    q = q.npu()
    with virtual_ascend.record() as rec:
        infer(q, cache, cache, "TND", **arguments)
    assert [launch.name for launch in rec.launches] == ["npu_fused_infer_attention_score"]
    given: dict[str, Any] = rec.launches[0].arguments
    assert given["actual_seq_lengths_kv"] == [40]
    outputs = 2 * 64 * 2 + 2 * 4
    assert outputs <= rec.allocated_bytes < outputs + 1024
    counted = rec.allocated_bytes
    with virtual_ascend.record() as copying:
        infer(q, cache.clone(), cache, "TND", **arguments)
    assert copying.allocated_bytes == counted + 4 * 16 * 64 * 2
    assert rec.allocated_bytes == counted


COPIES = {
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.t().contiguous(),
    "reshape": lambda x: x.t().reshape(-1),
    "index": lambda x: x[torch.arange(4, device=x.device)],
    "cast": lambda x: x.half().view(torch.int16),
    "copy": lambda x: x.copy_(x.t()),
    "assignment": lambda x: x.__setitem__(slice(None), x),
}


@pytest.mark.parametrize("name", COPIES)
def test_every_way_to_copy_on_the_device_is_counted(name: str) -> None:
    x = torch.randn(4, 4).npu()
    with virtual_ascend.record() as rec:
        COPIES[name](x)
    assert rec.allocated_bytes >= (32 if name == "cast" else 64)


def test_views_allocate_nothing() -> None:
    x = torch.randn(4, 4).npu()
    with virtual_ascend.record() as rec:
        x.t()[1:].unsqueeze(0)
        x.view(2, 8).contiguous().reshape(-1)
    assert rec.allocated_bytes == 0
