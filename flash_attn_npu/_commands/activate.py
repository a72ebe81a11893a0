"""`activate`: let this environment serve flash_attn, without a word in any program."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from . import environment
from .environment import Place


def add(subparsers: Any) -> None:
    """Describe the command."""
    subparsers.add_parser(
        "activate",
        help="let this environment serve flash_attn for good",
        description="Let every Python of this environment serve flash_attn, and tell pip that "
        "flash-attn is installed. `deactivate`, or `pip uninstall flash-attn`, undoes it.",
        allow_abbrev=False,
    )


def run(options: Namespace) -> int:
    """Activate, and say what was done."""
    place = Place.here()
    return environment.reported(
        lambda: environment.activate(place),
        done=f"activated: import flash_attn gives flash_attn_npu in {place.site}",
        before=f"nothing to do: {place.site} is activated",
    )
