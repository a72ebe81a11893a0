"""Our attention_forward_varlen beside Huawei's own, call for call on the simulated Ascend."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import mindie_function
from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu import attention_forward_varlen as ours
from flash_attn_npu._core.ground.memory import forget_all, forget_lengths
from flash_attn_npu._virtual_ascend import CardRefusal
from flash_attn_npu.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from tests.helpers import reference

Function = Callable[..., Tensor]

RESERVED = (
    *("max_seqlen_q", "max_seqlen_k", "window_size", "softcap"),
    *("alibi_slopes", "deterministic", "return_attn_probs", "block_table"),
)


@pytest.fixture(scope="module")
def huawei() -> tuple[Function, type[Exception]]:
    """Their function and the exception it refuses with."""
    if virtual_ascend.REASON is not None:
        pytest.skip(f"the virtual Ascend is not running: {virtual_ascend.REASON}")
    if importlib.util.find_spec("mindiesd") is None:
        pytest.skip("mindiesd is not installed")
    module, refusal = mindie_function.load()
    return module.attention_forward_varlen, refusal


@pytest.fixture
def theirs(huawei: tuple[Function, type[Exception]]) -> Function:
    return huawei[0]


def inputs(
    rows: int = 9,
    keys: int = 9,
    heads: int = 4,
    heads_k: int = 2,
    dtype: torch.dtype = torch.float32,
    device: str = "npu",
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(7)
    shapes = ((rows, heads, 16), (keys, heads_k, 16), (keys, heads_k, 16))
    q, k, v = (torch.randn(shape).to(dtype).to(device) for shape in shapes)
    return q, k, v


def launch_of(function: Function, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Any]]:
    """The result and the arguments of the one kernel launched for it."""
    with virtual_ascend.record() as rec:
        out = function(*args, **kwargs)
    attention = [launch for launch in rec.launches if "attention" in launch.name]
    assert [launch.name for launch in attention] == ["npu_fusion_attention"]
    return out, attention[0].arguments


def assert_same_arguments(mine: dict[str, Any], other: dict[str, Any]) -> None:
    assert mine.keys() == other.keys()
    for name, value in other.items():
        if name in ("query", "key", "value"):
            assert mine[name].data_ptr() == value.data_ptr(), name
            assert mine[name].stride() == value.stride(), name
        elif isinstance(value, Tensor):
            assert mine[name].dtype == value.dtype, name
            assert torch.equal(mine[name].cpu(), value.cpu()), name
        else:
            assert type(mine[name]) is type(value), name
            assert mine[name] == value, name


def test_the_signature_is_huaweis(theirs: Function) -> None:
    mine, other = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
    assert [(p.name, p.kind, p.default) for p in mine.values()] == [
        (p.name, p.kind, p.default) for p in other.values()
    ]


CALLS: dict[str, tuple[tuple[list[int], list[int]], dict[str, Any]]] = {
    "plain": (([0, 4, 9], [0, 4, 9]), {}),
    "causal": (([0, 4, 9], [0, 4, 9]), {"causal": True}),
    "more keys than queries": (([0, 2, 5], [0, 4, 9]), {"causal": True}),
    "more queries than keys": (([0, 4, 9], [0, 2, 5]), {}),
    "scale": (([0, 9], [0, 9]), {"softmax_scale": 0.3}),
    "scale 0": (([0, 9], [0, 9]), {"softmax_scale": 0.0}),
    "dropout near 0": (([0, 9], [0, 9]), {"dropout_p": 1e-7}),
    "dropout 1e-30": (([0, 9], [0, 9]), {"dropout_p": 1e-30}),
    "dropout below 0": (([0, 9], [0, 9]), {"dropout_p": -1e-30}),
    "an empty sequence": (([0, 4, 4, 9], [0, 4, 4, 9]), {}),
    "causal 1": (([0, 4, 9], [0, 4, 9]), {"causal": 1}),
    "as tuples": (((0, 4, 9), (0, 4, 9)), {"causal": True}),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_the_same_launch_and_the_same_bits(call: str, dtype: torch.dtype, theirs: Function) -> None:
    (cu_q, cu_k), options = CALLS[call]
    q, k, v = inputs(cu_q[-1], cu_k[-1], dtype=dtype)
    # a dropout mask would be drawn anew by every call
    torch.manual_seed(3)
    expected, other = launch_of(theirs, q, k, v, cu_q, cu_k, **options)
    torch.manual_seed(3)
    got, mine = launch_of(ours, q, k, v, cu_q, cu_k, **options)
    assert_same_arguments(mine, other)
    assert torch.equal(got.cpu(), expected.cpu())
    assert got.is_contiguous()


def test_more_arguments_by_position(theirs: Function) -> None:
    q, k, v = inputs()
    call = (q, k, v, [0, 9], [0, 9], None, None, 0.0, 0.2, True, *[None] * 6)
    expected, other = launch_of(theirs, *call)
    got, mine = launch_of(ours, *call)
    assert_same_arguments(mine, other)
    assert torch.equal(got.cpu(), expected.cpu())


@pytest.mark.parametrize("causal", [False, True])
def test_lists_that_end_in_zeros(causal: bool, theirs: Function) -> None:
    q, k, v = inputs(12, 12)
    lengths = [0, 4, 9, 0, 0]
    expected, other = launch_of(theirs, q, k, v, lengths, lengths, causal=causal)
    got, mine = launch_of(ours, q, k, v, lengths, lengths, causal=causal)
    assert_same_arguments(mine, other)
    # rows of no sequence are whatever the kernel leaves there
    assert torch.equal(got[:9].cpu(), expected[:9].cpu())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads_k", [1, 2, 4])
def test_gradients_through_torch_npu(heads_k: int, causal: bool, theirs: Function) -> None:
    gradients = []
    for function in (theirs, ours):
        leaves = [x.requires_grad_() for x in inputs(heads_k=heads_k)]
        with virtual_ascend.record() as rec:
            function(*leaves, [0, 4, 9], [0, 4, 9], causal=causal).square().sum().backward()
        assert "npu_fusion_attention_grad" in [launch.name for launch in rec.launches]
        gradients.append([leaf.grad.cpu() for leaf in leaves])
    for mine, other in zip(*gradients, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("value", [0, False, 0.0, (), -1, True], ids=repr)
@pytest.mark.parametrize("argument", RESERVED)
def test_reserved_arguments_are_refused(
    argument: str, value: Any, huawei: tuple[Function, type[Exception]]
) -> None:
    theirs, refusal = huawei
    q, k, v = inputs()
    with virtual_ascend.record() as rec:
        with pytest.raises(refusal, match=argument):
            theirs(q, k, v, [0, 9], [0, 9], **{argument: value})
        with pytest.raises(UnsupportedError, match=rf"^{argument}: .*flash_attn_varlen_func"):
            ours(q, k, v, [0, 9], [0, 9], **{argument: value})
    assert not rec.launches


@pytest.mark.parametrize("argument", RESERVED)
def test_reserved_arguments_are_refused_as_tensors(
    argument: str, huawei: tuple[Function, type[Exception]]
) -> None:
    theirs, refusal = huawei
    q, k, v = inputs()
    value = torch.zeros(4, device="npu")
    with pytest.raises(refusal, match=argument):
        theirs(q, k, v, [0, 9], [0, 9], **{argument: value})
    with (
        virtual_ascend.record() as rec,
        pytest.raises(UnsupportedError, match=f"^{argument}: "),
    ):
        ours(q, k, v, [0, 9], [0, 9], **{argument: value})
    assert not rec.launches
    assert not rec.device_to_host


@pytest.mark.parametrize("dropout_p", [0.1, 1.0, -0.1, 2e-6, -2e-6, float("nan"), float("inf")])
def test_dropout_is_refused(dropout_p: float, huawei: tuple[Function, type[Exception]]) -> None:
    theirs, refusal = huawei
    q, k, v = inputs()
    with virtual_ascend.record() as rec:
        with pytest.raises(refusal, match="dropout_p"):
            theirs(q, k, v, [0, 9], [0, 9], dropout_p=dropout_p)
        with pytest.raises(ArgumentError, match=r"^dropout_p: .*to fix it: "):
            ours(q, k, v, [0, 9], [0, 9], dropout_p=dropout_p)
    assert not rec.launches


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("argument", ["q", "k", "v"])
def test_other_ranks_are_refused(
    argument: str, rank: int, huawei: tuple[Function, type[Exception]]
) -> None:
    theirs, refusal = huawei
    tensors = dict(zip("qkv", inputs(), strict=True))
    tensors[argument] = torch.zeros((3,) * rank, device="npu")
    with virtual_ascend.record() as rec:
        with pytest.raises(refusal, match=f"Expected {argument} to be 3D"):
            theirs(**tensors, cu_seqlens_q=[0, 9], cu_seqlens_k=[0, 9])
        with pytest.raises(ArgumentError, match=f"^{argument}: got {rank} dimensions"):
            ours(**tensors, cu_seqlens_q=[0, 9], cu_seqlens_k=[0, 9])
    assert not rec.launches


REFUSED_BY_THE_CARD: dict[str, tuple[list[int], list[int], dict[str, Any]]] = {
    "causal, more queries than keys": ([0, 4, 9], [0, 5, 8], {"causal": True}),
    "lists of different length": ([0, 4, 9], [0, 8], {}),
    "lists without sequences": ([0], [0], {}),
    "an end before the last row": ([0, 4, 8], [0, 4, 7], {}),
    "an end past the last row": ([0, 4, 10], [0, 4, 8], {}),
    "decreasing lengths": ([0, 9, 4, 9], [0, 8, 4, 8], {}),
}


@pytest.mark.parametrize("call", REFUSED_BY_THE_CARD)
def test_the_card_judges_lengths_in_both(call: str, theirs: Function) -> None:
    cu_q, cu_k, options = REFUSED_BY_THE_CARD[call]
    q, k, v = inputs(9, 8)
    with pytest.raises(RuntimeError) as expected:
        theirs(q, k, v, cu_q, cu_k, **options)
    with pytest.raises(expected.type):
        ours(q, k, v, cu_q, cu_k, **options)
    # torch_npu itself compares the lists, the card's tiling does the rest
    assert (expected.type is CardRefusal) == (len(cu_q) == len(cu_k) > 1)


def test_tensors_of_lengths_are_copied_once_each(npu: torch.device) -> None:
    forget_lengths()
    q, k, v = inputs(5, 9)
    cu_q = torch.tensor([0, 2, 5], dtype=torch.int32, device=npu)
    cu_k = torch.tensor([0, 4, 9], dtype=torch.int32, device=npu)
    first, _ = launch_of(ours, q, k, v, [0, 2, 5], [0, 4, 9], causal=True)
    with virtual_ascend.record() as rec:
        results = [ours(q, k, v, cu_q, cu_k, causal=True) for _ in range(4)]
    assert [copy.shape for copy in rec.device_to_host] == [(3,), (3,)]
    assert not rec.host_to_device
    assert all(torch.equal(result.cpu(), first.cpu()) for result in results)
    cu_q[1] = 1
    with virtual_ascend.record() as rec:
        ours(q, k, v, cu_q, cu_k, causal=True)
    assert len(rec.device_to_host) == 1
    assert rec.launches[-1].arguments["actual_seq_qlen"] == [1, 5]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_host_tensors_of_lengths_are_read_where_they_are(
    dtype: torch.dtype, npu: torch.device
) -> None:
    q, k, v = inputs()
    cu = torch.tensor([0, 4, 9], dtype=dtype)
    with virtual_ascend.record() as rec:
        _, arguments = launch_of(ours, q, k, v, cu, cu)
    assert arguments["actual_seq_qlen"] == arguments["actual_seq_kvlen"] == [4, 9]
    assert not rec.device_to_host


def test_the_mask_is_made_once_per_device(npu: torch.device) -> None:
    forget_all()
    q, k, v = inputs()
    _, first = launch_of(ours, q, k, v, [0, 9], [0, 9], causal=True)
    with virtual_ascend.record() as rec:
        _, second = launch_of(ours, q, k, v, [0, 4, 9], [0, 4, 9], causal=True)
    assert second["atten_mask"] is first["atten_mask"] or (
        second["atten_mask"].data_ptr() == first["atten_mask"].data_ptr()
    )
    assert not rec.host_to_device


def test_things_that_are_no_lengths_or_no_tensors_are_named(npu: torch.device) -> None:
    q, k, v = inputs()
    with virtual_ascend.record() as rec:
        for wrong in (None, 9, "0 9"):
            with pytest.raises(ArgumentTypeError, match=r"^cu_seqlens_k: got .*to fix it: "):
                ours(q, k, v, [0, 9], wrong)
        with pytest.raises(ArgumentTypeError, match=r"^k: got .*to fix it: "):
            ours(q, [1.0], v, [0, 9], [0, 9])
    assert not rec.launches


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("cu_q", "cu_k", "causal"),
    [([0, 4, 9], [0, 4, 9], True), ([0, 2, 5], [0, 4, 9], True), ([0, 4, 9], [0, 2, 5], False)],
)
def test_off_the_card_it_serves_exactly(
    cu_q: list[int], cu_k: list[int], causal: bool, dtype: torch.dtype
) -> None:
    q, k, v = inputs(cu_q[-1], cu_k[-1], dtype=dtype, device="cpu")
    options = {"causal": causal, "softmax_scale": 0.3, "max_seqlen_k": 9}
    truth = reference.varlen(q, k, v, cu_q, cu_k, **options)
    plain = reference.varlen(q, k, v, cu_q, cu_k, **options, attend=reference.same_precision)
    for form in (list, torch.IntTensor):
        out = ours(q, k, v, form(cu_q), form(cu_k), causal=causal, softmax_scale=0.3)
        assert out.dtype == dtype
        reference.assert_close_to_reference(out, truth.out, plain.out, "out")


def test_off_the_card_the_refusals_are_the_same() -> None:
    q, k, v = inputs(device="cpu")
    for argument in RESERVED:
        with pytest.raises(UnsupportedError, match=f"^{argument}: "):
            ours(q, k, v, [0, 9], [0, 9], **{argument: 0})
    with pytest.raises(ArgumentError, match=r"^dropout_p: "):
        ours(q, k, v, [0, 9], [0, 9], dropout_p=0.1)
    with pytest.raises(ArgumentError, match=r"^v: got 2 dimensions"):
        ours(q, k, v[0], [0, 9], [0, 9])
