"""ops.layer_norm and ops.rms_norm: values, gradients, masks, what is returned, modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_npu.ops import layer_norm, rms_norm
from flash_attn_npu.ops.triton import layer_norm as of_triton
from tests.helpers.norm_cases import SHAPE, as_tuple, draw, each_place
from tests.helpers.norm_reference import EPS, Options, gradients, judge

each_norm = pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
# layerscale, rowscale and residual; dropout_p; residual_in_fp32
CASES = [
    ("bias", 0.0, False),
    ("bias residual", 0.0, False),
    ("residual:float32 weight:float32", 0.4, True),
    ("bias layerscale", 0.4, True),
    ("layerscale residual rowscale", 0.4, False),
    ("bias layerscale:float32 residual:float32", 0.0, False),
    ("bias rowscale", 0.0, True),
]

SINGLE = ("x", "residual", "weight", "bias", "rowscale", "layerscale")
PARALLEL = ("x", "x1", "residual", "weight", "bias", "weight1", "bias1")


def single(rms: bool) -> Any:
    return rms_norm.dropout_add_rms_norm if rms else layer_norm.dropout_add_layer_norm


def parallel(rms: bool) -> Any:
    if rms:
        return rms_norm.dropout_add_rms_norm_parallel_residual
    return layer_norm.dropout_add_layer_norm_parallel_residual


@each_norm
@each_place
@pytest.mark.parametrize(("wishes", "p", "in_fp32"), CASES)
def test_dropout_add_norm(
    device: torch.device, dtype: torch.dtype, rms: bool, wishes: str, p: float, in_fp32: bool
) -> None:
    leaves = draw(wishes, device, dtype)
    first = [leaves.get(name) for name in SINGLE[:4]]
    scales = [leaves.get(name) for name in SINGLE[4:]]
    z, total, mask = single(rms)(*first, p, EPS, *scales, True, in_fp32, True)
    assert (mask.dtype, mask.shape) == (torch.uint8, SHAPE)
    assert int(mask.max()) == 1
    assert bool((mask == 1).all()) == (p == 0)
    dtype_of_total = torch.float32 if in_fp32 else dtype
    if "residual" in leaves:
        dtype_of_total = leaves["residual"].dtype
    options = Options(rms, p=p, mask=mask.bool())
    judge({"y": z, "total": total}, leaves, options, total=dtype_of_total)
    z, mask = single(rms)(*first, p, EPS, *scales, False, in_fp32, True)
    judge({"y": z}, leaves, options._replace(mask=mask.bool()))


@each_norm
@each_place
@pytest.mark.parametrize(
    ("wishes", "p"),
    [
        ("bias x1 residual weight1 bias1", 0.4),
        ("x1 weight1", 0.0),
        ("bias residual:float32 weight1 bias1", 0.4),
        ("bias x1", 0.4),
    ],
)
def test_parallel_residual(
    device: torch.device, dtype: torch.dtype, rms: bool, wishes: str, p: float
) -> None:
    leaves = draw(wishes, device, dtype)
    given = [leaves.get(name) for name in PARALLEL]
    z0, z1, total, mask0, mask1 = parallel(rms)(*given, p, EPS, True, False, True)
    assert (z1 is None) == ("weight1" not in leaves)
    assert (mask1 is None) == ("x1" not in leaves)
    for mask in (mask0, mask1):
        assert mask is None or mask.dtype == torch.uint8
        assert mask is None or bool((mask == 1).all()) == (p == 0)
    results = {"y": z0, "total": total} | ({} if z1 is None else {"y1": z1})
    masks = (mask0.bool(), None if mask1 is None else mask1.bool())
    total_dtype = leaves["residual"].dtype if "residual" in leaves else dtype
    judge(results, leaves, Options(rms, False, p, *masks), total=total_dtype)


@each_norm
@pytest.mark.parametrize("prenorm", [False, True])
def test_the_autograd_classes_are_the_functions(
    no_small: None, device: torch.device, rms: bool, prenorm: bool
) -> None:
    p, in_fp32, masks = 0.4, True, True

    def compare(function: Any, apply: Any, leaves: dict[str, Tensor]) -> None:
        answers = []
        for call in (function, apply):
            torch.manual_seed(5)
            returned = call()
            results = {str(i): r for i, r in enumerate(returned) if r is not None}
            smooth = {name: r for name, r in results.items() if r.requires_grad}
            directions = {name: torch.ones_like(r) for name, r in smooth.items()}
            of = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
            answers.append({**results, **gradients(smooth, of, directions)})
        assert answers[0].keys() == answers[1].keys()
        assert all(torch.equal(answers[0][name], answers[1][name]) for name in answers[0])

    leaves = draw("bias layerscale rowscale", device, torch.bfloat16)
    given = [leaves.get(name) for name in SINGLE]
    compare(
        lambda: single(rms)(*given[:4], p, EPS, *given[4:], prenorm, in_fp32, masks),
        lambda: layer_norm.DropoutAddLayerNormFn.apply(
            *given, p, EPS, in_fp32, prenorm, rms, masks
        ),
        leaves,
    )
    leaves = draw("bias x1 residual weight1 bias1", device, torch.bfloat16)
    both = [leaves.get(name) for name in PARALLEL]
    compare(
        lambda: parallel(rms)(*both, p, EPS, prenorm, in_fp32, masks),
        lambda: layer_norm.DropoutAddLayerNormParallelResidualFn.apply(
            *both, p, EPS, in_fp32, prenorm, rms, masks
        ),
        leaves,
    )


@each_norm
def test_what_is_returned(rms: bool) -> None:
    leaves = draw("bias", torch.device("cpu"), torch.float32)
    x, weight, bias = (leaves[name] for name in ("x", "weight", "bias"))
    one = (x, None, weight, bias, 0.5, EPS)
    assert isinstance(single(rms)(*one), Tensor)
    for options, length in (({"prenorm": True}, 2), ({"return_dropout_mask": True}, 2)):
        assert len(single(rms)(*one, **options)) == length
    assert len(single(rms)(*one, prenorm=True, return_dropout_mask=True)) == 3
    two = (x, None, None, weight, bias, None, None, 0.5, EPS)
    assert [r is None for r in parallel(rms)(*two)] == [False, True]
    assert len(parallel(rms)(*two, prenorm=True)) == 3
    assert [r is None for r in parallel(rms)(*two, return_dropout_mask=True)] == [
        *(False, True),
        *(False, True),
    ]
    assert len(parallel(rms)(*two, prenorm=True, return_dropout_mask=True)) == 5


@each_place
def test_norms_alone(device: torch.device, dtype: torch.dtype) -> None:
    leaves = draw("bias", device, dtype)
    y = layer_norm.layer_norm(leaves["x"], leaves["weight"], leaves["bias"], EPS)
    judge({"y": y}, leaves, Options())
    del leaves["bias"]
    y = rms_norm.rms_norm(leaves["x"], leaves["weight"], EPS)
    judge({"y": y}, leaves, Options(rms=True))


@each_norm
@pytest.mark.parametrize("wishes", ["bias layerscale residual", "layerscale"])
def test_gradients_by_finite_differences(rms: bool, wishes: str) -> None:
    leaves = draw(wishes, torch.device("cpu"), torch.float64, (2, 4))
    order = ("x", "residual", "weight", "bias", "rowscale", "layerscale")
    names = [name for name in order if name in leaves]

    def call(*tensors: Tensor) -> Any:
        given = dict(zip(names, tensors, strict=True))
        arguments = [given.get(name) for name in order]
        return layer_norm.DropoutAddLayerNormFn.apply(*arguments, 0.0, EPS, False, True, rms)

    assert torch.autograd.gradcheck(call, tuple(leaves[name] for name in names))


def modules(**options: Any) -> dict[str, torch.nn.Module]:
    size = SHAPE[-1]
    return {
        "triton": of_triton.RMSNorm(size, **options),
        "rms": rms_norm.RMSNorm(size, **options),
        "add layer": layer_norm.DropoutAddLayerNorm(size, **options),
        "add rms": rms_norm.DropoutAddRMSNorm(size, **options),
    }


def test_modules_have_upstreams_parameters() -> None:
    for name, module in modules(dtype=torch.float64).items():
        expected = {"weight": torch.ones(SHAPE[-1], dtype=torch.float64)}
        if name == "add layer":
            expected["bias"] = torch.zeros(SHAPE[-1], dtype=torch.float64)
        state = module.state_dict()
        assert list(state) == list(expected)
        assert all(torch.equal(state[key], expected[key]) for key in expected)
        assert module.eps == 1e-5
        with torch.no_grad():
            module.weight.fill_(3)
        module.reset_parameters()
        assert torch.equal(module.weight.detach(), expected["weight"])
        assert module.to(torch.float16).weight.dtype == torch.float16
    for module in modules(device="meta").values():
        assert module.weight.is_meta
    centred = of_triton.RMSNorm(4, zero_centered_weight=True)
    assert torch.equal(centred.weight.detach(), torch.zeros(4))
    assert centred.bias is None
    assert of_triton.RMSNorm(4).drop is None
    assert of_triton.RMSNorm(4, dropout_p=0.25).drop.p == 0.25


def test_modules_are_their_functions(device: torch.device) -> None:
    leaves = draw("bias residual", device, torch.bfloat16)
    x, residual = leaves["x"], leaves["residual"]
    built = modules(device=device)
    with torch.no_grad():
        for module in built.values():
            module.weight.copy_(leaves["weight"])
            if module.bias is not None:
                module.bias.copy_(leaves["bias"])
    results = {
        "triton": built["triton"](x, residual, prenorm=True),
        "rms": built["rms"](x),
        "add layer": built["add layer"](x, residual),
        "add rms": built["add rms"](x, residual),
    }
    for name, returned in results.items():
        module = built[name]
        used = {"x": x, "weight": module.weight}
        if module.bias is not None:
            used["bias"] = module.bias
        if name != "rms":
            used["residual"] = residual
        found = dict(zip(("y", "total"), as_tuple(returned), strict=False))
        judge(found, used, Options(rms="layer" not in name))


def test_modules_drop_while_training(device: torch.device) -> None:
    x = torch.rand(SHAPE).to(device) + 1
    built = {
        "triton": of_triton.RMSNorm(SHAPE[-1], dropout_p=0.5, device=device),
        "layer": layer_norm.DropoutAddLayerNorm(SHAPE[-1], True, 0.5, device=device),
        "rms": rms_norm.DropoutAddRMSNorm(SHAPE[-1], True, 0.5, device=device),
    }
    for name, module in built.items():
        options = {"prenorm": True} if name == "triton" else {}
        for training in (True, False):
            _, total = module.train(training)(x, **options)
            share = float((total == 0).float().mean())
            assert (0.3 < share < 0.7) if training else share == 0
        in_fp32 = type(module)(
            SHAPE[-1],
            device=device,
            **({} if name == "triton" else {"prenorm": True, "residual_in_fp32": True}),
        )
        more = {"prenorm": True, "residual_in_fp32": True} if name == "triton" else {}
        assert in_fp32(x.half(), **more)[1].dtype == torch.float32


def test_modules_call_what_clients_may_have_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (
        (of_triton, "rms_norm_fn"),
        (layer_norm, "dropout_add_layer_norm"),
        (rms_norm, "dropout_add_rms_norm"),
        (rms_norm, "rms_norm"),
    ):
        monkeypatch.setattr(module, name, lambda *args, called=name, **kwargs: called)
    x = torch.ones(SHAPE)
    called = [module(x) for module in modules().values()]
    assert called == ["rms_norm_fn", "rms_norm", "dropout_add_layer_norm", "dropout_add_rms_norm"]


def test_autocast_changes_nothing(device: torch.device) -> None:
    leaves = draw("bias residual layerscale", device, torch.float32)
    given = [leaves[name] for name in ("x", "residual", "weight", "bias")]
    with torch.autocast(device.type, torch.float16):
        inside = single(False)(*given, 0.0, EPS, None, leaves["layerscale"], True)
    outside = single(False)(*given, 0.0, EPS, None, leaves["layerscale"], True)
    for one, other in zip(inside, outside, strict=True):
        assert torch.equal(one, other)
        assert one.dtype == torch.float32


def test_maybe_align() -> None:
    x = torch.arange(12.0)
    assert layer_norm.maybe_align(x) is x
    moved = layer_norm.maybe_align(x[1:])
    assert moved.data_ptr() % 16 == 0
    assert torch.equal(moved, x[1:])
    assert layer_norm.maybe_align(x[1:], 4).data_ptr() == x[1:].data_ptr()


def test_rms_norm_exports_the_autograd_classes() -> None:
    for name in ("", "ParallelResidual", "Subset"):
        found = f"DropoutAddLayerNorm{name}Fn"
        assert getattr(rms_norm, found) is getattr(layer_norm, found)
        assert issubclass(getattr(layer_norm, found), torch.autograd.Function)


def test_gradients_are_those_of_the_wider_function(device: torch.device) -> None:
    leaves = draw("bias residual", device, torch.float32)
    z = layer_norm.dropout_add_layer_norm(
        *(leaves[n] for n in ("x", "residual", "weight", "bias")), 0.0, EPS
    )
    y = of_triton.layer_norm_fn(**leaves, eps=EPS)
    assert torch.equal(z, y)
    direction = {"y": torch.randn(SHAPE).to(device)}
    ends = [gradients({"y": result}, leaves, direction) for result in (z, y)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in leaves)
