"""What type checkers are told of the attention functions is what the functions are."""

from __future__ import annotations

import ast
import inspect
import runpy
from pathlib import Path

import pytest

import flash_attn_npu
from flash_attn_npu import _overloads, flash_attn_interface

CHECKED = Path(__file__).parents[1] / "checked"
TREE = ast.parse(Path(_overloads.__file__).read_text())
CLASSES = {
    node.body[0].value.value.partition("`")[2].partition("`")[0]: node
    for node in TREE.body
    if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
}
FORMS = {"return_attn_probs", "return_softmax_lse"}


def parameters(node: ast.FunctionDef) -> list[tuple[str, object]]:
    """Names and defaults without self; the form of the answer has the function's own default."""
    given = node.args
    names = [argument.arg for argument in given.args]
    defaults = [None] * (len(names) - len(given.defaults)) + given.defaults
    pairs = [*zip(names, defaults, strict=True)]
    pairs += [*zip((a.arg for a in given.kwonlyargs), given.kw_defaults, strict=True)]
    return [
        (
            name,
            False
            if name in FORMS
            else inspect.Parameter.empty
            if x is None
            else ast.literal_eval(x),
        )
        for name, x in pairs
        if name != "self"
    ]


@pytest.mark.parametrize("name", CLASSES)
def test_overloads_are_the_functions(name: str) -> None:
    signature = inspect.signature(getattr(flash_attn_interface, name))
    expected = [(p.name, p.default) for p in signature.parameters.values()]
    overloads = [node for node in CLASSES[name].body if isinstance(node, ast.FunctionDef)]
    assert len(overloads) == 3
    for node in overloads:
        assert parameters(node) == expected


def test_every_function_whose_answer_has_two_forms_is_told() -> None:
    two = {
        name
        for name in flash_attn_interface.__all__
        if name.startswith("flash_attn_")
        and inspect.isfunction(function := getattr(flash_attn_interface, name))
        and FORMS & set(inspect.signature(function).parameters)
    }
    assert two == set(CLASSES)


def test_nothing_stands_between_a_caller_and_the_function() -> None:
    for name in CLASSES:
        function = getattr(flash_attn_interface, name)
        assert inspect.isfunction(function)
        assert function.__module__ == "flash_attn_npu.flash_attn_interface"
        assert not hasattr(function, "__wrapped__")


@pytest.mark.parametrize("script", ["user_script", "unmodified_client"])
def test_what_is_checked_runs(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    with flash_attn_npu.install():
        runpy.run_path(str(CHECKED / f"{script}.py"), run_name="__main__")
    assert capsys.readouterr().out
