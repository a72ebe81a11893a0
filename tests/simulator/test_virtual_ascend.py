"""The simulated Ascend against what it must not be: kinder, or different, than what is documented.

Nothing here was confirmed by an Ascend machine; the expectations come from CPU arithmetic and from
independent restatements of the documented rules.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu._virtual_ascend import CardRefusal
from tests.helpers.old_torch import HOLDS_KERNELS, TORCH, needs

FLOAT_MAX = torch.finfo(torch.float32).max
UNLIMITED = 2147483647

pytestmark = pytest.mark.usefixtures("npu")


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str, **given: Any) -> Any:
    import torch_npu

    heads = given.pop("head_num", q.shape[layout.find("N")] if "N" in layout else None)
    given.setdefault("scale", q.shape[-1] ** -0.5)
    return torch_npu.npu_fusion_attention(q, k, v, heads, layout, **given)


def triangle() -> torch.Tensor:
    return torch.ones(2048, 2048, dtype=torch.bool).triu(1).npu()


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype).npu()


def loop_kept(mode: int, rows: int, columns: int, pre: int, following: int) -> torch.Tensor:
    """The kept set of a sparse mode, one pair of indices at a time."""
    kept = torch.zeros(rows, columns, dtype=torch.bool)
    off = columns - rows
    for i in range(rows):
        for j in range(columns):
            if mode == 2:
                kept[i, j] = j <= i
            elif mode == 3:
                kept[i, j] = j <= i + off
            else:
                kept[i, j] = i + off - pre <= j <= i + off + following
    return kept


def plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """[N, S, D] in the inputs' dtype, with zeros in rows without keys."""
    groups = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    s = scale * q @ k.transpose(1, 2)
    if kept is not None:
        s = s.masked_fill(~kept, -torch.inf)
    return s.softmax(-1).nan_to_num(0.0) @ v


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a.cpu().double(), b.cpu().double(), rtol=tolerance, atol=tolerance)


FUNCTIONS = {
    "linear": (lambda x, w, b: F.linear(x, w, b), [(2, 4, 5), (3, 5), (3,)]),
    "matmul": (lambda x, y: x @ y, [(2, 2, 4, 5), (2, 1, 5, 3)]),
    "left": (lambda x, y: x @ y, [(1, 4, 5), (3, 5, 2)]),
    "vector": (lambda x, y: x @ y, [(3, 4), (4,)]),
    "softmax": (lambda x: x.softmax(-1).square(), [(4, 5)]),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (5,), w, b), [(2, 4, 5), (5,), (5,)]),
    "masked": (lambda x: x.masked_fill(x > 0, -torch.inf).exp(), [(7,)]),
    "setitem": (lambda x, y: x.clone().index_put((torch.tensor([0, 2]),), y), [(4, 3), (2, 3)]),
    "repeat": (lambda x: x.repeat_interleave(3, 1), [(2, 3)]),
    "gather": (lambda x: x.gather(1, torch.zeros_like(x, dtype=torch.long)), [(2, 3)]),
    "entropy": (lambda x: F.cross_entropy(x, x.argmax(-1)), [(4, 5)]),
    "views": (lambda x: x.t()[::2].unsqueeze(0).expand(3, 2, 4).reshape(6, 4), [(4, 3)]),
    "low": (lambda x: x.bfloat16().softmax(-1, dtype=torch.float32), [(4, 3)]),
    "kl": (lambda x, y: F.kl_div(x, y.softmax(-1), reduction="sum"), [(4, 3), (4, 3)]),
}


if TORCH < (2, 9):
    # torch_npu gives the target no gradient there
    FUNCTIONS["kl"] = (
        lambda x, y: F.kl_div(x, y.softmax(-1).detach(), reduction="sum") + y.sum(),
        [(4, 3), (4, 3)],
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_aten_gives_the_cpus_numbers_and_gradients(name: str) -> None:
    function, shapes = FUNCTIONS[name]
    inputs = [torch.randn(shape) for shape in shapes]
    host = [tensor.clone().requires_grad_() for tensor in inputs]
    device = [tensor.npu().requires_grad_() for tensor in inputs]
    expected, got = function(*host), function(*device)
    close(got, expected, 1e-6)
    seed = torch.randn_like(expected)
    expected.backward(seed)
    got.backward(seed.npu())
    for a, b in zip(device, host, strict=True):
        close(a.grad, b.grad, 1e-5)


def test_in_place_and_out_write_where_they_lie_and_bump_the_version() -> None:
    base = torch.arange(12.0).npu().view(3, 4)
    column, version = base[:, 1], base._version
    column.mul_(10)
    assert base._version == version + 1
    assert base[:, 1].tolist() == [10.0, 50.0, 90.0]
    out = torch.empty(0, device="npu")
    assert torch.add(column, 1, out=out) is out
    assert out.tolist() == [11.0, 51.0, 91.0]


def test_a_host_tensor_beside_a_device_tensor_is_refused() -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3).npu() + torch.ones(3)


@HOLDS_KERNELS
def test_uninitialized_memory_is_nan() -> None:
    assert torch.empty(5, device="npu").isnan().all()
    assert torch.empty_like(torch.ones(2, 2).npu()).isnan().all()


def test_modes_leave_no_dispatch_mode_behind() -> None:
    assert torch._C._len_torch_dispatch_stack() == 0
    x = torch.randn(4, 4).npu()
    with torch.inference_mode():
        assert (x @ x).is_inference()
    with torch.no_grad():
        assert not (x.requires_grad_() @ x).requires_grad
    with torch.autocast("npu", dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16


def test_manual_seed_repeats_and_draws_advance() -> None:
    torch.manual_seed(7)
    first, second = torch.randn(20, device="npu"), torch.randn(20, device="npu")
    torch.manual_seed(7)
    assert torch.equal(first, torch.randn(20, device="npu"))
    assert not torch.equal(first, second)


def test_copies_are_counted() -> None:
    with virtual_ascend.record() as outer:
        x = torch.ones(3, 2).npu()
        with virtual_ascend.record() as inner:
            x.cpu()
            x.sum().item()
            x[0].tolist()
            (x + x).copy_(torch.zeros(3, 2))
        x.clone()
    assert [copy.shape for copy in inner.device_to_host] == [(3, 2), (), (2,)]
    assert [copy.bytes for copy in inner.device_to_host] == [24, 4, 8]
    assert [copy.bytes for copy in inner.host_to_device] == [24]
    assert len(outer.host_to_device) == 2
    assert len(outer.device_to_host) == 3


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (3, 6), (6, 3), (1, 5)])
@pytest.mark.parametrize(
    ("mode", "pre", "following"),
    [(2, 0, 0), (3, 0, 0), (4, 2, 0), (4, 1, 2), (4, UNLIMITED, 1), (4, 5, -1), (4, -1, 3)],
)
def test_kept_sets_dense(mode: int, pre: int, following: int, rows: int, columns: int) -> None:
    kept = loop_kept(mode, rows, columns, pre, following)
    q, k, v = random(1, 2, rows, 8), random(1, 1, columns, 8), random(1, 1, columns, 8)
    given = {"sparse_mode": mode, "pre_tockens": pre, "next_tockens": following}
    if not kept.any():
        with pytest.raises(CardRefusal):
            attend(q, k, v, "BNSD", atten_mask=triangle(), **given)
        return
    out, maximum, total = attend(q, k, v, "BNSD", atten_mask=triangle(), **given)[:3]
    q, k, v = (tensor[0].cpu().double() for tensor in (q, k, v))
    close(out[0], plain_attention(q, k, v, kept, 8**-0.5))
    empty = ~kept.any(-1)
    assert (maximum.cpu()[:, :, empty] == -FLOAT_MAX).all()
    assert (total.cpu()[:, :, empty] == FLOAT_MAX).all()


def test_sparse_arguments_without_a_mask_are_ignored() -> None:
    q, k, v = (random(1, 5, 2, 8) for _ in range(3))
    full = attend(q, k, v, "BSND")[0]
    close(attend(q, k, v, "BSND", sparse_mode=3, pre_tockens=1, next_tockens=0)[0], full, 0)


def test_layouts_agree() -> None:
    q, k, v = random(2, 5, 4, 8), random(2, 7, 2, 8), random(2, 7, 2, 6)
    expected = attend(q, k, v, "BSND")[0]
    assert expected.shape == (2, 5, 4, 6)
    swapped = attend(*(tensor.transpose(1, 2) for tensor in (q, k, v)), "BNSD")[0]
    close(swapped.transpose(1, 2), expected, 0)
    flat = [tensor.flatten(2) for tensor in (q, k, v)]
    given = {"head_num": 4, "scale": 8**-0.5}
    close(attend(*flat, "BSH", **given)[0].unflatten(2, (4, 6)), expected, 0)
    sbh = attend(*(tensor.transpose(0, 1) for tensor in flat), "SBH", **given)[0]
    close(sbh.transpose(0, 1).unflatten(2, (4, 6)), expected, 0)
    packed = [tensor.flatten(0, 1) for tensor in (q, k, v)]
    lengths = {"actual_seq_qlen": [5, 10], "actual_seq_kvlen": [7, 14]}
    close(attend(*packed, "TND", **lengths)[0].view_as(expected), expected, 0)


def test_a_row_that_a_full_mask_empties_gives_the_mean_of_the_values() -> None:
    q, k, v = (random(1, 1, 3, 4) for _ in range(3))
    mask = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 0]], dtype=torch.bool).npu()
    out, maximum, total = attend(q, k, v, "BNSD", atten_mask=mask, sparse_mode=1)[:3]
    close(out[0, 0, 1], v[0, 0].mean(0))
    assert (maximum[0, 0, 1] == -FLOAT_MAX).all()
    assert (total[0, 0, 1] == 3).all()
    out = attend(q, k, v, "BNSD", atten_mask=mask, sparse_mode=1, inner_precise=2)[0]
    assert (out[0, 0, 1] == 0).all()


TND = {"actual_seq_qlen": [2, 2, 7], "actual_seq_kvlen": [3, 5, 10]}


@needs("npu_fusion_attention", "softmax_layout")
def test_statistics_of_tnd_in_both_layouts() -> None:
    q, k, v = random(7, 4, 8), random(10, 2, 8), random(10, 2, 8)
    default = attend(q, k, v, "TND", **TND)[1:3]
    true = attend(q, k, v, "TND", softmax_layout="TND", **TND)[1:3]
    for blocks, rows in zip(default, true, strict=True):
        assert blocks.shape == rows.shape == (7, 4, 8)
        pieces = blocks.cpu().view(-1, 8).split([2 * 4, 0, 5 * 4])
        decoded = [piece.view(4, -1, 8).transpose(0, 1) for piece in pieces]
        close(torch.cat(decoded), rows, 0)
    s = 8**-0.5 * q.cpu()[2:7, 1] @ k.cpu()[5:10, 0].T
    close(true[0][2:7, 1, 3], s.amax(-1))
    lse = true[0][2:7, 1, 0].cpu() + true[1][2:7, 1, 0].cpu().log()
    close(lse, s.logsumexp(-1))


def test_rows_beyond_the_last_length_are_not_computed() -> None:
    q, k, v = random(7, 2, 8), random(7, 2, 8), random(7, 2, 8)
    out = attend(q, k, v, "TND", actual_seq_qlen=[2, 5, 0], actual_seq_kvlen=[2, 5, 0])[0]
    assert out[5:].isnan().all()
    assert not out[:5].isnan().any()


def host_gradients(
    tensors: list[torch.Tensor], seed: torch.Tensor, kept: torch.Tensor | None
) -> list[torch.Tensor]:
    doubles = [tensor.detach().cpu().double().requires_grad_() for tensor in tensors]
    out = plain_attention(*doubles, kept, tensors[0].shape[-1] ** -0.5)
    return list(torch.autograd.grad(out, doubles, seed.cpu().double()))


@pytest.mark.parametrize(("mode", "rows", "columns"), [(3, 5, 5), (3, 6, 4), (4, 4, 6)])
def test_gradients_match_autograd(mode: int, rows: int, columns: int) -> None:
    tensors = [random(4, rows, 8), random(2, columns, 8), random(2, columns, 8)]
    kept = loop_kept(mode, rows, columns, 2, 1)
    seed = random(4, rows, 8)
    leaves = [tensor[None].requires_grad_() for tensor in tensors]
    given = {"sparse_mode": mode, "pre_tockens": 2, "next_tockens": 1, "atten_mask": triangle()}
    out = attend(*leaves, "BNSD", **given)[0]
    with virtual_ascend.record() as rec:
        out.backward(seed[None])
    assert [launch.name for launch in rec.launches] == ["npu_fusion_attention_grad"]
    for leaf, expected in zip(leaves, host_gradients(tensors, seed, kept), strict=True):
        close(leaf.grad[0], expected)


@needs("npu_fusion_attention", "softmax_layout")
def test_backward_from_the_log_sum_exp_alone() -> None:
    import torch_npu

    q, k, v, seed = (random(5, 4, 8) for _ in range(4))
    lengths = {"actual_seq_qlen": [2, 5], "actual_seq_kvlen": [2, 5]}
    given = {"atten_mask": triangle(), "sparse_mode": 3, "softmax_layout": "TND", **lengths}
    out, maximum, total = attend(q, k, v, "TND", **given)[:3]
    stats = {"softmax_max": maximum + total.log(), "softmax_sum": torch.ones_like(total)}
    given["scale_value"] = 8**-0.5
    gradients = torch_npu.npu_fusion_attention_grad(
        q, k, v, seed, 4, "TND", attention_in=out, **stats, **given
    )
    for part in (slice(0, 2), slice(2, 5)):
        tensors = [tensor[part].transpose(0, 1) for tensor in (q, k, v)]
        rows = tensors[0].shape[1]
        expected = host_gradients(
            tensors, seed[part].transpose(0, 1), loop_kept(3, rows, rows, 0, 0)
        )
        for gradient, reference in zip(gradients[:3], expected, strict=True):
            close(gradient[part].transpose(0, 1), reference)


def test_the_gradient_uses_the_attention_it_is_given() -> None:
    import torch_npu

    q, k, v, seed = (random(1, 3, 1, 4) for _ in range(4))
    out, maximum, total = attend(q, k, v, "BSND")[:3]
    stats = {"softmax_max": maximum, "softmax_sum": total, "scale_value": 0.5}
    arguments = (q, k, v, seed, 1, "BSND")
    right = torch_npu.npu_fusion_attention_grad(*arguments, attention_in=out, **stats)
    wrong = torch_npu.npu_fusion_attention_grad(*arguments, attention_in=2 * out, **stats)
    assert not torch.allclose(right[0], wrong[0])
    close(right[2], wrong[2], 0)


def test_dropout_repeats_by_seed_and_is_the_generated_mask() -> None:
    import torch_npu

    q, k, v = (random(1, 6, 2, 8).requires_grad_() for _ in range(3))
    runs = []
    for _ in range(2):
        torch.manual_seed(11)
        runs.append(attend(q, k, v, "BSND", keep_prob=0.6))
    assert runs[0][4:] == runs[1][4:]
    close(runs[0][0], runs[1][0], 0)
    assert not torch.equal(attend(q, k, v, "BSND", keep_prob=0.6)[0], runs[0][0])
    seed, offset, count = runs[0][4:]
    assert count == 2 * 6 * 6
    packed = torch_npu._npu_dropout_gen_mask(
        q, [count], p=0.4, seed=seed, offset=offset, parallel=True, sync=False
    )
    bits = packed.cpu()[:, None] >> torch.arange(8) & 1
    kept = bits.reshape(-1)[:count].view(2, 6, 6).double()
    host = [
        tensor.detach().cpu().double()[0].transpose(0, 1).requires_grad_() for tensor in (q, k, v)
    ]
    p = (8**-0.5 * host[0] @ host[1].transpose(1, 2)).softmax(-1) * kept / 0.6
    expected = p @ host[2]
    close(runs[0][0][0].transpose(0, 1), expected)
    grad = torch.randn(2, 6, 8)
    expected.backward(grad.double())
    runs[0][0].backward(grad.transpose(0, 1)[None].npu())
    for leaf, reference in zip((q, k, v), host, strict=True):
        close(leaf.grad[0].transpose(0, 1), reference.grad)


@pytest.mark.parametrize("tnd", [False, True], ids=["BSND", "TND"])
def test_the_gradient_refuses_another_count_of_dropout_bits(tnd: bool) -> None:
    import torch_npu

    q, k = random(2, 6, 4, 8), random(2, 5, 2, 8)
    given: dict[str, Any] = {"keep_prob": 0.6}
    if tnd:
        q, k = random(9, 4, 8), random(8, 2, 8)
        given |= {"actual_seq_qlen": [6, 9], "actual_seq_kvlen": [5, 8]}
    layout = "TND" if tnd else "BSND"
    out, top, total, _, seed, offset, count = attend(q, k, k, layout, **given)
    assert count == 4 * (6 * 5 + 3 * 3 if tnd else 2 * 6 * 5)
    given |= {"softmax_max": top, "softmax_sum": total, "attention_in": out}
    given |= {"seed": seed, "offset": offset}

    def gradient(numels: int) -> torch.Tensor:
        results = torch_npu.npu_fusion_attention_grad(
            q, k, k, out, 4, layout, scale_value=8**-0.5, numels=numels, **given
        )
        return results[0]

    assert gradient(count).isfinite().all()
    for wrong in (0, count // 2, count + 1):
        with pytest.raises(CardRefusal, match=f"what the forward returned, {count}, got {wrong}"):
            gradient(wrong)
    given["keep_prob"] = 1.0
    assert gradient(0).isfinite().all()


@pytest.mark.parametrize("start", [0, 2])
def test_alibi_of_the_second_version(start: int) -> None:
    import torch_npu

    slopes = torch.tensor([0.5, 0.25])
    q, k, v = random(4, 2, 8), random(4 + start, 2, 8), random(4 + start, 2, 8)
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    out = torch_npu.npu_fusion_attention_v2(
        *leaves, 2, "TND", pse=slopes.npu(), pse_type=2, scale=8**-0.5, q_start_idx=[start],
        kv_start_idx=[0], actual_seq_qlen=[4], actual_seq_kvlen=[4 + start],
    )[0]  # fmt: skip
    host = [leaf.detach().cpu().double().transpose(0, 1).requires_grad_() for leaf in leaves]
    distance = (torch.arange(4 + start) - torch.arange(4)[:, None] - start).abs()
    s = 8**-0.5 * host[0] @ host[1].transpose(1, 2) - slopes[:, None, None] * distance
    expected = s.softmax(-1) @ host[2]
    close(out.transpose(0, 1), expected)
    expected.sum().backward()
    out.sum().backward()
    for leaf, reference in zip(leaves, host, strict=True):
        close(leaf.grad.transpose(0, 1), reference.grad)


@pytest.mark.parametrize(("pse_type", "weight"), [(0, 1.0), (1, 8**-0.5)])
def test_outer_bias_joins_after_or_before_the_scale(pse_type: int, weight: float) -> None:
    import torch_npu

    q, k, v, bias = random(3, 2, 8), random(5, 2, 8), random(5, 2, 8), random(2, 3, 5)
    given = {"pse_type": pse_type, "scale": 8**-0.5}
    dense = [tensor[None] for tensor in (q, k, v)]
    first = torch_npu.npu_fusion_attention_v2(*dense, 2, "BSND", pse=bias[None], **given)[0]
    lengths = {"actual_seq_qlen": [3], "actual_seq_kvlen": [5]}
    packed = (q, k, v, 2, "TND")
    second = torch_npu.npu_fusion_attention_v2(*packed, pse=bias.flatten(), **lengths, **given)[0]
    q, k, v, bias = (tensor.cpu().double() for tensor in (q, k, v, bias))
    s = 8**-0.5 * torch.einsum("qhd,khd->hqk", q, k) + weight * bias
    expected = torch.einsum("hqk,khd->qhd", s.softmax(-1), v)
    close(first[0], expected)
    close(second, expected)


@needs("npu_fusion_attention", "sink")
def test_sink_joins_the_denominator() -> None:
    q, k, v = (random(1, 3, 2, 8, dtype=torch.float16) for _ in range(3))
    sink = torch.tensor([0.3, -0.2])
    out = attend(q, k, v, "BSND", sink=sink.npu())[0]
    q, k, v = (tensor[0].cpu().double().transpose(0, 1) for tensor in (q, k, v))
    s = torch.cat([8**-0.5 * q @ k.transpose(1, 2), sink.double().view(2, 1, 1).expand(2, 3, 1)], 2)
    close(out[0].transpose(0, 1), s.softmax(-1)[..., :3] @ v, 1e-3)
