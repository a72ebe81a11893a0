"""Padding where the mask belongs to the keys: every query is kept.

transformers cuts the queries by the mask too. For attention over a padded source that is another
sequence's mask: queries that stand where the source has padding get zeros, and others' rows.
What is not causal and has no window needs no cut: which keys a query sees does not depend on
where it stands. Then the queries stay as they are, and only the keys are unpadded.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from types import ModuleType
from typing import Any

import torch

from ..errors import UnsupportedError
from .replacing import defines, is_ours
from .unpadding import keys_and_all_queries

__all__ = ["forward_with_all_queries"]


def forward_with_all_queries(
    module: ModuleType, unserved: Collection[str], original: Callable[..., Any]
) -> Callable[..., Any]:
    """`_flash_attention_forward` of `module`, which keeps every query where it may.

    Args:
        module: where transformers looks up the functions that others replace.
        unserved: arguments that this version would not pass on; a model that uses one is refused.
        original: transformers' own, which does the rest.
    """
    named = [*inspect.signature(original).parameters][6:]

    @functools.wraps(original)
    def _flash_attention_forward(
        query_states: torch.Tensor,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        query_length: int,
        is_causal: bool,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        states = (query_states, key_states, value_states)
        options = dict(zip(named, args, strict=False), **kwargs)
        for name in unserved:
            if options.get(name) is not None:
                raise _unserved(name)
        if (
            attention_mask is None
            or is_causal
            or not _needs_no_cut(module, states, attention_mask, options)
        ):
            return original(*states, attention_mask, query_length, is_causal, **options)
        key, value, ragged = keys_and_all_queries(module, states, attention_mask)
        options.update(ragged, position_ids=None, sliding_window=None)
        return original(query_states, key, value, None, query_length, is_causal, **options)

    return _flash_attention_forward


def _needs_no_cut(
    module: ModuleType,
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    mask: torch.Tensor,
    options: dict[str, Any],
) -> bool:
    keys, window = states[1].shape[1], options.get("sliding_window")
    upad = vars(module).get("_upad_input")
    return (
        mask.dim() == 2
        and mask.shape[1] <= keys
        and (window is None or keys <= window)
        and options.get("block_table") is None
        # whoever has replaced it is asked
        and (defines(module, upad) or is_ours(upad))
    )


def _unserved(name: str) -> UnsupportedError:
    return UnsupportedError(
        name,
        "a value, from the model",
        "None: this version of transformers would not pass it on to flash attention",
        'attn_implementation="eager", or transformers 4.57.6 or 5.20 to 5.24',
    )
