"""What is said of a call that is not fused: the reasons that decided, in the caller's words."""

import re

import pytest
import torch

from flash_attn_npu import fallback, flash_attn_func, flash_attn_varlen_func, reporting
from flash_attn_npu._core.ground.memory import forget_all, memos
from flash_attn_npu._core.table import attention as support
from flash_attn_npu._core.table import choice, rowwise
from flash_attn_npu._integrations.stand_ins import npu_flash_attn_func
from flash_attn_npu.errors import ArgumentError, UnsupportedError

CAPPED = {"softcap": 5.0}
NO_SOFTCAP = "npu_fusion_attention: no Ascend kernel has softcap"
OFF_DIAGONAL = "npu_fusion_attention: its alibi_slopes are documented for seqlen_q = seqlen_k only"


def _sunk(device: torch.device, **options) -> torch.Tensor:
    q = torch.randn(2, 5, 4, 16, device=device, requires_grad=True)
    sink = torch.zeros(4, device=device, requires_grad=True)
    return npu_flash_attn_func(q, q, q, s_aux=sink, **options)


def _sloped(device: torch.device, **options) -> torch.Tensor:
    q, k = (torch.randn(n, 4, 16, device=device, requires_grad=True) for n in (17, 14))
    slopes = torch.rand(4).to(device)
    return flash_attn_varlen_func(
        q, k, k, [0, 8, 17], [0, 5, 14], 9, 9, alibi_slopes=slopes, **options
    )


def _dense(device: torch.device, **options) -> torch.Tensor:
    q = torch.randn(2, 5, 4, 16, device=device, requires_grad=True)
    return flash_attn_func(q, q, q, **options)


DECISIONS = {
    "softcap": (_dense, CAPPED, (NO_SOFTCAP,)),
    "sink in float32": (_sunk, {}, ()),
    "packed ALiBi": (_sloped, {}, (OFF_DIAGONAL,)),
    "packed ALiBi, deterministic": (
        _sloped,
        {"deterministic": True},
        (OFF_DIAGONAL,),
    ),
    "fused": (_dense, {}, ()),
    "fused, deterministic": (_dense, {"deterministic": True}, ()),
    "dropout": (_dense, {"dropout_p": 0.5, "softcap": 5.0}, (NO_SOFTCAP,)),
}


@pytest.mark.parametrize("name", DECISIONS)
def test_a_call_is_decided_once(npu, monkeypatch, name):
    """With the reasons that decided, and no others: nobody asked for softmax_lse."""
    run, options, reasons = DECISIONS[name]
    forget_all()
    decided = []

    def refusals(kernel, problem):
        if kernel == support.FUSION:
            decided.append(problem)
        return decide(kernel, problem)

    decide = choice.refusals
    monkeypatch.setattr(choice, "refusals", refusals)
    with reporting() as region:
        run(npu, **options).sum().backward()
        run(npu, **options).sum().backward()
    (plans,) = (memo for memo in memos() if memo.name == "plans of calls")
    (plan,) = plans._known.values()
    forget_all()
    assert len(decided) == 1
    # the kernel for a CPU is asked too, and not told
    told = [verdict for verdict in plan.trace if verdict.kernel != support.HOST]
    assert [len(verdict.reasons) > 0 for verdict in told] == [True] * len(reasons) + [False]
    assert plan.trace[-1].kernel == plan.name
    assert {x.reasons for x in region.tallies} == {reasons}
    forward = [x for x in region.tallies if not x.function.endswith(" (backward)")]
    assert [x.calls for x in forward] == [2]


def test_a_refusal_says_how_to_allow_it(npu):
    how = re.escape('flash_attn_npu.fallback("warn") or FLASH_ATTN_NPU_FALLBACK=warn')
    with fallback("error"), pytest.raises(UnsupportedError, match=rf"^flash_attn_func: .*{how}$"):
        _dense(npu, **CAPPED)


ARGUMENTS = {
    "softcap": ("softcap",),
    "alibi_slopes": ("alibi_slopes",),
    "sink": ("sink",),
    "window_size (0, 0)": ("window_size",),
    "S_dmask": ("return_attn_probs",),
    "backward of a dropout mask": ("rng_state",),
    "that is not contiguous": ("k_cache", "v_cache"),
    "cache_leftpad": ("cache_leftpad",),
    "shared pages": ("block_table",),
    "x1": ("x1",),
    "weight1": ("weight1",),
    "rowscale or layerscale": ("rowscale", "layerscale"),
    "norm with dropout_p": ("dropout_p",),
    "out or residual_out": ("out", "residual_out"),
    "label_smoothing": ("label_smoothing",),
    "logit_scale": ("logit_scale",),
    "lse_square_scale": ("lse_square_scale",),
    "precomputed_lse": ("precomputed_lse",),
    "process group": ("process_group",),
    "inplace_backward": ("inplace_backward",),
}


def test_reasons_name_the_arguments():
    """Whoever reads one must find what to leave out of his call."""
    refusals = [
        (rule.name, refusal)
        for rule in (*support.TABLE, *rowwise.TABLE)
        for refusal in rule.refused.values()
        # whoever lacks an operator has no argument to leave out
        if "a torch_npu without" not in rule.name
    ]
    named = set()
    for name, refusal in refusals:
        for part, arguments in ARGUMENTS.items():
            if part in name and f"{part}s" not in name:
                named.add(part)
                assert any(argument in refusal for argument in arguments), (name, refusal)
    assert named == set(ARGUMENTS)


@pytest.mark.parametrize("argument", ["k", "v"])
def test_the_advice_on_dtypes_keeps_the_narrow_one(argument):
    x = {name: torch.zeros(1, 2, 2, 8, dtype=torch.float32) for name in "qkv"}
    narrow = x | {argument: x[argument].half()}
    with pytest.raises(ArgumentError, match=rf"to fix it: q = q\.to\({argument}\.dtype\)"):
        flash_attn_func(**narrow)
    wide = {name: y.half() for name, y in x.items()} | {argument: x[argument]}
    with pytest.raises(ArgumentError, match=rf"to fix it: {argument} = {argument}\.to\(q\.dtype\)"):
        flash_attn_func(**wide)


def test_packed_heads_first_are_recognised():
    x = torch.zeros(2, 9, 8)
    heads_first = r"^cu_seqlens_q: .*heads first\? pass q\.transpose\(0, 1\)"
    with pytest.raises(ArgumentError, match=heads_first):
        flash_attn_varlen_func(x, x, x, [0, 4, 9], [0, 4, 9], 5, 5)
