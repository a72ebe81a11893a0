"""layer_norm_fn, rms_norm_fn and LayerNormFn: values, gradients, dropout, what is kept."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_npu._core.kernels.composed import norm_blocks
from flash_attn_npu.errors import UnsupportedError
from flash_attn_npu.ops.triton import layer_norm
from tests.helpers.norm_cases import SHAPE, as_tuple, draw, each_place
from tests.helpers.norm_reference import EPS, Options, assert_rounded_once, gradients, judge, solve

FLOATS = [torch.float16, torch.bfloat16, torch.float32]
# tensors besides x and weight, and options; short names are given where a test builds on them
CASES: list[tuple[str, dict[str, Any]]] = [
    ("", {}),
    ("bias", {}),
    ("bias", {"prenorm": True}),
    ("bias", {"prenorm": True, "residual_in_fp32": True}),
    ("bias residual", {}),
    ("bias residual", {"prenorm": True}),
    ("residual:float32", {"prenorm": True, "residual_in_fp32": True}),
    ("residual:float64", {"prenorm": True}),
    ("bias:float32 weight:float32 residual:float32", {"prenorm": True}),
    ("bias residual:bfloat16", {"prenorm": True}),
    ("bias x1", {"prenorm": True}),
    ("x1 residual", {"dropout_p": 0.3}),
    ("bias x1 residual weight1 bias1", {"dropout_p": 0.3, "prenorm": True}),
    ("bias weight1", {}),
    ("weight1 bias1", {"zero_centered_weight": True, "prenorm": True}),
    ("bias rowscale", {"prenorm": True}),
    ("rowscale:float32 residual:float32", {"dropout_p": 0.6, "zero_centered_weight": True}),
    ("bias", {"dropout_p": 0.3, "residual_in_fp32": True}),
    ("bias residual", {"out_dtype": torch.float32, "prenorm": True}),
]
EVERY_NAME = ["residual", "x1", "weight1 bias1", "bias", "rowscale"]
EVERY_OPTION: list[dict[str, Any]] = [
    {"prenorm": True},
    {"residual_in_fp32": True},
    {"zero_centered_weight": True},
    {"dropout_p": 0.3},
]


def check(
    device: torch.device, dtype: torch.dtype, rms: bool, wishes: str, options: dict[str, Any]
) -> None:
    leaves = draw(wishes, device, dtype)
    function = layer_norm.rms_norm_fn if rms else layer_norm.layer_norm_fn
    returned = as_tuple(
        function(**{"bias": None, **leaves}, eps=EPS, return_dropout_mask=True, **options)
    )
    names = ["y"] + ["y1"] * ("weight1" in leaves) + ["total"] * ("prenorm" in options)
    *results, mask, mask1 = returned
    p = options.get("dropout_p", 0.0)
    assert (mask is None) == (p == 0)
    assert (mask1 is None) == (p == 0 or "x1" not in leaves)
    for drawn in (mask, mask1):
        assert drawn is None or (drawn.dtype, drawn.shape) == (torch.bool, leaves["x"].shape)
    wide = torch.promote_types(dtype, torch.float32)
    total_dtype = wide if options.get("residual_in_fp32") else dtype
    y_dtype = options.get("out_dtype", dtype)
    judge(
        dict(zip(names, results, strict=True)),
        leaves,
        Options(rms, "zero_centered_weight" in options, p, mask, mask1),
        total=leaves["residual"].dtype if "residual" in leaves else total_dtype,
        y=y_dtype,
        y1=y_dtype,
    )


@each_place
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize(("wishes", "options"), CASES, ids=str)
def test_values_and_gradients(
    device: torch.device, dtype: torch.dtype, rms: bool, wishes: str, options: dict[str, Any]
) -> None:
    check(device, dtype, rms, wishes, options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize(("wishes", "options"), CASES, ids=str)
def test_values_and_gradients_of_many_rows(
    no_small: None,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    rms: bool,
    wishes: str,
    options: dict[str, Any],
) -> None:
    check(torch.device("cpu"), dtype, rms, wishes, options)
    monkeypatch.setattr(norm_blocks, "HOST_BLOCK", 3 * SHAPE[-1])
    check(torch.device("cpu"), dtype, rms, wishes, options)


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_values_and_gradients_of_every_combination(dtype: torch.dtype, rms: bool) -> None:
    for names in itertools.product([False, True], repeat=len(EVERY_NAME)):
        wishes = " ".join(itertools.compress(EVERY_NAME, names))
        if "x1" in wishes and "rowscale" in wishes:
            continue
        for taken in itertools.product([False, True], repeat=len(EVERY_OPTION)):
            options: dict[str, Any] = {}
            for option in itertools.compress(EVERY_OPTION, taken):
                options.update(option)
            check(torch.device("cpu"), dtype, rms, wishes, options)


@pytest.mark.parametrize("dims", [1, 3], ids=["flattened", "with-a-last-dimension"])
def test_rowscale_has_a_value_for_each_row(device: torch.device, dims: int) -> None:
    leaves = draw("bias rowscale", device, torch.float32)
    expected = layer_norm.layer_norm_fn(**leaves)
    scale = leaves["rowscale"]
    shape = (-1,) if dims == 1 else (*scale.shape, 1)
    got = layer_norm.layer_norm_fn(**leaves | {"rowscale": scale.reshape(shape)})
    assert torch.equal(got, expected)
    douts = torch.randn(expected.shape).to(device)
    for one, other in zip(
        torch.autograd.grad(got, [leaves["x"], leaves["weight"]], douts),
        torch.autograd.grad(expected, [leaves["x"], leaves["weight"]], douts),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_the_reference_is_torch_layer_norm_and_rms_norm() -> None:
    given = {n: t.detach() for n, t in draw("bias", torch.device("cpu"), torch.float64).items()}
    x, weight, bias = given["x"], given["weight"], given["bias"]
    of_torch = torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, EPS)
    torch.testing.assert_close(solve(given, Options())["y"], of_torch)
    del given["bias"]
    of_torch = torch.nn.functional.rms_norm(x, x.shape[-1:], weight, EPS)
    torch.testing.assert_close(solve(given, Options(rms=True))["y"], of_torch)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize(
    "wishes", ["", "bias residual", "bias x1 weight1 bias1", "residual weight1"]
)
@pytest.mark.parametrize("prenorm", [False, True], ids=["", "prenorm"])
def test_gradients_by_finite_differences(rms: bool, wishes: str, prenorm: bool) -> None:
    leaves = draw(wishes, torch.device("cpu"), torch.float64, (2, 4))
    order = ("x", "weight", "bias", "residual", "x1", "weight1", "bias1")
    names = [name for name in order if name in leaves]

    def call(*tensors: Tensor) -> Any:
        given = dict(zip(names, tensors, strict=True))
        arguments = [given.get(name) for name in order]
        return layer_norm.LayerNormFn.apply(*arguments, EPS, 0.0, None, prenorm, False, True, rms)

    assert torch.autograd.gradcheck(call, tuple(leaves[name] for name in names))


@pytest.mark.parametrize("options", [{}, {"prenorm": True}, {"dropout_p": 0.4}], ids=str)
@pytest.mark.parametrize("wishes", ["bias", "bias residual x1 weight1 bias1"])
def test_the_autograd_class_is_the_function(
    no_small: None, options: dict[str, Any], wishes: str
) -> None:
    leaves = draw(wishes, torch.device("cpu"), torch.float32)
    order = ("x", "weight", "bias", "residual", "x1", "weight1", "bias1")
    arguments = [leaves.get(name) for name in order]
    torch.manual_seed(1)
    expected = layer_norm.layer_norm_fn(*arguments, return_dropout_mask=True, **options)
    torch.manual_seed(1)
    p, prenorm = options.get("dropout_p", 0.0), options.get("prenorm", False)
    got = layer_norm.LayerNormFn.apply(
        *arguments, 1e-6, p, None, prenorm, False, False, False, True
    )
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    ends = [
        dict(enumerate(t for t in r if t is not None and t.requires_grad)) for r in (got, expected)
    ]
    directions = {place: torch.randn_like(result) for place, result in ends[0].items()}
    of_class, of_function = (gradients(results, leaves, directions) for results in ends)
    for name in leaves:
        assert torch.equal(of_class[name], of_function[name])


def test_what_is_returned() -> None:
    leaves = draw("bias weight1 bias1 x1", torch.device("cpu"), torch.float32)
    one = {name: leaves[name] for name in ("x", "weight", "bias")}

    def shape_of(results: Any) -> str:
        kinds = {None: "-", torch.bool: "m"}
        each = (kinds.get(None if r is None else r.dtype, "t") for r in as_tuple(results))
        return "".join(each) if isinstance(results, tuple) else "alone " + "".join(each)

    call = layer_norm.layer_norm_fn
    masks = {"return_dropout_mask": True}
    assert shape_of(call(**one)) == "alone t"
    assert shape_of(call(**one, prenorm=True)) == "tt"
    assert shape_of(call(**leaves)) == "tt"
    assert shape_of(call(**leaves, prenorm=True)) == "ttt"
    assert shape_of(call(**one, **masks)) == "t--"
    assert shape_of(call(**one, **masks, dropout_p=0.1)) == "tm-"
    assert shape_of(call(**one, **masks, prenorm=True, dropout_p=0.1)) == "ttm-"
    assert shape_of(call(**leaves, **masks, dropout_p=0.1)) == "ttmm"
    assert shape_of(call(**leaves, **masks, prenorm=True, dropout_p=0.1)) == "tttmm"
    assert shape_of(call(**leaves, prenorm=True, dropout_p=0.1)) == "ttt"


def test_masks_are_random_independent_and_repeated_by_a_seed(device: torch.device) -> None:
    x = torch.ones(400, 200, device=device)
    weight = torch.ones(200, device=device)

    def masks(seed: int | None = None) -> tuple[Tensor, Tensor]:
        if seed is not None:
            torch.manual_seed(seed)
        _, mask, mask1 = layer_norm.layer_norm_fn(
            x, weight, None, x1=x, dropout_p=0.3, return_dropout_mask=True
        )
        return mask.cpu(), mask1.cpu()

    mask, mask1 = masks(0)
    # five standard deviations of the mean of 80000 draws
    for drawn, share in ((mask, 0.7), (mask1, 0.7), (mask & mask1, 0.49)):
        assert abs(float(drawn.double().mean()) - share) < 5 * (share * (1 - share) / 80000) ** 0.5
    assert not torch.equal(masks()[0], mask)
    again = masks(0)
    assert torch.equal(again[0], mask)
    assert torch.equal(again[1], mask1)


def test_certain_dropout_leaves_the_residual(device: torch.device) -> None:
    leaves = draw("residual", device, torch.float32)
    with torch.no_grad():
        leaves["x"][0, 0, 0] = torch.inf
    y, total = layer_norm.rms_norm_fn(**leaves, bias=None, dropout_p=1.0, prenorm=True)
    assert torch.equal(total, leaves["residual"])
    y.sum().backward()
    assert torch.equal(leaves["x"].grad, torch.zeros_like(leaves["x"]))


@each_place
def test_inputs_of_any_strides(device: torch.device, dtype: torch.dtype) -> None:
    base = draw("bias residual", device, dtype, (5, 6, 64))
    leaves = {
        "x": base["x"].transpose(0, 1)[..., ::2],
        "residual": base["residual"][:1, :1, :32].expand(6, 5, 32),
        "weight": base["weight"][::2],
        "bias": base["bias"][:1].expand(32),
    }
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    assert not leaves["x"].is_contiguous()
    y, total = layer_norm.layer_norm_fn(**leaves, eps=EPS, prenorm=True)
    judge({"y": y, "total": total}, leaves, Options())
    alone, same = layer_norm.rms_norm_fn(leaves["x"], leaves["weight"], None, eps=EPS, prenorm=True)
    of = {name: leaves[name] for name in ("x", "weight")}
    judge({"y": alone, "total": same}, of, Options(rms=True))


def test_gradients_of_any_strides(device: torch.device) -> None:
    leaves = draw("bias", device, torch.float32)
    y, total = layer_norm.layer_norm_fn(**leaves, prenorm=True)
    whole = torch.randn(SHAPE[-1], 1, 1).to(device).expand(SHAPE[::-1]).permute(2, 1, 0)
    got = torch.autograd.grad([y, total], list(leaves.values()), [whole, whole], retain_graph=True)
    copies = [whole.contiguous()] * 2
    expected = torch.autograd.grad([y, total], list(leaves.values()), copies)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (8,)], ids=str)
def test_no_rows_and_one_row(device: torch.device, shape: tuple[int, ...]) -> None:
    leaves = draw("bias residual x1 weight1", device, torch.float16, shape)
    y, y1, total = layer_norm.layer_norm_fn(**leaves, eps=EPS, prenorm=True)
    judge({"y": y, "y1": y1, "total": total}, leaves, Options())


@pytest.mark.parametrize("used", ["y", "y1", "total"])
def test_results_that_nobody_uses(device: torch.device, used: str) -> None:
    leaves = draw("bias residual weight1 bias1", device, torch.float32)
    results = layer_norm.layer_norm_fn(**leaves, eps=EPS, prenorm=True)
    judge({used: dict(zip(("y", "y1", "total"), results, strict=True))[used]}, leaves, Options())


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_the_returned_sum_is_a_tensor_of_its_own(device: torch.device, rms: bool) -> None:
    leaves = draw("", device, torch.float32)
    _, total = layer_norm.layer_norm_fn(**leaves, bias=None, prenorm=True, is_rms_norm=rms)
    assert torch.equal(total, leaves["x"])
    assert total.data_ptr() != leaves["x"].data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("wishes", ["", "residual", "x1 residual"])
def test_what_is_kept_for_the_gradient(no_small: None, dtype: torch.dtype, wishes: str) -> None:
    leaves = draw(wishes, torch.device("cpu"), dtype)
    kept: list[tuple[torch.dtype, int]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append((tensor.dtype, tensor.numel()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer_norm.layer_norm_fn(**leaves, bias=None, dropout_p=0.5)
    rows, values = leaves["x"].numel() // SHAPE[-1], leaves["x"].numel()
    masks = [(torch.bool, values)] * (1 + ("x1" in leaves))
    statistics = [(torch.float32, rows)] * 2
    expected = [(dtype, values), *masks, *statistics, (dtype, SHAPE[-1])]
    assert sorted(kept, key=str) == sorted(expected, key=str)


def test_a_second_derivative_is_refused() -> None:
    leaves = draw("", torch.device("cpu"), torch.float32)
    y = layer_norm.layer_norm_fn(**leaves, bias=None)
    (dx,) = torch.autograd.grad(y.square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(UnsupportedError, match=r"^create_graph: got a second derivative of a norm"):
        # the other term would otherwise be all that is left
        torch.autograd.grad(dx.sum() + leaves["x"].sum(), leaves["x"])


@pytest.mark.parametrize("amp", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_autocast_changes_nothing(
    device: torch.device, amp: torch.dtype, dtype: torch.dtype
) -> None:
    leaves = draw("bias residual", device, dtype)
    outside = layer_norm.layer_norm_fn(**leaves, prenorm=True)
    with torch.autocast(device.type, amp):
        inside = layer_norm.layer_norm_fn(**leaves, prenorm=True)
    for one, other in zip(inside, outside, strict=True):
        assert one.dtype == dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize(("wishes", "options"), CASES[:-1], ids=str)
def test_the_plain_reference_functions(rms: bool, wishes: str, options: dict[str, Any]) -> None:
    options = {n: option for n, option in options.items() if n != "residual_in_fp32"}
    leaves = draw(wishes, torch.device("cpu"), torch.float64)
    leaves = {name: leaf.detach().double() for name, leaf in leaves.items()}
    mask, mask1 = (torch.rand(SHAPE) < 0.5 for _ in range(2))
    plain = layer_norm.rms_norm_ref if rms else layer_norm.layer_norm_ref
    results = as_tuple(
        plain(
            **{"bias": None, **leaves}, eps=EPS, dropout_mask=mask, dropout_mask1=mask1, **options
        )
    )
    names = ["y"] + ["y1"] * ("weight1" in leaves) + ["total"] * ("prenorm" in options)
    p = options.get("dropout_p", 0.0)
    masks = (mask, mask1) if p else (None, None)
    exact = solve(leaves, Options(rms, "zero_centered_weight" in options, p, *masks))
    for name, result in zip(names, results, strict=True):
        torch.testing.assert_close(result, exact[name])


def test_upcast_rounds_once() -> None:
    leaves = draw("bias residual", torch.device("cpu"), torch.bfloat16)
    y, total = layer_norm.layer_norm_ref(**leaves, eps=EPS, prenorm=True, upcast=True)
    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    exact = solve({name: leaf.detach().double() for name, leaf in leaves.items()}, Options())
    assert_rounded_once(y.detach(), exact["y"])
    low, low_total = layer_norm.layer_norm_ref(**leaves, eps=EPS, prenorm=True)
    assert (low.dtype, low_total.dtype) == (torch.bfloat16, torch.bfloat16)
    dropped = layer_norm.layer_norm_ref(
        leaves["x"].detach() + 8, leaves["weight"], None, dropout_p=0.5, prenorm=True
    )[1]
    assert 0 < int((dropped == 0).sum()) < dropped.numel()
