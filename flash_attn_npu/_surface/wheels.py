"""What is fused with which torch_npu: the operators of twenty wheels, and what calls need of them.

`torch_npu.json` is operator -> schema -> versions of torch_npu, read out of the wheels; an operator
that a version is not listed under is absent from it.
"""

from __future__ import annotations

import json
from importlib import resources

import torch
from packaging.version import Version

from .._core.table.installed import ATTENTION, ROWWISE, Need
from .._version import OLDEST_TORCH_NPU

__all__ = ["SCHEMAS", "VERSIONS", "arguments", "groups", "table"]

SCHEMAS: dict[str, dict[str, list[str]]] = json.loads(
    (resources.files(__package__) / "torch_npu.json").read_text(encoding="utf-8")
)

VERSIONS = tuple(
    sorted(
        {v for schemas in SCHEMAS.values() for them in schemas.values() for v in them}, key=Version
    )
)
"""Of the wheels that were read, the oldest first."""

_HEAD = f"""\
## What is fused with which torch_npu

Arguments came to torch_npu's operators with post releases, so the installed operators are asked,
not their version. Printed from the schemas of {len(VERSIONS)} wheels; a test binds every call of
every kernel against each of them. torch_npu must be that of the torch at hand: its first three
numbers are torch's.

"""


def schema(version: str, operator: str) -> str | None:
    """The operator's schema in a version of torch_npu, None if it is absent there."""
    found = (text for text, where in SCHEMAS[operator].items() if version in where)
    return next(found, None)


def arguments(version: str, operator: str) -> tuple[str, ...]:
    """The names of an operator's arguments in a version, none if it is absent there."""
    text = schema(version, operator)
    if text is None:
        return ()
    return tuple(argument.name for argument in torch._C.parse_schema(text).arguments)


def groups() -> dict[tuple[str, ...], list[str]]:
    """The versions of each column of the table: what becomes of every need -> the versions."""
    found: dict[tuple[str, ...], list[str]] = {}
    for version in VERSIONS:
        outcomes = tuple(_outcome(version, need) for need in (*ATTENTION, *ROWWISE))
        found.setdefault(outcomes, []).append(version)
    return found


def table() -> str:
    """The section of compat_matrix.md, as text."""
    columns = groups()
    head = ["a call with", *(", ".join(versions) for versions in columns.values())]
    lines = [head, ["---"] * len(head)]
    for place, need in enumerate((*ATTENTION, *ROWWISE)):
        lines.append([need.feature, *(outcomes[place] for outcomes in columns)])
    return _HEAD + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _outcome(version: str, need: Need) -> str:
    if Version(version) < Version(OLDEST_TORCH_NPU):
        return f"composed: older than {OLDEST_TORCH_NPU}"
    if all(set(call[1:]).issubset(arguments(version, call[0])) for call in need.calls):
        return "fused"
    return need.otherwise or "composed"
