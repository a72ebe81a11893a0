"""`matrix`: compat_matrix.md, as the installed package has it."""

from __future__ import annotations

from argparse import Namespace
from typing import Any


def add(subparsers: Any) -> None:
    """Describe the command."""
    subparsers.add_parser(
        "matrix",
        help="print what is fused and what is not (compat_matrix.md)",
        description="Print the compatibility matrix of this version.",
        allow_abbrev=False,
    )


def run(options: Namespace) -> int:
    """Print the matrix."""
    from .starting import complete

    complete()
    from .._surface.matrix import matrix

    print(matrix(), end="")
    return 0
