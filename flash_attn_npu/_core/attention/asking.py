"""From what is asked to a plan: validated once for each distinct `Ask`, and remembered."""

from __future__ import annotations

from typing import Any

from ..problems.ask import Ask
from ..problems.validation import describe
from ..table.choice import Plan, plan, recall

__all__ = ["make_plan", "new_plan"]


def make_plan(ask: Ask) -> Plan:
    """The plan for an `Ask`, whose options may be as they came."""
    try:
        return recall(ask) or new_plan(ask)
    except TypeError:
        # an option that cannot be a key: the checks accept it or name it
        return new_plan(ask)


def new_plan(key: tuple[Any, ...]) -> Plan:
    """The plan for an Ask, or a plain tuple of its fields, that is not remembered."""
    ask = Ask.of(key)
    if Ask.is_key(key):
        return plan(describe(ask), key)
    # options that cannot be a key (lists, tensors) were made plain
    return recall(ask) or plan(describe(ask), ask)
