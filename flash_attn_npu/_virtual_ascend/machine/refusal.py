"""The exception for what a card would refuse. Imports nothing: it exists before torch does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class CardRefusal(RuntimeError):  # noqa: N818
    """What the tiling code of a card's operators refuses; the message quotes the rule."""


def require(rule_holds: bool, rule: str) -> None:
    """Refuse the call unless the rule, quoted in the message, holds."""
    if not rule_holds:
        raise CardRefusal(rule)


def not_simulated(name: str) -> Callable[..., Any]:
    """A kernel for an operator whose numbers nobody here computes."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{name} has no simulated arithmetic")

    return kernel
