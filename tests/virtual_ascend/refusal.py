"""The exception for what a card would refuse. Imports nothing: it exists before torch does."""

from __future__ import annotations


class CardRefusal(RuntimeError):  # noqa: N818
    """What the tiling code of a card's operators refuses; the message quotes the rule."""


def require(rule_holds: bool, rule: str) -> None:
    """Refuse the call unless the rule, quoted in the message, holds."""
    if not rule_holds:
        raise CardRefusal(rule)
