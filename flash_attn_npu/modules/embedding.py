"""Mirror of `flash_attn.modules.embedding`: embeddings of words, positions and token types.

Over a process group the vocabulary is split over the ranks, and the embeddings of positions by
columns; both sums over the ranks become one. Without one they run on one process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .._core.ground.dense_arguments import LARGEST, require_dense, whole
from ..errors import ArgumentError
from ..ops._dense_steps import place
from ..utils.distributed import all_reduce, reduce_scatter

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "BertEmbeddings",
    "ColumnParallelEmbedding",
    "GPT2Embeddings",
    "ParallelGPT2Embeddings",
    "VocabParallelEmbedding",
    "all_reduce",
    "reduce_scatter",
]


class GPT2Embeddings(nn.Module):
    """The sum of the embeddings of words and of positions.

    Args:
        max_position_embeddings: 0 or less for none of positions.
        padding_idx: as in nn.Embedding, for words.
        word_embed_proj_dim: the width of the embeddings of words, which `project_in` brings to
            embed_dim; embed_dim, and no projection, if None.

    Contract: flash-attention 2.8, `GPT2Embeddings`.
    """

    def __init__(
        self,
        embed_dim: int,
        vocab_size: int,
        max_position_embeddings: int,
        padding_idx: int | None = None,
        word_embed_proj_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(embed_dim, vocab_size, max_position_embeddings)
        width = embed_dim if word_embed_proj_dim is None else word_embed_proj_dim
        self.word_embeddings = nn.Embedding(
            vocab_size, width, padding_idx=padding_idx, device=device, dtype=dtype
        )
        self.project_in = (
            None
            if word_embed_proj_dim is None
            else nn.Linear(width, embed_dim, bias=False, device=device, dtype=dtype)
        )
        self.max_position_embeddings = max_position_embeddings
        if max_position_embeddings > 0:
            self.position_embeddings = nn.Embedding(
                max_position_embeddings, embed_dim, device=device, dtype=dtype
            )

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Embed.

        Args:
            input_ids: (batch, seqlen).
            position_ids: (batch, seqlen) or (seqlen,); 0, 1, 2, ... if None.

        Returns:
            (batch, seqlen, embed_dim).

        Raises:
            ArgumentError: input_ids are not of two dimensions.
        """
        _check_ids(input_ids)
        embeddings: Tensor = self.word_embeddings(input_ids)
        if self.project_in is not None:
            embeddings = self.project_in(embeddings)
        if self.max_position_embeddings > 0:
            embeddings = embeddings + self.position_embeddings(_positions(input_ids, position_ids))
        return embeddings


class BertEmbeddings(nn.Module):
    """The sum of the embeddings of words, of positions, and of token types.

    Args:
        max_position_embeddings: 0 or less for none of positions.
        type_vocab_size: 0 or less for none of token types.
        padding_idx: as in nn.Embedding, for words.

    Contract: flash-attention 2.8, `BertEmbeddings`.
    """

    def __init__(
        self,
        embed_dim: int,
        vocab_size: int,
        max_position_embeddings: int,
        type_vocab_size: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(embed_dim, vocab_size, max_position_embeddings)
        whole("type_vocab_size", type_vocab_size, -LARGEST)
        self.word_embeddings = nn.Embedding(
            vocab_size, embed_dim, padding_idx=padding_idx, device=device, dtype=dtype
        )
        self.max_position_embeddings = max_position_embeddings
        self.type_vocab_size = type_vocab_size
        if max_position_embeddings > 0:
            self.position_embeddings = nn.Embedding(
                max_position_embeddings, embed_dim, device=device, dtype=dtype
            )
        if type_vocab_size > 0:
            self.token_type_embeddings = nn.Embedding(
                type_vocab_size, embed_dim, device=device, dtype=dtype
            )

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Embed.

        Args:
            input_ids: (batch, seqlen).
            position_ids: (batch, seqlen) or (seqlen,); 0, 1, 2, ... if None.
            token_type_ids: (batch, seqlen) or (seqlen,); zeros if None.

        Returns:
            (batch, seqlen, embed_dim).

        Raises:
            ArgumentError: input_ids are not of two dimensions.
        """
        _check_ids(input_ids)
        embeddings: Tensor = self.word_embeddings(input_ids)
        if self.max_position_embeddings > 0:
            embeddings = embeddings + self.position_embeddings(_positions(input_ids, position_ids))
        if self.type_vocab_size > 0:
            if token_type_ids is None:
                token_type_ids = input_ids.new_zeros(input_ids.shape[1], dtype=torch.long)
            embeddings = embeddings + self.token_type_embeddings(token_type_ids)
        return embeddings


class VocabParallelEmbedding(nn.Embedding):
    """This rank's part of a vocabulary: rows of zeros for the words of other ranks.

    The sum over the ranks, which is left to the caller, is the embedding.

    Args:
        num_embeddings: of the whole vocabulary.
        args, kwargs: as in nn.Embedding.
        process_group: the ranks that share it; None for one process.
        padding_idx: as in nn.Embedding; only without a process_group.

    Raises:
        ArgumentError: with a process_group, a padding_idx, or num_embeddings that it does not
            divide.

    Contract: flash-attention 2.8, `VocabParallelEmbedding`.
    """

    def __init__(
        self,
        num_embeddings: int,
        *args: Any,
        process_group: ProcessGroup | None = None,
        padding_idx: int | None = None,
        **kwargs: Any,
    ) -> None:
        if process_group is not None and padding_idx is not None:
            raise ArgumentError(
                "padding_idx", padding_idx, "None with a process_group", "leave padding_idx out"
            )
        held = _share("num_embeddings", num_embeddings, process_group)
        super().__init__(held, *args, padding_idx=padding_idx, **kwargs)  # type: ignore[misc]
        self.process_group = process_group

    def forward(self, input: Tensor) -> Tensor:
        """input, any shape, of ids of the whole vocabulary: (*input.shape, embedding_dim)."""
        if self.process_group is None:
            return super().forward(input)
        rank, _ = place(self.process_group)
        ids = input - rank * self.num_embeddings
        foreign = (ids < 0) | (ids >= self.num_embeddings)
        rows = super().forward(ids.masked_fill(foreign, 0))
        return rows.masked_fill(foreign[..., None], 0.0)


class ColumnParallelEmbedding(nn.Embedding):
    """This rank's columns of every embedding.

    Args:
        embedding_dim: of the whole embedding; `self.embedding_dim` is what this rank holds.
        args, kwargs: as in nn.Embedding.
        process_group: the ranks that share it; None for one process.

    Raises:
        ArgumentError: the process_group does not divide embedding_dim.

    Contract: flash-attention 2.8, `ColumnParallelEmbedding`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *args: Any,
        process_group: ProcessGroup | None = None,
        **kwargs: Any,
    ) -> None:
        held = _share("embedding_dim", embedding_dim, process_group)
        super().__init__(num_embeddings, held, *args, **kwargs)
        self.process_group = process_group


class ParallelGPT2Embeddings(nn.Module):
    """`GPT2Embeddings` over a process group.

    Args:
        process_group: the ranks that share it; None for one process.
        padding_idx: as in nn.Embedding, for words; only without a process_group.
        sequence_parallel: whether a rank returns its part of the first dimension, or all of it.
        others: as in `GPT2Embeddings`; sizes are those of the whole layer.

    Raises:
        ArgumentError: the process_group divides vocab_size or embed_dim not, or a padding_idx
            comes with it.

    Contract: flash-attention 2.8, `ParallelGPT2Embeddings`.
    """

    def __init__(
        self,
        embed_dim: int,
        vocab_size: int,
        max_position_embeddings: int,
        process_group: ProcessGroup | None,
        padding_idx: int | None = None,
        sequence_parallel: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(embed_dim, vocab_size, max_position_embeddings)
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel
        self.word_embeddings = VocabParallelEmbedding(
            vocab_size,
            embed_dim,
            padding_idx=padding_idx,
            process_group=process_group,
            device=device,
            dtype=dtype,
        )
        self.max_position_embeddings = max_position_embeddings
        if max_position_embeddings > 0:
            self.position_embeddings = ColumnParallelEmbedding(
                max_position_embeddings,
                embed_dim,
                process_group=process_group,
                device=device,
                dtype=dtype,
            )

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        combine_batch_seqlen_dim: bool = False,
    ) -> Tensor:
        """Embed.

        Args:
            input_ids: (batch, seqlen), the same in every rank.
            position_ids: (batch, seqlen) or (seqlen,); 0, 1, 2, ... if None.
            combine_batch_seqlen_dim: flatten (batch, seqlen), before it is scattered.

        Returns:
            (batch, seqlen, embed_dim) or (batch * seqlen, embed_dim); with sequence_parallel this
            rank's part of the first dimension.

        Raises:
            ArgumentError: input_ids are not of two dimensions, or the ranks cannot share the
                first dimension.
        """
        _check_ids(input_ids)
        rank, world_size = place(self.process_group)
        embeddings: Tensor = self.word_embeddings(input_ids)
        if self.max_position_embeddings > 0:
            columns = self.position_embeddings(_positions(input_ids, position_ids))
            held = columns.shape[-1]
            embeddings = embeddings + pad(columns, (rank * held, (world_size - 1 - rank) * held))
        if combine_batch_seqlen_dim:
            embeddings = embeddings.flatten(0, 1)
        if self.process_group is None:
            return embeddings
        reduce = reduce_scatter if self.sequence_parallel else all_reduce
        total: Tensor = reduce(embeddings, self.process_group)  # type: ignore[no-untyped-call]
        return total


def _positions(input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
    if position_ids is not None:
        return position_ids
    return torch.arange(input_ids.shape[1], dtype=torch.long, device=input_ids.device)


def _check_ids(input_ids: Tensor) -> None:
    require_dense(input_ids=input_ids)
    if input_ids.dim() != 2:
        raise ArgumentError(
            "input_ids",
            f"shape {tuple(input_ids.shape)}",
            "(batch, seqlen)",
            "pass input_ids[None] for one sequence",
        )


def _check_sizes(embed_dim: int, vocab_size: int, max_position_embeddings: int) -> None:
    whole("embed_dim", embed_dim)
    whole("vocab_size", vocab_size)
    whole("max_position_embeddings", max_position_embeddings, -LARGEST)


def _share(argument: str, size: int, process_group: ProcessGroup | None) -> int:
    """How many of an embedding's rows or columns each rank holds."""
    size = whole(argument, size, 1)
    _, world_size = place(process_group)
    if size % world_size:
        raise ArgumentError(
            argument,
            size,
            f"a multiple of {world_size}, the size of process_group",
            f"pad {argument} to the next multiple",
        )
    return size // world_size
