"""What is fused with which torch_npu: the operators of twenty wheels, and what calls need of them.

The schemas, read out of the wheels, are those of `ground.absent`.
"""

from __future__ import annotations

from packaging.version import Version

from .._core.ground.absent import arguments, schema, schemas, versions
from .._core.table.installed import NEEDS, Need
from .._version import OLDEST_TORCH_NPU

__all__ = ["arguments", "groups", "schema", "schemas", "table", "versions"]

_HEAD = f"""\
## What is fused with which torch_npu

Arguments came to torch_npu's operators with post releases, so the installed operators are asked,
not their version. Printed from the schemas of {len(versions())} wheels; a test binds every call of
every kernel against each of them. torch_npu must be that of the torch at hand: its first three
numbers are torch's.

"""


def groups() -> dict[tuple[str, ...], list[str]]:
    """The versions of each column of the table: what becomes of every need -> the versions."""
    found: dict[tuple[str, ...], list[str]] = {}
    for version in versions():
        outcomes = tuple(_outcome(version, need) for need in NEEDS)
        found.setdefault(outcomes, []).append(version)
    return found


def table() -> str:
    """The section of compat_matrix.md, as text."""
    columns = groups()
    head = ["a call with", *(", ".join(versions) for versions in columns.values())]
    lines = [head, ["---"] * len(head)]
    for place, need in enumerate(NEEDS):
        lines.append([need.feature, *(outcomes[place] for outcomes in columns)])
    return _HEAD + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _outcome(version: str, need: Need) -> str:
    if Version(version) < Version(OLDEST_TORCH_NPU):
        return f"composed: older than {OLDEST_TORCH_NPU}"
    if all(set(call[1:]).issubset(arguments(version, call[0])) for call in need.calls):
        return "fused"
    return need.otherwise or "composed"
