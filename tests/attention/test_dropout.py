"""dropout_p: a fair mask, scaled by 1 / (1 - p), the same in forward and backward.

The composed kernel shows its mask in S_dmask. The fused one does not: with the identity as v its
output is the dropped probabilities themselves.
"""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu import flash_attn_func, flash_attn_varlen_func
from flash_attn_npu import flash_attn_interface as interface
from tests.helpers import argument_harness as harness
from tests.helpers import reference
from tests.helpers.argument_harness import Arguments
from tests.helpers.strategies import Problem

P = 0.3
DENSE = Problem(((24, 40),) * 2, nheads_k=2, group=2, headdim=16, dtype=torch.float16, causal=True)
VARLEN = Problem(((9, 17), (24, 24), (30, 40)), nheads_k=2, group=2, headdim=16)
FUSED = ("npu_fusion_attention", "npu_fusion_attention_grad")

both_layouts = pytest.mark.parametrize(
    ("function", "problem"),
    [(flash_attn_func, DENSE), (flash_attn_varlen_func, VARLEN)],
    ids=["dense", "varlen"],
)


def assert_fair(hits: Tensor, probability: float) -> None:
    """As many True as independent draws give, within five standard deviations."""
    count = hits.numel()
    deviation = math.sqrt(count * probability * (1 - probability))
    assert abs(int(hits.sum()) - count * probability) < 5 * deviation


def assert_fair_mask(kept: Tensor, p: float) -> None:
    """(batch, nheads, seqlen_q, seqlen_k): fair overall, and neighbours in no direction agree."""
    assert_fair(kept, 1 - p)
    for dimension in range(kept.dim()):
        ahead, behind = kept.unflatten(dimension, (-1, 2)).unbind(dimension + 1)
        assert_fair(ahead & behind, (1 - p) ** 2)
    assert_fair(kept[0] & kept[-1], (1 - p) ** 2)
    assert_fair(kept[..., :64, :] & kept[..., -64:, :], (1 - p) ** 2)


def uniform(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v that give every probability 1 / 128, and show it in the output."""
    zeros = torch.zeros(2, 128, 4, 128, device=device)
    eye = torch.eye(128, device=device)[None, :, None].expand(2, 128, 4, 128)
    return zeros, zeros, eye


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_mask_is_fair(device, p):
    torch.manual_seed(0)
    s_dmask = flash_attn_func(*uniform(device), p, return_attn_probs=True)[2]
    assert s_dmask.shape == (2, 4, 128, 128)
    assert_fair_mask(s_dmask.cpu() > 0, p)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_mask_of_the_fused_kernel_is_fair_and_scales(npu, p):
    torch.manual_seed(0)
    with virtual_ascend.record() as seen:
        out = flash_attn_func(*uniform(npu), p)
    (launch,) = (x for x in seen.launches if x.name == FUSED[0])
    assert launch.arguments["keep_prob"] == 1 - p
    shown = out.cpu().transpose(1, 2)
    assert_fair_mask(shown > 0, p)
    expected = (shown > 0) / 128 / (1 - p)
    torch.testing.assert_close(shown, expected.to(shown.dtype))


def test_a_mask_spans_more_than_one_tile(device):
    """Tiles draw for themselves: those beside and below each other must draw differently."""
    torch.manual_seed(0)
    q = torch.zeros(1, 1100, 1, 8, device=device)
    s_dmask = flash_attn_func(q, q, q, 0.5, return_attn_probs=True)[2]
    kept = s_dmask.cpu()[0, 0, :1024, :1024] > 0
    assert_fair(kept, 0.5)
    tiles = [kept[i : i + 512, j : j + 512] for i in (0, 512) for j in (0, 512)]
    for index, tile in enumerate(tiles):
        for other in tiles[:index]:
            assert_fair(tile == other, 0.5)


@both_layouts
def test_output_and_gradients_are_the_reference_under_the_mask_of_s_dmask(
    device, function, problem
):
    call = harness.arguments_for(function, problem)
    call |= {"dropout_p": P, "return_attn_probs": True}
    answer = harness.run(function, call, device)
    call["dropout_mask"] = harness.masks_from(answer["s_dmask"], call)
    harness.assert_right(answer, harness.truth(function, call))


@both_layouts
def test_s_dmask_holds_the_probabilities_before_dropout(device, function, problem):
    call = harness.arguments_for(function, problem)
    call |= {"dropout_p": P, "return_attn_probs": True}
    s_dmask = harness.run(function, call, device)["s_dmask"]
    assert s_dmask.shape == (len(problem.seqlens), problem.nheads, 128, 128)
    exact = harness.solver(call | {"dropout_p": 0.0})(*harness.inputs_of(call)).probabilities
    for square, expected in zip(s_dmask.cpu(), exact, strict=True):
        rows, keys = expected.shape[1:]
        eps = torch.finfo(problem.dtype).eps
        torch.testing.assert_close(
            square[:, :rows, :keys].abs().double(), expected, rtol=4 * eps, atol=eps
        )
        assert (square[:, rows:] == 0).all()
        assert (square[:, :, keys:] == 0).all()


def with_identity(function, problem: Problem) -> Arguments:
    """A call whose v is the identity in each sequence, headdim being at least its length."""
    call = harness.arguments_for(function, problem)
    cumulative = problem.cu_seqlens_k
    ones = [torch.eye(end - start, problem.headdim) for start, end in pairwise(cumulative)]
    shape = call["v"].shape
    flat = torch.cat(ones)[:, None].expand(-1, problem.nheads_k, -1)
    return call | {"v": flat.reshape(shape).to(problem.dtype)}


def shown_masks(out: Tensor, problem: Problem) -> list[Tensor]:
    """Per sequence, which probabilities the output of `with_identity` shows."""
    rows = out.detach().cpu().reshape(-1, *out.shape[-2:]).transpose(0, 1)
    spans = zip(pairwise(problem.cu_seqlens_q), problem.seqlens, strict=True)
    return [rows[:, start:end, :keys] != 0 for (start, end), (_, keys) in spans]


@pytest.mark.parametrize(
    ("function", "seqlens"),
    [(flash_attn_func, ((24, 32),) * 2), (flash_attn_varlen_func, ((9, 17), (24, 24), (30, 32)))],
    ids=["dense", "varlen"],
)
@pytest.mark.parametrize("causal", [False, True])
def test_the_fused_kernel_drops_alike_in_forward_and_backward(npu, function, seqlens, causal):
    problem = Problem(seqlens, nheads_k=2, group=2, headdim=32, causal=causal)
    call = with_identity(function, problem) | {"dropout_p": P}
    with virtual_ascend.record() as seen:
        answer = harness.run(function, call, npu)
    launches = [x for x in seen.launches if x.name in FUSED]
    assert [x.name for x in launches] == list(FUSED)
    assert all(x.arguments["keep_prob"] == 1 - P for x in launches)
    call["dropout_mask"] = shown_masks(answer["out"], problem)
    visible = harness.solver(call | {"dropout_p": 0.0})(*harness.inputs_of(call)).probabilities
    for kept, probabilities in zip(call["dropout_mask"], visible, strict=True):
        assert_fair(kept[probabilities > 0], 1 - P)
    harness.assert_right(answer, harness.truth(function, call))


@pytest.mark.parametrize(
    ("layout", "seqlens"),
    [("", ((24, 32),) * 2), ("_varlen", ((9, 17), (24, 24), (0, 5), (20, 12)))],
    ids=["dense", "varlen"],
)
def test_the_fused_gradient_repeats_the_mask_of_rng_state(npu, layout, seqlens):
    """Given (out, lse, rng_state) alone, also where rows without keys were left out."""
    forward = getattr(interface, f"_flash_attn{layout}_forward")
    backward = getattr(interface, f"_flash_attn{layout}_backward")
    problem = Problem(seqlens, nheads_k=2, group=2, headdim=32, causal=True)
    call = with_identity(forward, problem) | {"dropout_p": P}
    with virtual_ascend.record() as seen:
        answer = harness.run(forward, call, npu)
        call |= harness.arguments_for(backward, problem) | {"v": call["v"], "dropout_p": P}
        call |= {x: answer[x].cpu() for x in ("out", "softmax_lse", "rng_state")}
        gradients = harness.run(backward, call, npu)
    launches = [x for x in seen.launches if x.name in FUSED]
    assert [x.name for x in launches] == list(FUSED)
    call["dropout_mask"] = shown_masks(answer["out"], problem)
    harness.assert_right(gradients, harness.truth(backward, call))


@pytest.mark.parametrize("function", [flash_attn_func, flash_attn_varlen_func])
def test_the_fused_kernel_drops_alike_when_deterministic(npu, function):
    problem = Problem(((24, 32),) * 2, nheads_k=2, group=2, headdim=32, causal=True)
    call = with_identity(function, problem) | {"dropout_p": P, "deterministic": True}
    with virtual_ascend.record() as seen:
        answer = harness.run(function, call, npu)
    assert [x.name for x in seen.launches if x.name in FUSED] == list(FUSED)
    call["dropout_mask"] = shown_masks(answer["out"], problem)
    harness.assert_right(answer, harness.truth(function, call))


@both_layouts
@pytest.mark.parametrize("shown", [False, True], ids=["plain", "with-s_dmask"])
def test_manual_seed_repeats_the_mask(device, function, problem, shown):
    call = harness.arguments_for(function, problem)
    call |= {"dropout_p": P, "return_attn_probs": shown}
    answers = []
    for seed in (1, None, 1):
        if seed is not None:
            torch.manual_seed(seed)
        answers.append(harness.run(function, call, device))
    first, second, again = answers
    for name in ("out", "dq", "dk", "dv"):
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], second[name])


CHECKPOINTED = {
    "dense": (flash_attn_func, DENSE, {}),
    "packed": (flash_attn_varlen_func, VARLEN, {}),
    # the fused kernel serves their forward, and its gradient does not
    "window of one": (flash_attn_varlen_func, VARLEN, {"window_size": (0, 0)}),
    "causal window": (flash_attn_varlen_func, VARLEN, {"causal": True, "window_size": (3, 0)}),
    "deterministic alibi": (
        flash_attn_varlen_func,
        VARLEN,
        {"deterministic": True, "alibi_slopes": torch.ones(4) / 8},
    ),
}


@pytest.mark.parametrize(
    ("function", "problem", "options"), CHECKPOINTED.values(), ids=CHECKPOINTED.keys()
)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_recomputes_the_same_mask(device, function, problem, options, reentrant):
    call = harness.arguments_for(function, problem) | {"dropout_p": P} | options

    there = {x: y.to(device) if isinstance(y, Tensor) else y for x, y in call.items()}
    rest = {name: there[name] for name in harness.parameters(function)[3:]}
    torch.manual_seed(5)
    expected = harness.run(function, call, device)
    torch.manual_seed(5)
    leaves = [there[name].detach().requires_grad_() for name in "qkv"]
    # reentrant checkpointing takes no keyword arguments
    out = checkpoint(lambda *x: function(*x, **rest), *leaves, use_reentrant=reentrant)
    # whoever draws in between must not disturb what is recomputed
    torch.rand(3, device=device), torch.rand(3)
    out.backward(there["dout"])
    assert torch.equal(out, expected["out"])
    for name, leaf in zip("qkv", leaves, strict=True):
        assert torch.equal(leaf.grad, expected[f"d{name}"])


@both_layouts
def test_a_vanishing_probability_means_none(device, function, problem):
    call = harness.arguments_for(function, problem) | {"return_attn_probs": True}
    before = torch.get_rng_state()
    with virtual_ascend.record() as seen:
        none, vanishing = (
            harness.run(function, call | {"dropout_p": p}, device) for p in (0.0, 1e-30)
        )
    assert none.keys() == vanishing.keys()
    assert all(torch.equal(none[name], vanishing[name]) for name in none)
    assert vanishing["s_dmask"].shape == (0,)
    assert torch.equal(torch.get_rng_state(), before)
    fused = [x for x in seen.launches if x.name in FUSED]
    assert len(fused) == (4 if device.type == "npu" else 0)
    assert all(x.arguments["keep_prob"] == 1.0 for x in fused)


@both_layouts
def test_the_mask_leaves_softmax_lse_alone(device, function, problem):
    call = harness.arguments_for(function, problem) | {"return_attn_probs": True}
    dropped = harness.run(function, call | {"dropout_p": P}, device)
    exact = harness.truth(function, call)["softmax_lse"].exact
    reference.assert_lse_close(dropped["softmax_lse"], exact)
