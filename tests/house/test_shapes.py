"""The shape of functions: what a call carries is a value with a name, not a list of arguments."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "flash_attn_npu"
MOST = 8
CORE = sorted(str(path.relative_to(PACKAGE)) for path in (PACKAGE / "_core").rglob("*.py"))
CONTRACTS = {
    ("_core/attention/mindie.py", "attention_forward_varlen"): "MindIE-SD 3.1",
    ("_core/rowwise/layer_norm_function.py", "LayerNormFn.forward"): "flash-attention 2.8",
    ("_core/rowwise/norm_linear.py", "LayerNormLinearFn.forward"): "flash-attention 2.8",
    ("_core/rowwise/losses.py", "CrossEntropyLoss.forward"): "flash-attention 2.8",
    ("_core/rowwise/dropout_norms.py", "DropoutAddLayerNormFn.forward"): "flash-attention 2.8",
    ("_core/rowwise/dropout_norms.py", "DropoutAddLayerNormSubsetFn.forward"): (
        "flash-attention 2.8"
    ),
    ("_core/rowwise/dropout_norms.py", "DropoutAddLayerNormParallelResidualFn.forward"): (
        "flash-attention 2.8"
    ),
}
"""Functions below the door whose signatures are somebody else's, and whose."""


def functions(file: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    """(qualified name, node) of every function of a file."""

    def visit(node: ast.AST, within: str) -> Iterator[tuple[str, ast.FunctionDef]]:
        for child in ast.iter_child_nodes(node):
            name = within
            if isinstance(child, (ast.ClassDef, ast.FunctionDef)):
                name = f"{within}.{child.name}".lstrip(".")
            if isinstance(child, ast.FunctionDef):
                yield name, child
            yield from visit(child, name)

    yield from visit(ast.parse((PACKAGE / file).read_text()), "")


def parameters(function: ast.FunctionDef) -> int:
    given = function.args
    return len([*given.posonlyargs, *given.args, *given.kwonlyargs])


@pytest.mark.parametrize("file", CORE)
def test_few_parameters_below_the_door(file: str) -> None:
    many = {name: parameters(node) for name, node in functions(file) if parameters(node) > MOST}
    contracts = {name for where, name in CONTRACTS if where == file}
    assert set(many) == contracts, many


@pytest.mark.parametrize("file", CORE)
def test_no_call_passes_many_arguments_by_position(file: str) -> None:
    for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
        if isinstance(node, ast.Call):
            given = [x for x in node.args if not isinstance(x, ast.Starred)]
            told = f"{file}:{node.lineno}: {len(given)} arguments by position"
            contract = "mindie" in file or "apply" in ast.unparse(node.func)
            assert contract or len(given) <= MOST, told
