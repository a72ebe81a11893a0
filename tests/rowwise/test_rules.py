"""Every rule of the second table: a plain problem is served, a changed one refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from flash_attn_npu._core.ground.memory import forget_all
from flash_attn_npu._core.problems.rowwise import Gate, Geglu, Lookup, Loss, Norm, Problem, Rotation
from flash_attn_npu._core.table import installed, rowwise
from flash_attn_npu._core.table.choice import refusals
from flash_attn_npu._core.table.rowwise import LOOKED_UP, TABLE, WHOLE
from flash_attn_npu._core.table.rule import Rule
from tests.helpers.wheel import pretend_row

CHANGES: dict[str, Callable[[Problem], Problem]] = {
    "tensors outside an Ascend NPU": lambda p: p._replace(device=torch.device("cpu")),
    "Ascend 310P and 200I": lambda p: p,
    "a torch_npu older than 2.6.0": lambda p: p,
    "rotary, a torch_npu without npu_rotary_mul": lambda p: p,
    "rotary at positions in a tensor, a torch_npu without npu_mrope": lambda p: p,
    "RMS norm, a torch_npu without npu_rms_norm": lambda p: p,
    "RMS norm of a sum, a torch_npu without npu_add_rms_norm and npu_rms_norm_backward": (
        lambda p: p
    ),
    "layer norm of a sum, a torch_npu without npu_add_layer_norm": lambda p: p,
    "swiglu, a torch_npu without npu_swiglu and npu_swiglu_backward": lambda p: p,
    "exact geglu, a torch_npu without npu_geglu": lambda p: p,
    "cross entropy, a torch_npu without npu_cross_entropy_loss": lambda p: p,
    "no element": lambda p: p._replace(empty=True),
    "float64": lambda p: p._replace(dtype=torch.float64),
    "rotary_dim of 896 and above": lambda p: p._replace(rotary_dim=896),
    "1000 heads and more": lambda p: p._replace(nheads=1000),
    "jit_compile=True, rotation by pairs or of a rotary_dim other than 128": (
        lambda p: p._replace(just_in_time=True)
    ),
    f"{LOOKED_UP}, by tables of another dtype": lambda p: p._replace(table_dtype=torch.float32),
    f"{LOOKED_UP}, of a part of each head": lambda p: p._replace(rotary_dim=32),
    f"{LOOKED_UP}, a headdim of no multiple of 64 bytes": (
        lambda p: p._replace(headdim=80, rotary_dim=80)
    ),
    f"{LOOKED_UP}, nheads * headdim above 4096": lambda p: p._replace(nheads=65),
    f"{LOOKED_UP}, with gradient": lambda p: p._replace(differentiated=True),
    f"{LOOKED_UP}, Ascend 950": lambda p: p,
    rowwise.CONSISTENT: lambda p: p,
    "no residual": lambda p: p._replace(residual_dtype=None),
    "norm of mixed dtypes": lambda p: p._replace(weight_dtype=torch.float32),
    "layer norm of mixed dtypes, but for a float32 residual without gradient": (
        lambda p: p._replace(residual_dtype=torch.float32)
    ),
    "RMS norm with gradient under torch.compile": (
        lambda p: p._replace(needs_grad=True, compiling=True)
    ),
    "layer norm without bias": lambda p: p._replace(bias_dtype=None),
    "torch.compile": lambda p: p._replace(compiling=True),
    "RMS norm with bias": lambda p: p._replace(bias_dtype=p.dtype),
    "norm with x1": lambda p: p._replace(branches=2),
    "norm with weight1": lambda p: p._replace(outputs=2),
    "norm with rowscale or layerscale": lambda p: p._replace(scaled=True),
    "norm with dropout_p": lambda p: p._replace(dropout=True),
    "norm in layer_norm_linear_fn, of a subset of rows, or by an autograd class": (
        lambda p: p._replace(within=True)
    ),
    "float16": lambda p: p._replace(dtype=torch.float16),
    "norm with out or residual_out": lambda p: p._replace(buffers=True),
    "swiglu of unequal dtypes": lambda p: p._replace(mixed=True),
    "swiglu_fwd that is differentiated itself": lambda p: p._replace(differentiated=True),
    "gradient of swiglu in another dtype": lambda p: p._replace(grad_dtype=torch.float32),
    "swiglu of rows of no multiple of 64 bytes": lambda p: p._replace(row_bytes=96),
    "exact geglu with gradient": lambda p: p._replace(differentiated=True),
    "exact geglu of more than 8 dimensions": lambda p: p._replace(dims=9),
    "cross entropy of float16 and bfloat16": lambda p: p._replace(dtype=torch.bfloat16),
    "cross entropy of more than 200000 rows": lambda p: p._replace(rows=200_001),
    "label_smoothing with gradient": (lambda p: p._replace(label_smoothing=0.1, needs_grad=True)),
    "label_smoothing outside [0, 1)": lambda p: p._replace(label_smoothing=1.0),
    "logit_scale": lambda p: p._replace(logit_scale=0.5),
    "lse_square_scale": lambda p: p._replace(lse_square_scale=1e-4),
    "precomputed_lse": lambda p: p._replace(precomputed=True),
    "cross entropy under torch.compile, a torch_npu without a fake operator for it": (
        lambda p: p._replace(compiling=True)
    ),
    "cross entropy over a process group": lambda p: p._replace(parallel=True),
    "inplace_backward": lambda p: p._replace(inplace_backward=True),
}


@pytest.fixture
def plain(npu: torch.device) -> dict[str, Problem]:
    """For each operator a problem that it serves."""
    common = {"function": "f", "device": npu, "empty": False}
    norm = Norm(
        **common,
        dtype=torch.bfloat16,
        out_dtype=torch.bfloat16,
        weight_dtype=torch.bfloat16,
        bias_dtype=None,
        residual_dtype=torch.bfloat16,
        rms=True,
        zero_centered=False,
        branches=1,
        outputs=1,
        scaled=False,
        dropout=False,
        buffers=False,
        needs_grad=False,
        compiling=False,
    )
    layer_norm = norm._replace(rms=False, bias_dtype=torch.bfloat16, needs_grad=True)
    return {
        rowwise.ROTARY_MUL: Rotation(
            **common,
            dtype=torch.bfloat16,
            table_dtype=torch.bfloat16,
            nheads=8,
            rotary_dim=64,
            interleaved=False,
        ),
        rowwise.MROPE: Lookup(
            **common,
            dtype=torch.bfloat16,
            table_dtype=torch.bfloat16,
            nheads=64,
            headdim=64,
            rotary_dim=64,
            interleaved=False,
            pair=True,
            several=True,
            whole=True,
            differentiated=False,
        ),
        rowwise.ADD_RMS_NORM: norm,
        rowwise.RMS_NORM: norm._replace(residual_dtype=None, needs_grad=True),
        rowwise.ADD_LAYER_NORM: layer_norm,
        rowwise.LAYER_NORM: layer_norm._replace(residual_dtype=None, compiling=True),
        rowwise.SWIGLU: Gate(
            **common,
            dtype=torch.bfloat16,
            halves=True,
            row_bytes=128,
            mixed=False,
            differentiated=False,
        ),
        rowwise.GEGLU: Geglu(**common, dtype=torch.bfloat16, dims=2, differentiated=False),
        rowwise.CROSS_ENTROPY: Loss(
            **common,
            dtype=torch.float32,
            rows=4,
            label_smoothing=0.0,
            logit_scale=1.0,
            lse_square_scale=0.0,
            precomputed=False,
            parallel=False,
            inplace_backward=False,
            needs_grad=False,
        ),
    }


@pytest.fixture(autouse=True)
def installed_rules() -> Iterator[None]:
    yield
    forget_all()


@pytest.fixture(autouse=True)
def chip(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    callspec = getattr(request.node, "callspec", None)
    rule = callspec.params.get("rule") if callspec else None
    if isinstance(rule, Rule):
        pretend_row(rule.name, monkeypatch)
    if isinstance(rule, Rule) and rule.name == "Ascend 310P and 200I":
        monkeypatch.setattr(installed, "soc_name", lambda device: "Ascend310P3")
    if isinstance(rule, Rule) and rule.name == rowwise.CONSISTENT:
        monkeypatch.setattr(rowwise, "consistent", lambda: True)
    if isinstance(rule, Rule) and rule.name.endswith("Ascend 950"):
        monkeypatch.setattr(rowwise, "soc_name", lambda device: "Ascend950PR")
    if isinstance(rule, Rule) and "without a fake operator" in rule.name:
        monkeypatch.setattr(rowwise, "untraceable", lambda device, operator: True)


def test_every_rule_has_a_change() -> None:
    assert list(CHANGES) == [rule.name for rule in TABLE]


@pytest.mark.parametrize("operator", rowwise.ALL)
def test_a_plain_problem_is_served(operator: str, plain: dict[str, Problem]) -> None:
    problem = plain[operator]
    assert refusals(operator, problem) == ()
    assert operator in [candidate.name for candidate in WHOLE.candidates(problem)]


@pytest.mark.parametrize("rule", TABLE, ids=lambda rule: rule.name)
def test_the_rule_refuses(rule: Rule, plain: dict[str, Problem]) -> None:
    for operator, refusal in rule.refused.items():
        changed = CHANGES[rule.name](plain[operator])
        assert refusal in refusals(operator, changed)


@pytest.mark.parametrize("field", ["residual_dtype", "out_dtype"])
def test_float64_by_every_route(field: str, plain: dict[str, Problem]) -> None:
    for operator in rowwise.NORMS:
        changed = plain[operator]._replace(**{field: torch.float64})
        assert "it takes float16, bfloat16 and float32" in refusals(operator, changed)


def test_mixed_dtypes_by_every_route(plain: dict[str, Problem]) -> None:
    norm = plain[rowwise.ADD_LAYER_NORM]
    for change in (
        {"bias_dtype": torch.float32},
        {"residual_dtype": torch.float32},
        {"out_dtype": torch.float32},
        {"zero_centered": True},
    ):
        assert refusals(rowwise.ADD_LAYER_NORM, norm._replace(**change)) == (
            "it takes one dtype, but a float32 residual where no gradient is needed",
        )
        assert refusals(rowwise.LAYER_NORM, norm._replace(**change)) == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_float32_residual_without_gradient(dtype: torch.dtype, plain: dict[str, Problem]) -> None:
    norm = plain[rowwise.ADD_LAYER_NORM]._replace(
        dtype=dtype, residual_dtype=torch.float32, out_dtype=dtype, needs_grad=False
    )
    assert refusals(rowwise.ADD_LAYER_NORM, norm) == ()
    assert refusals(rowwise.ADD_LAYER_NORM, norm._replace(residual_dtype=torch.float64))


@pytest.mark.parametrize(
    ("operator", "limit", "beyond"),
    [
        (rowwise.CROSS_ENTROPY, {"rows": 200_000}, {"rows": 200_001}),
        (rowwise.ROTARY_MUL, {"rotary_dim": 894}, {"rotary_dim": 896}),
        (rowwise.ROTARY_MUL, {"nheads": 999}, {"nheads": 1000}),
        (rowwise.SWIGLU, {"row_bytes": 64}, {"row_bytes": 65}),
    ],
)
def test_the_limit_itself(
    operator: str, limit: dict[str, int], beyond: dict[str, int], plain: dict[str, Problem]
) -> None:
    assert refusals(operator, plain[operator]._replace(**limit)) == ()
    assert refusals(operator, plain[operator]._replace(**beyond))
