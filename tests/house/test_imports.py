"""The arrows of the house: who may import whom. Read off the source, so nothing is run.

A file without an underscore below `flash_attn_npu` is upstream's (the mirror); `_core` is one
column, in which imports point down only.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "flash_attn_npu"
FLOORS = ("attention", "rowwise", "table", "verification", "kernels", "problems", "ground")
"""Of `_core`, from the top: a file imports from its own floor and from those below.

`attention` rotates by `rowwise`, which knows nothing of it."""
NPU = (
    "_core/kernels/ascend/",
    "_core/ground/chip.py",
    "_diagnosis/probe.py",
    "_integrations/",
    "_virtual_ascend/",
)
CARD = "_virtual_ascend/"
COMMANDS = ("__main__.py", "_commands/")
ALONE = ("_startup.py", "_packaging/")
"""Run without the package: at a start of Python, and to build it."""
FILES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(file: str) -> Iterator[str]:
    """Dotted names that a file imports, late ones too; ours relative to the package."""
    path = FILES[file]
    package = ["flash_attn_npu", *Path(file).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                yield f"{module}.{alias.name}".removeprefix("flash_attn_npu.")


def ours(file: str) -> Iterator[tuple[str, str]]:
    """(the dotted name, the file it lies in) of everything of ours that a file imports."""
    for name in imported(file):
        parts = name.split(".")
        for length in (len(parts), len(parts) - 1):
            stem = "/".join(parts[:length])
            for target in (f"{stem}.py", f"{stem}/__init__.py"):
                if stem and target in FILES:
                    yield name, target
                    break
            else:
                continue
            break


def floor(file: str) -> int | None:
    """Which floor of `_core` a file lies on, 0 at the top; None for other files."""
    parts = Path(file).parts
    return FLOORS.index(parts[1]) if parts[0] == "_core" and len(parts) > 2 else None


def mirrored(file: str) -> bool:
    """Whether a file has upstream's name, or is a helper that lies beside such files."""
    apart = (
        "_core/",
        "_activation/",
        "_commands/",
        "_diagnosis/",
        "_integrations/",
        "_packaging/",
        "_surface/",
        "_validation/",
        "__main__.py",
        CARD,
    )
    return not file.startswith(apart)


ABOVE = ("errors.py", "_startup.py", "_version.py")


@pytest.mark.parametrize("file", [file for file in FILES if floor(file) is not None])
def test_the_core_imports_downwards(file: str) -> None:
    for name, target in ours(file):
        if target in ABOVE:
            continue
        below = floor(target)
        assert below is not None, f"{file} imports {name}, which is not of the core"
        assert below >= floor(file), f"{file} imports {name}, which lies above it"


@pytest.mark.parametrize("file", [file for file in FILES if mirrored(file)])
def test_the_mirror_imports_neither_kernels_nor_tables(file: str) -> None:
    for name, target in ours(file):
        assert not target.startswith(("_core/kernels/", "_core/table/")), f"{file} imports {name}"


@pytest.mark.parametrize("file", FILES)
def test_torch_npu_stays_where_it_is_called(file: str) -> None:
    names = [name for name in imported(file) if name.split(".")[0] == "torch_npu"]
    assert not names or file.startswith(NPU), f"{file} imports {names}"


@pytest.mark.parametrize("file", FILES)
def test_the_simulated_card_and_we_do_not_know_each_other(file: str) -> None:
    """It stands where CANN stands: only the command line, which starts it, names it."""
    for name, target in ours(file):
        if file.startswith(CARD):
            assert target.startswith(CARD), f"{file} imports {name}"
        elif not file.startswith(COMMANDS):
            assert not target.startswith(CARD), f"{file} imports {name}"


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith(ALONE)])
def test_what_runs_without_the_package_imports_nothing_of_it(file: str) -> None:
    assert not [name for name, _ in ours(file)]
    assert not [name for name in imported(file) if name.startswith("flash_attn_npu")]


def test_no_circles() -> None:
    graph = {file: {target for _, target in ours(file) if target != file} for file in FILES}
    done: set[str] = set()

    def visit(file: str, way: tuple[str, ...]) -> None:
        assert file not in way, " -> ".join([*way[way.index(file) :], file])
        if file not in done:
            for target in sorted(graph[file]):
                if not target.endswith("__init__.py"):
                    visit(target, (*way, file))
            done.add(file)

    for file in sorted(graph):
        visit(file, ())
