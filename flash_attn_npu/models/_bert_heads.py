"""What stands on the encoder of BERT: the pooler, and the heads of pretraining."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..ops.fused_dense import FusedDense
from ..ops.triton.layer_norm import layer_norm_fn
from ._bert_config import gelu_kind

__all__ = [
    "BertLMPredictionHead",
    "BertPooler",
    "BertPreTrainingHeads",
    "BertPredictionHeadTransform",
    "normed",
]


class BertPooler(nn.Module):
    """tanh of a linear layer, of the first token.

    Contract: flash-attention 2.8, `BertPooler`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dense = _linear(config)(config.hidden_size, config.hidden_size)
        self.activation = nn.Tanh()

    def forward(self, hidden_states: Tensor, pool: bool = True) -> Tensor:
        """(batch, seqlen, hidden_size), or (batch, hidden_size) without pool, to the latter."""
        first = hidden_states[:, 0] if pool else hidden_states
        pooled: Tensor = self.activation(self.dense(first))
        return pooled


class BertPredictionHeadTransform(nn.Module):
    """A linear layer, GELU and layer norm.

    Raises:
        ArgumentError: config.hidden_act is no GELU.

    Contract: flash-attention 2.8, `BertPredictionHeadTransform`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.fused_dropout_add_ln = getattr(config, "fused_dropout_add_ln", False)
        self.dense = _linear(config)(config.hidden_size, config.hidden_size)
        self.activation = nn.GELU(approximate=gelu_kind(config))
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., hidden_size) to the same."""
        hidden = self.activation(self.dense(hidden_states))
        return normed(self.layer_norm, hidden, self.fused_dropout_add_ln)


class BertLMPredictionHead(nn.Module):
    """Logits of the words; `BertForPreTraining` ties the decoder to the word embeddings.

    Contract: flash-attention 2.8, `BertLMPredictionHead`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = _linear(config)(config.hidden_size, config.vocab_size, bias=True)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., hidden_size) to (..., vocab_size)."""
        logits: Tensor = self.decoder(self.transform(hidden_states))
        return logits


class BertPreTrainingHeads(nn.Module):
    """Logits of the words, and of whether the second sentence follows the first.

    Contract: flash-attention 2.8, `BertPreTrainingHeads`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.predictions = BertLMPredictionHead(config)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)

    def forward(self, sequence_output: Tensor, pooled_output: Tensor) -> tuple[Tensor, Tensor]:
        """(..., hidden_size) and (batch, hidden_size) to (..., vocab_size) and (batch, 2)."""
        return self.predictions(sequence_output), self.seq_relationship(pooled_output)


def _linear(config: Any) -> type[nn.Linear]:
    return FusedDense if getattr(config, "fused_bias_fc", False) else nn.Linear


def normed(norm: nn.LayerNorm, x: Tensor, fused: bool) -> Tensor:
    """The norm of x, by `layer_norm_fn` if fused."""
    out: Tensor = layer_norm_fn(x, norm.weight, norm.bias, eps=norm.eps) if fused else norm(x)
    return out
