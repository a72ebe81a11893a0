"""`torch.ops.flash_attn` while installed: our operators under the name clients write.

Nothing is registered in upstream's namespace: that would break whoever registers it next. What
somebody else registers there comes first.
"""

from __future__ import annotations

from typing import Any

import torch

from .._core.attention.records import NAMESPACE

__all__ = ["insert", "remove"]

ALIAS = "flash_attn"


class _Either(type(getattr(torch.ops, NAMESPACE))):  # type: ignore[misc]
    """A namespace of operators: those of `flash_attn`, and behind them ours."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):
                raise
            return getattr(getattr(torch.ops, NAMESPACE), name)


def insert() -> None:
    """Answer to `torch.ops.flash_attn`."""
    if not isinstance(vars(torch.ops).get(ALIAS), _Either):
        # an attribute of its own hides what torch would make up for the name
        vars(torch.ops)[ALIAS] = _Either(ALIAS)


def remove() -> None:
    """Leave the name to torch again."""
    if isinstance(vars(torch.ops).get(ALIAS), _Either):
        del vars(torch.ops)[ALIAS]
