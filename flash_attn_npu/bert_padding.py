"""Mirror of `flash_attn.bert_padding`: between padded batches and packed sequences.

The conventions are those of 2.8: `unpad_input` returns five values. Everything is composed of
differentiable torch operations.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["index_first_axis", "index_put_first_axis", "pad_input", "unpad_input"]


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Rows `indices` of input (rows, ...): (len(indices), ...)."""
    return input[indices]


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """(first_axis_dim, ...) with values at the rows `indices` and zeros elsewhere."""
    whole = values.new_zeros(first_axis_dim, *values.shape[1:])
    return whole.index_copy(0, indices.long(), values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Pack the tokens of a padded batch.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), bool or int, 1 for a token.
        unused_mask: (batch, seqlen), 1 for a row that is kept but holds no token.

    Returns:
        packed (total, ...), where total counts both masks; indices (total,) of the packed rows
        in the flattened batch; cu_seqlens (batch + 1,) int32; max_seqlen, int; seqused (batch,)
        int32, which counts attention_mask alone.
    """
    every = attention_mask if unused_mask is None else attention_mask + unused_mask
    seqlens = every.sum(dim=-1, dtype=torch.int32)
    seqused = attention_mask.sum(dim=-1, dtype=torch.int32)
    indices = torch.nonzero(every.flatten(), as_tuple=False).flatten()
    max_seqlen = int(seqlens.max()) if seqlens.numel() else 0
    cu_seqlens = pad(torch.cumsum(seqlens, dim=0, dtype=torch.int32), (1, 0))
    packed = index_first_axis(hidden_states.flatten(0, 1), indices)
    return packed, indices, cu_seqlens, max_seqlen, seqused


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Undo `unpad_input`: (batch, seqlen, ...) with zeros where there was padding."""
    whole = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return whole.view(batch, seqlen, *whole.shape[1:])
