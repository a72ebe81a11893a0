"""Every call of every kernel against the schemas of every torch_npu, and right numbers with each.

The table asks the installed operators what they take. So with each set of schemas that some wheel
has, no call may reach an operator that would refuse it, and what is served otherwise is right.
"""

from __future__ import annotations

import ast
import json
import logging
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flash_attn_npu
from flash_attn_npu import reporting
from flash_attn_npu._core.attention import cache_operators, call
from flash_attn_npu._core.attention.decode import CacheCall
from flash_attn_npu._core.ground import absent
from flash_attn_npu._core.problems.ask import Options
from flash_attn_npu._core.rowwise.gates import geglu
from flash_attn_npu._core.table import installed
from flash_attn_npu._core.table.attention import BLOCKWISE, FUSION
from flash_attn_npu._surface import wheels
from flash_attn_npu.layers.rotary import apply_rotary_emb
from flash_attn_npu.ops.activations import swiglu
from flash_attn_npu.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn_npu.ops.triton.layer_norm import layer_norm_fn, rms_norm_fn
from tests.helpers import reference
from tests.helpers.wheel import Call, Seen, bind, pretended

ASCEND = Path(flash_attn_npu.__file__).parent / "_core" / "kernels" / "ascend"
NEEDS = installed.NEEDS
SHORTCUTS = ("of a sum", "new keys", "gathered", "at positions", "exact geglu")
"""Needs whose call gives way to one that does the same with more launches, which nobody is told."""


def classes() -> dict[str, list[str]]:
    """One version for each set of schemas -> all versions that have it."""
    found: dict[tuple[str | None, ...], list[str]] = {}
    for version in wheels.versions():
        schemas = tuple(wheels.schema(version, operator) for operator in wheels.schemas())
        found.setdefault(schemas, []).append(version)
    return {versions[-1]: versions for versions in found.values()}


CLASSES = classes()
SUPPORTED = [version for version in CLASSES if not version.startswith("2.5.")]
NEWEST = wheels.versions()[-1]

EQUAL = ([7, 4, 9], [7, 4, 9])
MORE_QUERIES = ([7, 4, 9], [5, 4, 3])
MIXED = ([7, 5, 0, 9], [7, 8, 4, 3])
CAUSAL = {"causal": True}
LSE = {"return_attn_probs": True}


class Case:
    """One attention call, solved here and in float64."""

    def __init__(
        self, dtype: torch.dtype, lengths: Any = None, slopes: bool = False, sink: bool = False,
        **options: Any,
    ) -> None:  # fmt: skip
        self.dtype, self.lengths = dtype, lengths
        self.options = Options(**options)
        generator = torch.Generator().manual_seed(5)
        rows_q, rows_k = ((2, 6), (2, 6)) if lengths is None else ((sum(n),) for n in lengths)
        shapes = ((*rows_q, 4, 16), (*rows_k, 2, 16), (*rows_k, 2, 16), (*rows_q, 4, 16))
        q, k, v, self.dout = (torch.randn(n, generator=generator).to(dtype) for n in shapes)
        self.leaves = {"q": q, "k": k, "v": v}
        if sink:
            self.leaves["sink"] = torch.tensor([0.5, -1.0, 3.0, 0.0])
        self.slopes = torch.tensor([0.5, 0.25, 0.1, 0.05]) if slopes else None

    def solve(self, device: torch.device) -> dict[str, Tensor]:
        """By this package: out, softmax_lse if it is asked for, and a gradient of each leaf."""
        leaves = {name: x.to(device).requires_grad_() for name, x in self.leaves.items()}
        slopes = None if self.slopes is None else self.slopes.to(device)
        given = (leaves["q"], leaves["k"], leaves["v"])
        packed = None
        if self.lengths is not None:
            cu = ([0, *accumulate(lengths)] for lengths in self.lengths)
            packed = (*cu, *map(max, self.lengths))
        answer = call.attend("f", given, packed, self.options, slopes, leaves.get("sink"))
        out = answer[0] if isinstance(answer, tuple) else answer
        grads = torch.autograd.grad(out, tuple(leaves.values()), self.dout.to(device))
        found = {"out": out, **{f"d{x}": g for x, g in zip(leaves, grads, strict=True)}}
        return found | ({"lse": answer[1]} if isinstance(answer, tuple) else {})

    def expected(self, attend: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = {x: t.to(dtype).requires_grad_() for x, t in self.leaves.items()}
        options: dict[str, Any] = {
            "causal": self.options.causal, "window_size": self.options.window_size,
            "alibi_slopes": self.slopes, "sink": leaves.get("sink"), "attend": attend,
        }  # fmt: skip
        tensors = (leaves["q"], leaves["k"], leaves["v"])
        if self.lengths is None:
            result = reference.dense(*tensors, **options)
        else:
            cu = ([0, *accumulate(lengths)] for lengths in self.lengths)
            longest = max(self.lengths[1])
            result = reference.varlen(*tensors, *cu, max_seqlen_k=longest, **options)
        grads = torch.autograd.grad(result.out, tuple(leaves.values()), self.dout.to(dtype))
        found = {f"d{x}": g for x, g in zip(leaves, grads, strict=True)}
        return found | {"out": result.out, "lse": result.softmax_lse}

    @cached_property
    def answers(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The truth, and what plain PyTorch makes of it in the same precision."""
        truth = self.expected(reference.attention, torch.float64)
        return truth, self.expected(reference.same_precision, self.dtype)

    def check(self, answer: dict[str, Tensor]) -> None:
        truth, plain = self.answers
        for name, value in answer.items():
            if name == "lse":
                assert value.is_contiguous()
                reference.assert_lse_close(value, truth[name])
            else:
                reference.assert_close_to_reference(value, truth[name], plain[name], name)


HALF, WIDE = torch.bfloat16, torch.float32
CASES = {
    "dense": Case(HALF, **CAUSAL),
    "window": Case(HALF, MIXED, window_size=(2, 1)),
    "packed, lse": Case(HALF, MIXED, **CAUSAL, **LSE),
    "packed, equal lengths, lse": Case(HALF, ([5, 5], [5, 5]), **LSE),
    "packed, single queries, lse": Case(HALF, ([1, 1, 1], [5, 3, 4]), **CAUSAL, **LSE),
    "packed, deterministic": Case(HALF, MIXED, **CAUSAL, deterministic=True),
    "alibi, dense, lse, deterministic": Case(HALF, slopes=True, **LSE, deterministic=True),
    "alibi, packed, lse": Case(HALF, EQUAL, slopes=True, **CAUSAL, **LSE),
    "alibi, packed, lse, deterministic": Case(HALF, EQUAL, slopes=True, **LSE, deterministic=True),
    "alibi, float32, more queries, lse": Case(
        WIDE, MORE_QUERIES, slopes=True, **CAUSAL, **LSE, deterministic=True
    ),
    "sink, dense": Case(HALF, sink=True, **CAUSAL),
    "sink, packed": Case(HALF, MIXED, sink=True, **CAUSAL),
    "sink, packed, lse": Case(HALF, MIXED, sink=True, **CAUSAL, **LSE),
    "sink, packed, deterministic": Case(HALF, MIXED, sink=True, deterministic=True, **CAUSAL),
    "sink, float32": Case(WIDE, sink=True, **CAUSAL),
    "sink, float32, packed, lse": Case(WIDE, MIXED, sink=True, window_size=(3, 0), **LSE),
    "sink, alibi, packed": Case(HALF, EQUAL, slopes=True, sink=True, **CAUSAL),
    "sink, alibi, dense, lse": Case(HALF, slopes=True, sink=True, **LSE),
}


def paged(device: torch.device) -> Any:
    """With new keys, and with softcap, which no kernel has."""
    q, cache = torch.randn(2, 1, 2, 64), torch.randn(4, 16, 2, 64)
    table = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32)
    q, cache, table = q.half().to(device), cache.half().to(device), table.to(device)
    given = {"cache_seqlens": 20, "block_table": table, "return_softmax_lse": True}
    values = cache.clone()
    return [
        flash_attn_npu.flash_attn_with_kvcache(q, cache, values, k=q, v=q, **given),
        flash_attn_npu.flash_attn_with_kvcache(q, cache, values, softcap=5.0, **given),
    ]


def paged_sink(device: torch.device) -> Any:
    q, cache = torch.randn(2, 1, 2, 64), torch.randn(4, 16, 2, 64)
    table = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32)
    q, cache, table = q.bfloat16().to(device), cache.bfloat16().to(device), table.to(device)
    sink = torch.randn(2).bfloat16().to(device)
    given = {"cache_seqlens": 20, "block_table": table, "sink": sink}
    return cache_operators.attend(CacheCall(q, cache, cache.clone(), **given))


def inference(device: torch.device) -> Any:
    q = torch.randn(2, 6, 2, 16).half().to(device)
    with torch.no_grad():
        return flash_attn_npu.flash_attn_func(q, q, q, causal=True)


def mindie(device: torch.device) -> Any:
    q = torch.randn(9, 2, 16).half().to(device)
    return flash_attn_npu.attention_forward_varlen(q, q, q, [0, 4, 9], [0, 4, 9], causal=True)


def low_level(device: torch.device) -> Any:
    """A backward with a dropout mask that the kernel drew, plain and with ALiBi."""
    q = torch.randn(2, 6, 2, 16).half().to(device)
    interface = flash_attn_npu.flash_attn_interface
    grads = [torch.empty_like(q) for _ in range(3)]
    for slopes in (None, torch.rand(2).to(device)):
        options = (0.5, 0.25, False, -1, -1, 0.0, slopes, False)
        out, lse, _, rng_state = interface._flash_attn_forward(q, q, q, *options)
        interface._flash_attn_backward(q, q, q, q, out, lse, *grads, *options, rng_state)
    return grads


def rotary(device: torch.device) -> Any:
    x, table = torch.randn(2, 5, 2, 64), torch.rand(5, 32)
    x, table = x.bfloat16().to(device), table.bfloat16().to(device)
    places = torch.tensor([3, 0]).to(device)
    steps = [apply_rotary_emb(x[:, :2], table, table, seqlen_offsets=places) for _ in range(2)]
    whole = [apply_rotary_emb(x, table, table, interleaved=pairs) for pairs in (False, True)]
    return [*steps, *whole]


def norms(device: torch.device) -> Any:
    x, y, weight = (torch.randn(n).bfloat16().to(device) for n in ((4, 64), (4, 64), (64,)))
    given = [
        rms_norm_fn(x, weight, None),
        rms_norm_fn(x, weight, None, residual=y),
        layer_norm_fn(x, weight, weight, residual=y),
    ]
    trained = rms_norm_fn(x.requires_grad_(), weight, None, residual=y)
    return [*given, *torch.autograd.grad(trained, x, torch.ones_like(trained))]


def gates(device: torch.device) -> Any:
    both = torch.randn(4, 128).bfloat16().to(device).requires_grad_()
    out = swiglu(*both.chunk(2, dim=-1))
    gelus = geglu(both.detach())
    return [gelus, out, *torch.autograd.grad(out, both, torch.ones_like(out))]


def losses(device: torch.device) -> Any:
    logits = torch.randn(4, 50).to(device)
    labels = torch.arange(4, device=device)
    return [cross_entropy_loss(logits, labels, label_smoothing=x)[0] for x in (0.0, 0.1)]


OTHERS: dict[str, Callable[[torch.device], Any]] = {
    each.__name__: each
    for each in (paged, paged_sink, inference, mindie, low_level, rotary, norms, gates, losses)
}


@pytest.mark.parametrize("version", SUPPORTED)
def test_nothing_is_asked_that_a_wheel_refuses(npu: torch.device, version: str) -> None:
    """And every attention case is one launch there and right, whatever the operators lack."""
    with pretended(version) as seen:
        for name, case in CASES.items():
            before = len(seen.calls)
            with reporting() as report:
                case.check(case.solve(npu))
            assert {entry.kernel for entry in report.tallies} == {FUSION}, name
            operators = [x for x in seen.operators()[before:] if "grad" not in x]
            assert len(operators) == 1, (name, operators)
        for run in OTHERS.values():
            run(npu)
    for entry in seen.calls:
        for other in CLASSES[version]:
            assert entry.arguments <= set(wheels.arguments(other, entry.operator))


@pytest.fixture(scope="module")
def recorded() -> list[Call]:
    """What the newest torch_npu is asked by all cases together."""
    pytest.importorskip("torch_npu", reason="the virtual Ascend is not running")
    device = torch.device("npu:0")
    with pretended(NEWEST) as seen:
        for case in CASES.values():
            case.solve(device)
        for run in OTHERS.values():
            run(device)
    return seen.calls


def named(node: ast.expr) -> str | None:
    """The operator of torch_npu that an expression stands for: `torch_npu.X`, `launcher("X")`."""
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) in (
        "torch_npu",
        "torch.ops.npu",
    ):
        return node.attr
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "launcher":
        return str(ast.literal_eval(node.args[0]))
    return None


def expressions() -> Iterator[tuple[str, ast.expr]]:
    for path in sorted(ASCEND.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.expr):
                yield path.name, node


def call_sites() -> Iterator[tuple[str, int, int, str]]:
    """(file, first line, last line, operator) of every call of an operator of torch_npu."""
    for file, node in expressions():
        operator = named(node.func) if isinstance(node, ast.Call) else None
        if operator is not None:
            yield file, node.lineno, node.end_lineno or 0, operator


def operators_named() -> set[str]:
    """Every operator of torch_npu that the kernels' source names."""
    return {operator for _, node in expressions() if (operator := named(node))}


def test_every_call_is_covered(npu: torch.device, recorded: list[Call]) -> None:
    """A new call of a kernel fails here until a case makes it and a need names it."""
    assert operators_named() == set(wheels.schemas())
    assert {entry.operator for entry in recorded} == set(wheels.schemas())
    lines = {(Path(entry.file).name, entry.line) for entry in recorded}
    sites = list(call_sites())
    assert len(sites) >= 10
    for file, first, last, operator in sites:
        met = [line for line in range(first, last + 1) if (file, line) in lines]
        assert met, f"{file}:{first}: no case calls this {operator}"


def test_the_needs_name_what_is_passed(npu: torch.device, recorded: list[Call]) -> None:
    named: dict[str, set[str]] = {operator: set() for operator in wheels.schemas()}
    for need in NEEDS:
        for operator, *arguments in need.calls:
            named[operator] |= set(arguments)
    passed: dict[str, set[str]] = {operator: set() for operator in wheels.schemas()}
    for entry in recorded:
        passed[entry.operator] |= entry.arguments
    # behind a setting that no case here switches on, and on a chip that none here has
    for operator in (f"{FUSION}_v2", f"{FUSION}_grad_v2"):
        passed[operator] |= {"q_start_idx", "kv_start_idx"}
    passed[f"{FUSION}_v2"] |= {"sink", "softmax_layout"}
    for operator, arguments in passed.items():
        assert arguments - named[operator] == set(), operator
        assert named[operator] - arguments == set(), operator


@pytest.mark.parametrize("need", NEEDS, ids=lambda need: need.feature)
def test_the_table_refuses_what_a_wheel_lacks(
    need: installed.Need, npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows and compat_matrix.md say the same of every wheel."""
    column = NEEDS.index(need)
    outcomes = {v: outcomes[column] for outcomes, them in wheels.groups().items() for v in them}
    assert set(outcomes) == set(wheels.versions())
    if need.otherwise is not None:
        return
    (row,) = installed.rows((need._replace(applies=lambda problem: True),))
    problem = type("Problem", (), {"device": npu})
    for version, outcome in outcomes.items():
        with pretended(version):
            old = installed.supported((need.kernel,)).present(problem)
            assert (old or row.present(problem)) == outcome.startswith("composed")


def test_an_unsupported_torch_npu_is_refused_by_name(
    npu: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "flash_attn_npu")
    for version in ("2.5.1", "2.5.1.post1"):
        caplog.clear()
        with pretended(version) as seen:
            for name in ("packed, lse", "sink, packed", "alibi, packed, lse"):
                with reporting() as report:
                    CASES[name].check(CASES[name].solve(npu))
                assert {entry.kernel for entry in report.tallies} == {BLOCKWISE}
            for run in (rotary, norms, gates, losses):
                run(npu)
        assert not seen.calls
        messages = [record.getMessage() for record in caplog.records]
        assert len(messages) >= 5
        assert all("older than 2.6.0, the oldest that is supported" in text for text in messages)


def without(version: str, operator: str) -> None:
    """No operator at all."""


def test_a_torch_npu_without_operators_is_named_too(
    npu: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "flash_attn_npu")
    with pretended(NEWEST, without) as seen:
        for name in ("packed, lse", "sink, packed", "alibi, packed, lse"):
            CASES[name].check(CASES[name].solve(npu))
        before = [run(npu) for run in (paged, rotary, norms, gates, losses)]
    assert not seen.calls
    assert len(before) == 5
    text = "\n".join(record.getMessage() for record in caplog.records)
    for need in NEEDS:
        # what adds and norms at once gives way to a norm behind an addition
        if need.otherwise is None and not any(word in need.feature for word in SHORTCUTS):
            names = " and ".join(call[0] for call in need.calls)
            assert f"the installed torch_npu lacks {names}, or an argument of it" in text


def test_a_pretended_wheel_refuses_what_the_real_one_would(npu: torch.device) -> None:
    """The test of the test."""
    import torch_npu

    q = torch.randn(6, 2, 16).half().to(npu)
    given = {"actual_seq_qlen": [6], "actual_seq_kvlen": [6], "softmax_layout": "TND"}
    with pretended("2.6.0"), pytest.raises(TypeError, match="softmax_layout"):
        torch_npu.npu_fusion_attention(q, q, q, 2, "TND", **given)
    with pretended("2.5.1"), pytest.raises(TypeError, match="no such operator"):
        torch_npu.npu_fusion_attention_v2(q, q, q, 2, "TND")
    text = wheels.schema(NEWEST, FUSION)
    for args, wrong in (((q,), {}), ((q,) * 3, {"query": q}), ((q,) * 99, {})):
        with pytest.raises(TypeError):
            bind(text, args, wrong)


def test_the_data_is_what_was_read_out_of_wheels() -> None:
    stored = json.loads((Path(absent.__file__).parent / "torch_npu.json").read_text())
    assert stored == wheels.schemas()
    assert len(wheels.versions()) == 20
    assert sum(map(len, CLASSES.values())) == 20
    assert isinstance(Seen().calls, list)
