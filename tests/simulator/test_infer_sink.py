"""`learnable_sink` of the simulated inference attention's second version: its arithmetic against
Huawei's own golden, a softmax over the scores and the sink, and what the documents refuse of it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_npu import _virtual_ascend as virtual_ascend
from tests.helpers.infer_cases import close, cumulative, in_pages, triangle
from tests.helpers.old_torch import needs

pytestmark = [pytest.mark.usefixtures("npu"), needs("npu_fused_infer_attention_score_v2")]

ROWS, COLUMNS = [1, 3, 0, 2], [20, 33, 5, 0]
HEADS, HEADS_K, WIDTH, SCALE = 4, 2, 64, 0.2
SINK = torch.tensor([2.0, -1.0, 0.5, 4.0], dtype=torch.bfloat16)
TABLE = torch.tensor([[7, 2, 99], [5, 0, 4], [3, 99, 99], [99, 99, 99]], dtype=torch.int32)


def tensors(dtype: torch.dtype = torch.bfloat16, width: int = WIDTH) -> list[Tensor]:
    torch.manual_seed(1)
    shapes = ((sum(ROWS), HEADS), *[(sum(COLUMNS), HEADS_K)] * 2)
    return [torch.randn(*shape, width).to(dtype) for shape in shapes]


def ask(q: Tensor, k: Tensor, v: Tensor, **changed: Any) -> tuple[Tensor, Tensor]:
    """One call over pages of 16, its tensors on the host."""
    import torch_npu

    caches = [in_pages(x, COLUMNS, 16, TABLE, 8).flatten(2) for x in (k, v)]
    given = {
        "input_layout": "TND", "actual_seq_qlen": cumulative(ROWS), "actual_seq_kvlen": COLUMNS,
        "block_table": TABLE, "block_size": 16, "num_query_heads": HEADS,
        "num_key_value_heads": HEADS_K, "softmax_scale": SCALE, "learnable_sink": SINK,
        "sparse_mode": 3, "atten_mask": triangle(), "return_softmax_lse": True,
    } | changed  # fmt: skip
    given = {name: x.npu() if isinstance(x, Tensor) else x for name, x in given.items()}
    out, lse = torch_npu.npu_fused_infer_attention_score_v2(
        q.npu(), *(x.npu() for x in caches), **given
    )
    return out.cpu(), lse.cpu()


def golden(q: Tensor, k: Tensor, v: Tensor, left: int | None = None) -> Tensor:
    """Sequence by sequence: softmax of scores and sink, the sink's part dropped."""
    found = []
    for one, keys, values in zip(q.split(ROWS), k.split(COLUMNS), v.split(COLUMNS), strict=True):
        keys, values = (
            x.double().repeat_interleave(HEADS // HEADS_K, 1).transpose(0, 1)
            for x in (keys, values)
        )
        scores = SCALE * one.double().transpose(0, 1) @ keys.transpose(1, 2)
        distance = torch.arange(keys.shape[1]) - torch.arange(len(one))[:, None]
        distance -= keys.shape[1] - len(one)
        hidden = (distance > 0) | (distance < -left if left is not None else False)
        scores = scores.masked_fill(hidden, -torch.inf)
        sink = SINK.double()[:, None, None].expand(HEADS, len(one), 1)
        weights = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
        found.append((weights @ values).transpose(0, 1))
    return torch.cat(found)


@pytest.mark.parametrize("left", [None, 4])
def test_the_sink_is_one_more_score(left: int | None) -> None:
    given = tensors()
    band = {} if left is None else {"sparse_mode": 4, "pre_tokens": left, "next_tokens": 0}
    out, lse = ask(*given, **band)
    close(out, golden(*given, left), 1e-2)
    # of a sequence without keys too, whose queries get zeros
    assert not out[-2:].any()
    # no document says whether it counts the sink
    assert lse.isnan().all()
    without, _ = ask(*given, learnable_sink=None, **band)
    assert (out - without).abs().max() > 0.1


def test_a_row_without_keys_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROWS", [1, 40, 0, 2])
    out, _ = ask(*tensors(), sparse_mode=4, pre_tokens=2147483647, next_tokens=0)
    assert out[1:8].isnan().all()
    assert out[8:].isfinite().all()


HALF = torch.float16
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another dtype": ({"learnable_sink": SINK.float()}, "one dtype"),
    "float16 beside bfloat16": ({"learnable_sink": SINK.half()}, "one dtype"),
    "another shape": ({"learnable_sink": SINK[:2]}, "contiguous"),
    "an imprecise kernel": ({"inner_precise": 2}, "inner_precise"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_documents_refuse(case: str) -> None:
    changed, words = REFUSED[case]
    with pytest.raises(virtual_ascend.CardRefusal, match=words):
        ask(*tensors(), **changed)


def test_a_strided_sink() -> None:
    strided = SINK.repeat_interleave(2).npu()[::2]
    with pytest.raises(virtual_ascend.CardRefusal, match="contiguous"):
        ask(*tensors(), learnable_sink=strided)


def test_float16_on_a_950_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    given = tensors(HALF)
    with pytest.raises(virtual_ascend.CardRefusal, match="one dtype"):
        ask(*given, learnable_sink=SINK.half())
    monkeypatch.setenv("VIRTUAL_ASCEND_SOC", "Ascend950PR_9589")
    close(ask(*given, learnable_sink=SINK.half())[0], golden(*given))


@pytest.mark.parametrize(("layout", "width"), [("TND", 96), ("BSND", 64)])
def test_other_layouts_and_headdims(layout: str, width: int) -> None:
    import torch_npu

    shape = (4, 1, width) if layout == "TND" else (4, 1, 1, width)
    q = torch.randn(shape).bfloat16().npu()
    ends = [1, 2, 3, 4] if layout == "TND" else None
    with pytest.raises(virtual_ascend.CardRefusal, match="learnable_sink needs"):
        torch_npu.npu_fused_infer_attention_score_v2(
            q, q, q, input_layout=layout, learnable_sink=SINK[:1].clone().npu(), num_query_heads=1,
            actual_seq_qlen=ends, actual_seq_kvlen=ends,
        )  # fmt: skip
