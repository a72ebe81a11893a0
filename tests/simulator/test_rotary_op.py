"""The simulated rotary operators against float64 sums over pairs, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flash_attn_npu._core.ground import schemas
from flash_attn_npu._core.ground.versions import torch_npu_version
from flash_attn_npu._virtual_ascend import CardRefusal
from tests.helpers.fused_cases import (
    DTYPES,
    all_close,
    close,
    in_double,
    on_device,
    on_npu,
    random,
)
from tests.helpers.old_torch import TORCH, doubled, needs

pytestmark = pytest.mark.usefixtures("npu")

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
MODES = ("half", "interleave")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def quarter_turns(d: int, mode: str) -> torch.Tensor:
    """The matrix R of x @ R: every pair (a, b) becomes (-b, a)."""
    turns = torch.zeros(d, d, dtype=torch.float64)
    for pair in range(d // 2):
        a, b = (pair, pair + d // 2) if mode == "half" else (2 * pair, 2 * pair + 1)
        turns[b, a], turns[a, b] = -1, 1
    return turns


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mode: str) -> torch.Tensor:
    return x * cos + (x @ quarter_turns(x.shape[-1], mode)) * sin


def rotate(*tensors: torch.Tensor, mode: str = "half") -> torch.Tensor:
    import torch_npu

    return torch_npu.npu_rotary_mul(*tensors, mode)


# B 2, S 9, N 3 (S above B: the gradient wants it), the axes that a table shares at 1
SHARED = {
    "BSND": ((2, 9, 3), [(1, 9, 1), (2, 9, 1), (2, 9, 3)]),
    "BNSD": ((2, 3, 9), [(1, 1, 9), (2, 1, 9), (2, 3, 9)]),
    "SBND": ((9, 2, 3), [(9, 1, 1), (9, 2, 1), (9, 2, 3)]),
    "TND": ((9, 3), [(9, 1), (9, 3)]),
}
HALVES = [(layout, "half", table) for layout, (_, tables) in SHARED.items() for table in tables]
INTERLEAVES = [(layout, "interleave", tables[0]) for layout, (_, tables) in SHARED.items()]


@pytest.mark.parametrize(("layout", "mode", "table"), HALVES + INTERLEAVES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_mul(layout: str, mode: str, table: tuple[int, ...], dtype: torch.dtype) -> None:
    shape = (*SHARED[layout][0], 32)
    x, dout = random(*shape, dtype=dtype), random(*shape, dtype=dtype)
    cos, sin = (random(*table, 32, dtype=dtype) for _ in range(2))
    got = on_npu(lambda *given: rotate(*given, mode=mode), [x, cos, sin], dout)
    assert all(tensor.dtype == dtype for tensor in got)
    all_close(got, in_double(lambda *given: rotated(*given, mode), [x, cos, sin], dout))


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
def test_wide_tables_are_rounded_to_the_input(dtype: torch.dtype) -> None:
    x, dout = (random(2, 9, 3, 16, dtype=dtype) for _ in range(2))
    tables = [random(1, 9, 1, 16) for _ in range(2)]
    got = on_npu(rotate, [x, *tables], dout)
    assert [tensor.dtype for tensor in got] == [dtype, dtype, FULL, FULL]
    inputs = [x, *(table.to(dtype) for table in tables)]
    expected = in_double(lambda *given: rotated(*given, "half"), inputs, dout)
    all_close(got[:2], expected[:2])
    for mine, theirs in zip(got[2:], expected[2:], strict=True):
        assert torch.equal(mine.cpu(), theirs.to(dtype).float())


def test_strided_tensors() -> None:
    x, dout, tables = random(3, 9, 16), random(9, 3, 16), random(2, 9, 1, 32)[..., ::2]

    def swapped(turn: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda x, cos, sin: turn(x.transpose(0, 1), cos, sin)

    got = on_npu(swapped(rotate), [x, *tables], dout)
    assert got[0].is_contiguous()
    expected = swapped(lambda *given: rotated(*given, "half"))
    all_close(got, in_double(expected, [x, *tables], dout))


@pytest.mark.parametrize("mode", MODES)
def test_nobody_writes_the_gradients_of_tables_that_need_none(mode: str) -> None:
    import torch_npu

    x, dout = (random(2, 9, 3, 16).npu() for _ in range(2))
    cos, sin = (random(1, 9, 1, 16).npu() for _ in range(2))
    dx, *dtables = torch_npu.npu_rotary_mul_backward(dout, x, cos, sin, mode)
    assert dx.isfinite().all()
    assert all(tensor.isnan().all() for tensor in dtables)
    # one of them is enough
    dtables = torch_npu.npu_rotary_mul_backward(dout, x, cos.requires_grad_(), sin, mode)[1:]
    assert all(tensor.isfinite().all() for tensor in dtables)


def test_torch_npu_itself_refuses_an_unknown_mode() -> None:
    with pytest.raises(RuntimeError, match="should be half or interleave"):
        rotate(*(random(2, 9, 3, 16).npu() for _ in range(3)), mode="quarter")


# the shape of the input, that of the tables, the mode, the dtype
ALLOWED: dict[str, tuple[tuple[int, ...], tuple[int, ...], str, torch.dtype]] = {
    "D 894": ((1, 2, 1, 894), (1, 2, 1, 894), "half", FULL),
    "999 heads": ((1, 1, 999, 16), (1, 1, 1, 16), "half", FULL),
    "eight heads to a row": ((2, 4, 1, 16), (1, 1, 1, 16), "half", FULL),
    "an unaligned D of 82": ((2, 30, 3, 82), (1, 1, 3, 82), "half", HALF),
    "few heads of an unaligned D": ((1, 1, 97, 40), (1, 1, 97, 40), "half", HALF),
    "packed, one row for all": ((9, 3, 16), (1, 1, 16), "half", HALF),
    "999 pairs": ((27, 2, 37, 16), (1, 2, 1, 16), "interleave", FULL),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_allowed(name: str) -> None:
    shape, table, mode, dtype = ALLOWED[name]
    x, cos, sin = (random(*sizes, dtype=dtype) for sizes in (shape, table, table))
    y = rotate(x.npu(), cos.npu(), sin.npu(), mode=mode)
    close(y, rotated(x.double(), cos.double(), sin.double(), mode))


Shapes = tuple[tuple[int, ...], tuple[int, ...]]

FORBIDDEN: dict[str, tuple[str, Shapes, str, torch.dtype]] = {
    "odd D": ("D must be even", ((1, 9, 3, 15), (1, 9, 1, 15)), "half", FULL),
    "D 896": ("D must be below 896", ((1, 2, 1, 896), (1, 2, 1, 896)), "half", FULL),
    "half tables": ("must have input's dimensions", ((1, 9, 3, 16), (1, 9, 1, 8)), "half", FULL),
    "fewer table axes": ("must have input's dimensions", ((1, 9, 3, 16), (9, 16)), "half", FULL),
    "two axes": ("3 or 4 dimensions", ((9, 16), (9, 16)), "half", FULL),
    "no row": ("must not be empty", ((1, 0, 3, 16), (1, 0, 1, 16)), "half", FULL),
    "one row for all": ("no layout has", ((2, 9, 3, 16), (1, 1, 1, 16)), "half", FULL),
    "packed, one row for all": ("no layout has", ((9, 3, 16), (1, 1, 16)), "interleave", FULL),
    "packed, tables of heads": ("no layout has", ((9, 3, 16), (9, 2, 16)), "half", FULL),
    "1000 heads": ("below 1000", ((1, 2, 1000, 16), (1, 2, 1, 16)), "half", FULL),
    "heads before few rows": (r"exceed S\*8", ((3, 6, 2, 16), (1, 1, 2, 16)), "half", FULL),
    "a small unaligned D": ("32-byte aligned", ((2, 3, 30, 40), (1, 1, 30, 40)), "half", HALF),
    "tables of sequences": ("without B and N", ((2, 9, 3, 16), (2, 9, 1, 16)), "interleave", FULL),
    "1000 pairs": (r"B\*N below 1000", ((25, 2, 40, 16), (1, 2, 1, 16)), "interleave", FULL),
    "int32": ("only float16, bfloat16", ((1, 9, 3, 16), (1, 9, 1, 16)), "half", torch.int32),
}


def refuses(rule: str, shapes: Shapes, mode: str, dtype: torch.dtype) -> None:
    x, cos, sin = (random(*shapes[place], dtype=dtype).npu() for place in (0, 1, 1))
    with pytest.raises(CardRefusal, match=rule):
        rotate(x, cos, sin, mode=mode)


@pytest.mark.parametrize("name", FORBIDDEN)
def test_refused(name: str) -> None:
    refuses(*FORBIDDEN[name])


def test_float64_is_refused() -> None:
    x, cos, sin = (random(1, 9, 3, 16).npu() for _ in range(3))
    with pytest.raises(CardRefusal, match="input is"):
        rotate(doubled(x), cos, sin)
    with pytest.raises(CardRefusal, match="r2 is"):
        rotate(x, cos, doubled(sin))


def test_tables_of_two_shapes_are_refused() -> None:
    x, cos, sin = (random(2, 9, heads, 16).npu() for heads in (3, 3, 1))
    with pytest.raises(CardRefusal, match="r2 must have shape"):
        rotate(x, cos, sin)


@needs("npu_rotary_mul", "rotate")
def test_a_matrix_to_rotate_by_is_refused() -> None:
    import torch_npu

    x = random(1, 9, 3, 16).npu()
    with pytest.raises(CardRefusal, match="rotate is not simulated"):
        torch_npu.npu_rotary_mul(x, x, x, "interleave", random(16, 16).npu())


FORBIDDEN_BACKWARD: dict[str, tuple[str, Shapes, str, bool]] = {
    "sequences of few rows": ("B 2 below S 2", ((2, 3, 2, 16), (2, 1, 2, 16)), "half", False),
    "1025 pairs": (r"B\*N at most 1024", ((41, 2, 25, 16), (1, 2, 1, 16)), "half", True),
    "1000 pairs": (r"B\*N below 1000", ((25, 2, 40, 16), (1, 2, 1, 16)), "interleave", False),
    "1000 heads": ("below 1000", ((1, 2, 1000, 16), (1, 2, 1, 16)), "half", False),
    "D 896": ("D must be below 896", ((1, 2, 1, 896), (1, 2, 1, 896)), "half", False),
}


def differentiated(shapes: Shapes, mode: str, tables_too: bool) -> list[torch.Tensor]:
    import torch_npu

    x, cos, sin = (random(*sizes).npu() for sizes in (shapes[0], shapes[1], shapes[1]))
    tables = [table.requires_grad_(tables_too) for table in (cos, sin)]
    return torch_npu.npu_rotary_mul_backward(x, x, *tables, mode)


@pytest.mark.parametrize("name", FORBIDDEN_BACKWARD)
def test_refused_by_the_gradient(name: str) -> None:
    rule, shapes, mode, tables_too = FORBIDDEN_BACKWARD[name]
    with pytest.raises(CardRefusal, match=rule):
        differentiated(shapes, mode, tables_too)


def test_sequences_of_few_rows_are_rows_of_few_sequences_where_no_head_is_between() -> None:
    assert differentiated(((3, 2, 4, 16), (3, 2, 1, 16)), "half", True)[1].isfinite().all()


def test_many_pairs_have_a_gradient_without_that_of_the_tables() -> None:
    assert differentiated(((41, 2, 25, 16), (1, 2, 1, 16)), "half", False)[0].isfinite().all()


def test_the_gradient_of_another_shape_is_refused() -> None:
    import torch_npu

    x = random(1, 9, 3, 16).npu()
    with pytest.raises(CardRefusal, match="grad must have shape"):
        torch_npu.npu_rotary_mul_backward(x[:, :8], x, x, x)


OLD: dict[str, tuple[str, Shapes, str, torch.dtype]] = {
    "bfloat16": ("only float16, float32", ((1, 9, 3, 64), (1, 9, 1, 64)), "half", BRAIN),
    "interleave": (r"one of \('half',\)", ((1, 9, 3, 64), (1, 9, 1, 64)), "interleave", FULL),
    "D 16": ("32, 64, 96 or 128", ((1, 9, 3, 16), (1, 9, 1, 16)), "half", FULL),
    "far rows": ("blocks of 32 bytes", ((1, 10, 450, 128), (1, 1, 1, 128)), "half", FULL),
    "heads before few rows": (r"exceed S\*8", ((3, 6, 2, 64), (1, 1, 2, 64)), "half", FULL),
}


@pytest.mark.parametrize("name", OLD)
def test_a_310p_refuses_more(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRTUAL_ASCEND_SOC", "Ascend310P3")
    refuses(*OLD[name])


def test_a_310p_has_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRTUAL_ASCEND_SOC", "Ascend310P3")
    with pytest.raises(CardRefusal, match="does not exist on a 310P"):
        differentiated(((1, 9, 3, 64), (1, 9, 1, 64)), "half", False)


def test_a_950_wants_shapes_that_broadcast_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRTUAL_ASCEND_SOC", "Ascend950PR_9589")
    assert rotate(random(2, 9, 3, 16).npu(), *random(2, 1, 1, 1, 16).npu()).isfinite().all()
    assert differentiated(((2, 9, 3, 16), (1, 1, 1, 16)), "half", True)[1].isfinite().all()
    x, tables = random(9, 3, 16), random(2, 1, 1, 16)
    close(rotate(x.npu(), *tables.npu()), rotated(x.double(), *tables.double(), "half"))
    for shapes in (((2, 9, 3, 16), (2, 3, 3, 16)), ((9, 3, 16), (1, 3, 16))):
        with pytest.raises(CardRefusal, match="must broadcast"):
            differentiated(shapes, "half", False)


def given_to_apply(**given: Any) -> dict[str, Any]:
    """The arguments of npu_apply_rotary_pos_emb on the device, every one replaceable."""
    dtype = given.pop("dtype", FULL)
    heads = {"query": 4, "key": 2, "cos": 1, "sin": 1}
    tensors = {name: random(2, 3, n, 64, dtype=dtype) for name, n in heads.items()}
    return on_device({**tensors, **given})


def apply(given: dict[str, Any]) -> Any:
    import torch_npu

    return torch_npu.npu_apply_rotary_pos_emb(**given)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_rotary_pos_emb_writes_into_its_arguments(dtype: torch.dtype, packed: bool) -> None:
    given = given_to_apply(dtype=dtype)
    if packed:
        given = {name: tensor.flatten(0, 1) for name, tensor in given.items()}
        given["layout"] = "TND"
    before = {n: t.cpu().clone() for n, t in given.items() if isinstance(t, torch.Tensor)}
    versions = [given[name]._version for name in ("query", "key")]
    outputs = apply(given)
    assert outputs[0] is given["query"]
    assert outputs[1] is given["key"]
    # autograd is not told
    assert [output._version for output in outputs] == versions
    for name, output in zip(("query", "key"), outputs, strict=True):
        wide = [before[n].double() for n in (name, "cos", "sin")]
        close(output, rotated(*wide, "half"), 3 if dtype == HALF else 1)


def test_apply_rotary_pos_emb_rounds_thrice_in_float16() -> None:
    given = given_to_apply(dtype=HALF)
    x, cos, sin = (given[name].cpu() for name in ("query", "cos", "sin"))
    turned = (x.double() @ quarter_turns(64, "half")).half()
    assert torch.equal(apply(given)[0].cpu(), x * cos + turned * sin)


def test_apply_rotary_pos_emb_spoils_a_leaf_and_has_no_gradient() -> None:
    given = given_to_apply()
    query = given["query"].requires_grad_()
    before = query.detach().clone()
    out = apply(given)[0]
    assert not torch.equal(query.detach(), before)
    assert out is query
    if TORCH < (2, 9):
        # it is the same tensor, and autograd has heard of nothing
        return
    assert not query.is_leaf
    with pytest.raises(RuntimeError, match="not implemented"):
        out.sum().backward()


REFUSED_TO_APPLY: dict[str, tuple[str, dict[str, Any]]] = {
    "D 32": (
        "D must be 64 or 128",
        {name: random(2, 3, 1, 32) for name in ("query", "key", "cos", "sin")},
    ),
    "layout": ("layout must be BSND or TND", {"layout": "BNSD"}),
    "mode": ("rotary_mode must be half", {"rotary_mode": "interleave"}),
    "packed layout of sequences": ("TND needs 3", {"layout": "TND"}),
    "two dtypes": ("must have query's dtype", {"cos": random(2, 3, 1, 64, dtype=HALF)}),
    "key of other rows": ("key must have shape", {"key": random(2, 4, 2, 64)}),
    "shared tables": ("cos must have shape", {"cos": random(1, 3, 1, 64)}),
    "half tables": ("sin must have shape", {"sin": random(2, 3, 1, 32)}),
    "no keys": ("key must not be empty", {"key": random(2, 3, 0, 64)}),
    "many heads": ("255 heads together", {"query": random(2, 3, 254, 64)}),
    "a full buffer": ("bytes of buffer", {"query": random(2, 3, 160, 64)}),
}


@pytest.mark.parametrize("name", REFUSED_TO_APPLY)
def test_refused_to_apply(name: str) -> None:
    rule, given = REFUSED_TO_APPLY[name]
    if not schemas.has("npu_apply_rotary_pos_emb", *given):
        pytest.skip(f"torch_npu {torch_npu_version()} takes no {', '.join(given)}")
    with pytest.raises(CardRefusal, match=rule):
        apply(given_to_apply(**given))


def test_float64_is_refused_to_apply() -> None:
    tensors = {name: doubled(tensor) for name, tensor in given_to_apply().items()}
    with pytest.raises(CardRefusal, match="only float16, bfloat16, float32"):
        apply(tensors)
