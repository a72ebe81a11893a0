"""`doctor`: one page about this environment, to paste into an issue."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any

_EPILOG = """\
Exit status 0 if attention would be fused here, else 1. In a program that has imported things
already, `print(flash_attn_npu.doctor())` gives the same page about that process.

examples:
  %(prog)s
  %(prog)s --json | jq .clashes
"""


def add(subparsers: Any) -> None:
    """Describe the command."""
    from argparse import RawDescriptionHelpFormatter

    parser = subparsers.add_parser(
        "doctor",
        help="say what is installed, what clashes, and whether attention would be fused",
        description="One page about this environment, to paste into an issue.",
        epilog=_EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="the same as data")
    parser.add_argument(
        "--simulate", action="store_true", help="look at a simulated Ascend instead"
    )


def run(options: Namespace) -> int:
    """Print the page."""
    from .._diagnosis.page import doctor

    page = doctor(options.simulate)
    print(json.dumps(page.as_json(), indent=1) if options.json else page)
    return 0 if page.fused else 1
