"""What the fused kernel is given for each kind of call, and what its callers get back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
)
from flash_attn_npu._core.ground.memory import forget_all
from flash_attn_npu.errors import ArgumentError
from tests.helpers import reference
from tests.helpers.frames import frames
from tests.helpers.old_torch import lacks

UNLIMITED = 2147483647
KERNEL = "npu_fusion_attention"
NAMES = ("query", "key", "value")

pytestmark = pytest.mark.usefixtures("npu")


@pytest.fixture(autouse=True)
def fresh() -> None:
    forget_all()
    torch.manual_seed(0)


@pytest.mark.parametrize("grad", [False, True])
def test_little_stands_before_the_kernel(grad: bool) -> None:
    """What is known of a call is looked up: nothing else may run before each launch."""
    q, k, v = (x.requires_grad_(grad) for x in dense())
    rows = [x.flatten(0, 1) for x in (q, k, v)]
    cu = torch.tensor([0, 9, 18], dtype=torch.int32).npu()

    def run(*lengths: Any) -> list[str]:
        given = (*rows, *lengths) if lengths else (q, k, v)
        function = flash_attn_varlen_func if lengths else flash_attn_func
        function(*given, causal=True)
        return frames(lambda: function(*given, causal=True))

    # the call of an operator in torch/_ops.py is none of them: C is called at once
    start, kernel = ["attend", "is_dynamo_compiling"], "watched" if grad else "run"
    assert run() == ["flash_attn_func", *start, kernel]
    assert run(cu, cu, 9, 9) == ["flash_attn_varlen_func", *start, "_read", kernel]


@pytest.mark.parametrize("changed", ["q", "k", "v"])
def test_one_tensor_of_another_dtype_or_device_is_another_call(changed: str) -> None:
    """What is remembered of three tensors alike serves no others, and the other way round."""
    given = dict(zip("qkv", dense(), strict=True))
    for function in (flash_attn_func, packed_alike):
        for other in (given[changed].half(), given[changed].cpu(), given[changed].to("meta")):
            for _ in range(2):
                same_values(function(*given.values()), *given.values())
                with pytest.raises(ArgumentError):
                    function(*(given | {changed: other}).values())


def packed_alike(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    cu = torch.tensor([0, 9, 18], dtype=torch.int32)
    out = flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q, k, v)), cu, cu, 9, 9)
    return out.view(q.shape)


def test_an_operator_that_stands_in_for_the_kernel_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tools that watch operators replace them, before a plan is made or after."""
    import torch_npu

    given, original = [], torch_npu.npu_fusion_attention

    def watching(*arguments: Any, **options: Any) -> Any:
        given.append(arguments[3])
        return original(*arguments, **options)

    q, k, v = dense()
    for grad in (False, True):
        q.requires_grad_(grad)
        flash_attn_func(q, k, v)
        with monkeypatch.context() as patched:
            patched.setattr(torch_npu, "npu_fusion_attention", watching)
            flash_attn_func(q, k, v)
            flash_attn_func(q, k, v, causal=True)
        flash_attn_func(q, k, v, causal=True)
    assert given == [4] * 4


def dense(rows: int = 9, keys: int = 9, heads_k: int = 2, dim: int = 16) -> tuple[Tensor, ...]:
    shapes = ((2, rows, 4, dim), (2, keys, heads_k, dim), (2, keys, heads_k, dim))
    return tuple(torch.randn(shape).npu() for shape in shapes)


def packed(rows: int, keys: int, heads_k: int = 2) -> tuple[Tensor, ...]:
    shapes = ((rows, 4, 16), (keys, heads_k, 16), (keys, heads_k, 16))
    return tuple(torch.randn(shape).npu() for shape in shapes)


def lengths(*cumulative: int) -> Tensor:
    return torch.tensor(cumulative, dtype=torch.int32, device="npu")


def only_launch(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, dict]:
    """The result, and the arguments of the one kernel of this package that was launched."""
    with virtual_ascend.record() as rec:
        out = function(*args, **kwargs)
    assert [launch.name for launch in rec.launches] == [KERNEL]
    return out, rec.launches[0].arguments


def same_values(got: Tensor, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> None:
    expected = reference.dense(q.cpu(), k.cpu(), v.cpu(), **options).out
    torch.testing.assert_close(got.cpu().double(), expected, rtol=0, atol=1e-5)


BANDS: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    "none": ({}, (0, UNLIMITED, UNLIMITED)),
    "causal": ({"causal": True}, (3, UNLIMITED, 0)),
    "right 0": ({"window_size": (-1, 0)}, (3, UNLIMITED, 0)),
    "window": ({"window_size": (3, 2)}, (4, 3, 2)),
    "window, causal": ({"window_size": (3, 3), "causal": True}, (4, 3, 0)),
    "left only": ({"window_size": (3, -1)}, (4, 3, 9)),
    "right only": ({"window_size": (-1, 2)}, (4, UNLIMITED, 2)),
    "no left": ({"window_size": (0, 2)}, (4, 0, 2)),
    "the diagonal": ({"window_size": (0, 0)}, (4, 0, 0)),
    "wide": ({"window_size": (9, 9)}, (0, UNLIMITED, UNLIMITED)),
    "wide, causal": ({"window_size": (9, 9), "causal": True}, (3, UNLIMITED, 0)),
}


@pytest.mark.parametrize("layout", ["BSND", "TND"])
@pytest.mark.parametrize("band", BANDS)
def test_the_band_of_a_call(band: str, layout: str) -> None:
    options, (mode, before, after) = BANDS[band]
    q, k, v = dense(keys=9)
    if layout == "BSND":
        out, given = only_launch(flash_attn_func, q, k, v, **options)
    else:
        flat, cu = [x.flatten(0, 1) for x in (q, k, v)], lengths(0, 9, 18)
        out, given = only_launch(flash_attn_varlen_func, *flat, cu, cu, 9, 9, **options)
        out = out.view(q.shape)
    assert given["sparse_mode"] == mode
    assert (given["pre_tockens"], given["next_tockens"]) == (before, after)
    if mode == 0:
        assert given["atten_mask"] is None
    else:
        assert given["atten_mask"].shape == (2048, 2048)
        assert given["atten_mask"].dtype == torch.bool
        expected = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
        assert torch.equal(given["atten_mask"].cpu(), expected)
    assert (given["input_layout"], given["head_num"]) == (layout, 4)
    same_values(out, q, k, v, **options)


@pytest.mark.parametrize("scale", [None, 0.5, 0, -0.25])
def test_the_scale_is_always_passed(scale: float | None) -> None:
    q, k, v = dense(dim=64)
    out, given = only_launch(flash_attn_func, q, k, v, softmax_scale=scale)
    assert given["scale"] == (0.125 if scale is None else scale)
    assert given["keep_prob"] == 1.0
    same_values(out, q, k, v, softmax_scale=scale)


def test_dropout_becomes_what_is_kept() -> None:
    _, given = only_launch(flash_attn_func, *dense(), dropout_p=0.25)
    assert given["keep_prob"] == 0.75
    for nothing in (0, 0.0, 1e-30):
        _, given = only_launch(flash_attn_func, *dense(), dropout_p=nothing)
        assert given["keep_prob"] == 1.0


def test_dense_tensors_reach_the_kernel_as_they_are() -> None:
    tensors = dense()
    _, given = only_launch(flash_attn_func, *tensors, causal=True)
    assert [given[name].data_ptr() for name in NAMES] == [x.data_ptr() for x in tensors]
    assert given["actual_seq_qlen"] is given["actual_seq_kvlen"] is None


def test_cumulative_lengths_lose_their_zero_and_keep_empty_keys_and_queries() -> None:
    q, k, v = packed(10, 12)
    cu_q, cu_k = lengths(0, 4, 4, 4, 10), lengths(0, 4, 6, 6, 12)
    _, given = only_launch(flash_attn_varlen_func, q, k, v, cu_q, cu_k, 6, 6)
    # the third sequence is empty on both sides
    assert given["actual_seq_qlen"] == [4, 4, 10]
    assert given["actual_seq_kvlen"] == [4, 6, 12]


def test_queries_that_see_no_key_are_left_out() -> None:
    q, k, v = packed(12, 9)
    cu_q, cu_k = lengths(0, 5, 12), lengths(0, 2, 9)
    out, given = only_launch(flash_attn_varlen_func, q, k, v, cu_q, cu_k, 7, 7, causal=True)
    assert given["query"].shape[0] == 9
    assert given["actual_seq_qlen"] == [2, 9]
    assert torch.equal(given["query"].cpu(), q.cpu()[torch.tensor([3, 4, *range(5, 12)])])
    assert not out[:3].cpu().any()
    expected = reference.varlen(
        *(x.cpu() for x in (q, k, v)), [0, 5, 12], [0, 2, 9], max_seqlen_k=7, causal=True
    )
    torch.testing.assert_close(out.cpu().double(), expected.out, rtol=0, atol=1e-5)


def test_sequences_without_keys_are_left_out() -> None:
    q, k, v = packed(9, 5)
    cu_q, cu_k = lengths(0, 4, 9), lengths(0, 0, 5)
    for causal in (False, True):
        out, given = only_launch(flash_attn_varlen_func, q, k, v, cu_q, cu_k, 5, 5, causal=causal)
        assert given["actual_seq_qlen"] == given["actual_seq_kvlen"] == [5]
        assert not out[:4].cpu().any()
        assert out[4:].cpu().all()


def test_dense_queries_that_see_no_key_are_left_out() -> None:
    q, k, v = dense(rows=9, keys=6)
    out, given = only_launch(flash_attn_func, q, k, v, causal=True)
    assert given["query"].shape == (2, 6, 4, 16)
    assert not out[:, :3].cpu().any()
    same_values(out, q, k, v, causal=True)


def test_rows_past_the_last_sequence_are_left_out() -> None:
    q, k, v = packed(15, 12)
    cu_q, cu_k = lengths(0, 4, 9), lengths(0, 4, 11)
    out, given = only_launch(flash_attn_varlen_func, q, k, v, cu_q, cu_k, 5, 7)
    assert (given["query"].shape[0], given["key"].shape[0]) == (9, 11)
    assert (given["actual_seq_qlen"], given["actual_seq_kvlen"]) == ([4, 9], [4, 11])
    assert [given[name].data_ptr() for name in NAMES] == [x.data_ptr() for x in (q, k, v)]
    assert not out[9:].cpu().any()
    assert out.shape == q.shape


def test_a_packed_diagonal_is_fused_without_gradient() -> None:
    q, k, v = packed(9, 9)
    cu = lengths(0, 4, 9)
    out, given = only_launch(flash_attn_varlen_func, q, k, v, cu, cu, 5, 5, window_size=(0, 0))
    assert (given["sparse_mode"], given["pre_tockens"], given["next_tockens"]) == (4, 0, 0)
    torch.testing.assert_close(out.cpu(), v.cpu().repeat_interleave(2, 1))


def test_a_packed_diagonal_with_gradient_is_composed_whole() -> None:
    """One decision serves a call and its backward, which the packed kernel refuses here."""
    q, k, v = (x.requires_grad_() for x in packed(9, 9))
    cu = lengths(0, 4, 9)
    with virtual_ascend.record() as rec:
        out = flash_attn_varlen_func(q, k, v, cu, cu, 5, 5, window_size=(0, 0))
        out.sum().backward()
    assert not [launch.name for launch in rec.launches]
    torch.testing.assert_close(v.grad.cpu(), torch.full((9, 2, 16), 2.0))


@pytest.mark.parametrize("shape", [(4,), (2, 4)])
def test_alibi_is_the_second_versions_inner_bias(shape: tuple[int, ...]) -> None:
    q, k, v = dense()
    slopes = torch.rand(shape).npu()
    with virtual_ascend.record() as rec:
        out = flash_attn_func(q, k, v, causal=True, alibi_slopes=slopes)
    assert [launch.name for launch in rec.launches] == ["npu_fusion_attention_v2"]
    given = rec.launches[0].arguments
    assert (given["pse_type"], given["sparse_mode"], given["next_tokens"]) == (2, 3, 0)
    assert torch.equal(given["pse"].cpu(), slopes.cpu())
    same_values(out, q, k, v, causal=True, alibi_slopes=slopes.cpu().expand(2, 4))


@pytest.mark.parametrize("layout", ["BSND", "TND"])
def test_statistics_are_asked_for_in_the_order_of_the_rows(layout: str) -> None:
    q, k, v = dense()
    if layout == "BSND":
        (_, lse, _), given = only_launch(flash_attn_func, q, k, v, return_attn_probs=True)
        expected = reference.dense(q.cpu(), k.cpu(), v.cpu()).softmax_lse
    else:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        cu = lengths(0, 5, 18)
        (_, lse, _), given = only_launch(
            flash_attn_varlen_func, *(q, k, v, cu, cu, 13, 13), return_attn_probs=True
        )
        host = [x.cpu() for x in (q, k, v)]
        expected = reference.varlen(*host, [0, 5, 18], [0, 5, 18], max_seqlen_k=13).softmax_lse
    by_rows = layout == "TND" and not lacks("npu_fusion_attention", "softmax_layout")
    assert given["softmax_layout"] == ("TND" if by_rows else "")
    reference.assert_lse_close(lse, expected)


EQUAL_CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 0)},
    "lse": {"return_attn_probs": True},
    "alibi": {"alibi": True},
}


@pytest.mark.parametrize("lists", [([0, 4, 9], [0, 4, 9]), ([0, 5, 9], [0, 3, 9])])
@pytest.mark.parametrize("call", EQUAL_CALLS)
def test_a_second_equal_call_copies_nothing(call: str, lists: tuple[list[int], list[int]]) -> None:
    options = dict(EQUAL_CALLS[call])
    if options.pop("alibi", False):
        options["alibi_slopes"] = torch.rand(4).npu()
    leaves = [x.requires_grad_() for x in packed(9, 9)]
    cu_q, cu_k = lengths(*lists[0]), lengths(*lists[1])
    for again in (False, True):
        with virtual_ascend.record() as rec:
            out = flash_attn_varlen_func(*leaves, cu_q, cu_k, 6, 6, **options)
            (out[0] if isinstance(out, tuple) else out).backward(torch.ones_like(leaves[0]))
        if again:
            assert not rec.host_to_device
            assert not rec.device_to_host


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (2, 0)}], ids=repr)
def test_no_memory_of_quadratic_size_is_taken(options: dict[str, Any]) -> None:
    seqlen = 3000
    forget_all()
    q, k, v = (torch.randn(1, seqlen, 1, 8).npu() for _ in range(3))
    # one byte for each pair would be 9 MB; the compressed mask is 4 MiB, and twice that when made
    first = peak_of(lambda: flash_attn_func(q, k, v, **options))
    assert first < seqlen * seqlen
    # out, and eight values of each statistic for a row: nothing else
    second = peak_of(lambda: flash_attn_func(q, k, v, **options))
    assert second < 2 * (seqlen * 8 * 4 * 3)


def peak_of(call: Callable[[], Any]) -> int:
    """Bytes of device memory that torch_npu's allocator gave out at most during the call."""
    torch.npu.reset_peak_memory_stats()
    before = torch.npu.memory_allocated()
    call()
    return torch.npu.max_memory_allocated() - before


def _three(*shape: int) -> Tensor:
    return torch.randn(3, *shape).npu()


def _shared(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    expanded = torch.randn(shape).npu().expand(2, 9, 4, 16)
    return torch.randn(2, 9, 4, 16).npu(), expanded, expanded


STRIDED: dict[str, Callable[[], Any]] = {
    "unbound": lambda: torch.randn(2, 9, 3, 4, 16).npu().unbind(2),
    "transposed": lambda: _three(2, 4, 9, 16).transpose(2, 3),
    "sliced": lambda: _three(2, 9, 4, 32)[..., 8:24],
    "every second": lambda: _three(2, 9, 8, 16)[:, :, :, ::2],
    "expanded heads": lambda: _shared(2, 9, 1, 16),
    "expanded batch": lambda: _shared(1, 9, 4, 16),
    "expanded rows": lambda: _shared(2, 1, 4, 16),
    "aliased": lambda: [torch.randn(2, 9, 4, 16).npu()] * 3,
}
"""Ways in which clients make q, k and v (2, 9, 4, 16) that are not contiguous."""


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", STRIDED)
def test_strided_tensors_give_the_same_contiguous_results(name: str, causal: bool) -> None:
    tensors = tuple(STRIDED[name]())
    out = flash_attn_func(*tensors, causal=causal)
    assert out.is_contiguous()
    same_values(out, *tensors, causal=causal)
    parts = flash_attn_func(*tensors, causal=causal, return_attn_probs=True)
    assert all(part.is_contiguous() for part in parts)
    same_values(parts[0], *tensors, causal=causal)
    cu, flat = lengths(0, 9), [x[0] for x in tensors]
    parts = flash_attn_varlen_func(*flat, cu, cu, 9, 9, causal=causal, return_attn_probs=True)
    assert all(part.is_contiguous() for part in parts)
    same_values(parts[0][None], *(x[None] for x in flat), causal=causal)


@pytest.mark.parametrize("name", STRIDED)
def test_strided_tensors_have_the_gradients_of_contiguous_ones(name: str) -> None:
    tensors = tuple(STRIDED[name]())
    dout = torch.randn(2, 16, 9, 4).npu().permute(0, 2, 3, 1)
    results = []
    for whole in (False, True):
        leaves = [x.detach() for x in tensors]
        if whole:
            leaves = [x.clone(memory_format=torch.contiguous_format) for x in leaves]
        leaves = [x.requires_grad_() for x in leaves]
        flash_attn_func(*leaves, causal=True).backward(dout)
        results.append([leaf.grad.cpu() for leaf in leaves])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)


def test_packed_layouts_are_views_of_what_came() -> None:
    qkv = torch.randn(2, 9, 3, 4, 16).npu()
    parts = qkv.unbind(2)
    pointers = [x.data_ptr() for x in parts]
    out, given = only_launch(flash_attn_qkvpacked_func, qkv, causal=True)
    assert [given[name].data_ptr() for name in NAMES] == pointers
    same_values(out, *parts, causal=True)
    out, given = only_launch(flash_attn_kvpacked_func, parts[0], qkv[:, :, 1:], causal=True)
    assert [given[name].data_ptr() for name in NAMES] == pointers
    same_values(out, *parts, causal=True)


@pytest.mark.parametrize(
    ("shape_q", "shape_k"),
    [
        ((0, 9, 4, 16), (0, 9, 2, 16)),
        ((2, 0, 4, 16), (2, 9, 2, 16)),
        ((2, 9, 4, 16), (2, 0, 2, 16)),
        ((2, 9, 0, 16), (2, 9, 0, 16)),
    ],
)
def test_where_there_is_no_work_nothing_is_launched(
    shape_q: tuple[int, ...], shape_k: tuple[int, ...]
) -> None:
    q, k, v = (torch.randn(shape).npu().requires_grad_() for shape in (shape_q, shape_k, shape_k))
    with virtual_ascend.record() as rec:
        out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
        out.sum().backward()
    assert not rec.launches
    assert out.shape == q.shape
    assert not out.cpu().any()
    assert (lse.cpu() == torch.inf).all()
    assert all(not leaf.grad.cpu().any() for leaf in (q, k, v))


@pytest.mark.parametrize(("ends_q", "ends_k"), [((), ()), ((0, 0), (0, 0)), ((9,), (0,))])
def test_packed_calls_without_work_launch_nothing(
    ends_q: tuple[int, ...], ends_k: tuple[int, ...]
) -> None:
    q, k, v = packed(9, 9)
    with virtual_ascend.record() as rec:
        out = flash_attn_varlen_func(q, k, v, lengths(0, *ends_q), lengths(0, *ends_k), 9, 9)
    assert not rec.launches
    assert out.shape == q.shape
    assert not out.cpu().any()
