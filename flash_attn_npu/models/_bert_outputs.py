"""What `models.bert` returns: classes of transformers, or where it is missing named tuples.

Both have the same attributes. By index, those of transformers leave out what is None.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

__all__ = ["BertForPreTrainingOutput", "BertModelOutput"]


class _ModelOutput(NamedTuple):
    last_hidden_state: Tensor
    pooler_output: Tensor | None


class _PreTrainingOutput(NamedTuple):
    loss: Tensor | None
    prediction_logits: Tensor
    seq_relationship_logits: Tensor


if TYPE_CHECKING:
    BertModelOutput = _ModelOutput
    BertForPreTrainingOutput = _PreTrainingOutput
else:
    try:
        from transformers.modeling_outputs import (
            BaseModelOutputWithPoolingAndCrossAttentions as BertModelOutput,
        )
        from transformers.models.bert.modeling_bert import BertForPreTrainingOutput
    except ImportError:
        BertModelOutput, BertForPreTrainingOutput = _ModelOutput, _PreTrainingOutput
