"""The comparison itself: every kind of defect is found, in a package made for it."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flash_attn_npu._surface.comparison import Comparison, compare
from flash_attn_npu._surface.rules import Absent, Added, Different, Rules

NAMES: dict[str, dict[str, Any]] = {
    "VALUE": {"kind": "value"},
    "call": {
        "kind": "function",
        "params": ["x", "*args", "p=0.0", "size=(-1, -1)", "act=F.gelu", "**kwargs"],
    },
    "keyword": {"kind": "function", "params": ["x", "*", "mode='mean'", "cls=Layer"]},
    "Layer": {
        "kind": "class",
        "bases": ["nn.Module"],
        "methods": {"__init__": ["self", "dim", "dtype=torch.float16"], "forward": ["self", "x"]},
    },
    "Fn": {
        "kind": "class",
        "bases": ["torch.autograd.Function"],
        "methods": {"forward": ["ctx", "x"], "backward": ["ctx", "dout", "*args"]},
    },
}
UPSTREAM = {
    "upstream": {},
    "upstream.core": NAMES,
    "upstream.other": {"call": {"kind": "import", "from": "upstream.core"}},
}
CORE = """
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    VALUE = 1

    def call(x, *args, p=0.0, size=(-1, -1), act=F.gelu, **kwargs): ...

    class Layer(nn.Module):
        def __init__(self, dim, dtype=torch.float16): ...
        def forward(self, x): ...

    def keyword(x, *, mode='mean', cls=Layer): ...

    class Fn(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): ...
        @staticmethod
        def backward(ctx, dout, *args): ...
"""
MIRRORED = ("", "core", "other")

NO_RULES = Rules()

Compare = Callable[..., Comparison]


@pytest.fixture
def compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Compare]:
    """Compares a package of these files, module name -> source, with UPSTREAM."""
    monkeypatch.syspath_prepend(tmp_path)

    def run(
        core: str = CORE,
        *,
        mirrored: tuple[str, ...] = MIRRORED,
        rules: Rules = NO_RULES,
        **others: str,
    ) -> Comparison:
        files = {"__init__": "", "other": "from .core import call", "core": core, **others}
        (tmp_path / "mine").mkdir()
        for name, source in files.items():
            (tmp_path / "mine" / f"{name}.py").write_text(textwrap.dedent(source))
        importlib.invalidate_caches()
        return compare(UPSTREAM, "mine", mirrored, rules)

    yield run
    for name in [*sys.modules]:
        if name.partition(".")[0] == "mine":
            del sys.modules[name]


def defects(comparison: Comparison, module: str = "core") -> list[str]:
    return [f"{one.kind} {one.name}" for one in comparison.modules[module].defects]


def test_a_faithful_module_has_no_defect(compared: Compare) -> None:
    comparison = compared()
    assert comparison.defects == ()
    assert [defects(comparison, module) for module in MIRRORED] == [[], [], []]
    assert comparison.modules["core"].served == tuple(NAMES)
    assert comparison.modules["other"].served == ("call",)


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("VALUE = 1", "", "missing VALUE"),
        ("VALUE = 1", "VALUE = 1; more = 2", "spurious more"),
        ("VALUE = 1", "VALUE = 1\n    def helper(): ...", "spurious helper"),
        ("p=0.0", "p=0", "signature call"),
        ("p=0.0", "p=False", "signature call"),
        ("size=(-1, -1)", "size=(-1, 0)", "signature call"),
        ("act=F.gelu", "act=F.relu", "signature call"),
        ("act=F.gelu", "act=None", "signature call"),
        ("p=0.0, size=(-1, -1)", "size=(-1, -1), p=0.0", "signature call"),
        (", size=(-1, -1)", "", "signature call"),
        (", **kwargs", "", "signature call"),
        ("*args, p=0.0", "p=0.0", "signature call"),
        ("x, *args", "x=None, *args", "signature call"),
        ("x, *, mode", "x, mode", "signature keyword"),
        ("mode='mean'", "mode='sum'", "signature keyword"),
        ("cls=Layer", "cls=nn.Linear", "signature keyword"),
        ("dtype=torch.float16", "dtype=torch.float32", "signature Layer.__init__"),
        ("def forward(self, x)", "def forward(self, y)", "signature Layer.forward"),
        ("def forward(self, x): ...", "", "signature Layer.forward"),
        ("nn.Module", "", "base Layer"),
        ("torch.autograd.Function", "", "base Fn"),
        ("def backward(ctx, dout, *args)", "def backward(ctx, dout)", "signature Fn.backward"),
        ("class Layer(nn.Module)", "class Layer(nn.ModuleList)", None),
        ("VALUE = 1", "VALUE = 1; _private = 2", None),
        ("def keyword", "class keyword: ...\n    def _keyword", "kind keyword"),
        ("class Fn(torch.autograd.Function)", "Fn = 1\n    class _Fn", "kind Fn"),
        ("def __init__(self, dim, dtype=torch.float16): ...", "", "signature Layer.__init__"),
        ("def backward(ctx, dout, *args): ...", "def other(): ...", "signature Fn.backward"),
    ],
)
def test_a_change_is_found(compared: Compare, old: str, new: str, found: str | None) -> None:
    assert old in CORE
    comparison = compared(CORE.replace(old, new, 1))
    assert {*defects(comparison)} == ({found} if found else set())
    if found:
        assert found.split()[1].partition(".")[0] not in comparison.modules["core"].served


def test_a_missing_method_is_found(compared: Compare) -> None:
    source = CORE.replace("(nn.Module)", "").replace("def forward(self, x): ...", "")
    assert defects(compared(source)) == ["base Layer", "missing Layer.forward"]


def test_a_name_in_another_of_our_modules_is_hidden(compared: Compare) -> None:
    source = CORE.replace("VALUE = 1", "from . import private")
    comparison = compared(source, private="VALUE = 1")
    assert defects(comparison) == ["hidden VALUE"]
    assert "mine.private" in str(comparison.modules["core"].defects[0])


def test_a_name_left_out_of_all_is_hidden(compared: Compare) -> None:
    names = [name for name in NAMES if name != "VALUE"]
    assert defects(compared(f"{CORE}\n    __all__ = {names}")) == ["hidden VALUE"]


def test_imports_are_not_shown_unless_all_says_so(compared: Compare) -> None:
    source = CORE.replace("VALUE = 1", "from .private import helper\n    VALUE = 1")
    source = f"{source}\n    __all__ = {[*NAMES, 'helper']}"
    assert defects(compared(source, private="def helper(): ...")) == ["spurious helper"]


def test_another_object_of_the_same_name_is_found(compared: Compare) -> None:
    comparison = compared(other="def call(): ...")
    assert defects(comparison, "other") == ["identity call"]


def test_modules_that_are_missing(compared: Compare) -> None:
    comparison = compared(other="import nothing_of_that_name", mirrored=("", "other", "strange"))
    assert defects(comparison) == ["unexposed core"]
    assert defects(comparison, "other") == ["missing other"]
    assert [one.name for one in comparison.defects] == ["strange"]


def test_rules_allow_what_they_name(compared: Compare) -> None:
    rules = Rules(
        (Absent("co*", "because", ("VAL*", "Layer.forward")), Absent("other", "no")),
        (Added("core", "more", ("extra",)),),
        (Different("core", "wider", "keyword", ("mode", "wide")),),
    )
    source = CORE.replace("VALUE = 1", "extra = 1").replace("mode='mean'", "wide=1, mode=2")
    source = source.replace("(nn.Module)", "(nn.Parameter)").replace(
        "def forward(self, x): ...", ""
    )
    comparison = compared(source, mirrored=("", "core"), rules=rules, other="")
    assert defects(comparison) == ["base Layer"]
    assert comparison.modules["core"].absent == {"VALUE": "because"}
    assert comparison.modules["other"].absent == {"call": "no"}
    assert comparison.defects == ()


def test_rules_that_no_longer_hold_are_found(compared: Compare) -> None:
    rules = Rules(
        (
            Absent("core", "because", ("VALUE", "Layer.forward", "gone")),
            Absent("other", "no"),
            Absent("nowhere", "no"),
        ),
        (Added("core", "more", ("extra", "call")), Added("nowhere", "more", ("extra",))),
        (
            Different("core", "wider", "keyword", ("mode",)),
            Different("core", "wider", "gone", ("mode",)),
        ),
    )
    comparison = compared(rules=rules)
    assert defects(comparison) == [
        "stale VALUE",
        "stale keyword",
        "stale Layer.forward",
        "stale call",
        "stale extra",
    ]
    assert defects(comparison, "other") == ["stale other"]
    assert [one.name for one in comparison.defects] == [
        "core: gone",
        "nowhere: *",
        "nowhere: extra",
        "core: gone",
    ]
