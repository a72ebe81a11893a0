"""From what is asked to a plan: validated once for each distinct `Ask`, and remembered."""

from __future__ import annotations

from collections.abc import Hashable

from ..problems.ask import Ask
from ..problems.validation import describe
from ..table.choice import Plan, plan, recall

__all__ = ["make_plan", "new_plan"]


def make_plan(ask: Ask) -> Plan:
    """The plan for an `Ask`, whose options may be as they came."""
    return (recall(ask) if ask.plain else None) or new_plan(ask, ask)


def new_plan(ask: Ask, key: Hashable) -> Plan:
    """The plan for an `Ask` that is not remembered under this key."""
    checked = ask.checked()
    if ask.plain:
        return plan(describe(checked), key)
    # options that cannot be a key (lists, tensors) were made plain
    return recall(checked) or plan(describe(checked), checked)
