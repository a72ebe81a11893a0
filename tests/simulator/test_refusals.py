"""Every rule by which the simulated Ascend refuses an attention call, broken once each, beside the
nearest call that keeps it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flash_attn_npu._virtual_ascend import CardRefusal
from tests.helpers.old_torch import lacks, needs

pytestmark = pytest.mark.usefixtures("npu")

UNLIMITED = 2147483647


def triangle() -> torch.Tensor:
    return torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def call(version: int = 1, **given: Any) -> Any:
    """One attention call on small tensors, every argument replaceable; on TND if lengths come."""
    import torch_npu

    is_tnd = "actual_seq_qlen" in given
    if is_tnd:
        rows = given.pop("total_q", max(given["actual_seq_qlen"]))
        columns = given.pop("total_kv", max(given["actual_seq_kvlen"]))
        q, k, v = torch.randn(rows, 2, 8), torch.randn(columns, 2, 8), torch.randn(columns, 2, 8)
    else:
        rows, columns = given.pop("rows", 4), given.pop("columns", 4)
        q, k, v = (torch.randn(1, size, 2, 8) for size in (rows, columns, columns))
    q, k, v = given.pop("q", q), given.pop("k", k), given.pop("v", v)
    heads, layout = given.pop("head_num", 2), given.pop("layout", "TND" if is_tnd else "BSND")
    backward = given.pop("backward", False)
    given = {n: x.npu() if isinstance(x, torch.Tensor) else x for n, x in given.items()}
    leaves = [tensor.npu().requires_grad_(backward) for tensor in (q, k, v)]
    operator = (torch_npu.npu_fusion_attention, torch_npu.npu_fusion_attention_v2)[version - 1]
    results = operator(*leaves, heads, layout, scale=0.3, **given)
    if backward:
        results[0].sum().backward()
    return results


def banded(pre: int, following: int, **given: Any) -> dict[str, Any]:
    return {
        "atten_mask": triangle(),
        "sparse_mode": 4,
        "pre_tockens": pre,
        "next_tockens": following,
        **given,
    }


def masked(mode: int, mask: torch.Tensor | None = None, **given: Any) -> dict[str, Any]:
    return {"atten_mask": triangle() if mask is None else mask, "sparse_mode": mode, **given}


def lengths(rows: list[int], columns: list[int], **given: Any) -> dict[str, Any]:
    return {"actual_seq_qlen": rows, "actual_seq_kvlen": columns, **given}


def alibi(pse: torch.Tensor, **given: Any) -> dict[str, Any]:
    return {"version": 2, "pse": pse, "pse_type": 2, **given}


def flipped() -> torch.Tensor:
    mask = triangle()
    mask[7, 3] = True
    return mask


def none_kept() -> torch.Tensor:
    return torch.ones(4, 4, dtype=torch.bool)


BAND = torch.ones(4, 4, dtype=torch.bool).triu(2)
SLOPES = torch.tensor([0.5, 0.25])

REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "head_num": ("must equal query's N", {"head_num": 1}),
    "kv heads do not divide": (
        "must be a multiple of key's N",
        {"head_num": 3, "q": torch.randn(1, 4, 3, 8)},
    ),
    "more than 256 heads": (
        "N must be in 1..256",
        {"head_num": 257, "q": torch.randn(1, 4, 257, 8)}
        | {name: torch.randn(1, 4, 257, 8) for name in "kv"},
    ),
    "head dim above 768": (
        "D must be in 1..768",
        {name: torch.randn(1, 4, 2, 769) for name in "qkv"},
    ),
    "key's head dim": (
        "must equal key's D",
        {"k": torch.randn(1, 4, 2, 4), "v": torch.randn(1, 4, 2, 4)},
    ),
    "value's head dim": ("must not exceed key's D", {"v": torch.randn(1, 4, 2, 16)}),
    "two dtypes": ("need one dtype", {"k": torch.randn(1, 4, 2, 8).half()}),
    "double": (
        "only float16, bfloat16 and float32",
        {name: torch.randn(1, 4, 2, 8).double() for name in "qkv"},
    ),
    "keep_prob zero": ("keep_prob", {"keep_prob": 0.0}),
    "keep_prob above one": ("keep_prob", {"keep_prob": 1.5}),
    "float mask": ("must be bool or uint8", masked(3, triangle().float())),
    "mask of another size": (
        "atten_mask of shape",
        masked(3, torch.ones(4, 4, dtype=torch.bool).triu(1)),
    ),
    "one wrong bit": ("upper triangle", masked(3, flipped())),
    "lower triangle": ("upper triangle", masked(3, ~triangle())),
    "full mask of another size": (
        "atten_mask of a shape in",
        masked(1, torch.zeros(4, 5, dtype=torch.bool)),
    ),
    "full mask of another batch": (
        "atten_mask of a shape in",
        masked(1, torch.zeros(2, 2, 4, 4, dtype=torch.bool)),
    ),
    "window disagrees with mask": (
        "must agree with atten_mask",
        masked(0, BAND, pre_tockens=9, next_tockens=0),
    ),
    "mode 5": ("not simulated", masked(5)),
    "mode 8": ("not simulated", masked(8, **lengths([2, 4], [2, 4]))),
    "mode 9": ("sparse_mode", masked(9)),
    "dense band both negative": ("both are negative", banded(-1, -1)),
    "dense band beyond": ("negative pre_tokens needs", banded(-4, 8)),
    "dense band no row": ("negative next_tokens needs", banded(8, -4)),
    "tnd lengths differ": ("must be the same", lengths([2, 4], [4])),
    "tnd decreases": ("must not decrease", lengths([3, 2, 4], [3, 3, 4])),
    "tnd too short": ("must equal T", lengths([2, 4], [2, 4], total_q=3)),
    "tnd padded": ("EOD scenario", lengths([2, 4], [2, 4], total_q=6, total_kv=6)),
    "tnd padded on one side": ("must equal T", lengths([2, 4, 0], [2, 4, 0], total_q=6)),
    "tnd padded, one zero": ("EOD scenario", lengths([2, 4, 0], [2, 4, 4], total_q=6, total_kv=6)),
    "tnd 20001 sequences": ("at most 20000", lengths([1] * 20001, [1] * 20001)),
    "tnd mode 3 more rows": ("Sq <= Skv", masked(3, **lengths([2, 5], [2, 4]))),
    "tnd mode 3 no keys": ("Sq <= Skv", masked(3, **lengths([1, 3], [0, 4]))),
    "tnd mode 4 more rows": ("Sq - next_tokens <= Skv", banded(5, 0, **lengths([2, 5], [2, 4]))),
    "tnd mode 4 negative pre": ("pre_tokens >= 0", banded(-1, 3, **lengths([2, 4], [2, 4]))),
    "tnd mode 4 empty band": (
        "pre_tokens \\+ next_tokens >= 0",
        banded(1, -2, **lengths([2, 4], [6, 12])),
    ),
    "tnd mode 0 negative next": (
        "next_tokens >= 0",
        masked(0, BAND, next_tockens=-1, **lengths([4], [4])),
    ),
    "tnd row without keys": ("at least one key", masked(1, none_kept(), **lengths([4], [4]))),
    "pse of another dtype": ("query's dtype", {"pse": torch.zeros(1, 2, 4, 4).half()}),
    "pse of another shape": ("pse needs a shape in", {"pse": torch.zeros(1, 1, 4, 4)}),
    "pse with an empty sequence": (
        "length zero",
        {"pse": torch.zeros(2 * 16), **lengths([0, 4], [0, 4])},
    ),
    "alibi in half": ("float32 slopes", alibi(SLOPES.half())),
    "alibi for one head": ("inner pse needs a shape", alibi(SLOPES[:1])),
    "alibi of unequal sizes": ("s1Size and s2Size", alibi(SLOPES, columns=5)),
    "alibi with an empty sequence": ("length zero", alibi(SLOPES, **lengths([0, 4], [0, 4]))),
    "sink in half": (
        "sink must be float32",
        {"sink": torch.zeros(2).half()} | {name: torch.randn(1, 4, 2, 8).half() for name in "qkv"},
    ),
    "sink with float32": ("float16 and bfloat16 only", {"sink": torch.zeros(2)}),
}

ACCEPTED: dict[str, dict[str, Any]] = {
    "grouped heads": {"head_num": 4, "q": torch.randn(1, 4, 4, 8)},
    "head dim 768": {name: torch.randn(1, 4, 2, 768) for name in "qkv"},
    "smaller value": {"v": torch.randn(1, 4, 2, 4)},
    "bytes": masked(3, triangle().to(torch.uint8)),
    "full mask": masked(1, torch.zeros(4, 4, dtype=torch.bool)),
    "full mask per head": masked(1, torch.zeros(1, 2, 4, 4, dtype=torch.bool)),
    "window agrees with mask": masked(0, BAND, pre_tockens=9, next_tockens=1),
    "dense band partial": banded(2, -1, backward=True),
    "dense mode 3 more rows": masked(3, rows=6, backward=True),
    "tnd padded": lengths([2, 4, 0], [2, 4, 0], total_q=6, total_kv=6),
    "tnd empty sequences": lengths([0, 4, 4], [0, 4, 5], backward=True),
    "tnd mode 4 right of the corner": banded(5, 1, **lengths([2, 5], [2, 4])),
    "tnd mode 2 more rows": masked(2, **lengths([2, 5], [2, 4])),
    "alibi": alibi(SLOPES, backward=True),
    "alibi per sequence": alibi(SLOPES[None].repeat(2, 1), **lengths([2, 4], [2, 4])),
    "alibi in tnd of unequal sizes": alibi(SLOPES, **lengths([2, 4], [3, 6])),
    "outer pse in tnd": {"pse": torch.zeros(2 * 8), **lengths([2, 4], [2, 4])},
}

# Fine forward, refused by the gradient
REFUSED_BACKWARD: dict[str, tuple[str, dict[str, Any]]] = {
    "tnd window of one key": (
        "pre_tokens \\+ next_tokens > 0",
        banded(0, 0, **lengths([2, 4], [2, 4])),
    ),
    "tnd band empty": ("-next_tokens", banded(2, -2, **lengths([1, 2], [6, 12]))),
    "pse_type without pse": ("without pse", {"version": 2, "pse_type": 2}),
    "true statistics with padding": (
        "wrong statistics",
        lengths([2, 0], [2, 0], total_q=4, total_kv=4) | {"softmax_layout": "TND"},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    if "sink" in REFUSED[name][1] and lacks("npu_fusion_attention", "sink"):
        pytest.skip("this torch_npu takes no sink")
    rule, given = REFUSED[name]
    with pytest.raises(RuntimeError, match=rule):
        call(**given)


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str) -> None:
    out = call(**ACCEPTED[name])[0]
    # every row was computed, but for those that only pad
    used = max(ACCEPTED[name].get("actual_seq_qlen", [len(out)]))
    assert out[:used].isfinite().all()


@pytest.mark.parametrize("name", REFUSED_BACKWARD)
def test_refused_by_the_gradient(name: str) -> None:
    rule, given = REFUSED_BACKWARD[name]
    if "softmax_layout" in given and lacks("npu_fusion_attention", "softmax_layout"):
        pytest.skip("this torch_npu takes no softmax_layout")
    call(**given)
    with pytest.raises(RuntimeError, match=rule):
        call(**given, backward=True)


@pytest.mark.parametrize("wrong", ["half", "shape", "unequal", "dy", "attention"])
def test_the_gradient_refuses_what_is_not_the_forwards(wrong: str) -> None:
    import torch_npu

    q, k, v, dy = (torch.randn(1, 3, 2, 8).npu() for _ in range(4))
    out, maximum, total = torch_npu.npu_fusion_attention(q, k, v, 2, "BSND")[:3]
    if wrong == "half":
        maximum = maximum.half()
    elif wrong == "shape":
        total = total.transpose(1, 2).contiguous()
    elif wrong == "unequal":
        maximum[0, 0, 0, 3] += 1
    elif wrong == "dy":
        dy = dy[:, :2].contiguous()
    else:
        out = out.bfloat16()
    given = {"softmax_max": maximum, "softmax_sum": total, "attention_in": out}
    with pytest.raises(CardRefusal):
        torch_npu.npu_fusion_attention_grad(q, k, v, dy, 2, "BSND", **given)


@needs("npu_fusion_attention_v2", "softmax_layout")
def test_the_second_version_ignores_the_layout_of_statistics_without_a_sink() -> None:
    torch.manual_seed(0)
    given = lengths([2, 4], [2, 4], q=torch.randn(4, 2, 8), k=torch.randn(4, 2, 8))
    first = call(**given)[1]
    assert torch.equal(first, call(version=2, softmax_layout="TND", **given)[1])
    assert not torch.equal(first, call(softmax_layout="TND", **given)[1])


def test_operators_without_arithmetic_say_so() -> None:
    import torch_npu

    with pytest.raises(NotImplementedError, match="no simulated arithmetic"):
        torch_npu.npu_silu(torch.randn(2, 4).npu())
