"""A launch that raises at the first call of a kind is no end of the model: what is behind it serves
exactly, one error tells of it, and the operator is not launched again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import flash_attn_npu
from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu import flash_attn_func
from flash_attn_npu._core.ground.settings import verifying
from flash_attn_npu._core.table import choice
from flash_attn_npu._core.verification import kinds
from flash_attn_npu.errors import UnsupportedError
from flash_attn_npu.layers.rotary import apply_rotary_emb
from flash_attn_npu.ops.activations import swiglu
from tests.helpers.old_torch import needs
from tests.helpers.telling_calls import CALLS, HALF, alike, drawn, errors, sunk_by_torch

LACKED = {
    "npu_fusion_attention": (
        "flash_attn_func",
        "flash_attn_func, gradient",
        "flash_attn_func(deterministic), gradient",
        "flash_attn_func(alibi)",
        "flash_attn_varlen_func(causal), gradient",
        "attention with a sink, gradient",
    ),
    "npu_fusion_attention_grad": (
        "flash_attn_func(causal), gradient",
        "flash_attn_func(deterministic), gradient",
        "flash_attn_varlen_func, gradient",
        "attention with a sink, gradient",
    ),
    "npu_fused_infer_attention_score": (
        "flash_attn_with_kvcache(lse)",
        "flash_attn_with_kvcache(window)",
        "flash_attn_with_kvcache, unpaged",
    ),
    "npu_fused_infer_attention_score_v2": ("a sink over pages", "a sink over pages (window)"),
    "npu_scatter_pa_kv_cache": (
        "flash_attn_with_kvcache, new keys",
        "flash_attn_with_kvcache, new keys in rows",
    ),
    "npu_gather_pa_kv_cache": ("flash_attn_with_kvcache, gathered",),
    "npu_rotary_mul": (
        "apply_rotary_emb",
        "apply_rotary_emb(inplace)",
        "apply_rotary_emb, gradient",
    ),
    "npu_mrope": ("rotary of a step", "rotary of a step, q alone"),
    "npu_rms_norm": ("rms norm", "rms norm, gradient"),
    "npu_rms_norm_backward": ("rms norm, gradient",),
    "npu_add_rms_norm": ("rms norm of a sum",),
    "npu_add_layer_norm": ("layer norm of a sum", "layer norm and its sum, gradient"),
    "npu_add_layer_norm_backward": ("layer norm of a sum, gradient",),
    "npu_swiglu": ("swiglu", "swiglu, gradient"),
    "npu_swiglu_backward": ("swiglu, gradient",),
    "npu_geglu": ("exact geglu",),
    "npu_cross_entropy_loss": ("cross entropy", "cross entropy(label_smoothing)"),
    "npu_cross_entropy_loss_backward": ("cross entropy, gradient",),
}
CASES = [
    pytest.param(operator, call, late, id=f"{operator}, {call}{', late' * late}")
    for operator, calls in LACKED.items()
    for call in calls
    for late in (False, True)[: 1 + (call is calls[0])]
]
LACKING = "ERR01004 OPS invalid pointer"
UNTOLD = ("norm", "new keys", "gathered", "over pages", "of a step", "geglu", "swiglu, gradient")
"""That a shortcut was passed over nobody is told, and a gate's gradient is not counted."""


@pytest.fixture(autouse=True)
def seeded(npu: torch.device) -> Iterator[None]:
    torch.npu.manual_seed(0)
    with verifying("compose"):
        yield


def exact(name: str, served: list[Tensor], honest: list[Tensor]) -> bool:
    """By upstream's rule with a sink: what older kernels do not take makes out be rounded twice."""
    if name != "attention with a sink, gradient":
        return alike(served, honest)
    truth, plain = (sunk_by_torch(dtype) for dtype in (torch.float64, HALF))
    return all(
        off(x, true) <= 2 * off(other, true) + 1e-5
        for answer in (served, honest)
        for x, true, other in zip(answer, truth, plain, strict=True)
    )


def off(x: Tensor, true: Tensor) -> float:
    return float((x.detach().cpu().double() - true).abs().max())


@pytest.mark.parametrize(("operator", "name", "late"), CASES)
def test_what_raises_is_served_exactly(
    operator: str, name: str, late: bool, npu: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    call = CALLS[name]
    with verifying("off"):
        honest = call(npu)
        with virtual_ascend.lacking(operator, late=late) as lack:
            with contextlib.suppress(RuntimeError):
                call(npu)
            if not lack.raised:
                pytest.skip("this torch_npu lacks the operator: the call is composed")
    with virtual_ascend.lacking(operator, late=late) as lack:
        served = call(npu)
        assert exact(name, served, honest)
        # where one operator stands behind another, or a gradient is another kind, it raises too
        record, *more = errors(caplog)
        launched = lack.raised
        assert len(more) + 1 == launched
        with flash_attn_npu.reporting() as report:
            assert exact(name, call(npu), honest)
        assert lack.raised == launched
    assert len(errors(caplog)) == launched
    told = "".join(reason for tally in report.tallies for reason in tally.reasons)
    assert kinds.RAISED in told or any(word in name for word in UNTOLD)
    for word in ("raised an error at its first call", f"aclnn{operator}", "kind:", "Ascend910B3"):
        assert word in record
    assert "\n" not in record
    print(record)


def leaves(device: torch.device) -> list[Tensor]:
    given = [drawn(device, 2, 20, n, 32 + i)[..., :32] for i, n in enumerate((4, 2, 2))]
    return [x.detach().requires_grad_() for x in given]


def called(device: torch.device) -> Tensor:
    with torch.no_grad():
        return flash_attn_func(*leaves(device), causal=True)


def test_refuse_and_warn_show_the_original_error(
    npu: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    for mode in ("refuse", "warn", "off"):
        with verifying(mode), virtual_ascend.lacking("npu_fusion_attention"):
            for _ in range(2):
                with pytest.raises(RuntimeError, match=LACKING):
                    called(npu)
    assert not errors(caplog)
    with virtual_ascend.lacking("npu_fusion_attention"):
        called(npu)
        for mode in ("refuse", "warn"):
            with verifying(mode), pytest.raises(RuntimeError, match=LACKING):
                called(npu)


def test_a_kind_that_is_settled_is_not_watched(npu: torch.device) -> None:
    called(npu)
    with (
        virtual_ascend.lacking("npu_fusion_attention"),
        pytest.raises(RuntimeError, match=LACKING),
    ):
        called(npu)
    with verifying("always"):
        called(npu)
        with virtual_ascend.lacking("npu_fusion_attention"):
            called(npu)


MACHINE = [
    "NPU out of memory. Tried to allocate 2.00 GiB",
    "call aclnnFlashAttentionScore failed, EL0004: Failed to allocate memory",
    "FORCE STOP.",
    "UCE ERROR",
]


@pytest.mark.parametrize("words", MACHINE)
def test_what_the_machine_raises_is_no_word_against_a_kernel(
    words: str, npu: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        virtual_ascend.lacking("npu_fusion_attention", words),
        pytest.raises(RuntimeError, match=words[:9]),
    ):
        called(npu)
    assert not errors(caplog)
    assert not kinds._verdicts._known
    called(npu)
    assert [verdict.agrees for verdict in kinds._verdicts._known.values()] == [True]


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_rehearsal_for_which_there_is_no_memory_is_none(
    deterministic: bool, npu: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    with virtual_ascend.lacking("npu_fusion_attention_grad", MACHINE[0]) as lack:
        out = flash_attn_func(*leaves(npu), deterministic=deterministic)
        assert lack.raised == 1
    out.sum().backward()
    assert not errors(caplog)
    assert all(verdict.agrees for verdict in kinds._verdicts._known.values())


def test_a_captured_graph_raises_what_it_raises(
    npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.npu, "is_current_stream_capturing", lambda: True)
    with (
        virtual_ascend.lacking("npu_fusion_attention"),
        pytest.raises(RuntimeError, match=LACKING),
    ):
        called(npu)
    assert not kinds._verdicts._known


def test_where_nothing_else_serves_the_first_error_is_seen(
    npu: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    with virtual_ascend.lacking("npu_fusion_attention") as lack, flash_attn_npu.fallback("error"):
        for times in (1, 2):
            with pytest.raises(RuntimeError, match=LACKING) as caught:
                called(npu)
            assert isinstance(caught.value.__cause__, UnsupportedError)
            assert lack.raised == times
    assert not errors(caplog)
    assert not any(verdict.settled for verdict in kinds._verdicts._known.values())


def test_where_what_is_behind_raises_too_the_first_error_is_seen(
    npu: torch.device, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    decide = choice._decide

    def broken(problem: Any) -> choice.Plan:
        plan = decide(problem)
        if plan.name == "torch":
            raise RuntimeError("the device is gone")
        return plan

    x = drawn(npu, 2, 9, 3, 64)
    before, tables = x.clone(), (drawn(npu, 9, 32), drawn(npu, 9, 32))
    monkeypatch.setattr(choice, "_decide", broken)
    with (
        virtual_ascend.lacking("npu_rotary_mul", late=True),
        pytest.raises(RuntimeError, match="aclnnnpu_rotary_mul") as caught,
    ):
        apply_rotary_emb(x, *tables, inplace=True)
    assert str(caught.value.__cause__) == "the device is gone"
    assert torch.equal(x, before)
    assert not errors(caplog)


@needs("npu_scatter_pa_kv_cache", "cache_mode")
def test_an_append_that_raises_behind_its_rehearsal_is_written_again(
    npu: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    call = CALLS["flash_attn_with_kvcache, new keys"]
    with verifying("off"):
        honest = call(npu)
    with virtual_ascend.lacking("npu_scatter_pa_kv_cache", spared=1, late=True) as lack:
        served = call(npu)
    assert lack.raised == 1
    assert all(torch.equal(a, b) for a, b in zip(served[1:], honest[1:], strict=True))
    assert len(errors(caplog)) == 1


def test_a_rotation_in_place_begins_where_it_began(npu: torch.device) -> None:
    call = CALLS["apply_rotary_emb(inplace)"]
    with verifying("off"):
        [honest] = call(npu)
    with virtual_ascend.lacking("npu_rotary_mul", late=True):
        [served] = call(npu)
    assert alike([served], [honest])


@pytest.mark.parametrize("lies", [False, True])
def test_every_block_of_a_large_rotation_is_served_by_what_is_right(
    lies: bool, npu: torch.device, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One plan serves all blocks, and the first of them finds the kernel wrong."""
    x, tables = drawn(npu, 4, 9, 3, 64), (drawn(npu, 9, 32), drawn(npu, 9, 33)[:, :32])
    decide = choice._decide

    def in_blocks(problem: Any) -> choice.Plan:
        plan = decide(problem)
        plan.kernel = plan.kernel._replace(at_once=x[0].numel())
        return plan

    monkeypatch.setattr(choice, "_decide", in_blocks)
    with verifying("off"):
        honest = apply_rotary_emb(x.clone(), *tables, inplace=True)
    fault = virtual_ascend.lying("rotary turns back")
    with fault if lies else virtual_ascend.lacking("npu_rotary_mul"):
        served = apply_rotary_emb(x.clone(), *tables, inplace=True)
    assert alike([served], [honest])
    assert len(errors(caplog)) == 1


# of torch's own tracing
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_traced_graph_uses_nothing_that_raised(npu: torch.device, fresh_dynamo: None) -> None:
    def gated(x: Tensor) -> Tensor:
        return swiglu(*x.chunk(2, -1))

    x = drawn(npu, 3, 128)
    with virtual_ascend.lacking("npu_swiglu"), torch.no_grad():
        honest = gated(x)
        served = torch.compile(gated, backend="eager", fullgraph=True)(x)
    assert torch.equal(served, honest)
    assert not kinds.missed("npu_rms_norm")
