"""`status`: who answers to flash_attn in this environment, and why."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from . import environment
from .environment import Place


def add(subparsers: Any) -> None:
    """Describe the command."""
    subparsers.add_parser(
        "status",
        help="say who answers to flash_attn here",
        description="Say what new interpreters of this environment find as flash_attn. The exit "
        "status is 0 where that is flash_attn_npu without being asked for, 1 where it is not.",
        allow_abbrev=False,
    )


def run(options: Namespace) -> int:
    """Print it."""
    place = Place.here()
    for line in environment.facts(place):
        print(line)
    return 0 if environment.activated(place) else 1
