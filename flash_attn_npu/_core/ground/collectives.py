"""What ranks do together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work

__all__ = ["gather_rows"]


def gather_rows(
    rows: Tensor, process_group: ProcessGroup | None, async_op: bool = False
) -> tuple[Tensor, Work | None]:
    """(the ranks' tensors (n, ...) one after the other, a handle); no gradient flows."""
    # torch 2.13 deprecates the name that it had before
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    ranks = dist.get_world_size(process_group)
    gathered = rows.new_empty((rows.shape[0] * ranks, *rows.shape[1:]))
    source = rows.detach().contiguous()
    return gathered, gather(gathered, source, group=process_group, async_op=async_op)
