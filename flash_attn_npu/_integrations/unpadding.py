"""Unpadding for transformers, with one device-to-host copy per attention mask.

transformers derives the same indices and lengths from the same mask, or from the same position
ids of packed sequences, in every layer, each time with copies to the host. Here each of these
tensors is read once, and all layers get the same tensor objects. On the host, where nothing has to
be copied, they are read in every layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

from .._core.ground.lengths import remember_lengths
from .._core.ground.memory import PerTensorMemo, held

__all__ = ["memoised_upad_input", "once_per_tensor"]

MASKS_REMEMBERED = 16
BYTES_REMEMBERED = 1 << 28
"""64 masks of 32k tokens need 35 MB."""


class _Ragged(NamedTuple):
    """Which tokens of a padded batch are kept, and how long each sequence then is."""

    indices: torch.Tensor
    cu_seqlens: torch.Tensor
    longest: int


class _MaskReading:
    """What one (batch, seqlen) mask says, for whichever part of it serves as queries."""

    def __init__(self, mask: torch.Tensor) -> None:
        self._device = mask.device
        self._kept = mask.detach().cpu()
        self.keys = self._ragged(self._kept)
        self._queries: tuple[int, _Ragged] | None = None

    @property
    def nbytes(self) -> int:
        return held((self._kept, self.keys, self._queries))

    def last(self, length: int) -> _Ragged:
        """Of the last `length` columns, as transformers does for left-padded queries."""
        known = self._queries
        if known is None or known[0] != length:
            self._queries = known = (length, self._ragged(self._kept[:, -length:]))
        return known[1]

    def one_each(self) -> _Ragged:
        """One query per row, padded or not: a decoding step."""
        known = self._queries
        if known is None or known[0] != 1:
            ones = torch.ones(len(self._kept), 1, dtype=torch.bool, device="cpu")
            rows = self._ragged(ones)
            # transformers indexes with the int32 cu_seqlens here
            self._queries = known = (1, rows._replace(indices=rows.cu_seqlens[:-1]))
        return known[1]

    def _ragged(self, kept: torch.Tensor) -> _Ragged:
        # inference tensors have no version counter, so nothing could be remembered about them
        with torch.inference_mode(False):
            seqlens = kept.sum(dim=-1, dtype=torch.int32)
            indices = torch.nonzero(kept.flatten()).flatten()
            cumulative = F.pad(torch.cumsum(seqlens, dim=0, dtype=torch.int32), (1, 0))
            cu_seqlens = cumulative.to(self._device)
            remember_lengths(cu_seqlens, tuple(cumulative.tolist()))
            return _Ragged(indices.to(self._device), cu_seqlens, int(seqlens.max()))


_memo: PerTensorMemo[_MaskReading] = PerTensorMemo(
    "attention masks of transformers", MASKS_REMEMBERED, nbytes=BYTES_REMEMBERED
)
_answers: PerTensorMemo[dict[Any, Any]] = PerTensorMemo(
    "position ids of transformers", MASKS_REMEMBERED, nbytes=BYTES_REMEMBERED
)


def memoised_upad_input(original: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' `_upad_input`, same contract and results, reading a device's mask once.

    Args:
        original: transformers' own, which serves while torch.compile traces.
    """

    def _upad_input(
        query_layer: torch.Tensor,
        key_layer: torch.Tensor,
        value_layer: torch.Tensor,
        attention_mask: torch.Tensor,
        query_length: int,
        unpad_input_func: Callable[..., Any],
    ) -> Any:
        if torch.compiler.is_compiling():
            return original(
                query_layer, key_layer, value_layer, attention_mask, query_length, unpad_input_func
            )
        mask = _memo.get(attention_mask, _MaskReading)
        width = attention_mask.shape[-1]
        if key_layer.shape[1] > width:
            # a static cache is longer than what it holds so far
            key_layer, value_layer = key_layer[:, :width], value_layer[:, :width]
        if query_length == key_layer.shape[1]:
            queries = mask.keys
        elif query_length == 1:
            queries = mask.one_each()
        else:
            queries = mask.last(query_length)
        keys = mask.keys
        return (
            query_layer.squeeze(1)
            if query_length == 1 and queries is not keys
            else _index_first_axis(query_layer, queries.indices),
            _index_first_axis(key_layer, keys.indices),
            _index_first_axis(value_layer, keys.indices),
            queries.indices,
            (queries.cu_seqlens, keys.cu_seqlens),
            (queries.longest, keys.longest),
        )

    return _upad_input


def once_per_tensor(original: Callable[..., Any]) -> Callable[..., Any]:
    """`original(position_ids, *rest)`, asked once for each tensor on a device.

    A yes or no comes as a bool.
    """

    @functools.wraps(original)
    def ask(position_ids: torch.Tensor | None, *rest: Any) -> Any:
        if position_ids is None or torch.compiler.is_compiling() or position_ids.is_inference():
            return original(position_ids, *rest)
        if any(isinstance(other, torch.Tensor) for other in rest):
            # it may be written while position_ids stays as it is
            return original(position_ids, *rest)
        answers = _answers.get(position_ids, lambda _: {})
        question = (original, rest)
        if question not in answers:
            # inference tensors have no version counter, so nothing could be remembered about them
            with torch.inference_mode(False):
                answer = original(position_ids, *rest)
                answers[question] = bool(answer) if isinstance(answer, torch.Tensor) else answer
        return answers[question]

    return ask


def _index_first_axis(tensor: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, *tensor.shape[2:])[indices]
