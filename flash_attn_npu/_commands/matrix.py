"""`matrix`: compat_matrix.md, as the installed package has it, and reports that go into it."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

from ..errors import ArgumentError

_EPILOG = """\
examples:
  %(prog)s                      print the matrix
  %(prog)s --add report.json    check a report of validate, and keep it
"""


def add(subparsers: Any) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "matrix",
        help="print what is fused and what is not; add a report",
        description="Print the compatibility matrix of this version, or add a report to it.",
        epilog=_EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--add", metavar="FILE", help="check a report of validate, and keep it with the package"
    )


def run(options: Namespace) -> int:
    """Print the matrix, or add a report."""
    from .starting import complete

    # the tables take torch, and no card; without CANN torch_npu would end its import
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    try:
        complete()
    except ArgumentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.add:
        return _add(Path(options.add))
    from .._surface.matrix import matrix

    print(matrix(), end="")
    return 0


def _add(file: Path) -> int:
    from .._core.ground import confirmed
    from .._core.table import choice
    from .._validation.report import faults

    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return _refused(file, [str(error)])
    found = faults(report, choice.ROWS, choice.KERNELS)
    target = Path(str(confirmed.FOLDER)) / f"{_name(report)}.json" if not found else None
    if target is None:
        return _refused(file, found)
    if target.exists() and target.read_bytes() != file.read_bytes():
        older = json.loads(target.read_text(encoding="utf-8"))
        if len(older["cases"]) > len(report["cases"]):
            return _refused(file, [f"{target.name} is there, and holds more cases"])
    try:
        shutil.copyfile(file, target)
    except OSError as error:
        return _refused(file, [str(error)])
    statuses = [case["status"] for case in report["cases"]]
    print(f"added as {target.name}: {statuses.count('right')} of {len(statuses)} cases right")
    if report["simulated"] or report["machine"]["device"] != "npu":
        print("it was not made on a card, and confirms nothing")
    else:
        print("print compat_matrix.md anew, and send both files")
    return 0


def _name(report: dict[str, Any]) -> str:
    machine = report["machine"]
    kind = "simulated-" if report["simulated"] else ""
    parts = (machine["soc"] or machine["device"], f"cann{machine['cann'] or '0'}")
    torch_npu = machine["torch_npu"] or f"torch{machine['torch']}"
    return kind + re.sub(r"[^\w.-]+", "_", "-".join((*parts, f"torch_npu{torch_npu}")))


def _refused(file: Path, found: list[str]) -> int:
    print(f"error: {file} is not added:", file=sys.stderr)
    for fault in found[:20]:
        print(f"  {fault}", file=sys.stderr)
    return 1
