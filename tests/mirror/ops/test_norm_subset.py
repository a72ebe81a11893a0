"""dropout_add_layer_norm_subset and its RMS twin: rows that are absent, and rows that are left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_npu.errors import ArgumentError, ArgumentTypeError
from flash_attn_npu.ops import layer_norm, rms_norm
from tests.helpers.norm_cases import as_tuple, draw, each_place
from tests.helpers.norm_reference import (
    EPS,
    Options,
    assert_close,
    assert_rounded_once,
    gradients,
    solve,
)

HIDDEN = 16
# 2 sequences of 4 tokens: 5 rows of x0, 3 rows of z
X0_SUBSET = [[1, 0, 2, 3], [0, 4, 0, 5]]
OUT_SUBSET = [[0, 1, 0, 2], [3, 0, 0, 0]]


def picked(values: Tensor, subset: Tensor | None) -> Tensor:
    """The row of each token, by a loop."""
    if subset is None:
        return values.reshape(-1, HIDDEN)
    rows = [
        values[j - 1] if j else torch.zeros(HIDDEN).to(values) for j in subset.flatten().tolist()
    ]
    return torch.stack(rows)


def expected(
    leaves: dict[str, Tensor], options: Options, x0_subset: Any, out_subset: Any
) -> dict[str, Tensor]:
    whole = dict(leaves, x=picked(leaves["x"], x0_subset))
    if "residual" in leaves:
        whole["residual"] = leaves["residual"].reshape(-1, HIDDEN)
    mask = options.mask
    solved = solve(whole, options._replace(mask=None if mask is None else picked(mask, x0_subset)))
    if out_subset is None:
        return solved
    tokens = [out_subset.flatten().tolist().index(j + 1) for j in range(int(out_subset.max()))]
    return {**solved, "y": solved["y"][tokens]}


@each_place
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("some_in", [False, True], ids=["all in", "some in"])
@pytest.mark.parametrize("some_out", [False, True], ids=["all out", "some out"])
@pytest.mark.parametrize(
    ("wishes", "p", "constant"),
    [
        ("bias residual layerscale", 0.4, 1.5),
        ("residual:float32", 0.0, 1.0),
        ("bias residual", 0.0, 0.5),
        ("bias layerscale", 0.4, 0.5),
    ],
)
def test_values_and_gradients(
    device: torch.device,
    dtype: torch.dtype,
    rms: bool,
    some_in: bool,
    some_out: bool,
    wishes: str,
    p: float,
    constant: float,
) -> None:
    leaves = draw(wishes, device, dtype, (5 if some_in else 8, HIDDEN))
    if "residual" in leaves:
        values = torch.randn(2, 4, HIDDEN).to(leaves["residual"])
        leaves["residual"] = values.requires_grad_()
    x0_subset = torch.tensor(X0_SUBSET, dtype=torch.int32) if some_in else None
    out_subset = torch.tensor(OUT_SUBSET) if some_out else None
    function = (
        rms_norm.dropout_add_rms_norm_subset if rms else layer_norm.dropout_add_layer_norm_subset
    )
    z, total, mask = function(
        *(leaves.get(name) for name in ("x", "residual", "weight", "bias")),
        p,
        EPS,
        layerscale=leaves.get("layerscale"),
        x0_subset=None if x0_subset is None else x0_subset.to(device),
        out_subset=None if out_subset is None else out_subset.to(device),
        rowscale_const=constant,
        out_numrows=3 if some_out else 0,
        prenorm=True,
        return_dropout_mask=True,
    )
    assert (z.shape, total.shape) == ((3 if some_out else 8, HIDDEN), (8, HIDDEN))
    assert (mask.dtype, mask.shape) == (torch.uint8, leaves["x"].shape)
    assert z.dtype == dtype
    assert total.dtype == (leaves["residual"].dtype if "residual" in leaves else dtype)
    results = {"y": z, "total": total}
    directions = {name: torch.randn(r.shape).to(r) for name, r in results.items()}
    got = gradients(results, leaves, directions)
    options = Options(rms, p=p, mask=mask.cpu().bool() if p else None, constant=constant)
    answers = []
    for wide in (torch.float64, None):
        copies = {
            n: t.detach().cpu().to(wide or t.dtype).requires_grad_() for n, t in leaves.items()
        }
        solved = expected(copies, options, x0_subset, out_subset)
        ends = {n: d.cpu().to(wide or d.dtype) for n, d in directions.items()}
        answers.append((solved, gradients({n: solved[n] for n in ends}, copies, ends)))
    (exact, exact_grads), (_, plain_grads) = answers
    for name, result in results.items():
        assert_rounded_once(result.detach(), exact[name].detach())
    for name, leaf in leaves.items():
        assert (got[name].dtype, got[name].shape) == (leaf.dtype, leaf.shape)
        assert_close(name, got[name], exact_grads[name], plain_grads[name])


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_gradients_by_finite_differences(rms: bool) -> None:
    leaves = draw("bias layerscale", torch.device("cpu"), torch.float64, (5, 4))
    residual = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    subsets = (torch.tensor(X0_SUBSET), torch.tensor(OUT_SUBSET))

    def call(*tensors: Tensor) -> Any:
        return layer_norm.DropoutAddLayerNormSubsetFn.apply(
            *tensors, *subsets, 0.0, EPS, 0.5, 3, False, True, rms
        )

    given = (leaves["x"], residual, leaves["weight"], leaves["bias"], leaves["layerscale"])
    assert torch.autograd.gradcheck(call, given)


def test_without_subsets_it_is_the_whole(device: torch.device) -> None:
    leaves = draw("bias residual layerscale", device, torch.bfloat16)
    given = [leaves[name] for name in ("x", "residual", "weight", "bias")]
    scale = leaves["layerscale"]
    torch.manual_seed(3)
    whole = layer_norm.dropout_add_layer_norm(*given, 0.5, EPS, None, scale, True, False, True)
    torch.manual_seed(3)
    some = layer_norm.dropout_add_layer_norm_subset(
        *given, 0.5, EPS, scale, prenorm=True, return_dropout_mask=True
    )
    for one, other in zip(some, whole, strict=True):
        assert torch.equal(one, other)
        assert one.shape == leaves["x"].shape


def test_a_row_may_be_used_twice_and_a_result_by_nobody(device: torch.device) -> None:
    x = torch.randn(1, 8).to(device).requires_grad_()
    weight = torch.ones(8, device=device)
    z = layer_norm.dropout_add_layer_norm_subset(
        x,
        None,
        weight,
        None,
        0.0,
        EPS,
        x0_subset=torch.tensor([1, 1, 0], device=device),
        out_subset=torch.tensor([3, 1, 0], device=device),
        out_numrows=3,
    )
    once = layer_norm.layer_norm(x, weight, None, EPS)
    torch.testing.assert_close(z, torch.cat((once, once * 0, once)))
    direction = torch.randn(3, 8).to(device)
    (twice,) = torch.autograd.grad(z, x, direction)
    (alone,) = torch.autograd.grad(once, x, direction[:1] + direction[2:3])
    torch.testing.assert_close(twice, alone)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_results_have_the_dimensions_of_x0_behind_the_first(
    device: torch.device, rms: bool, p: float
) -> None:
    leaves = draw("bias layerscale", device, torch.float32, (2, 3, 8))
    leaves["residual"] = torch.randn(4, 3, 8).to(device).requires_grad_()
    x0_subset = torch.tensor([[1, 0, 2], [0, 0, 3], [4, 5, 0], [0, 6, 0]], device=device)
    out_subset = torch.tensor([[1, 2, 0], [3, 4, 5], [6, 0, 7], [8, 0, 9]], device=device)
    function = (
        rms_norm.dropout_add_rms_norm_subset if rms else layer_norm.dropout_add_layer_norm_subset
    )

    def call(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        results = function(
            x, residual, leaves["weight"], leaves["bias"], p, EPS, leaves["layerscale"],
            x0_subset, out_subset, 1.0, 9, prenorm=True, return_dropout_mask=True,
        )  # fmt: skip
        return as_tuple(results)

    z, total, mask = call(leaves["x"], leaves["residual"])
    assert (z.shape, total.shape, mask.shape) == ((3, 3, 8), (4, 3, 8), (2, 3, 8))
    flat = call(leaves["x"].reshape(6, 8), leaves["residual"].reshape(12, 8))
    assert [one.shape for one in flat] == [(9, 8), (12, 8), (6, 8)]
    directions = torch.randn(9, 8).to(device), torch.randn(12, 8).to(device)
    ends = [d.view(r.shape) for d, r in zip(directions, (z, total), strict=True)]
    got = torch.autograd.grad((z, total), list(leaves.values()), ends)
    want = torch.autograd.grad(flat[:2], list(leaves.values()), directions)
    for one, other in zip((z, total, mask, *got), (*flat, *want), strict=True):
        assert torch.equal(one.reshape(other.shape), other)
    # what is returned may be written, and a changed sum is noticed
    z, total, _ = call(leaves["x"], leaves["residual"])
    z.mul_(2)
    total.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_one_dimension_is_one_row() -> None:
    x, weight = torch.randn(8, requires_grad=True), torch.ones(8)
    subset = torch.tensor([0, 1])
    z, total = layer_norm.dropout_add_layer_norm_subset(
        x, None, weight, None, 0.0, EPS, None, subset, subset, out_numrows=1, prenorm=True
    )
    once = layer_norm.layer_norm(x, weight, None, EPS)
    assert torch.equal(z, once)
    assert torch.equal(total, torch.cat((x * 0, x)))
    direction = torch.randn(8)
    (got,) = torch.autograd.grad(z, x, direction)
    torch.testing.assert_close(got, torch.autograd.grad(once, x, direction)[0])


def test_no_rows_at_all(device: torch.device) -> None:
    x = torch.empty(0, 8, device=device, requires_grad=True)
    weight = torch.ones(8, device=device, requires_grad=True)
    residual = torch.randn(2, 8).to(device)
    absent = torch.tensor([0, 0], device=device)
    z, total = layer_norm.dropout_add_layer_norm_subset(
        x, residual, weight, None, 0.5, EPS, x0_subset=absent, prenorm=True
    )
    assert torch.equal(total, residual)
    z.sum().backward()
    assert x.grad.shape == (0, 8)
    nothing = layer_norm.dropout_add_layer_norm_subset(
        residual, None, weight, None, 0.0, EPS, out_subset=absent, out_numrows=0
    )
    assert nothing.shape == (0, 8)


def test_autocast_changes_nothing(device: torch.device) -> None:
    x, weight = draw("", device, torch.float32, (5, HIDDEN)).values()
    subset = torch.tensor(X0_SUBSET, device=device)

    def call() -> tuple[Any, ...]:
        torch.manual_seed(0)
        return as_tuple(
            layer_norm.dropout_add_layer_norm_subset(
                x,
                None,
                weight,
                None,
                0.5,
                EPS,
                x0_subset=subset,
                out_subset=subset,
                out_numrows=5,
                prenorm=True,
                return_dropout_mask=True,
            )
        )

    with torch.autocast(device.type, torch.float16):
        inside = call()
    assert all(torch.equal(one, other) for one, other in zip(inside, call(), strict=True))


@pytest.mark.parametrize(
    ("argument", "changed", "error"),
    [
        ("x0", {"x0": 1.0}, ArgumentTypeError),
        ("x0", {"x0": torch.ones(())}, ArgumentError),
        ("x0_subset", {"x0_subset": [1, 0]}, ArgumentTypeError),
        ("x0_subset", {"x0_subset": torch.ones(2)}, ArgumentError),
        ("out_subset", {"out_subset": torch.ones(3, dtype=torch.int64)}, ArgumentError),
        ("residual", {"residual": torch.ones(4, 4)}, ArgumentError),
        ("residual", {"residual": torch.ones(3, 8)}, ArgumentError),
        ("weight", {"weight": torch.ones(4)}, ArgumentError),
        ("bias", {"bias": torch.ones(8).int()}, ArgumentError),
        ("layerscale", {"layerscale": torch.ones(4)}, ArgumentError),
        ("epsilon", {"epsilon": None}, ArgumentTypeError),
        ("rowscale_const", {"rowscale_const": "2"}, ArgumentTypeError),
        ("out_subset", {"out_subset": torch.tensor([1, 2], device="meta")}, ArgumentError),
        ("out_subset", {"out_subset": torch.tensor([1, 1]), "out_numrows": 2}, ArgumentError),
        ("out_numrows", {"out_subset": torch.tensor([1, 2]), "out_numrows": 3}, ArgumentError),
        ("out_numrows", {"out_subset": torch.tensor([1, 2]), "out_numrows": 2**40}, ArgumentError),
        ("out_numrows", {"out_subset": torch.tensor([1, 2]), "out_numrows": -1}, ArgumentError),
        (
            "out_numrows",
            {"out_subset": torch.tensor([1, 2]), "out_numrows": 1.5},
            ArgumentTypeError,
        ),
        ("out_subset", {"out_subset": torch.tensor([1, 2]), "out_numrows": 1}, ArgumentError),
        (
            "out_numrows",
            {"x0": torch.ones(1, 2, 8), "out_subset": torch.tensor([1, 0]), "out_numrows": 1},
            ArgumentError,
        ),
        (
            "x0_subset",
            {"x0": torch.ones(1, 2, 8), "x0_subset": torch.tensor([1, 0, 2])},
            ArgumentError,
        ),
    ],
)
def test_bad_input(argument: str, changed: dict[str, Any], error: type[Exception]) -> None:
    given = {
        "x0": torch.ones(2, 8),
        "residual": None,
        "weight": torch.ones(8),
        "bias": None,
        "dropout_p": 0.0,
        "epsilon": EPS,
    }
    for function in (
        layer_norm.dropout_add_layer_norm_subset,
        rms_norm.dropout_add_rms_norm_subset,
    ):
        with pytest.raises(error, match=f"^{argument}: got .*; allowed: .*; to fix it: "):
            function(**{**given, **changed})


def test_the_class_calls_its_arguments_as_flash_attn_does() -> None:
    x, row, wrong = torch.ones(2, 8), torch.ones(8), torch.ones(4)
    for name, tensors in (
        ("gamma", (wrong, None, None)),
        ("beta", (row, wrong, None)),
        ("colscale", (row, None, wrong)),
    ):
        with pytest.raises(ArgumentError, match=f"^{name}: got "):
            layer_norm.DropoutAddLayerNormSubsetFn.apply(
                x, None, *tensors, None, None, 0.0, EPS, 1.0, 0
            )


def test_a_row_that_does_not_exist() -> None:
    x, weight = torch.ones(2, 8), torch.ones(8)
    for named in (3, -1):
        subset = torch.tensor([1, named])
        for options in ({"x0_subset": subset}, {"out_subset": subset, "out_numrows": 2}):
            name = next(iter(options))
            with pytest.raises(ArgumentError, match=f"^{name}: got a row {named}; allowed: 0 to 2"):
                layer_norm.dropout_add_layer_norm_subset(x, None, weight, None, 0.0, EPS, **options)
