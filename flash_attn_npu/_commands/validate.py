"""`validate`: run every row of the tables on this device against float64, and write a report."""

from __future__ import annotations

import sys
import time
from argparse import Namespace, RawDescriptionHelpFormatter
from importlib import metadata
from pathlib import Path
from typing import Any

from .._startup import PROVIDER
from ..errors import ArgumentError
from .outputs import writable

_EPILOG = """\
Exit status 0 if everything asked was right, 1 if something was wrong, 2 if nothing could be asked,
130 after Ctrl-C, which keeps what was done: --resume goes on from there.

examples:
  %(prog)s --quick -o report.json          two minutes on a card
  %(prog)s --full -o report.json           twenty
  %(prog)s --full -o report.json --resume  what is left of them
"""


def add(subparsers: Any) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "validate",
        help="compare every row of the tables with float64 on this device, and write a report",
        description="Ask this device every row of the tables and the open questions, through the\n"
        "public functions, and compare with float64 on the host. The report holds no personal\n"
        "data.",
        epilog=_EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help="one case for each row (the default)")
    mode.add_argument("--full", action="store_true", help="more sizes, and what takes long")
    parser.add_argument("-o", "--output", metavar="FILE", help="where to write the report")
    parser.add_argument("--resume", action="store_true", help="keep what FILE holds, and go on")
    parser.add_argument("--only", metavar="TEXT", default="", help="cases with TEXT in their names")
    parser.add_argument("--simulate", action="store_true", help="ask a simulated Ascend instead")


def run(options: Namespace) -> int:
    """Ask, and say how it went."""
    from .._validation.report import MismatchError, Report, UnwrittenError
    from .._validation.session import NoCaseError, NoWorkerError
    from .._validation.session import run as ask

    mode = "full" if options.full else "quick"
    if options.resume and options.output is None:
        return _failed("--resume needs the file to go on with: -o FILE")
    try:
        named = options.output is not None
        file = writable("-o/--output", options.output, replaced=True) if named else None
        if options.resume and file is not None and file.exists():
            report = Report.read(file)
            report.mode, report.simulated = mode, options.simulate
        else:
            report = Report(_version(), mode, options.simulate)
        ask(report, file, _Progress(len(report.cases)), options.only)
    except (ArgumentError, MismatchError, NoCaseError, UnwrittenError) as error:
        return _failed(str(error))
    except (NoWorkerError, OSError) as error:
        return _failed(f"{error}; see `flash-attn-npu doctor`")
    except KeyboardInterrupt:
        kept = f" in {file}; go on with --resume" if file else ""
        print(f"interrupted: {len(report.cases)} cases are kept{kept}", file=sys.stderr)
        return 130
    print(_summary(report, file))
    bad = [case for case in report.cases if case["status"] in ("wrong", "crash", "error")]
    return 1 if bad else 0


class _Progress:
    """A line on stderr for each case."""

    def __init__(self, done: int) -> None:
        self._done = done
        self._last = time.monotonic()

    def __call__(self, case: dict[str, Any], total: int) -> None:
        self._done += 1
        now = time.monotonic()
        told = f"[{self._done:3}/{total}] {case['status']:<7} {case['name']}"
        served = f" ({case['kernel']})" if case["kernel"] else ""
        note = f": {case['note']}" if case.get("note") else ""
        print(f"{told}{served} {now - self._last:.1f} s{note}", file=sys.stderr, flush=True)
        self._last = now


def _summary(report: Any, file: Path | None) -> str:
    machine = report.machine
    where = " ".join(filter(None, (machine["soc"], "SIMULATED" if report.simulated else "")))
    statuses = [case["status"] for case in report.cases]
    counts = ", ".join(f"{statuses.count(s)} {s}" for s in dict.fromkeys(statuses))
    lines = [f"{where or machine['device']}: {counts or 'nothing asked'}"]
    for statement, holds in report.as_json()["answers"].items():
        lines.append(f"  {'yes' if holds else 'no ':<4} {statement}")
    for case in report.cases:
        if case["status"] in ("wrong", "crash", "error"):
            lines.append(f"  {case['status']}: {case['name']} ({case['kernel'] or 'unknown'})")
    if file is not None:
        lines.append(f"written to {file}; what to do with it: docs/your-card.md")
    return "\n".join(lines)


def _failed(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _version() -> str:
    try:
        return metadata.version(PROVIDER)
    except metadata.PackageNotFoundError:
        return "unknown"
