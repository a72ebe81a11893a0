"""`torch.ops.flash_attn` while installed: our operators under the name clients write.

Nothing is registered in upstream's namespace: that would break whoever registers it next.
"""

from __future__ import annotations

import torch

from ..attention.ops import NAMESPACE

__all__ = ["insert", "remove"]

ALIAS = "flash_attn"


def insert() -> None:
    """Answer to `torch.ops.flash_attn`, unless somebody has registered operators there."""
    if not _registered():
        # an attribute of its own hides what torch would make up for the name
        vars(torch.ops)[ALIAS] = getattr(torch.ops, NAMESPACE)


def remove() -> None:
    """Leave the name to torch again."""
    if vars(torch.ops).get(ALIAS) is getattr(torch.ops, NAMESPACE):
        del vars(torch.ops)[ALIAS]


def _registered() -> bool:
    return any(name.startswith(f"{ALIAS}::") for name in torch._C._dispatch_get_all_op_names())
