"""What is remembered answers only the question that was asked.

For each memo there is a call that fills it, and variants of that call of the same shapes, each
with one attribute changed. They are observed with nothing remembered, and then one after the
other, in both orders, so that each follows each: nothing may differ.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flash_attn_npu
from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu._core.ground.memory import PerTensorMemo, forget_all, memos
from tests.helpers.remembered_cases import CASES, INFERENCE, MASK, TENSORS, Maker, Variant

flash = pytest.importorskip("transformers.modeling_flash_attention_utils")

for _, _name, _ in pkgutil.walk_packages(flash_attn_npu.__path__, "flash_attn_npu."):
    if not _name.endswith("__main__"):
        importlib.import_module(_name)

SAID = (
    "reasons that were logged",
    "remarks on decoding that were logged",
    "readings that a captured graph holds",
)
"""Memos that answer nothing: what they hold is not said a second time."""
COMPARED = (
    "kinds of calls that were compared",
    "kinds of gradients that were launched",
    "operators of which a kind does not serve",
    "versions of what runs on a chip",
)
"""Memos that are filled where first calls are compared, which is off here."""


@pytest.fixture(autouse=True)
def installed(npu: torch.device) -> Iterator[None]:
    flash._loaded_implementation = None
    TENSORS["mask"] = MASK.to(npu)
    TENSORS["ids"] = torch.tensor([[0, 1, 2, 0, 1, 2]]).to(npu)
    angle = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    TENSORS["cos"], TENSORS["sin"] = (t.half().to(npu) for t in (angle.cos(), angle.sin()))
    with flash_attn_npu.install():
        yield
    TENSORS.clear()
    flash._loaded_implementation = None


def observe(call: Callable[[Maker], Any], variant: Variant) -> dict[str, Any]:
    """Everything that a caller could tell of a call: kernels, results, gradients, errors."""
    torch.manual_seed(0)
    make, seen = Maker(variant), {}
    with virtual_ascend.record() as rec, ExitStack() as stack:
        if "mode" in variant:
            stack.enter_context(variant["mode"]())
        try:
            answer = call(make)
            answers = answer if isinstance(answer, tuple) else (answer,)
            outs = [out for out in answers if out is not None]
            for i, out in enumerate(outs):
                seen |= {f"out {i}": out, f"flags {i}": (out.requires_grad, out.is_inference())}
            wanted = [out for out in outs if out.requires_grad]
            if wanted:
                torch.autograd.backward([out.float().square().sum() for out in wanted])
        except Exception as error:
            seen["error"] = f"{type(error).__name__}: {error}"
    seen |= {f"gradient of {name}": leaf.grad for name, leaf in make.leaves.items()}
    seen["launches"] = [
        (x.name, {k: v for k, v in x.arguments.items() if not isinstance(v, Tensor)})
        for x in rec.launches
    ]
    return {k: v.detach().cpu() if isinstance(v, Tensor) else v for k, v in seen.items()}


def same(got: dict[str, Any], expected: dict[str, Any]) -> bool:
    try:
        assert_same(got, expected, "")
    except AssertionError:
        return False
    return True


def assert_same(got: dict[str, Any], expected: dict[str, Any], name: str) -> None:
    assert got.keys() == expected.keys(), (name, got, expected)
    for part, value in expected.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(
                got[part], value, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{name}: {m}"
            )
        else:
            assert got[part] == value, (name, part)


@pytest.mark.parametrize("case", CASES)
def test_each_variant_after_each_other_is_as_if_it_were_alone(case: str) -> None:
    call, variants, names = CASES[case]
    alone = {}
    for name, variant in variants.items():
        forget_all()
        alone[name] = observe(call, variant)
    different = [name for name in variants if not same(alone[name], alone["as it is"])]
    # otherwise nothing would be tried
    assert len(different) >= len(variants) // 2
    forget_all()
    observe(call, {})
    filled = {memo.name for memo in memos() if len(memo)}
    if case == "pages":
        # where no gradient is wanted the pages are read as they lie
        observe(call, {"grad": ("k",)})
        filled = {memo.name for memo in memos() if len(memo)}
    assert filled >= set(names)
    # what is made in inference mode must serve training, too: it has to come first once
    untracked = [x for x, variant in variants.items() if variant.get("mode") is INFERENCE]
    orders = [list(variants), list(reversed(variants)), *([x, *variants] for x in untracked)]
    for order in orders:
        forget_all()
        for name in order:
            assert_same(observe(call, variants[name]), alone[name], name)


def test_every_memo_has_a_case() -> None:
    covered = {name for _, _, names in CASES.values() for name in names}
    assert {memo.name for memo in memos()} == covered | set(SAID) | set(COMPARED)
    assert len({memo.name for memo in memos()}) == len(memos())


def test_every_memo_is_bounded_and_cleared_at_once() -> None:
    for call, variants, _ in CASES.values():
        observe(call, {})
        observe(call, variants.get("gradient of k", {}))
    assert all(len(memo) for memo in memos() if memo.name not in (*SAID, *COMPARED))
    assert all(0 < memo.entries <= 1024 for memo in memos())
    for memo in memos():
        if memo.held():
            assert memo.nbytes is not None, memo.name
    forget_all()
    assert not any(len(memo) for memo in memos())


def test_a_change_while_a_tensor_is_read_is_noticed(npu: torch.device) -> None:
    memo: PerTensorMemo[int] = PerTensorMemo("for a test", 4)
    tensor = torch.zeros(1, dtype=torch.int32, device=npu)

    def disturbed(x: Tensor) -> int:
        read = int(x)
        # as another thread might, at this very moment
        x.add_(1)
        return read

    assert memo.get(tensor, disturbed) == 0
    assert memo.get(tensor, int) == 1


STATE = {
    "_activation.install._claims",
    "_activation.install._set_aside",
    "_integrations.models._told",
    "_integrations.models.refused",
    "_integrations.transformers._available",
    "_activation.install._say_shadowed",
    "_core.ground.locks._locks",
    "_core.ground.memory._memos",
    "_core.ground.unseen_writes._libraries",
    "_surface.compared",
    "_surface.comparison._defined",
    "_core.ground.usage._tallies",
    # read from files of the package, which do not change
    "_core.ground.absent.absent",
    "_core.ground.absent.arguments",
    "_core.ground.absent.default",
    "_core.ground.absent.schemas",
    "_core.ground.absent.versions",
    "_core.ground.confirmed.refuted",
    "_core.ground.confirmed.reports",
    "_core.ground.processor.multiplies_bf16",
    "_core.kernels.host.flash.shares_heads",
    "_startup._said",
    "_activation.notebooks._claims",
    "_integrations.torch_attention._claims",
    "_integrations.torch_attention._libraries",
}
"""What answers no question about a call: who installed, what was counted, what upstream has."""


EMPTY = r"\{\}|\[\]|(\w+\.)*(set|dict|list|\w*Dict|defaultdict|\w*Set)\(\)"


def test_nothing_is_remembered_elsewhere() -> None:
    """No module keeps a container that is filled later, and no function keeps its results."""
    found = set()
    for name, module in list(sys.modules.items()):
        if not name.startswith("flash_attn_npu.") or module.__file__ is None:
            continue
        if name.startswith("flash_attn_npu._virtual_ascend"):
            continue
        for node in ast.parse(Path(module.__file__).read_text()).body:
            kept = ""
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                empty = re.fullmatch(EMPTY, ast.unparse(node.value))
                kept = ast.unparse(target) if empty else ""
            elif isinstance(node, ast.FunctionDef):
                decorators = " ".join(map(ast.unparse, node.decorator_list))
                kept = node.name if re.search(r"\b(lru_cache|cache)\b", decorators) else ""
            if kept:
                found.add(f"{name.removeprefix('flash_attn_npu.')}.{kept}")
    assert found <= STATE, "register it in flash_attn_npu._core.ground.memory"
