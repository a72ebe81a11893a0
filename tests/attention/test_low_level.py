"""The `_flash_attn_*` functions and the extension: clients build ring attention from them."""

import inspect
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu import flash_attn_interface as interface
from flash_attn_npu.errors import ArgumentError, ArgumentTypeError
from tests.helpers import argument_harness as harness
from tests.helpers.argument_harness import Answer, Arguments
from tests.helpers.old_torch import lacks
from tests.helpers.strategies import Problem

P = 0.25
DENSE = Problem(((9, 13),) * 2, nheads_k=2, group=2, headdim=16, dtype=torch.float16, causal=True)
VARLEN = Problem(
    ((5, 8), (9, 9), (4, 7)),
    nheads_k=2,
    group=2,
    headdim=16,
    dtype=torch.bfloat16,
    causal=True,
)
FORWARDS = (interface._flash_attn_forward, interface._flash_attn_varlen_forward)
BACKWARDS = (interface._flash_attn_backward, interface._flash_attn_varlen_backward)
OPTIONS = [
    *("dropout_p", "softmax_scale", "causal", "window_size_left", "window_size_right"),
    *("softcap", "alibi_slopes"),
]
LENGTHS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
SAVED = ["dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv"]
PAGED = ["block_table", "leftpad_k", "seqused_k", "zero_tensors", "num_splits"]
SURFACE = {
    "_flash_attn_forward": ["q", "k", "v", *OPTIONS, "return_softmax"],
    "_flash_attn_varlen_forward": [
        *("q", "k", "v", *LENGTHS, *OPTIONS),
        *("return_softmax", *PAGED),
    ],
    "_flash_attn_backward": [*SAVED, *OPTIONS, "deterministic", "rng_state"],
    "_flash_attn_varlen_backward": [
        *(*SAVED, *LENGTHS, *OPTIONS),
        *("deterministic", "rng_state", "zero_tensors"),
    ],
}

LAYOUTS = ["dense", "varlen"]
forwards = pytest.mark.parametrize(
    ("function", "problem"), list(zip(FORWARDS, (DENSE, VARLEN), strict=True)), ids=LAYOUTS
)
backwards = pytest.mark.parametrize(
    ("function", "problem"), list(zip(BACKWARDS, (DENSE, VARLEN), strict=True)), ids=LAYOUTS
)


def on(device: torch.device, function, call: Arguments) -> Arguments:
    """The arguments of the function, on the device."""
    moved = {name: call.get(name) for name in harness.parameters(function)}
    return {x: y.to(device) if isinstance(y, Tensor) else y for x, y in moved.items()}


@pytest.mark.parametrize("name", SURFACE)
def test_parameters_are_upstreams(name):
    function = getattr(interface, name)
    assert list(inspect.signature(function).parameters) == SURFACE[name]
    specification = inspect.getfullargspec(function)
    assert specification.args == SURFACE[name]
    assert (specification.varargs, specification.varkw, specification.kwonlyargs) == (
        None,
        None,
        [],
    )


def test_the_name_of_flash_attention_1_is_absent():
    assert not hasattr(interface, "flash_attn_unpadded_func")


@forwards
@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("wanted", [False, True])
def test_forward_returns_four_tensors_in_order(device, function, problem, dropout_p, wanted):
    call = harness.arguments_for(function, problem)
    call |= {"dropout_p": dropout_p, "return_softmax": wanted and dropout_p > 0}
    out, lse, s_dmask, rng_state = function(**on(device, function, call))
    assert (out.shape, out.dtype, out.device) == (call["q"].shape, problem.dtype, device)
    heads_first = call["q"][..., 0].transpose(-1, -2)
    assert (lse.shape, lse.dtype, lse.device) == (heads_first.shape, torch.float32, device)
    sides = (len(problem.seqlens), problem.nheads, 128, 128)
    assert s_dmask.shape == (sides if call["return_softmax"] else (0,))
    assert (rng_state.shape, rng_state.dtype) == ((2,), torch.int64)
    assert out.is_contiguous()
    assert lse.is_contiguous()


@forwards
def test_forward_is_served_by_the_fused_kernel(npu, function, problem):
    call = harness.arguments_for(function, problem)
    with virtual_ascend.record() as seen:
        answer = harness.run(function, call, npu)
    assert [x.name for x in seen.launches] == ["npu_fusion_attention"]
    harness.assert_right(answer, harness.truth(function, call))


def window_into(bigger: Tensor, shape: torch.Size) -> Tensor:
    """A view of the shape with a border all around it, so not contiguous."""
    for dimension, size in enumerate(shape):
        bigger = bigger.narrow(dimension, 1, size)
    return bigger


IN_PLACE = {
    "dense": (BACKWARDS[0], DENSE),
    "dense-blind-rows": (BACKWARDS[0], Problem(((9, 6),) * 2, 2, 2, 16, causal=True)),
    "varlen": (BACKWARDS[1], VARLEN),
    "varlen-blind-rows-and-tails": (
        BACKWARDS[1],
        Problem(((6, 3), (4, 0), (5, 9)), 2, 2, 16, causal=True, tail_q=2, tail_k=3),
    ),
    "varlen-tails": (
        BACKWARDS[1],
        Problem(((3, 6), (4, 4), (5, 9)), 2, 2, 16, causal=True, tail_q=2, tail_k=3),
    ),
    "varlen-tail-of-queries": (BACKWARDS[1], Problem(((3, 6), (4, 4)), 2, 2, 16, tail_q=2)),
    "nothing-to-see": (BACKWARDS[1], Problem(((6, 0), (0, 4)), 2, 2, 16)),
}


@pytest.mark.parametrize(("function", "problem"), IN_PLACE.values(), ids=IN_PLACE)
def test_backward_writes_where_the_gradients_lie(device, function, problem):
    """Into slices of a bigger buffer, beside which nothing is touched."""
    call = harness.arguments_for(function, problem)
    there = on(device, function, call)
    buffers = {}
    for name in ("dq", "dk", "dv"):
        shape = call[name].shape
        buffers[name] = torch.full([n + 2 for n in shape], -7.0, device=device).to(problem.dtype)
        there[name] = window_into(buffers[name], shape)
    assert not any(there[name].is_contiguous() for name in buffers)
    function(**there)
    expected = harness.truth(function, call)
    for name, buffer in buffers.items():
        view = window_into(buffer, call[name].shape)
        harness.assert_right({name: view}, expected)
        view.fill_(-7.0)
        assert (buffer == -7.0).all()


@backwards
def test_backward_is_one_launch_from_out_and_lse_alone(npu, function, problem):
    call = harness.arguments_for(function, problem)
    with virtual_ascend.record() as seen:
        answer = harness.run(function, call, npu)
    (launch,) = seen.launches
    assert launch.name == "npu_fusion_attention_grad"
    given = launch.arguments
    assert given["softmax_sum"].cpu().eq(1).all()
    lse = given["softmax_max"].cpu()[..., 0]
    expected = call["softmax_lse"].t() if "varlen" in function.__name__ else call["softmax_lse"]
    if not lacks("npu_fusion_attention_grad", "softmax_layout"):
        assert torch.equal(lse, expected)
    harness.assert_right(answer, harness.truth(function, call))


@backwards
def test_row_sums_are_padded_as_upstream_pads_them(device, function, problem):
    call = harness.arguments_for(function, problem)
    row_sums = harness.run(function, call, device)["row_sums"]
    assert row_sums.dtype == torch.float32
    sums = (call["dout"].double() * call["out"].double()).sum(-1).transpose(-1, -2)
    if "varlen" not in function.__name__:
        batch, nheads, seqlen = sums.shape
        expected = torch.zeros(batch, nheads, 128, dtype=torch.float64)
        expected[..., :seqlen] = sums
    else:
        nheads, total = sums.shape
        expected = torch.zeros(nheads, total + 128 * len(problem.seqlens), dtype=torch.float64)
        for index, start in enumerate(problem.cu_seqlens_q[:-1]):
            end = problem.cu_seqlens_q[index + 1]
            # these sequences are shorter than 128 together, so each has a block of its own
            expected[:, 128 * index : 128 * index + end - start] = sums[:, start:end]
    torch.testing.assert_close(row_sums.cpu().double(), expected, rtol=1e-5, atol=1e-5)


def drawn(forward, call: Arguments, device: torch.device) -> Answer:
    return harness.run(forward, call | {"dropout_p": P, "return_softmax": True}, device)


def forward_call(function, problem: Problem) -> Arguments:
    return harness.arguments_for(FORWARDS[BACKWARDS.index(function)], problem)


@backwards
def test_backward_repeats_the_mask_of_rng_state(device, function, problem):
    forward = FORWARDS[BACKWARDS.index(function)]
    answer = drawn(forward, forward_call(function, problem), device)
    call = harness.arguments_for(function, problem) | {"dropout_p": P}
    call |= {x: answer[x].cpu() for x in ("out", "softmax_lse", "rng_state")}
    call["dropout_mask"] = harness.masks_from(answer["s_dmask"], call)
    gradients = harness.run(function, call, device)
    harness.assert_right(gradients, harness.truth(function, call))


@backwards
def test_backward_with_dropout_needs_rng_state(device, function, problem):
    call = harness.arguments_for(function, problem) | {"dropout_p": P}
    with pytest.raises(ArgumentError, match="rng_state"):
        harness.run(function, call, device)


@backwards
@pytest.mark.parametrize("name", ["dout", "out", "dq", "dk", "dv"])
def test_a_wrong_shape_is_refused_by_name(device, function, problem, name):
    call = harness.arguments_for(function, problem)
    call[name] = call[name][:-1]
    there = on(device, function, call)
    with virtual_ascend.record() as seen, pytest.raises(ArgumentError, match=rf"^{name}: "):
        function(**there)
    assert not seen.launches
    assert all(there[x].isnan().all() for x in ("dq", "dk", "dv"))


@backwards
def test_gradients_are_demanded(device, function, problem):
    call = on(device, function, harness.arguments_for(function, problem)) | {"dk": None}
    with pytest.raises(ArgumentTypeError, match=r"^dk: "):
        function(**call)


@backwards
@pytest.mark.parametrize("wrong", ["one-row-less", "one-head", "one-sequence"])
def test_an_lse_of_the_wrong_shape_is_refused_by_name(device, function, problem, wrong):
    call = harness.arguments_for(function, problem)
    lse = call["softmax_lse"]
    call["softmax_lse"] = {
        "one-row-less": lse[..., :-1],
        "one-head": lse[..., :1, :],
        "one-sequence": lse[:1] if lse.dim() == 3 else lse[:, : problem.seqlens[0][0]],
    }[wrong]
    with pytest.raises(ArgumentError, match=r"^softmax_lse: "):
        harness.run(function, call, device)


WRONG_DTYPES = [
    *((name, torch.float32) for name in ("dout", "out", "dq", "dk", "dv")),
    *(("softmax_lse", dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)),
]


def assert_refused(device: torch.device, function, call: Arguments, name: str) -> None:
    """By name, and nothing was written."""
    there = on(device, function, call)
    with virtual_ascend.record() as seen, pytest.raises(ArgumentError, match=rf"^{name}: "):
        function(**there)
    assert not seen.launches
    assert all(there[x].isnan().all() for x in ("dq", "dk", "dv"))


@backwards
@pytest.mark.parametrize(("name", "dtype"), WRONG_DTYPES)
def test_a_wrong_dtype_is_refused_by_name(device, function, problem, name, dtype):
    call = harness.arguments_for(function, problem)
    call[name] = call[name].to(dtype)
    assert_refused(device, function, call, name)


@backwards
def test_the_lse_of_float64_is_float64(device, function, problem):
    call = harness.arguments_for(function, replace(problem, dtype=torch.float64))
    assert_refused(device, function, call, "softmax_lse")
    call["softmax_lse"] = call["softmax_lse"].double()
    harness.assert_right(harness.run(function, call, device), harness.truth(function, call))


@forwards
@pytest.mark.parametrize("dropout_p", [0.0, 1e-30, P])
@pytest.mark.parametrize("wanted", [False, True])
def test_fake_tensors_have_the_shapes_of_real_ones(device, function, problem, dropout_p, wanted):
    """S_dmask among them, which is empty where nothing is dropped."""
    call = harness.arguments_for(function, problem)
    there = on(device, function, call | {"dropout_p": dropout_p, "return_softmax": wanted})
    real = function(**there)
    with FakeTensorMode() as mode:
        fake = function(
            **{x: mode.from_tensor(y) if isinstance(y, Tensor) else y for x, y in there.items()}
        )
    for one, other in zip(real, fake, strict=True):
        assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    assert (real[2].shape == (0,)) == (not wanted or dropout_p < P)


@forwards
@pytest.mark.parametrize("options", [{}, {"softcap": 0.8}, {"dropout_p": P}], ids=str)
def test_lse_needs_no_gradient(device, function, problem, options):
    call = harness.arguments_for(function, problem) | options
    leaves = {name: call[name].requires_grad_() for name in "qkv"}
    out, *others = function(**on(device, function, call | leaves))
    assert out.requires_grad
    assert not any(x.requires_grad for x in others)
