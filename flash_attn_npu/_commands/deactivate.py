"""`deactivate`: undo `activate`, to the byte."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from . import environment
from .environment import Place


def add(subparsers: Any) -> None:
    """Describe the command."""
    subparsers.add_parser(
        "deactivate",
        help="undo activate",
        description="Take away what `activate` placed in this environment.",
        allow_abbrev=False,
    )


def run(options: Namespace) -> int:
    """Deactivate, and say what was done."""
    place = Place.here()
    return environment.reported(
        lambda: environment.deactivate(place),
        done=f"deactivated: {place.site} is as it was",
        before=f"nothing to do: {place.site} is not activated",
    )
