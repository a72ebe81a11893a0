"""One call of npu_fused_infer_attention_score in either version, unpacked: what its arguments mean,
and per-sequence views of its tensors and of the pages of its cache. No rules and no arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..machine.memory import host_view

_LARGEST_FLASH_HEAD = 256
_LARGEST_FLASH_PAGE = 512


@dataclass(frozen=True)
class InferCall:
    """The arguments by their meaning; tensors are host views of the device's memory."""

    version: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    heads: int
    given_kv_heads: int
    layout: str
    mask: torch.Tensor | None
    scale: float
    pre: int
    next: int
    mode: int
    inner_precise: int
    q_lengths: tuple[int, ...] | None
    kv_lengths: tuple[int, ...] | None
    block_table: torch.Tensor | None
    block_size: int
    sink: torch.Tensor | None
    not_simulated: tuple[str, ...]

    @property
    def is_tnd(self) -> bool:
        return self.layout == "TND"

    @property
    def is_paged(self) -> bool:
        return self.block_table is not None

    @property
    def is_dense_decode(self) -> bool:
        """One row for each sequence of a dense layout: the incremental kernel's case."""
        return not self.is_tnd and self.query.shape[self.layout.index("S")] == 1

    @property
    def kv_heads(self) -> int:
        return self.given_kv_heads or self.heads

    @property
    def batch(self) -> int:
        if self.is_tnd:
            return len(self.q_lengths or ())
        return self.query.shape[self.layout.index("B")]

    @property
    def head_dims(self) -> tuple[int, int, int]:
        """(Dq, Dk, Dv)."""
        width = self.query.shape[-1]
        flat = self.key.dim() == 3 and not (self.is_tnd and not self.is_paged)
        groups = self.kv_heads if flat else 1
        return (
            width // self.heads if self.layout == "BSH" else width,
            self.key.shape[-1] // groups,
            self.value.shape[-1] // groups,
        )

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """(Sq, Skv) of every sequence, without what pads them."""
        if not self.is_tnd:
            return list(zip(self._dense_rows(), self._dense_columns(), strict=True))
        columns = self.kv_lengths if self.is_paged else steps(self.kv_lengths)
        return list(zip(steps(self.q_lengths), columns, strict=True))

    def _dense_rows(self) -> list[int]:
        size = self.query.shape[self.layout.index("S")]
        # The incremental kernel does not look at the lengths of its queries
        return _spread(None if self.is_dense_decode else self.q_lengths, self.batch, size)

    def _dense_columns(self) -> list[int]:
        size = 0 if self.is_paged else self.key.shape[self.layout.index("S")]
        return _spread(self.kv_lengths, self.batch, size)

    @property
    def takes_flash_path(self) -> bool:
        """Whether the router of packed layouts picks the kernel whose mode 3 is its own."""
        query, key, value = self.head_dims
        equal = query == key == value <= _LARGEST_FLASH_HEAD
        grouped = self.kv_heads != self.heads
        pages = not self.is_paged or (
            self.key.dim() == 3
            and self.block_size % 16 == 0
            and self.block_size <= _LARGEST_FLASH_PAGE
        )
        return (
            self.is_tnd
            and self.mode in (0, 3, 4)
            and equal
            and (self.inner_precise == 0 or not grouped)
            and pages
        )

    def split_q(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Views [N, S, D] of a tensor laid out like the query, padding included."""
        if self.is_tnd:
            return [piece.transpose(0, 1) for piece in tensor.split(steps(self.q_lengths))]
        return list(_to_bnsd(tensor, self.layout, self.heads))

    def split_lse(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Views [N, S, 1] of softmax_lse."""
        if self.is_tnd:
            return [piece.transpose(0, 1) for piece in tensor.split(steps(self.q_lengths))]
        return list(tensor)

    def sequence(self, tensor: torch.Tensor, index: int) -> torch.Tensor:
        """The [Nkv, Skv, D] of a sequence in key or value, and nothing beyond its length."""
        columns = self.lengths[index][1]
        if self.is_paged:
            return self._from_pages(tensor, index, columns)
        if self.is_tnd:
            end = self.kv_lengths[index]
            return tensor[end - columns : end].transpose(0, 1)
        return _to_bnsd(tensor, self.layout, self.kv_heads)[index, :, :columns]

    def pages(self, index: int) -> torch.Tensor:
        """The entries of the block table that the length of a sequence reaches."""
        count = -(-self.lengths[index][1] // self.block_size)
        return self.block_table[index, :count].long()

    def _from_pages(self, cache: torch.Tensor, index: int, columns: int) -> torch.Tensor:
        if cache.dim() == 3:
            cache = cache.unflatten(2, (self.kv_heads, -1)).transpose(1, 2)
        pages = cache[self.pages(index)]
        return pages.transpose(0, 1).flatten(1, 2)[:, :columns]


def steps(cumulative: Sequence[int]) -> list[int]:
    return [end - start for start, end in zip((0, *cumulative[:-1]), cumulative, strict=True)]


def _spread(lengths: Sequence[int] | None, batch: int, size: int) -> list[int]:
    """A list of one length is every sequence's, and a longer one than the batch is cut."""
    if lengths is None:
        return [size] * batch
    return [lengths[0]] * batch if len(lengths) == 1 else list(lengths[:batch])


def _to_bnsd(tensor: torch.Tensor, layout: str, heads: int) -> torch.Tensor:
    if layout == "BSH":
        return tensor.unflatten(2, (heads, -1)).transpose(1, 2)
    return tensor.transpose(1, 2) if layout == "BSND" else tensor


_SIMULATED = {"query", "key", "value", "atten_mask", "block_table", "learnable_sink"}
_NAMES = {
    1: ("num_heads", "scale", "actual_seq_lengths", "actual_seq_lengths_kv"),
    2: ("num_query_heads", "softmax_scale", "actual_seq_qlen", "actual_seq_kvlen"),
}


def unpack(version: int, given: dict[str, Any]) -> InferCall:
    """The call meant by the arguments of the given version."""
    heads, scale, rows, columns = _NAMES[version]
    others = {
        name
        for name, value in given.items()
        if name not in _SIMULATED and isinstance(value, torch.Tensor)
    }
    return InferCall(
        version=version,
        query=host_view(given["query"]),
        key=host_view(given["key"]),
        value=host_view(given["value"]),
        heads=given[heads],
        given_kv_heads=given["num_key_value_heads"],
        layout=given["input_layout"],
        mask=_host(given["atten_mask"]),
        scale=given[scale],
        pre=given["pre_tokens"],
        next=given["next_tokens"],
        mode=given["sparse_mode"],
        inner_precise=given["inner_precise"],
        q_lengths=_lengths(given[rows]),
        kv_lengths=_lengths(given[columns]),
        block_table=_host(given["block_table"]),
        block_size=given["block_size"],
        # the first version has none
        sink=_host(given.get("learnable_sink")),
        not_simulated=tuple(sorted(others)),
    )


def _host(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else host_view(tensor)


def _lengths(values: Any) -> tuple[int, ...] | None:
    return None if values is None else tuple(int(value) for value in values)
