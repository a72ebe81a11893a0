"""Every rule by which the simulated Ascend refuses a call of the inference attention, broken once
each, beside the nearest call that keeps it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.infer_cases import infer, packed, random, triangle
from tests.helpers.old_torch import TORCH, needs

pytestmark = pytest.mark.usefixtures("npu")

Answer = tuple[torch.Tensor, torch.Tensor]


def dense(**given: Any) -> Answer:
    """Two sequences of 2 rows and 4 keys in BSND, every argument replaceable."""
    layout = given.pop("layout", "BSND")
    q = given.pop("q", random(2, 2, 2, 16))
    k = given.pop("k", random(2, 4, 1, 16))
    v = given.pop("v", torch.zeros_like(k))
    return infer(q, k, v, layout, **{"num_heads": 2, "num_key_value_heads": 1, **given})


def tnd(**given: Any) -> Answer:
    """Packed sequences of 2 and 3 rows and keys, every argument replaceable."""
    rows, columns = given.pop("rows", [2, 3]), given.pop("columns", [2, 3])
    sizes = {name: given.pop(name) for name in ("heads", "width") if name in given}
    (q, k, v), arguments = packed(rows, columns, **sizes)
    if "dtype" in given:
        dtype = given.pop("dtype")
        q, k, v = (x.to(dtype) for x in (q, k, v))
    v = given.pop("v", v)
    return infer(q, k, v, "TND", **{**arguments, **given})


def paged(**given: Any) -> Answer:
    """tnd over a cache of 4 blocks of 16, every argument replaceable."""
    rows = given.pop("rows", [1, 1])
    width, size = given.pop("width", 64), given.pop("size", 16)
    blocks = given.pop("blocks", 4)
    cache = given.pop("cache", random(blocks, size, width))
    arguments = {
        "actual_seq_lengths": torch.tensor(rows).cumsum(0).tolist(),
        "actual_seq_lengths_kv": [16, 20],
        "block_table": table([[0, 9], [1, 2]]),
        "block_size": cache.shape[-2],
        "num_heads": 2,
        "num_key_value_heads": 1,
    }
    q = given.pop("q", random(sum(rows), 2, width))
    layout, values = given.pop("layout", "TND"), given.pop("values", cache)
    return infer(q, cache, values, layout, **{**arguments, **given})


def table(pages: list[list[int]], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(pages, dtype=dtype)


def masked(mode: int, **given: Any) -> dict[str, Any]:
    return {"sparse_mode": mode, "atten_mask": triangle(), **given}


def flipped() -> torch.Tensor:
    mask = triangle()
    mask[7, 3] = True
    return mask


def matrix(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bool)


FLOATS = {name: random(2, 4, 2, 16, dtype=torch.float32) for name in "qkv"}

NARROW = {"q": random(2, 2, 2, 192), "k": random(2, 4, 1, 192), "v": random(2, 4, 1, 128)}

REFUSED: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "another layout": ("not simulated", dense, {"layout": "BNSD_BSND"}),
    "bias": ("pse_shift: not simulated", dense, {"pse_shift": random(2, 2, 2, 4)}),
    "left padding": (
        "kv_padding_size: not simulated",
        paged,
        {"kv_padding_size": torch.zeros(1, dtype=torch.int64)},
    ),
    "bias with pages": ("pse_shift: not simulated", paged, {"pse_shift": random(1, 2, 1, 32)}),
    "query not contiguous": (
        "query must be contiguous",
        dense,
        {"q": random(2, 2, 2, 16).transpose(1, 2)},
    ),
    "key not contiguous": (
        "key must be contiguous",
        dense,
        {"k": random(2, 2, 4, 16).transpose(1, 2), "num_key_value_heads": 2},
    ),
    "value not contiguous": (
        "value must be contiguous",
        dense,
        {
            "k": random(2, 4, 2, 16),
            "v": random(2, 2, 4, 16).transpose(1, 2),
            "num_key_value_heads": 2,
        },
    ),
    "float": ("only float16 and bfloat16", dense, FLOATS),
    "two dtypes": ("need one dtype", dense, {"k": random(2, 4, 1, 16).bfloat16()}),
    "dimensions": ("consistent with that of Layout", dense, {"q": random(2, 2, 32)}),
    "inner_precise": ("inner_precise 4", dense, {"inner_precise": 4}),
    "N above 256": ("N must be in", dense, {"q": random(2, 2, 257, 16), "num_heads": 257}),
    "num_heads": ("must equal query's N", dense, {"num_heads": 3}),
    "num_heads in BSH": (
        "must divide H",
        dense,
        {"layout": "BSH", "q": random(2, 2, 31), "k": random(2, 4, 16)},
    ),
    "kv heads do not divide": (
        "must divide N",
        dense,
        {"k": random(2, 4, 3, 16), "num_key_value_heads": 3},
    ),
    "kv heads not given": ("must be the N of key", dense, {"num_key_value_heads": 0}),
    "kv heads differ": ("must be the N of key", dense, {"k": random(2, 4, 2, 16)}),
    "key's D": ("must equal key's D", dense, {"k": random(2, 4, 1, 32)}),
    "D above 512": (
        "D must be in 1..512",
        dense,
        {"q": random(2, 1, 2, 528), "k": random(2, 4, 1, 528)},
    ),
    "shapes of key and value": ("need one shape", dense, {"v": random(2, 5, 1, 16)}),
    "B above 65536": (
        "B must be in",
        dense,
        {name: random(65537, 1, 1, 1) for name in "qkv"}
        | {"num_heads": 1, "num_key_value_heads": 1},
    ),
    "another batch": ("need the same B", dense, {"k": random(3, 4, 1, 16)}),
    "D not divisible by 16": (
        "divisible by 16",
        dense,
        {"q": random(2, 2, 2, 24), "k": random(2, 4, 1, 24)},
    ),
    "one row, large D not divisible by 16": (
        "must not exceed 128",
        dense,
        {"q": random(2, 1, 2, 136), "k": random(2, 4, 1, 136)},
    ),
    "flat width": (
        "N \\* D < 65536",
        dense,
        {"q": random(2, 1, 128, 512), "k": random(2, 4, 1, 512), "num_heads": 128},
    ),
    "list of lengths too short": (
        "at least B 3",
        dense,
        {"q": random(3, 2, 2, 16), "k": random(3, 4, 1, 16), "actual_seq_lengths_kv": [1, 2]},
    ),
    "negative length": ("must not be negative", dense, {"actual_seq_lengths_kv": [-1]}),
    "kv length beyond": ("must not exceed S 4", dense, {"actual_seq_lengths_kv": [4, 5]}),
    "q length beyond": ("must not exceed S 2", dense, {"actual_seq_lengths": [3]}),
    "mode 9": ("not simulated", dense, masked(9)),
    "mode 3 without mask": ("needs atten_mask", dense, {"sparse_mode": 3}),
    "mode 1 without mask": ("needs atten_mask", dense, {"sparse_mode": 1}),
    "float mask": ("bool, int8 or uint8", dense, masked(3, atten_mask=triangle().half())),
    "transposed mask": (
        "atten_mask must be contiguous",
        dense,
        masked(3, atten_mask=triangle().t()),
    ),
    "mask of another size": ("of a shape in", dense, masked(3, atten_mask=matrix(2, 4))),
    "one wrong bit": ("upper triangle", dense, masked(3, atten_mask=flipped())),
    "band without keys": (
        "sum that is not negative",
        dense,
        masked(4, pre_tokens=-1, next_tokens=0),
    ),
    "band beyond": ("must not be below", dense, masked(4, pre_tokens=-3)),
    "matrix of another size": ("needs atten_mask", dense, masked(1, atten_mask=matrix(2, 5))),
    "window disagrees with matrix": (
        "must agree with atten_mask",
        dense,
        masked(0, atten_mask=matrix(2, 4), pre_tokens=0),
    ),
    "matrix with one row": (
        "with one row: not simulated",
        dense,
        {"q": random(2, 1, 2, 16), "atten_mask": matrix(2, 1, 1, 4)},
    ),
    "tnd without lengths": ("needs actual_seq_lengths", tnd, {"actual_seq_lengths_kv": None}),
    "tnd lengths differ": ("same number of entries", tnd, {"actual_seq_lengths": [5]}),
    "tnd decreases": ("must not decrease", tnd, {"actual_seq_lengths": [6, 5]}),
    "tnd padded": ("must equal T 5", tnd, {"actual_seq_lengths": [2, 4]}),
    "tnd keys padded": ("must equal T 5", tnd, {"actual_seq_lengths_kv": [2, 4]}),
    "tnd negative": ("must not decrease", tnd, {"actual_seq_lengths": [-1, 5]}),
    "tnd 65537 sequences": (
        "at most 65536",
        tnd,
        {"actual_seq_lengths": [5] * 65537, "actual_seq_lengths_kv": [5] * 65537},
    ),
    "tnd without any length": ("needs actual_seq_lengths", tnd, {"actual_seq_lengths": None}),
    "tnd mode 2": ("sparse_mode 0, 3 or 4", tnd, masked(2)),
    "tnd mode 0 with mask": ("takes no atten_mask", tnd, masked(0)),
    "tnd grouped, not precise": ("inner_precise in", tnd, {"inner_precise": 1}),
    "tnd bfloat16, not precise": (
        "inner_precise in",
        tnd,
        {"heads": (2, 2), "dtype": torch.bfloat16, "inner_precise": 1},
    ),
    "tnd D": ("TND needs D of", tnd, {"width": 272}),
    "tnd D not divisible by 16": ("divisible by 16", tnd, {"width": 72}),
    "tnd value's D": ("one D, or 192 and 128", tnd, {"v": random(5, 1, 32)}),
    "tnd value's rows": ("one shape, D apart", tnd, {"v": random(4, 1, 64)}),
    "dense with D 192 and 128": ("one D, or 192 and 128 in TND", dense, NARROW),
    "pages with D 192 and 64": (
        "one D, or 192 and 128",
        paged,
        {"width": 192, "values": random(4, 16, 64)},
    ),
    "quantized output": (
        "quant_offset2, quant_scale2: not simulated",
        dense,
        {"quant_scale2": torch.ones(1), "quant_offset2": torch.zeros(1)},
    ),
    "tnd more rows, not the flash path": (
        "Sq <= Skv",
        tnd,
        masked(3, rows=[2, 4], width=192, v=random(5, 1, 128)),
    ),
    "pages without kv heads": ("divides by zero", paged, {"num_key_value_heads": 0}),
    "pages without lengths": (
        "needs actual_seq_lengths",
        paged,
        {"actual_seq_lengths_kv": None},
    ),
    "dense pages without lengths": (
        "block_table needs actual_seq_lengths_kv",
        paged,
        {
            "layout": "BSND",
            "q": random(2, 1, 2, 64),
            "actual_seq_lengths": None,
            "actual_seq_lengths_kv": None,
        },
    ),
    "pages of negative length": (
        "must not be negative",
        paged,
        {"actual_seq_lengths_kv": [16, -1]},
    ),
    "cache whose H does not divide": (
        "must divide H",
        paged,
        {"q": random(2, 2, 64), "num_key_value_heads": 2, "cache": random(4, 16, 129)},
    ),
    "cache too wide": (
        "H <= 65535",
        paged,
        {
            "q": random(2, 256, 256),
            "num_heads": 256,
            "num_key_value_heads": 256,
            "cache": random(4, 16, 65536),
        },
    ),
    "pages with a short list": ("same number", paged, {"actual_seq_lengths_kv": [16]}),
    "block id beyond": ("outside the cache", paged, {"block_table": table([[0, 9], [1, 4]])}),
    "block id negative": ("outside the cache", paged, {"block_table": table([[-1, 9], [1, 2]])}),
    "table too narrow": ("needs 2 entries", paged, {"block_table": table([[0], [1]])}),
    "table without pages": (
        "must not be empty",
        paged,
        {"block_table": table([[], []]), "actual_seq_lengths_kv": [0, 0]},
    ),
    "table too short": ("a row for each", paged, {"block_table": table([[0, 1]])}),
    "table of int64": (
        "must be int32",
        paged,
        {"block_table": table([[0, 9], [1, 2]], torch.int64)},
    ),
    "table not contiguous": (
        "contiguous",
        paged,
        {"block_table": table([[0, 1], [9, 2]]).t()},
    ),
    "table of one dimension": ("contiguous", paged, {"block_table": table([[0, 1]])[0]}),
    "block_size differs": ("must be the cache's", paged, {"block_size": 32}),
    "block_size not given": ("must be the cache's", paged, {"block_size": 0}),
    "block_size not divisible": ("divisible by 16", paged, {"size": 24}),
    "block_size above 1024": ("at most 1024", paged, {"size": 1040}),
    "block_size above 512": (
        "at most 512",
        paged,
        {
            "layout": "BSH",
            "q": random(2, 1, 160),
            "cache": random(4, 528, 80),
            "actual_seq_lengths": None,
        },
    ),
    "block_size not divisible by 128": (
        "divisible by 128",
        paged,
        {
            "layout": "BSND",
            "q": random(2, 2, 2, 80),
            "cache": random(4, 64, 80),
            "actual_seq_lengths": None,
        },
    ),
    "cache of blocks, tokens and heads": (
        "\\[blocks, 1, block_size, D\\]",
        paged,
        {"cache": random(4, 16, 1, 64), "block_size": 16},
    ),
    "cache of 5 dimensions": ("need \\(3, 4\\)", paged, {"cache": random(4, 1, 4, 16, 16)}),
    "too few blocks": ("as many blocks", paged, {"blocks": 2}),
}

ACCEPTED: dict[str, tuple[Any, dict[str, Any]]] = {
    "dense": (dense, {}),
    "one row, any D": (dense, {"q": random(2, 1, 2, 20), "k": random(2, 4, 1, 20)}),
    "flat width in BNSD": (
        dense,
        {
            "layout": "BNSD",
            "q": random(2, 128, 1, 512),
            "k": random(2, 1, 4, 512),
            "num_heads": 128,
        },
    ),
    "mask as bytes": (dense, masked(3, atten_mask=triangle()[None, None].to(torch.uint8))),
    "matrix padded to 16": (dense, masked(1, atten_mask=matrix(2, 1, 16, 16))),
    "one row, first version, compressed mask": (dense, masked(3, q=random(2, 1, 2, 16))),
    "tnd with D 80": (tnd, {"width": 80}),
    "tnd with D 192 and 128": (tnd, {"width": 192, "v": random(5, 1, 128)}),
    "tnd half, high performance": (tnd, {"heads": (2, 2), "inner_precise": 1}),
    "pages": (paged, {}),
    "pages with D 192 and 128": (paged, {"width": 192, "values": random(4, 16, 128)}),
    "pages of 1024": (paged, {"size": 1024}),
    "table wider than needed": (paged, {"block_table": table([[0, 9, 9], [1, 2, 9]])}),
    "empty key": (dense, {"k": random(2, 0, 1, 16), "sparse_mode": 3}),
}

OLD: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "tnd D": ("old CANN", tnd, {"width": 96}),
    "ratio": ("old CANN", tnd, {"heads": (65, 1)}),
    "pages of 16": ("old CANN", paged, {"rows": [2, 1]}),
    "cache of 4 dimensions": (
        "old CANN",
        paged,
        {
            "layout": "BSND",
            "q": random(2, 1, 2, 64),
            "cache": random(4, 1, 16, 64),
            "actual_seq_lengths": None,
        },
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    if name == "dimensions" and TORCH < (2, 8):
        pytest.skip("torch_npu 2.6 does not compare them")
    rule, call, given = REFUSED[name]
    with pytest.raises(RuntimeError, match=rule):
        call(**given)


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str) -> None:
    if "D 192 and 128" in name and TORCH < (2, 8):
        pytest.skip("torch_npu 2.6 answers from pages in the headdim of queries")
    call, given = ACCEPTED[name]
    out, lse = call(**given)
    # every row was computed
    assert out.isfinite().all()
    assert not lse.isnan().any()


@pytest.mark.parametrize("name", OLD)
def test_refused_by_old_releases_only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, call, given = OLD[name]
    call(**given)
    monkeypatch.setenv("VIRTUAL_ASCEND_OLD_FIA", "1")
    tnd(width=192)
    with pytest.raises(RuntimeError, match=rule):
        call(**given)


@needs("npu_fused_infer_attention_score_v2")
def test_the_second_version_refuses_the_compressed_mask_with_one_dense_row() -> None:
    import torch_npu

    q = random(1, 1, 1, 16).npu()
    given = {"atten_mask": triangle().npu(), "sparse_mode": 3}
    with pytest.raises(RuntimeError, match="second version refuses"):
        torch_npu.npu_fused_infer_attention_score_v2(q, q, q, input_layout="BSND", **given)
