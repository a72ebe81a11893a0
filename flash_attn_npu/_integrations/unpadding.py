"""Unpadding for transformers, with one device-to-host copy per attention mask.

transformers derives the same indices and lengths from the same mask, or from the same position
ids of packed sequences, in every layer, each time with copies to the host. Here each of these
tensors is read once, and all layers get the same tensor objects. On the host, where nothing has to
be copied, they are read in every layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

from .. import bert_padding
from .._core.ground.lengths import remember_lengths
from .._core.ground.memory import PerTensorMemo, held
from .replacing import defines

__all__ = [
    "counted",
    "keys_and_all_queries",
    "memoised_upad_input",
    "once_per_tensor",
    "short_upad_input",
]

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
        self._full: tuple[int, torch.Tensor] | None = None

    @property
    def nbytes(self) -> int:
        return held((self._kept, self.keys, self._queries, self._full))

    def every(self, length: int) -> torch.Tensor:
        """cu_seqlens of `length` queries in each row, padded or not."""
        known = self._full
        if known is None or known[0] != length:
            with torch.inference_mode(False):
                lengths = _every(len(self._kept), length, torch.device("cpu"))
                cu_seqlens = lengths.to(self._device)
                remember_lengths(cu_seqlens, tuple(lengths.tolist()))
            self._full = known = (length, cu_seqlens)
        return known[1]

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


def short_upad_input(module: ModuleType, original: Callable[..., Any]) -> Callable[..., Any]:
    """`_upad_input`, short while each function that transformers' own would ask is nobody else's.

    Packing recipes replace `_get_unpad_data`.
    """
    short = memoised_upad_input(original)

    @functools.wraps(original)
    def _upad_input(
        query_layer: torch.Tensor,
        key_layer: torch.Tensor,
        value_layer: torch.Tensor,
        attention_mask: torch.Tensor,
        query_length: int,
        unpad_input_func: Callable[..., Any],
    ) -> Any:
        untouched = _untouched(module) and (
            defines(module, unpad_input_func) or defines(bert_padding, unpad_input_func)
        )
        upad = short if untouched else original
        return upad(
            query_layer, key_layer, value_layer, attention_mask, query_length, unpad_input_func
        )

    return _upad_input


def keys_and_all_queries(
    module: ModuleType,
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    mask: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Keys and values without padding, and the lengths to call with while queries stay as they are.

    Args:
        module: of transformers; who has replaced its `_get_unpad_data` is asked.
        states: query, key and value, (batch, seqlen, nheads, headdim).
        mask: (batch, seqlen_k), which keys are none.
    """
    query, key, value = states
    batch, queries = query.shape[:2]
    if _untouched(module) and not torch.compiler.is_compiling():
        reading = _memo.get(mask, _MaskReading)
        keys, cu_seqlens_q = reading.keys, reading.every(queries)
    else:
        keys = _Ragged(*vars(module)["_get_unpad_data"](mask))
        cu_seqlens_q = _every(batch, queries, mask.device)
    width = mask.shape[1]
    key, value = (
        vars(module)["_index_first_axis"](state[:, :width], keys.indices) for state in (key, value)
    )
    lengths = {
        "cu_seq_lens_q": cu_seqlens_q,
        "cu_seq_lens_k": keys.cu_seqlens,
        "max_length_q": queries,
        "max_length_k": keys.longest,
    }
    return key[None], value[None], lengths


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
    def ask(position_ids: torch.Tensor | None, *rest: Any, **named: Any) -> Any:
        if position_ids is None or torch.compiler.is_compiling() or position_ids.is_inference():
            return original(position_ids, *rest, **named)
        if any(isinstance(other, torch.Tensor) for other in (*rest, *named.values())):
            # it may be written while position_ids stays as it is
            return original(position_ids, *rest, **named)
        answers = _answers.get(position_ids, lambda _: {})
        question = (original, rest, *named.items())
        if question not in answers:
            # inference tensors have no version counter, so nothing could be remembered about them
            with torch.inference_mode(False):
                answer = original(position_ids, *rest, **named)
                answers[question] = bool(answer) if isinstance(answer, torch.Tensor) else answer
        return answers[question]

    return ask


def counted(original: Callable[..., Any]) -> Callable[..., Any]:
    """`original`, whose answers are tensors with a version counter, in inference mode too.

    For what transformers makes once in a forward and reads in every layer. Without a counter
    nothing may be remembered of a tensor, as it could be written meanwhile unseen.
    """

    @functools.wraps(original)
    def once(*args: Any, **kwargs: Any) -> Any:
        answer = original(*args, **kwargs)
        if torch.compiler.is_compiling():
            return answer
        return type(answer)(map(_counted, answer)) if type(answer) is tuple else _counted(answer)

    return once


def _counted(answer: Any) -> Any:
    if isinstance(answer, torch.Tensor) and answer.is_inference():
        with torch.inference_mode(False):
            return answer.clone()
    return answer


def _untouched(module: ModuleType) -> bool:
    asked = (vars(module).get("_get_unpad_data"), vars(module).get("_index_first_axis"))
    return all(defines(module, function) for function in asked)


def _every(rows: int, length: int, device: torch.device) -> torch.Tensor:
    return torch.arange(rows + 1, dtype=torch.int32, device=device) * length


def _index_first_axis(tensor: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, *tensor.shape[2:])[indices]
