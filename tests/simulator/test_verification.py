"""What the comparison of first calls costs and disturbs: one sample of the first call of a kind,
and nothing after it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn_npu._core.ground.settings import verification, verifying
from flash_attn_npu._core.ground.versions import torch_npu_version
from flash_attn_npu._core.kernels.ascend import filling, infer_attention
from flash_attn_npu._core.table import choice
from flash_attn_npu._core.verification import kinds
from flash_attn_npu.errors import ArgumentError, UnsupportedError
from flash_attn_npu.layers.rotary import apply_rotary_emb
from flash_attn_npu.ops.activations import swiglu
from flash_attn_npu.ops.triton.layer_norm import rms_norm_fn

HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def on(npu: torch.device) -> Iterator[None]:
    with verifying("compose"):
        yield


def drawn(device: torch.device, *shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, HALF).requires_grad_(grad)


def qkv(device: torch.device, *shape: int, grad: bool = False) -> tuple[Tensor, ...]:
    return tuple(drawn(device, *shape, seed=seed, grad=grad) for seed in range(3))


def known() -> list[kinds.Kind]:
    return list(kinds._verdicts._known)


def plans() -> list[choice.Plan]:
    return list(choice._plans._known.values())


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]


def test_a_kind_that_is_known_is_served_by_the_kernel_itself(npu: torch.device) -> None:
    q, k, v = qkv(npu, 2, 20, 4, 32, grad=True)
    for _ in range(2):
        flash_attn_func(q, k, v, causal=True).sum().backward()
    [plan] = plans()
    assert plan.kernel is filling.KERNEL
    assert plan.direct.__qualname__ == "_plain.<locals>.watched"
    assert [kind.part for kind in known()] == ["forward", "gradient"]
    with virtual_ascend.record() as record:
        flash_attn_func(q, k, v, causal=True).sum().backward()
    assert not record.device_to_host


def test_what_is_composed_is_not_compared(npu: torch.device) -> None:
    q, k, v = qkv(npu, 2, 20, 4, 32)
    flash_attn_func(q, k, v, softcap=3.0)
    flash_attn_func(*(x.cpu() for x in (q, k, v)))
    assert not known()


def test_a_gradient_is_compared_beside_the_first_forward(npu: torch.device) -> None:
    q, k, v = qkv(npu, 2, 20, 4, 32, grad=True)
    out = flash_attn_func(q, k, v)
    assert [kind.part for kind in known()] == ["forward", "gradient"]
    assert all(verdict.settled for verdict in kinds._verdicts._known.values())
    with virtual_ascend.record() as record:
        flash_attn_func(q, k, v)
        out.sum().backward()
    assert not record.device_to_host


@pytest.mark.parametrize("mode", ["warn", "refuse"])
def test_a_gradient_waits_for_the_first_backward_where_no_other_kernel_may_serve(
    mode: str, npu: torch.device
) -> None:
    q, k, v = qkv(npu, 2, 20, 4, 32, grad=True)
    with verifying(mode):
        outs = [flash_attn_func(q, k, v) for _ in range(3)]
        assert [kind.part for kind in known()] == ["forward"]
        outs[1].sum().backward()
        assert [kind.part for kind in known()] == ["forward", "gradient"]
        with virtual_ascend.record() as record:
            outs[0].sum().backward()
        assert not record.device_to_host


def test_values_that_tell_nothing_of_a_gradient_are_no_rehearsal(npu: torch.device) -> None:
    zeros = torch.zeros(2, 20, 4, 32, dtype=HALF, device=npu, requires_grad=True)
    for _ in range(2):
        flash_attn_func(zeros, zeros, zeros)
    assert not any(verdict.settled for verdict in kinds._verdicts._known.values())
    flash_attn_func(*qkv(npu, 2, 20, 4, 32, grad=True))
    assert all(verdict.settled for verdict in kinds._verdicts._known.values())


def test_a_gradient_is_tried_so_often_only(npu: torch.device) -> None:
    zeros = torch.zeros(2, 20, 4, 32, dtype=HALF, device=npu, requires_grad=True)
    for _ in range(kinds.MOST_TRIES):
        flash_attn_func(zeros, zeros, zeros)
    with virtual_ascend.record() as record:
        flash_attn_func(zeros, zeros, zeros)
    assert [launch.name for launch in record.launches] == ["npu_fusion_attention"]


def test_a_ragged_training_checks_few_kinds(npu: torch.device) -> None:
    generator = torch.Generator().manual_seed(7)
    for _ in range(40):
        lengths = torch.randint(1, 60, (6,), generator=generator)
        ends = torch.cat((torch.zeros(1), lengths.cumsum(0))).to(torch.int32)
        q, k, v = qkv(npu, int(ends[-1]), 2, 16)
        flash_attn_varlen_func(q, k, v, ends, ends, 60, 60, causal=True)
    assert len(known()) == 1


def test_a_check_reads_a_sample(npu: torch.device) -> None:
    q, k, v = qkv(npu, 12, 256, 12, 16, grad=True)
    batch = 4 * q.nbytes
    copied = []
    for mode in (torch.no_grad, torch.enable_grad):
        with virtual_ascend.record() as record, mode():
            flash_attn_func(q, k, v, causal=True)
        copied.append(sum(copy.bytes for copy in record.device_to_host))
    forward, gradient = copied
    assert 0 < forward < batch / 8
    assert 0 < gradient < batch / 8


def test_nothing_is_disturbed(npu: torch.device) -> None:
    def state() -> list[object]:
        generator = torch.npu.default_generators[0]
        return [
            generator.get_offset(),
            torch.default_generator.get_state().tolist(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("npu"),
        ]

    q, k, v = qkv(npu, 2, 20, 4, 32, grad=True)
    versions = [x._version for x in (q, k, v)]
    before = state()
    out = flash_attn_func(q, k, v, window_size=(4, 2))
    with verifying("off"):
        plain = flash_attn_func(q, k, v, window_size=(4, 2))
    assert out.grad_fn.name() == plain.grad_fn.name()
    assert torch.equal(out, plain)
    out.backward(torch.ones_like(out))
    assert state() == before
    assert [x._version for x in (q, k, v)] == versions


@pytest.mark.parametrize("mode", ["inference", "no_grad", "autocast", "default device"])
def test_it_runs_under_every_mode(mode: str, npu: torch.device) -> None:
    modes = {
        "inference": torch.inference_mode(),
        "no_grad": torch.no_grad(),
        "autocast": torch.autocast("npu", dtype=torch.float16),
        "default device": torch.device(npu),
    }
    q, k, v = qkv(npu, 2, 20, 4, 64)
    weight = torch.ones(64, dtype=HALF, device=npu)
    cos = drawn(npu, 20, 32)
    with modes[mode]:
        flash_attn_func(q, k, v, causal=True)
        rms_norm_fn(q, weight, None, eps=1e-5)
        apply_rotary_emb(q, cos, cos)
        flash_attn_with_kvcache(q, k, v, cache_seqlens=19)
    assert len(known()) == 4
    assert all(verdict.settled for verdict in kinds._verdicts._known.values())


def test_dropout_draws_the_same_mask_as_without(npu: torch.device) -> None:
    q, k, v = qkv(npu, 2, 20, 4, 32)
    torch.npu.manual_seed(3)
    checked = [flash_attn_func(q, k, v, dropout_p=0.4) for _ in range(2)]
    with verifying("off"):
        torch.npu.manual_seed(3)
        plain = [flash_attn_func(q, k, v, dropout_p=0.4) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(checked, plain, strict=True))


def test_dropout_is_compared_by_its_scale_where_the_mask_is_not_to_be_had(
    npu: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torch_npu

    monkeypatch.delattr(torch_npu, "_npu_dropout_gen_mask")
    q, k, v = qkv(npu, 2, 90, 4, 32)
    flash_attn_func(q, k, v, dropout_p=0.2)
    assert not errors(caplog)
    with verifying("compose"), virtual_ascend.lying("dropout not scaled"):
        flash_attn_func(q, k, v, dropout_p=0.2)
    assert len(errors(caplog)) == 1


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_few_probabilities_are_far_off_their_mean(
    dropout_p: float, npu: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of rows that were filled up have no mask to be compared with."""
    slopes = torch.tensor([0.5, 8.0]).to(npu)
    with verifying("always"):
        for seed in range(12):
            shapes = ((2, 5, 2, 32), (2, 40, 1, 32), (2, 40, 1, 32))
            q, k, v = (drawn(npu, *shape, seed=3 * seed + i) for i, shape in enumerate(shapes))
            flash_attn_func(q * 4, k, v, dropout_p=dropout_p, alibi_slopes=slopes)
    assert not errors(caplog)


def test_the_scale_of_dropout_is_compared_without_a_mask(
    npu: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    q, k, v = (drawn(npu, 2, length, 4, 32, seed=length) for length in (90, 140, 140))
    slopes = torch.tensor([0.1, 0.05, 0.02, 0.01]).to(npu)
    with virtual_ascend.lying("dropout not scaled"):
        flash_attn_func(q, k, v, dropout_p=0.4, alibi_slopes=slopes)
    assert len(errors(caplog)) == 1


def test_nothing_is_read_while_a_graph_is_captured(
    npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = qkv(npu, 2, 20, 4, 32)
    monkeypatch.setattr(torch.npu, "is_current_stream_capturing", lambda: True)
    with virtual_ascend.record() as record:
        flash_attn_func(q, k, v)
    assert not record.device_to_host
    assert not known()
    monkeypatch.undo()
    flash_attn_func(q, k, v)
    assert len(known()) == 1


def test_values_that_tell_nothing_settle_nothing(
    npu: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    """A run to warm up, on zeros or on ones, is no comparison."""
    q, k, v = qkv(npu, 2, 20, 4, 32)
    for fill in (torch.zeros_like, torch.ones_like):
        flash_attn_func(fill(q), fill(k), fill(v), causal=True)
    with virtual_ascend.lying("heads grouped the other way"):
        flash_attn_func(fill(q), fill(k)[:, :, :2], fill(v)[:, :, :2], causal=True)
        assert not errors(caplog)
        flash_attn_func(q, k[:, :, :2], v[:, :, :2], causal=True)
    assert len(errors(caplog)) == 1


def test_a_confirmed_combination_is_not_compared(
    npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def confirmed(*combination: object) -> bool:
        asked.append(combination)
        return True

    monkeypatch.setattr(kinds, "confirmed", confirmed)
    q, k, v = qkv(npu, 2, 20, 4, 32)
    with virtual_ascend.record() as record:
        flash_attn_func(q, k, v)
    assert not record.device_to_host
    soc, _, torch_npu, kind = asked[0]
    here = ("Ascend910B3", torch_npu_version(), "npu_fusion_attention")
    assert (soc, torch_npu, kind.kernel) == here


def test_the_settings(npu: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    q, k, v = qkv(npu, 2, 20, 4, 32)
    truth = flash_attn_func(*(x.cpu() for x in (q, k, v)))
    with virtual_ascend.lying("scale forgotten"):
        with verifying("refuse"):
            for _ in range(2):
                with pytest.raises(UnsupportedError, match="FLASH_ATTN_NPU_VERIFY=refuse"):
                    flash_attn_func(q, k, v)
            assert len(errors(caplog)) == 1
        with verifying("warn"):
            for _ in range(2):
                assert (flash_attn_func(q, k, v).cpu() - truth).abs().max() > 0.1
            assert len(errors(caplog)) == 2
        with verifying("off"):
            assert (flash_attn_func(q, k, v).cpu() - truth).abs().max() > 0.1
            assert len(errors(caplog)) == 2
    with verifying("always"):
        flash_attn_func(q, k, v)
        with virtual_ascend.lying("scale forgotten"):
            assert (flash_attn_func(q, k, v).cpu() - truth).abs().max() < 0.02
        assert len(errors(caplog)) == 3
    assert verification() == "compose"
    with pytest.raises(ArgumentError, match="compose, refuse, warn, always, off"):
        verifying("sometimes").__enter__()


def test_a_cache_is_read_where_it_lies_again(npu: torch.device) -> None:
    q, k, v = qkv(npu, 2, 64, 2, 64)
    for _ in range(2):
        flash_attn_with_kvcache(q[:, :1], k, v, cache_seqlens=50)
    assert infer_attention.KERNEL in [plan.kernel for plan in plans()]


def test_a_wrong_gradient_is_put_right_in_its_own_backward(
    npu: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the kernel was given fewer rows than the caller has."""
    ends = [torch.tensor(x, dtype=torch.int32) for x in ([0, 30, 50, 50], [0, 20, 60, 63])]
    leaves = [drawn(npu, 52, 4, 32, grad=True)]
    leaves += [drawn(npu, 65, 2, 32, seed=seed, grad=True) for seed in (1, 2)]
    dout = drawn(npu, 52, 4, 32, seed=5)

    def gradients() -> tuple[Tensor, ...]:
        out = flash_attn_varlen_func(*leaves, *ends, 30, 40, causal=True)
        return torch.autograd.grad(out, leaves, dout)

    honest = gradients()
    with verifying("compose"), virtual_ascend.lying("gradients of k halved"):
        for grad, truth in zip(gradients(), honest, strict=True):
            assert torch.allclose(grad, truth, atol=2e-2, rtol=2e-2)
    assert len(errors(caplog)) == 1


def test_single_tokens_alone_settle_nothing_else(
    npu: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernel is not given them: so it answers for nothing, its gradient neither."""
    for lengths in ([1] * 20, [1] * 20 + [9]):
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        leaves = qkv(npu, sum(lengths), 2, 32, grad=True)
        with virtual_ascend.lying("scale forgotten"):
            out = flash_attn_varlen_func(*leaves, ends, ends, 9, 9)
        assert all(grad is not None for grad in torch.autograd.grad(out.sum(), leaves))
        assert len(errors(caplog)) == (1 if 9 in lengths else 0)


def test_numbers_that_are_none_accuse_nobody(
    npu: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    """NaN that came in, and sums that float16 does not hold, are the caller's."""
    q, k, v = qkv(npu, 2, 20, 4, 32)
    k[1, 3, 0, 0] = torch.nan
    v[0, 5] = torch.inf
    flash_attn_func(q, k, v, causal=True)
    x = torch.full((4, 64), 6e4, dtype=torch.float16, device=npu)
    weight = torch.ones(64, dtype=torch.float16, device=npu)
    rms_norm_fn(x, weight, None, residual=x, prenorm=True, eps=1e-5)
    assert not errors(caplog)
    assert not any(v.settled for kind, v in kinds._verdicts._known.items() if kind.headdim)


@pytest.mark.parametrize(("eps", "size"), [(1e-8, 1e-4), (6e-8, 1.0), (1e-5, 1e-3)])
def test_gradients_too_large_for_float16_accuse_nobody(
    eps: float, size: float, npu: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    """They are as many times larger as the rows of a norm are small."""
    x = drawn(npu, 7, 64).to(torch.float16) * size
    weight = torch.linspace(-30, 30, 64, dtype=torch.float16).to(npu)
    rms_norm_fn(x.requires_grad_(), weight.requires_grad_(), None, eps=eps)
    [verdict] = kinds._verdicts._known.values()
    assert verdict == kinds.Verdict(True, 1)
    assert not errors(caplog)


def test_a_gate_of_any_length_is_of_one_kind(npu: torch.device) -> None:
    for tokens in (3, 5):
        swiglu(*drawn(npu, tokens, 64).chunk(2, -1))
    assert [str(kind) for kind in known()] == ["npu_swiglu, forward: bfloat16, halves"]


def test_a_plan_tells_its_kinds_whatever_the_setting(npu: torch.device) -> None:
    """By which reports confirm them."""
    q, k, v = qkv(npu, 2, 20, 4, 32)
    flash_attn_func(q, k, v, causal=True)
    names = {str(kind) for kind in known()}
    with verifying("off"):
        flash_attn_func(q, k, v, causal=True)
        assert {name for plan in plans() for name in choice.kinds(plan)} == names
